"""Algorithm 3: distil a pretrained extractor Psi into a patch description network, the teacher T.

Notebook 02 walks through it. The lines cited here are those of Algorithm 3 in the supplement.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from effad_core.backbones import FeatureExtractor, open_extractor
from effad_core.datasets.pretraining import PretrainingImages, open_pretraining
from effad_core.datasets.transforms import normalise
from effad_core.losses import mean_squared_difference
from effad_core.networks import PatchDescriptionNetwork, output_length
from effad_core.precision import autocast, resolve_precision
from effad_core.runs import Run, write_tensors
from effad_core.statistics import channel_statistics

PRESETS = ("smoke", "quick", "laptop", "paper")


@dataclass(frozen=True)
class DistillationSchedule:
    """How long, on what and in which format to distil.

    Attributes:
        iterations: optimiser steps (line 14).
        batch_size: images a step (line 16).
        statistics_images: images for mu and sigma of Psi (line 4).
        learning_rate: Adam's.
        cosine: decay the learning rate to 1 % along half a cosine; the paper keeps it constant.
        size: side of T's square input in pixels; Psi's input is twice as large.
        scales: None resizes whole images (lines 7, 20). Otherwise T and Psi see a random window
            of an image, magnified for Psi by a factor drawn between these two: many small crops
            hold more different patches than a few whole images at the same cost.
        padding: pad T (64x64 cells at 256) or compare only the cells that see real pixels.
        gray_probability: of converting an image to gray scale (lines 6, 18).
        precision: "float32", "bfloat16" or "auto" (bfloat16 where it is fast).
    """

    iterations: int = 60_000
    batch_size: int = 16
    statistics_images: int = 10_000
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    cosine: bool = False
    size: int = 256
    scales: tuple[float, float] | None = None
    padding: bool = True
    gray_probability: float = 0.1
    precision: str = "float32"

    @classmethod
    def paper(cls) -> "DistillationSchedule":
        """Algorithm 3 to the letter; for a GPU."""
        return cls()

    @classmethod
    def laptop(cls) -> "DistillationSchedule":
        """Many small crops, for two CPU cores: about an hour."""
        return cls(
            iterations=4_000,
            statistics_images=1_024,
            learning_rate=1e-3,
            cosine=True,
            size=128,
            scales=(0.6, 1.6),
            padding=False,
            precision="auto",
        )

    @classmethod
    def quick(cls) -> "DistillationSchedule":
        """A minute or two: enough to see the loss fall, not a teacher to use."""
        return replace(cls.laptop(), iterations=150, statistics_images=128, size=96)

    @classmethod
    def smoke(cls) -> "DistillationSchedule":
        """A handful of steps: shows that everything runs."""
        return replace(cls.quick(), iterations=3, batch_size=2, statistics_images=4)

    @classmethod
    def named(cls, name: str) -> "DistillationSchedule":
        """The preset of that name: smoke, quick, laptop or paper.

        Raises:
            ValueError: for another name.
        """
        if name not in PRESETS:
            raise ValueError(f"the profile must be one of {', '.join(PRESETS)}, not {name!r}")
        return getattr(cls, name)()


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
) -> dict[str, float]:
    """Train a teacher to predict the normalised features of Psi (Algorithm 3). In place.

    Args:
        teacher: a PDN with as many output channels as the extractor; line 1 is its construction.
        extractor: Psi, with PatchCore's post-processing, stride 8.
        images: the images I_dist (ImageNet in the paper).
        schedule: see `DistillationSchedule`.
        held_out: images never trained on; their loss is logged every `20 * log_every` iterations.
        run_dir: folder for log.csv, a checkpoint that a second call resumes from, and
            teacher.safetensors; None writes nothing.
        seed: every random choice derives from (seed, iteration).
        log_every: iterations between rows of the log.

    Returns:
        The last logged row: iteration, loss, held_out_loss (NaN without held-out images).

    Raises:
        ValueError: if the channels of teacher and extractor differ.
        RunError: if run_dir holds a run with other settings.
    """
    if teacher.out_channels != extractor.out_channels:
        raise ValueError(
            f"the teacher has {teacher.out_channels} output channels, the extractor "
            f"{extractor.out_channels}; build both with the same out_channels"
        )
    device = next(teacher.parameters()).device
    precision = resolve_precision(schedule.precision, device)
    extractor.to(device, memory_format=torch.channels_last)
    network = PatchDescriptionNetwork(teacher.size, teacher.out_channels, schedule.padding)
    network.load_state_dict(teacher.state_dict())
    network.to(device, memory_format=torch.channels_last).train()

    def batch(key: tuple[int, ...], count: int, source: PretrainingImages) -> Tensor:
        """Images for Psi, uint8, shape (count, 3, 2 * size, 2 * size); lines 5-7 and 17-19."""
        rng = np.random.default_rng(key)
        size, gray = 2 * schedule.size, schedule.gray_probability
        if schedule.scales is None:
            return source.whole_images(rng, count, size, gray_probability=gray)
        return source.crops(rng, count, size, scale=schedule.scales, gray_probability=gray)

    @torch.no_grad()
    def features(psi_images: Tensor) -> Tensor:
        """Psi's features, shape (N, C, h, w), the cells that T has."""
        with autocast(precision, device):
            maps = extractor(psi_images.to(device))  # Algorithm 3, lines 8 and 21
        return maps if schedule.padding else maps[..., 4 : 4 + cells, 4 : 4 + cells]

    def loss_on(psi_images: Tensor) -> Tensor:
        # Algorithm 3, line 20: T sees the same image at half the size of Psi's
        small = F.interpolate(
            psi_images.to(device).float() / 255, scale_factor=0.5, mode="bilinear"
        )
        target = (features(psi_images) - mu) / sigma  # Algorithm 3, line 22
        with autocast(precision, device):
            output = network(normalise(small))  # Algorithm 3, line 23
        return mean_squared_difference(output.float(), target)  # Algorithm 3, lines 24-28

    cells = output_length(schedule.size, schedule.padding)
    optimizer = torch.optim.Adam(  # Algorithm 3, line 13
        network.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    config = {
        "algorithm": 3,
        "size": teacher.size,
        "out_channels": teacher.out_channels,
        "extractor": extractor.name,
        "images": images.describe(),
        "held_out": None if held_out is None else held_out.describe(),
        "seed": seed,
        "schedule": asdict(schedule),
    }
    run = Run(run_dir, config, {"teacher": network}, optimizer)
    done, row = run.resume()

    def statistics_stream() -> Iterator[Tensor]:
        size = schedule.batch_size
        for index in range(-(-schedule.statistics_images // size)):  # Algorithm 3, line 4
            count = min(size, schedule.statistics_images - index * size)
            yield features(batch((seed, 0, index), count, images)).float()

    # Algorithm 3, lines 2-12: mu^Psi and sigma^Psi
    mu, sigma = (
        value.to(device)[:, None, None] for value in channel_statistics(statistics_stream())
    )

    progress = tqdm(range(done, schedule.iterations), initial=done, total=schedule.iterations)
    losses = []
    for iteration in progress:  # Algorithm 3, line 14
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(schedule, iteration)
        loss = loss_on(batch((seed, 1, iteration), schedule.batch_size, images))
        if not torch.isfinite(loss):  # before the step: no checkpoint holds NaN weights
            raise ValueError(
                f"the loss is {loss.item()} at iteration {iteration + 1}; lower the learning rate"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # Algorithm 3, line 29
        losses.append(loss.item())
        last = iteration + 1 == schedule.iterations
        if (iteration + 1) % log_every == 0 or last:
            row = {"iteration": iteration + 1, "loss": float(np.mean(losses))}
            row["held_out_loss"] = float("nan")
            if held_out is not None and (last or (iteration + 1) % (20 * log_every) == 0):
                with torch.no_grad():
                    row["held_out_loss"] = float(
                        np.mean([loss_on(batch((0, 2, i), 16, held_out)).item() for i in range(8)])
                    )
            progress.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k != "iteration"})
            run.log(row)
            losses = []
        run.after(iteration + 1, last)

    teacher.load_state_dict(network.state_dict())  # Algorithm 3, line 31
    if run.folder is not None:
        save_teacher(run.folder / "teacher.safetensors", teacher, config | row)
    return row


def save_teacher(path: Path, teacher: PatchDescriptionNetwork, card: dict) -> None:
    """Write a teacher in float16 (half the size) with its card in the file's header."""
    weights = {name: value.half() for name, value in teacher.state_dict().items()}
    header = {"kind": "teacher", "size": teacher.size, "out_channels": teacher.out_channels}
    write_tensors(Path(path), weights, header | {"card": card})


def _learning_rate(schedule: DistillationSchedule, iteration: int) -> float:
    if not schedule.cosine:
        return schedule.learning_rate
    rise = min(1.0, (iteration + 1) / 100)  # a short warm-up for the higher rate
    fall = 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * iteration / schedule.iterations))
    return schedule.learning_rate * rise * fall


