"""Seconds per training iteration: effad_core against a plain implementation of Algorithm 1.

    python benchmarks/training_iteration.py [--size small medium]

The plain one follows the pseudocode word by word: float32, default memory layout, one pass of the
student per image, all 768 channels each time, and `torch.quantile`. "Kept" has the teacher's output
on the training image from memory, as the schedules for a CPU do. anomalib's EfficientAd takes part
where it is installed (see inference.py). All take turns in one process on the same random images,
so the ratios hold even where the machine's speed drifts. The limit is what direct convolutions in
the same format can reach: the FLOPs of the iteration, counted, over the rate at which the largest
layer of the PDN runs here, measured beside them.
"""

from collections.abc import Callable
from functools import partial

import torch
import turns
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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


def anomalib_iteration(size: str) -> dict[str, Callable]:
    """The same with anomalib's networks and losses, if it is installed."""
    model = turns.anomalib_model(size)
    if model is None:
        return {}
    weights = [*model.student.parameters(), *model.ae.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-4, weight_decay=1e-5)

    def step(images: Tensor) -> None:
        image, _, pretraining = (images / 255).split(1)  # it augments the image itself
        loss = sum(model(image, pretraining))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return {"anomalib, float32": step}


def flops(step: Callable, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        step(images)
    return counter.get_total_flops()


def ways(size: str, images: Tensor) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """Training steps by name, and the FLOPs of each."""

    def prepared(build: Callable, *extra: str | bool) -> Callable:
        torch.manual_seed(0)
        detector = EfficientAD(size).train()
        weights = [*detector.student.parameters(), *detector.autoencoder.parameters()]
        return build(detector, torch.optim.Adam(weights, lr=1e-4, weight_decay=1e-5), *extra)

    fastest = resolve_precision("auto", torch.device("cpu"))
    steps = {"plain, float32": prepared(plain_iteration)}
    for precision in dict.fromkeys(("float32", fastest)):
        steps[f"effad_core, {precision}"] = prepared(core_iteration, precision)
        steps[f"effad_core, {precision}, kept"] = prepared(core_iteration, precision, True)
    steps |= anomalib_iteration(size)
    counted = {name: flops(step, images) for name, step in steps.items()}
    # Winograd's multiplications are fewer than those of the convolutions that they stand for
    work = {name: counted[name.replace(fastest, "float32")] for name in steps}
    return {name: partial(step, images) for name, step in steps.items()}, work


def main() -> None:
    args = turns.arguments(__doc__)
    images = torch.randint(256, (3, 3, 256, 256), dtype=torch.uint8)
    for size in args.size:
        turns.compare(size, *ways(size, images), args.rounds)


if __name__ == "__main__":
    main()
