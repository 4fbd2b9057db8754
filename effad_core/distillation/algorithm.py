"""Algorithm 3: distil a pretrained extractor Psi into a patch description network, the teacher T.

Notebook 02 walks through it. The lines cited here are those of Algorithm 3 in the supplement.

    effad distill FOLDER --run-dir build/distil/small
    torchrun --nproc-per-node 4 -m effad_core distill FOLDER --run-dir build/distil/small
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from effad_core.acceleration.devices import DEVICE_HELP, choose_device
from effad_core.acceleration.memory import keep_freed_memory
from effad_core.acceleration.precision import PRECISIONS
from effad_core.datasets.pretraining import PretrainingImages, open_pretraining
from effad_core.distillation import distributed
from effad_core.distillation.backbones import BACKBONES
from effad_core.distillation.extractors import FeatureExtractor, open_extractor
from effad_core.distillation.muon import KernelMuon
from effad_core.distillation.pairs import Pairs
from effad_core.distillation.schedule import DistillationSchedule
from effad_core.distillation.start import starting_weights
from effad_core.errors import command_errors
from effad_core.networks import PatchDescriptionNetwork
from effad_core.schedule import PROFILES
from effad_core.storage.files import as_path
from effad_core.storage.runs import Run, settled_precision
from effad_core.storage.weights import load_weights, read_tensors, write_tensors

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

TEACHER = "teacher.safetensors"


def distill(
    teacher: PatchDescriptionNetwork,
    extractor: FeatureExtractor,
    images: PretrainingImages,
    schedule: DistillationSchedule,
    *,
    held_out: PretrainingImages | None = None,
    run_dir: str | Path | None = None,
    seed: int = 0,
    log_every: int = 50,
    workers: int = 0,
    start: dict | None = None,
    device: str | torch.device | None = None,
) -> dict[str, float]:
    """Train a teacher to predict the normalised features of Psi (Algorithm 3). In place.

    Under torchrun, every process takes its part of each batch; run_dir must then be a folder that
    all of them see.

    Args:
        teacher: a PDN with as many output channels as the extractor; line 1 is its construction.
        extractor: Psi.
        images: the images I_dist (ImageNet in the paper).
        schedule: see `DistillationSchedule`.
        held_out: images never trained on; their loss is logged every `5 * log_every` iterations.
        run_dir: folder for log.csv, a checkpoint that a second call resumes from, and
            teacher.safetensors; None writes nothing.
        seed: every random choice derives from it and the number of the image.
        log_every: iterations between rows of the log.
        workers: processes that read and cut images (a script that asks for some must guard its
            own start with `if __name__ == "__main__"`); 0: this one. The result is the same.
        start: the card of the teacher, if it was distilled before; the new card then holds it.
        device: where to distil, and where the teacher then is; None takes the GPU where there is
            one.

    Returns:
        The last logged row: iteration, loss, held_out_loss (NaN without held-out images).

    Raises:
        ValueError: if the channels of teacher and extractor differ, or the batch cannot be parted.
        RunError: if run_dir is in use, cannot be written, or holds a run with other settings or of
            other images.
    """
    if teacher.out_channels != extractor.out_channels:
        raise ValueError(
            f"the teacher has {teacher.out_channels} output channels, the extractor "
            f"{extractor.out_channels}; build both with the same out_channels"
        )
    keep_freed_memory()
    device = choose_device(device)
    teacher.to(device)
    precision = settled_precision(schedule.precision, device, run_dir, teacher.size)
    chosen = torch.tensor(PRECISIONS.index(precision), device=device)
    distributed.share(chosen)  # all processes compute as the first
    schedule = replace(schedule, precision=PRECISIONS[chosen])
    network = _copy(teacher, schedule.padding)
    pairs = Pairs(extractor, schedule, device, workers)
    psi = nn.Module()  # mu^Psi and sigma^Psi, which a resumed run takes from its checkpoint
    for name in ("mu", "sigma"):
        psi.register_buffer(name, torch.ones(teacher.out_channels, 1, 1, device=device))
    optimizers = make_optimizers(network, schedule)
    config = {
        "algorithm": 3,
        "size": teacher.size,
        "out_channels": teacher.out_channels,
        "extractor": extractor.name,
        "features": extractor.describe(),
        "images": images.describe(),
        "held_out": None if held_out is None else held_out.describe(),
        "digests": {
            "distillation": images.identity(),
            "held-out": "none" if held_out is None else held_out.identity(),
        },
        "seed": seed,
        "schedule": asdict(schedule),
        "start": start,
    }
    modules = {"teacher": network, "psi": psi}
    with Run(
        run_dir, config, modules, optimizers, schedule.iterations, writes=distributed.is_first()
    ) as run:
        done, row = run.resume()
        distributed.wait()  # until all have read the checkpoint
        if done == 0:  # Algorithm 3, lines 2-12
            if distributed.is_first():
                psi.mu, psi.sigma = pairs.statistics(images, seed)
            distributed.share(psi.mu, psi.sigma)
        parallel = distributed.parallel(network)

        iterations = range(done, schedule.iterations)
        batches = distributed.own_batches(iterations, schedule.batch_size)
        progress = tqdm(
            pairs.images(images, (seed, 1), batches),
            initial=done,
            total=schedule.iterations,
            disable=not distributed.is_first(),
        )
        for iteration, batch in zip(iterations, progress, strict=True):  # Algorithm 3, line 14
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = schedule.learning_rate_at(iteration)
            loss = pairs.loss(parallel, batch, psi.mu, psi.sigma)
            if not torch.isfinite(loss):  # before the step: no checkpoint holds NaN weights
                raise ValueError(
                    f"the loss is {loss.item()} at iteration {iteration + 1}; lower the learning "
                    "rate"
                )
            network.zero_grad()
            loss.backward()
            for optimizer in optimizers.values():
                optimizer.step()  # Algorithm 3, line 29
            run.window.append(distributed.mean(loss.item(), device))
            last = iteration + 1 == schedule.iterations
            if (iteration + 1) % log_every == 0 or last:
                row = {"iteration": iteration + 1, "loss": float(np.mean(run.window))}
                row["held_out_loss"] = float("nan")
                due = last or (iteration + 1) % (5 * log_every) == 0
                if held_out is not None and due and distributed.is_first():
                    row["held_out_loss"] = pairs.held_out_loss(network, held_out, psi.mu, psi.sigma)
                progress.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k != "iteration"})
                run.log(row)
                run.window.clear()
            run.after(iteration + 1)

        teacher.load_state_dict(network.state_dict())  # Algorithm 3, line 31
        if run.writes and not (done == schedule.iterations and _is_saved(run)):
            statistics = pairs.output_statistics(network, images, seed)
            names = ("output_mean", "output_deviation")
            rounded = ([round(value, 6) for value in part.tolist()] for part in statistics)
            save_teacher(
                run.folder / TEACHER, teacher, config | row | dict(zip(names, rounded, strict=True))
            )
        return row


def held_out_loss(
    teacher: PatchDescriptionNetwork,
    extractor: FeatureExtractor,
    images: PretrainingImages,
    held_out: PretrainingImages,
    schedule: DistillationSchedule,
    seed: int = 0,
) -> float:
    """L_dist of a finished teacher on held-out images, as `distill` logs it.

    Args:
        teacher, extractor, images, held_out, schedule, seed: as in `distill`; mu and sigma of Psi
            come from `images`.

    Returns:
        The loss in normalised feature units: 1 is no better than each channel's mean.
    """
    keep_freed_memory()
    pairs = Pairs(extractor, schedule, next(teacher.parameters()).device)
    network = _copy(teacher, schedule.padding)
    return pairs.held_out_loss(network, held_out, *pairs.statistics(images, seed))


def _is_saved(run: Run) -> bool:
    """Whether the run's folder holds its teacher, not one that lay there before."""
    path = run.folder / TEACHER
    if not path.exists():
        return False
    _, header = read_tensors(path, "teacher", card=dict)
    return run.config.items() <= header["card"].items()