def main() -> None:
    """`python -m effad_core.distillation IMAGES --run-dir FOLDER`; a second call resumes."""
    parser = argparse.ArgumentParser(description="Distil a teacher (Algorithm 3).")
    parser.add_argument("images", help="a folder of photographs, 'imagenette' or 'photographs'")
    parser.add_argument("--run-dir", required=True, help="where log, checkpoint and teacher go")
    parser.add_argument("--size", choices=("small", "medium"), default="small")
    parser.add_argument("--extractor", default="efficientnet-lite0")
    parser.add_argument("--profile", choices=PRESETS, default="paper")
    parser.add_argument("--iterations", type=int, help="instead of the profile's")
    parser.add_argument("--hold-out", type=int, default=50, help="images never trained on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    schedule = DistillationSchedule.named(args.profile)
    if args.iterations is not None:
        schedule = replace(schedule, iterations=args.iterations)
    images, held_out = open_pretraining(args.images).hold_out(args.hold_out)
    extractor = open_extractor(args.extractor)
    torch.manual_seed(args.seed)
    teacher = PatchDescriptionNetwork(args.size, extractor.out_channels)
    row = distill(
        teacher, extractor, images, schedule,
        held_out=held_out, run_dir=args.run_dir, seed=args.seed,
    )  # fmt: skip
    print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))


if __name__ == "__main__":
    main()
