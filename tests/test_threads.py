"""How threads wait and how many there are, in processes of their own: torch reads it once."""

import os
import subprocess
import sys

from effad_core.acceleration import threads
from effad_core.acceleration.threads import usable_processors

import pytest

SHOW = "import os; print(os.environ.get('OMP_WAIT_POLICY'), torch.get_num_threads())"
CHOICES = (*threads.WAITING, *threads.COUNTS)


def run(code, **environment):
    outer = {name: value for name, value in os.environ.items() if name not in CHOICES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=outer | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


def test_importing_the_package_settles_it_before_torch():
    usable = str(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else None
    policy, count = run(
        f"import effad_core, sys; assert 'torch' not in sys.modules; import torch; {SHOW}"
    )
    assert policy == "PASSIVE"
    assert usable is None or int(count) <= int(usable)


@pytest.mark.parametrize(
    ("environment", "policy"),
    [
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ({"GOMP_SPINCOUNT": "100"}, "None"),
        ({"KMP_BLOCKTIME": "5"}, "None"),
    ],
)
def test_what_the_user_has_chosen_stays(environment, policy):
    assert run(f"import effad_core, torch; {SHOW}", **environment)[0] == policy
    assert run(f"import effad_core, torch; {SHOW}", OMP_NUM_THREADS="1")[1] == "1"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_an_affinity_mask_limits_the_threads():
    one = min(os.sched_getaffinity(0))
    before = f"import os; os.sched_setaffinity(0, {{{one}}});"
    assert run(f"{before} import effad_core, torch; {SHOW}")[1] == "1"


def test_torch_that_was_imported_before_gets_fewer_threads_all_the_same():
    late = "from effad_core.acceleration import threads; threads.usable_processors = lambda: 1; "
    assert run(f"import torch; {late} threads.settle_threads(); {SHOW}")[1] == "1"


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {}, 64),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),  # a part of a processor is a thread's
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "100000 100000\n", "a/cpu.max": "300000 100000\n"}, 1),
        (
            "5:cpu:/x\n",
            {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        ("5:cpu:/x\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        (None, {"cpu.max": "100000 100000\n"}, 64),  # not Linux
    ],
)
def test_a_containers_quota_limits_the_processors(tmp_path, monkeypatch, own, files, expected):
    for name, text in files.items():
        write(tmp_path / "groups", name, text)
    if own is not None:
        write(tmp_path, "own", own)
    monkeypatch.setattr(threads, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(threads, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_processors() == expected