def _copy(teacher: PatchDescriptionNetwork, padding: bool) -> PatchDescriptionNetwork:
    """The same network with this padding, in the memory format that trains fastest."""
    network = PatchDescriptionNetwork(teacher.size, teacher.out_channels, padding)
    network.load_state_dict(teacher.state_dict())
    device = next(teacher.parameters()).device
    return network.to(device, memory_format=torch.channels_last)


def save_teacher(path: Path, teacher: PatchDescriptionNetwork, card: dict) -> None:
    """Write a teacher in float16 (half the size) with its card in the file's header."""
    weights = {name: value.half() for name, value in teacher.state_dict().items()}
    header = {"kind": "teacher", "size": teacher.size, "out_channels": teacher.out_channels}
    write_tensors(as_path(path), weights, header | {"card": card})


def make_optimizers(
    network: nn.Module, schedule: DistillationSchedule
) -> dict[str, torch.optim.Optimizer]:
    """The optimisers of the schedule, by name: their state is saved under it."""
    rate, decay = schedule.learning_rate, schedule.weight_decay
    if schedule.optimizer == "adam":  # Algorithm 3, line 13
        return {"adam": torch.optim.Adam(network.parameters(), rate, weight_decay=decay)}
    weights = dict(network.named_parameters())
    kernels = {name: p for name, p in weights.items() if p.ndim == 4}
    biases = [p for name, p in weights.items() if name not in kernels]
    return {
        "muon": KernelMuon(list(kernels.values()), rate, decay),
        "adam": torch.optim.Adam(biases, rate),
    }


