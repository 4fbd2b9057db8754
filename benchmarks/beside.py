"""Seconds per training iteration when the machine is quiet, and beside others.

    python benchmarks/beside.py

An iteration of EfficientAD-S, the teacher's output kept, on as many threads as there are
processors: alone, beside one process that is busy in one thread, and beside a second training.
With threads that wait passively, as `import effad_core` has them (acceleration/threads.py), and
with OpenMP's default, which is to spin for a while. Each arithmetic in a process of its own, by
turns.
"""

import multiprocessing
import os
import statistics
from contextlib import ExitStack, contextmanager

from effad_core.acceleration.precision import CANDIDATES, measure
from effad_core.evaluation.timing import machine

import turns
from training_iteration import core_iteration

ROUNDS = 5
POLICIES = {  # name: environment; 300,000 turns of a loop are what OpenMP (GNU) waits by default
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "default": {"GOMP_SPINCOUNT": "300000"},
}
NEIGHBOURS = ("nobody", "a busy process", "a second training")


def spin() -> None:
    while True:
        pass


def train_for_ever(precision: str) -> None:
    step = core_iteration("small", precision, True)
    while True:
        step()


@contextmanager
def neighbour(name: str, precision: str):
    """Somebody else, for the length of the block, at work when the block begins."""
    if name == "nobody":
        yield
        return
    context = multiprocessing.get_context("spawn")
    target, args = (spin, ()) if name == "a busy process" else (train_for_ever, (precision,))
    child = context.Process(target=target, args=args, daemon=True)
    child.start()
    try:
        yield
    finally:
        child.kill()
        child.join()


def main() -> None:
    print(machine(turns.CPU), flush=True)
    measured = measure(turns.CPU, "training")
    auto = measured.fastest()
    print(f'"auto" took {measured.sentence(auto)}')
    precisions = [name for name in CANDIDATES["training"] if name in measured.seconds]
    print(f"{'seconds, median (x alone)':34}" + "".join(f"{name:>24}" for name in NEIGHBOURS))
    for policy, environment in POLICIES.items():
        os.environ.pop("OMP_WAIT_POLICY", None)  # which this process has from effad_core
        os.environ |= environment  # processes that start from now on inherit it
        ways = {name: turns.Way(core_iteration, ("small", name, True)) for name in precisions}
        taken = {name: [] for name in precisions}
        with ExitStack() as stack:
            asked = {n: stack.enter_context(turns.process(way)) for n, way in ways.items()}
            for once in asked.values():
                once(), once()
            for beside in NEIGHBOURS:
                with neighbour(beside, auto):
                    for once in asked.values():  # meanwhile the neighbour gets to work
                        once(), once()
                    rows = [[once() for once in asked.values()] for _ in range(ROUNDS)]
                for name, times in zip(asked, zip(*rows, strict=True), strict=True):
                    taken[name].append(statistics.median(times))
        for name, (alone, *rest) in taken.items():
            cells = [f"{alone:.2f}", *(f"{time:.2f} ({time / alone:.2f})" for time in rest)]
            print(f"{policy + ', ' + name:34}" + "".join(f"{c:>24}" for c in cells), flush=True)


if __name__ == "__main__":
    main()
