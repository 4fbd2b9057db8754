"""The examples in the docstrings give what they say."""

import doctest
from importlib import import_module

import pytest

MODULES = (
    *("acceleration.devices", "errors", "losses", "metrics", "statistics", "storage.shipped"),
    "thresholds",
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of(name):
    found = doctest.testmod(import_module(f"effad_core.{name}"))
    assert found.attempted > 0 and found.failed == 0