def _read_teacher(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Weights and card of a teacher's file, or of the checkpoint of a run that goes no further."""
    if path.name != Run.CHECKPOINT:
        weights, header = read_tensors(path, "teacher", card=dict)
        return weights, header["card"]
    tensors, header = read_tensors(path, "checkpoint", config=dict, iteration=int)
    prefix = "teacher."
    weights = {n[len(prefix) :]: value for n, value in tensors.items() if n.startswith(prefix)}
    return weights, header["config"] | {"iteration": header["iteration"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; a second call resumes."""
    parser = argparse.ArgumentParser(
        prog="effad distill",
        description="Distil a teacher (Algorithm 3).",
        epilog="example: effad distill path/to/photographs --run-dir build/distil/small",
    )
    parser.add_argument("images", help="a folder of photographs, 'imagenette' or 'photographs'")
    parser.add_argument("--run-dir", type=as_path, help="where log, checkpoint and teacher go")
    parser.add_argument("--size", choices=("small", "medium"), default="small")
    parser.add_argument("--channels", type=int, help="of the features, instead of the extractor's")
    parser.add_argument(
        "--start",
        type=as_path,
        help="a teacher or checkpoint to go on from; one with other channels begins its last layer "
        "anew, and a medium teacher may begin from a small one",
    )
    parser.add_argument("--extractor", choices=BACKBONES, default="efficientnet-lite0")
    parser.add_argument("--weights", help="a state dict of the extractor on disk")
    parser.add_argument("--profile", choices=PROFILES, default="paper")
    parser.add_argument("--iterations", type=int, help="instead of the profile's")
    parser.add_argument("--precision", choices=PRECISIONS, help="instead of the profile's")
    parser.add_argument("--hold-out", type=int, default=50, help="images never trained on")
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", type=as_path, help="a teacher: its held-out loss, no run")
    args = parser.parse_args(arguments)
    if (args.run_dir is None) == (args.measure is None):
        parser.error("give either --run-dir or --measure")
    if args.start is not None and args.measure is not None:
        parser.error("--measure measures a teacher as it is: leave --start out")
    with command_errors():
        _run(args)


def _run(args: argparse.Namespace) -> None:
    schedule = DistillationSchedule.named(args.profile)
    if args.iterations is not None:
        schedule = replace(schedule, iterations=args.iterations)
    if args.precision is not None:
        schedule = replace(schedule, precision=args.precision)
    images, held_out = open_pretraining(args.images).hold_out(args.hold_out)
    extractor = open_extractor(args.extractor, args.channels, args.weights)
    torch.manual_seed(args.seed)
    teacher = PatchDescriptionNetwork(args.size, extractor.out_channels)
    start = None
    if (path := args.start or args.measure) is not None:
        weights, start = _read_teacher(path)
        if args.start is not None:
            weights = starting_weights(weights, teacher, path)
        load_weights(teacher, weights, path)
    if args.measure is not None:
        teacher.to(choose_device(args.device))
        loss = held_out_loss(teacher, extractor, images, held_out, schedule, args.seed)
        print(f"{args.measure.name}: held-out loss {loss:.4f}")
        return
    with distributed.processes(args.device) as device:
        row = distill(
            teacher, extractor, images, schedule,
            held_out=held_out, run_dir=args.run_dir, seed=args.seed, workers=args.workers,
            start=start, device=device,
        )  # fmt: skip
        if distributed.is_first():
            print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
            print(f"the teacher: {args.run_dir / TEACHER}")
