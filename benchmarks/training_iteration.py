"""Seconds per training step: effad_core against a plain implementation of Algorithm 1.

    python benchmarks/training_iteration.py [--size small medium]

The plain one follows the pseudocode word by word: float32, default memory layout, one pass of the
student per image, all 768 channels each time, and `torch.quantile`. "Kept" has the teacher's output
on the training image from memory, as the schedules for a CPU do. The second table is of the steps
that train the autoencoder alone; "torch's own" has torch's dropout and a loss written out.
anomalib's EfficientAd takes part where it is installed (see inference.py). All take turns on the
same random images, each in a process of its own, so the ratios hold even where the machine's speed
drifts. The limit is what direct convolutions in the same format can reach: the FLOPs of the step,
counted, over the rate at which the largest layer of the PDN runs here, measured beside them.
"""

from collections.abc import Callable

from effad_core import EfficientAD
from effad_core.acceleration.memory import keep_freed_memory
from effad_core.acceleration.precision import CANDIDATES, measure
from effad_core.datasets import normalise
from effad_core.schedule import Schedule
from effad_core.training import autoencoder_loss, loss_terms

import torch
import turns
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

BATCH = 4  # images of a step of the autoencoder alone


def images(count: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(256, (count, 3, 256, 256), dtype=torch.uint8)


def detector_and_optimizer(size: str, **settings) -> tuple[EfficientAD, torch.optim.Optimizer]:
    torch.manual_seed(0)
    detector = EfficientAD(size).train()
    weights = [*detector.student.parameters(), *detector.autoencoder.parameters()]
    return detector, torch.optim.Adam(weights, lr=1e-4, weight_decay=1e-5, **settings)


def step_of(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def plain_iteration(size: str) -> Callable[[], None]:
    """Algorithm 1, lines 14-42, as written."""
    detector, optimizer = detector_and_optimizer(size)
    teacher, student, autoencoder = detector.teacher, detector.student, detector.autoencoder
    three = images()

    def loss() -> Tensor:
        image, augmented, pretraining = normalise(three).split(1)
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
        return loss_st + ((y_hat - y_ae) ** 2).mean() + ((y_ae - y_stae) ** 2).mean()

    return step_of(optimizer, loss)


def core_iteration(size: str, precision: str, kept: bool) -> Callable[[], None]:
    """The same through `effad_core.training`."""
    keep_freed_memory()  # as `train` does
    detector, optimizer = detector_and_optimizer(size, fused=True)
    detector.to(memory_format=torch.channels_last)
    schedule, three = Schedule(precision=precision), images()
    known = torch.randn(1, 384, 56, 56) if kept else None
    if kept:
        known = known.contiguous(memory_format=torch.channels_last)
    return step_of(optimizer, lambda: sum(loss_terms(detector, schedule, *three, known).values()))


def anomalib_iteration(size: str) -> Callable[[], None]:
    """The same with anomalib's networks and losses."""
    model = turns.anomalib_model(size)
    weights = [*model.student.parameters(), *model.ae.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-4, weight_decay=1e-5)
    image, _, pretraining = (images() / 255).split(1)  # it augments the image itself
    return step_of(optimizer, lambda: sum(model(image, pretraining)))


def torch_autoencoder(size: str, precision: str, known: bool) -> Callable[[], None]:
    """A step of the autoencoder alone with torch's own dropout and loss.

    Args:
        size, precision: as everywhere here.
        known: whether the teacher's output is there already. `train` has it from its statistics.
    """
    keep_freed_memory()
    detector, optimizer = detector_and_optimizer(size)
    detector.to(memory_format=torch.channels_last)
    kept = [torch.randn(1, 384, 56, 56).half() for _ in range(BATCH)]
    kept = [one.contiguous(memory_format=torch.channels_last) for one in kept]
    batch = images(BATCH)

    def loss() -> Tensor:
        inputs = normalise(batch).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            if known:
                teacher = torch.cat([one.float() for one in kept])
            else:
                with torch.no_grad():
                    teacher = torch.cat(
                        [detector.normalised_teacher(one) for one in inputs[:, None]]
                    )
            output = detector.autoencoder(inputs)
        return (output.float() - teacher).square().mean()

    return step_of(optimizer, loss)


def core_autoencoder(size: str, precision: str) -> Callable[[], None]:
    """The same through `effad_core.training`."""
    keep_freed_memory()
    detector, optimizer = detector_and_optimizer(size, fused=True)
    detector.to(memory_format=torch.channels_last)
    kept = [torch.randn(1, 384, 56, 56).half() for _ in range(BATCH)]
    kept = [one.contiguous(memory_format=torch.channels_last) for one in kept]
    batch = images(BATCH)
    return step_of(optimizer, lambda: autoencoder_loss(detector, precision, batch, torch.cat(kept)))


def flops(step: Callable[[], None]) -> int:
    """Counted; Winograd's multiplications are fewer than those of what they stand for."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def number_format(precision: str) -> str:
    return "bfloat16" if precision == "bfloat16" else "float32"


def main() -> None:
    args = turns.arguments(__doc__)
    for size in args.size:
        measured = measure(turns.CPU, "training", size)
        auto = measured.fastest()
        possible = [name for name in CANDIDATES["training"] if name in measured.seconds]
        whole = flops(plain_iteration(size))
        counted = {kept: flops(core_iteration(size, "float32", kept)) for kept in (False, True)}
        ways = {"plain, float32": turns.Way(plain_iteration, (size,), whole)}
        for precision in possible:
            for kept in (False, True):
                name = f"effad_core, {precision}{', kept' if kept else ''}"
                ways[name] = turns.Way(
                    core_iteration, (size, precision, kept), counted[kept], number_format(precision)
                )
        if turns.anomalib_model(size) is not None:
            ways["anomalib, float32"] = turns.Way(
                anomalib_iteration, (size,), flops(anomalib_iteration(size))
            )
        taken = turns.compare("One iteration of Algorithm 1", size, ways, args.rounds)
        kept = {p: taken[f"effad_core, {p}, kept"] for p in possible}
        turns.print_choice(measured.sentence(auto), kept[auto], kept)
    ways = {}
    for name, build, arguments in (
        ("torch's own, the teacher's output computed", torch_autoencoder, (False,)),
        ("torch's own", torch_autoencoder, (True,)),
        ("effad_core", core_autoencoder, ()),
    ):
        counted = flops(build("small", "float32", *arguments))
        ways[f"{name}, {auto}"] = turns.Way(
            build, ("small", auto, *arguments), counted, number_format(auto)
        )
    turns.compare(f"A step of the autoencoder, {BATCH} images", "small", ways, args.rounds)


if __name__ == "__main__":
    main()
