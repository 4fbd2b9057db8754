"""Seconds per training iteration: effad_core against a plain implementation of Algorithm 1.

    python benchmarks/training_iteration.py

The plain one follows the pseudocode word by word: float32, default memory layout, one pass of the
student per image, all 768 channels each time, and `torch.quantile`. "Kept" has the teacher's output
on the training image from memory, as the schedules for a CPU do. All take turns in one process on
the same random images, so the ratios hold even where the machine's speed drifts.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from effad_core import EfficientAD
from effad_core.datasets import normalise
from effad_core.precision import resolve_precision
from effad_core.training import Schedule, loss_terms


def plain_iteration(detector: EfficientAD, optimizer: torch.optim.Optimizer) -> Callable:
    """Algorithm 1, lines 14-42, as written."""
    teacher, student, autoencoder = detector.teacher, detector.student, detector.autoencoder

    def step(images: Tensor) -> None:
        image, augmented, pretraining = normalise(images).split(1)
        with torch.no_grad():
            y_hat = (teacher(image) - detector.mu) / detector.sigma
        y_st = student(image)[:, :384]
        d_st = (y_hat - y_st) ** 2
        d_hard = torch.quantile(d_st.flatten(), 0.999)
        loss_st = d_st[d_st >= d_hard].mean() + (student(pretraining)[:, :384] ** 2).mean()
        y_ae = autoencoder(augmented)
        with torch.no_grad():
            y_hat = (teacher(augmented) - detector.mu) / detector.sigma
        y_stae = student(augmented)[:, 384:]
        loss = loss_st + ((y_hat - y_ae) ** 2).mean() + ((y_ae - y_stae) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def core_iteration(
    detector: EfficientAD, optimizer: torch.optim.Optimizer, precision: str, kept: bool = False
) -> Callable:
    """The same through `effad_core.training`."""
    detector.to(memory_format=torch.channels_last)
    schedule = Schedule(precision=precision)
    known = torch.randn(1, 384, 56, 56) if kept else None

    def step(images: Tensor) -> None:
        loss = sum(loss_terms(detector, schedule, *images, known).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("small", "medium"), default="small")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()

    def prepared(build: Callable, *extra: str | bool) -> Callable:
        torch.manual_seed(0)
        detector = EfficientAD(args.size).train()
        weights = [*detector.student.parameters(), *detector.autoencoder.parameters()]
        return build(detector, torch.optim.Adam(weights, lr=1e-4, weight_decay=1e-5), *extra)

    fastest = resolve_precision("auto", torch.device("cpu"))
    variants = {"plain, float32": prepared(plain_iteration)}
    for precision in dict.fromkeys(("float32", fastest)):
        variants[f"effad_core, {precision}"] = prepared(core_iteration, precision)
        variants[f"effad_core, {precision}, kept"] = prepared(core_iteration, precision, True)
    images = torch.randint(256, (3, 3, 256, 256), dtype=torch.uint8)
    seconds = {name: [] for name in variants}
    for round_number in range(args.rounds + 2):
        for name, step in variants.items():
            start = time.perf_counter()
            step(images)
            if round_number >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - start)
    print(f"EfficientAD ({args.size}), {torch.get_num_threads()} threads, {args.rounds} rounds")
    plain = seconds["plain, float32"]
    for name, times in seconds.items():
        ratio = statistics.median(p / t for p, t in zip(plain, times, strict=True))
        print(f"{name:36} {statistics.median(times):7.3f} s per iteration   {ratio:5.2f} x plain")


if __name__ == "__main__":
    main()
