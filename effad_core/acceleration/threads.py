"""How many threads compute and how they wait for each other; decided before torch is loaded.

OpenMP, which runs torch's threads on a CPU, reads its settings once, when torch is loaded. By
default a thread that is done spins until the others are: it keeps its core busy and does nothing.
Beside another program, for example a second notebook, that core is the one the other thread needs,
and everything takes several times as long. `python benchmarks/beside.py` measures it.
"""

import math
import os
import sys
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them is the user's choice
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
CGROUPS = Path("/sys/fs/cgroup")  # where Linux shows what a container may use
OWN_CGROUP = Path("/proc/self/cgroup")


def settle_threads() -> None:
    """Let idle threads sleep, and start no more of them than this process has processors for.

    What you have set yourself in the environment, in one of the variables `WAITING` or `COUNTS`,
    stays as it is. `import effad_core` calls this; if torch was imported before, only the number of
    threads can still follow.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if any(name in os.environ for name in COUNTS):
        return
    usable = usable_processors()
    if usable < (os.cpu_count() or 1):
        os.environ["OMP_NUM_THREADS"] = str(usable)
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() > usable:
        torch.set_num_threads(usable)


def usable_processors() -> int:
    """How many processors this process may use, which can be fewer than the machine has.

    An affinity mask (`taskset`) or the quota of a container (`docker run --cpus`) limits them.
    """
    processors = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    return max(1, min([processors, *map(math.ceil, _quotas())]))


def _quotas() -> list[float]:
    """What the control groups of this process allow, in processors; none outside of Linux."""
    try:
        own = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    path = next((line[3:] for line in own if line.startswith("0::")), "/").strip("/")
    groups = [CGROUPS / path, *(CGROUPS / path).parents]
    pairs = [_words(group / "cpu.max") for group in groups if group.is_relative_to(CGROUPS)]
    one = CGROUPS / "cpu"  # the first version of control groups, as a container sees its own
    pairs.append([*_words(one / "cpu.cfs_quota_us"), *_words(one / "cpu.cfs_period_us")])
    return [
        int(pair[0]) / int(pair[1])
        for pair in pairs
        if len(pair) == 2 and pair[0].isdecimal() and int(pair[1]) > 0  # not "max", not -1
    ]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
