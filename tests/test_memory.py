"""Freed memory is used again: counted in page faults, which other load does not change."""

import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, torch
from effad_core.acceleration.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory() and keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):  # the first blocks each find a place of their own
    torch.ones(2**24)  # 64 MiB, written and freed
before = faults()
for _ in range(8):
    torch.ones(2**24)
print(faults() - before)
"""


def page_faults(choice):
    command = [sys.executable, "-c", COUNT_FAULTS, choice]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is on Linux")
def test_a_block_that_was_freed_costs_no_page_faults():
    assert page_faults("kept") * 10 < page_faults("default")
