"""Algorithm 1: train student and autoencoder on normal images, then find the map quantiles.

Notebook 03 builds the student's losses, notebook 04 the autoencoder's, notebook 05 the quantiles.
The lines cited here are those of Algorithm 1 in the supplement.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, replace

from effad_core.acceleration.devices import choose_device
from effad_core.acceleration.memory import keep_freed_memory
from effad_core.acceleration.precision import computing_in, describe_precision, resolve_precision
from effad_core.acceleration.shortcuts import mean_squared_difference_to
from effad_core.acceleration.threads import usable_processors
from effad_core.datasets import (
    PretrainingImages,
    ResizedImages,
    Sample,
    Scenario,
    open_pretraining,
)
from effad_core.datasets.checks import check_images
from effad_core.datasets.transforms import augment, draw_augmentation, normalise, to_tensor
from effad_core.detector import DETECTOR, POINTS, EfficientAD
from effad_core.losses import hard_feature_loss, mean_squared_difference, pretraining_penalty
from effad_core.schedule import Schedule
from effad_core.statistics import channel_statistics
from effad_core.storage.digests import combined, inventory
from effad_core.storage.files import check_folder
from effad_core.storage.runs import Run, settled_precision
from effad_core.storage.weights import fingerprint
from effad_core.tiles import Crops

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

TERMS = ("L_hard", "penalty", "L_AE", "L_STAE")
FEWEST_CROPS, MOST_CROPS = 256, 4096  # of large images, for a detector with tiles
CELL_IMAGES = 128  # training images for the means of the cells, at most
MOST_WORKERS = 8  # threads that prepare images for a GPU


def train(
    detector: EfficientAD,
    scenario: Scenario,
    schedule: Schedule,
    pretraining: PretrainingImages | None = None,
    run_dir: str | os.PathLike | None = None,
    seed: int = 0,
    log_every: int = 20,
    device: str | torch.device | None = None,
    workers: int | None = None,
    start: EfficientAD | None = None,
) -> dict[str, float]:
    """Train a detector on a scenario's normal images (Algorithm 1). In place.

    Args:
        detector: with a distilled teacher; its student and autoencoder are initialised anew.
        scenario: only its training and validation images are used, never its test images.
        schedule: see `Schedule`.
        pretraining: the images P of the penalty; None takes `open_pretraining()`.
        run_dir: folder for config.json, log.csv, a checkpoint that a second call resumes from, and
            detector.safetensors; None writes nothing.
        seed: initialisation and every random choice derive from it and the iteration.
        log_every: iterations between rows of the log.
        device: where to train, and where the detector then is; None takes the GPU where there is
            one (see `choose_device`).
        workers: threads that read and augment the images of the next steps meanwhile; None takes
            none on a CPU, which is busy anyway, and up to eight for a GPU. The result is the same.
        start: a trained detector with the same teacher, whose student and autoencoder the training
            begins with; it stays as it is. Statistics, quantiles and thresholds are found anew.
            None begins with random ones.

    Returns:
        The last row of the log: iteration, the loss terms and the learning rate.

    Raises:
        DataError: for images that cannot be read.
        RunError: if run_dir is in use, cannot be written, or holds a run with other settings or of
            other images, which are recognised by their content.
        ValueError: if `start` has another teacher or size; if the images are constant, the loss is
            no longer finite, or this machine does not have the device.

    Example:
        >>> detector = EfficientAD("small").load_teacher()
        >>> row = train(detector, scenario, Schedule.smoke(), device="cpu")
        >>> row["step"], bool(detector.quantiles.isfinite().all())
        (6, True)
    """
    keep_freed_memory()
    device = choose_device(device, now=detector.device)
    if run_dir is not None:
        check_folder(run_dir, "run_dir")
    check_images(scenario.train)
    pretraining = open_pretraining() if pretraining is None else pretraining
    if workers is None:
        workers = 0 if device.type == "cpu" else min(MOST_WORKERS, usable_processors())
    precision = settled_precision(schedule.precision, device, run_dir, detector.size)
    schedule = replace(schedule, precision=precision)
    validation_images = ResizedImages(scenario.validation, detector.image_size)
    if not scenario.validation:
        raise ValueError(
            f"the scenario {scenario.name} has no validation images, from which the quantiles come"
        )
    _check_variation(scenario.name, validation_images)
    for sample in scenario.validation if detector.tiles or detector.region else ():
        for part in filter(None, (detector.tiles, detector.region)):
            part.check_image(sample.load().size, sample.path)
    training_images = open_training_images(detector, scenario.train, schedule, seed)
    found = inventory(sample.path for sample in (*scenario.train, *scenario.validation))
    count = len(scenario.train)
    images = {"training": found[:count], "validation": found[count:]}
    digests = {split: combined(part) for split, part in images.items()}
    digests["pretraining"] = pretraining.identity() if schedule.penalty else "none"
    torch.manual_seed(seed)
    detector.initialise_student()
    if start is not None:
        _take_over(detector, start)
    detector.cell_means.fill_(1)
    detector.to(device, memory_format=torch.channels_last)
    detector.card["training"] = config = {
        "algorithm": 1,
        "teacher": detector.card["teacher"],
        "teacher_weights": fingerprint(detector.teacher.state_dict()),
        "size": detector.size,
        "padding": detector.padding,
        "image_size": detector.image_size,
        "scenario": scenario.name,
        "train_images": len(scenario.train),
        "validation_images": len(scenario.validation),
        "pretraining": pretraining.describe() if schedule.penalty else "none: no penalty",
        "digests": digests,
        "seed": seed,
        "schedule": asdict(schedule),
    }
    detector.full_scale = scenario.full_scale
    if detector.full_scale is not None:  # 8-bit images: as if there was no such setting
        config["full_scale"] = detector.full_scale
    if detector.tiles is not None:
        config["tiles"] = asdict(detector.tiles) | {"crops": len(training_images)}
    if detector.region is not None:
        config["region"] = detector.region.to_text()
    if start is not None:
        config["start"] = {
            "weights": fingerprint(start.state_dict()),
            "training": start.card.get("training", "unknown"),
        }
    arithmetic = describe_precision(precision, device, "training", detector.size)
    student, autoencoder = detector.student, detector.autoencoder

    optimizer = torch.optim.Adam(  # Algorithm 1, line 11
        [{"params": list(network.parameters())} for network in (student, autoencoder)],
        lr=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        fused=True,  # one pass over each weight instead of ten
    )
    modules = {"student": student, "autoencoder": autoencoder}
    total_steps = schedule.autoencoder_iterations + schedule.iterations
    notes = {"device": str(device), "arithmetic": arithmetic}
    optimizers = {"optimizer": optimizer}
    run = Run(run_dir, config, modules, optimizers, total_steps, notes=notes, images=images)
    with ExitStack() as held:
        held.enter_context(run)
        if device.type == "cuda":  # images of one size: the fastest convolutions are worth a search
            held.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=True))
        done, row = run.resume()
        if done == total_steps and run.folder is not None and (run.folder / DETECTOR).exists():
            finished = EfficientAD.load(run.folder / DETECTOR, device)
            if finished.card.get("training") == run.config:  # not one that lay here before
                detector.load_state_dict(finished.state_dict())
                for name in ("card", "precision", *POINTS.values()):
                    setattr(detector, name, getattr(finished, name))
                detector.eval()  # the new student and autoencoder are not yet
                return row

        teacher_features = TeacherFeatures(
            detector, training_images, precision, schedule.cache_megabytes
        )
        teacher_features.find_statistics()  # Algorithm 1, lines 3-10

        def draw(step: int) -> tuple[int, list[int], Tensor]:
            """All that chance decides in a step: a seed for dropout, and the images.

            Returns:
                The seed; the training images' numbers; uint8 images, shape (n, 3, H, W): as many
                training images, or the training image, the same augmented, and P.
            """
            rng = np.random.default_rng((seed, step))
            dropout_seed = int(rng.integers(2**63))
            if step < schedule.autoencoder_iterations:
                batch = schedule.autoencoder_batch
                chosen = rng.integers(len(training_images), size=batch).tolist()
                images = [to_tensor(training_images[index]) for index in chosen]
            else:
                chosen = [int(rng.integers(len(training_images)))]  # Algorithm 1, line 13
                image = training_images[chosen[0]]
                augmented = augment(image, *draw_augmentation(rng))  # Algorithm 1, lines 23-31
                images = [to_tensor(image), to_tensor(augmented)]
                if schedule.penalty:  # Algorithm 1, line 21
                    images += [*pretraining.whole_images(rng, 1, detector.image_size)]
            stacked = torch.stack(images)
            return dropout_seed, chosen, stacked.pin_memory() if device.type == "cuda" else stacked

        pending: list[tuple[int, dict[str, Tensor]]] = []  # losses that are still on the device

        def fetch() -> None:
            """Bring the pending losses to the run's window, which waits for the device: only for a
            row of the log and before a checkpoint."""
            flat = [value for _, terms in pending for value in terms.values()]
            values = iter(torch.stack(flat).tolist() if flat else ())
            for step, terms in pending:
                named = {name: next(values) for name in terms}
                if not math.isfinite(named["L"]):  # no checkpoint holds NaN weights
                    raise ValueError(
                        f"the loss is {named['L']} at step {step + 1}; lower the learning rate, or "
                        'train with precision="float32"'
                    )
                run.window.append(named)
            pending.clear()

        run.before_save = fetch
        steps = range(done, total_steps)
        draws = held.enter_context(closing(ahead(draw, steps, workers)))
        progress = tqdm(
            steps, initial=done, total=total_steps, desc=f"training on {device} in {precision}"
        )
        detector.train()
        for step, (dropout_seed, chosen, images) in zip(progress, draws, strict=True):  # line 12
            torch.manual_seed(dropout_seed)
            iteration = step - schedule.autoencoder_iterations
            images = images.to(device, non_blocking=True)
            if iteration < 0:
                teacher = torch.cat([teacher_features.half(index) for index in chosen])
                terms = {"L_AE": autoencoder_loss(detector, precision, images, teacher)}
            else:
                image, augmented, *p = images
                known = teacher_features[chosen[0]] if schedule.cache_megabytes else None
                inside = _region_cells(detector, training_images, chosen[0])
                terms = loss_terms(
                    detector, schedule, image, augmented, *p or [None], known, inside
                )
            total = sum(terms.values())  # Algorithm 1, line 41
            pending.append((step, {name: v.detach() for name, v in (terms | {"L": total}).items()}))
            rates = schedule.learning_rates_at(step)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            optimizer.zero_grad()
            total.backward()
            optimizer.step()  # Algorithm 1, line 42
            last = step + 1 == total_steps
            if last or (step + 1) % log_every == 0 or iteration == -1:
                fetch()
                row = _log_row(step + 1, rates[0], run.window)
                measured = [name for name in TERMS if not math.isnan(row[name])]
                progress.set_postfix({name: f"{row[name]:.3g}" for name in measured})
                run.log(row)
                run.window.clear()
            run.after(step + 1)
        detector.eval()
        detector.precision = precision
        find_map_numbers(detector, training_images, validation_images, schedule.divide_cells)
        if run.folder is not None:
            detector.save(run.folder / DETECTOR)  # Algorithm 1, line 61
        return row


def find_map_numbers(
    detector: EfficientAD,
    training_images: ResizedImages,
    validation_images: ResizedImages,
    divide_cells: bool,
) -> None:
    """Set what is found on images once the networks are trained: means of cells, and quantiles.

    Algorithm 1, lines 47-60.

    Args:
        detector: its networks are trained.
        training_images: give the means of the cells.
        validation_images: give the quantiles.
        divide_cells: whether cells are divided by their means, as the training's schedule says.

    Raises:
        DataError, ValueError: as `train`.
    """
    if divide_cells:
        detector.find_cell_means(training_images.batches(8, most=CELL_IMAGES))
    if detector.tiles is None:
        detector.find_quantiles(validation_images.batches(8), len(validation_images))
    else:
        detector.find_tile_quantiles([sample.path for sample in validation_images.samples])


def _take_over(detector: EfficientAD, start: EfficientAD) -> None:
    """Give a detector the student and the autoencoder of another one.

    Raises:
        ValueError: if that has another teacher or size.
    """
    teachers = [fingerprint(one.teacher.state_dict()) for one in (detector, start)]
    shapes = [(one.size, one.padding, one.out_channels) for one in (detector, start)]
    if teachers[0] != teachers[1] or shapes[0] != shapes[1]:
        raise ValueError(
            "the detector to start from has another teacher, size or padding: begin with a "
            "detector that loads the same teacher, or without a start"
        )
    detector.student.load_state_dict(start.student.state_dict())
    detector.autoencoder.load_state_dict(start.autoencoder.state_dict())


def open_training_images(
    detector: EfficientAD, samples: Sequence[Sample], schedule: Schedule, seed: int
) -> ResizedImages:
    """The whole images at the detector's size; with tiles, crops from anywhere in them.

    Args:
        detector: whose size, tiles and region.
        samples: training images.
        schedule: its iterations say how many crops are cut.
        seed: of the crops' places.
    """
    if detector.tiles is None:
        return ResizedImages(samples, detector.image_size)
    count = min(max(FEWEST_CROPS, schedule.iterations, len(samples)), MOST_CROPS)
    size, region = detector.image_size, detector.region
    return Crops(samples, size, detector.tiles, count, seed, region, detector.padding)


def _region_cells(detector: EfficientAD, images: ResizedImages, index: int) -> Tensor | None:
    """The cells of a training image, or of a crop, that lie in the detector's region."""
    if detector.region is None:
        return None
    if isinstance(images, Crops):
        return torch.from_numpy(images.region_cells(index))
    return torch.from_numpy(detector.region.cells(detector.image_size, detector.padding))


def _check_variation(name: str, images: ResizedImages) -> None:
    """Read all validation images before the training, not after it.

    Raises:
        DataError: for one that cannot be read.
        ValueError: if each is of one colour, for then their maps have no quantiles.
    """
    extremes = [pair for image in images for pair in image.getextrema()]
    if all(low == high for low, high in extremes):
        raise ValueError(
            f"each validation image of {name} is of one colour, such as {images.samples[0].path}: "
            "the quantiles need images with content"
        )


def ahead(draw: Callable[[int], object], steps: Sequence[int], workers: int) -> Iterator:
    """`draw(step)` for each step, in order.

    Args:
        draw: may be called in several threads at once, and for later steps than are asked for.
        steps: what to call it with.
        workers: threads that draw the next ones meanwhile; 0: each is drawn when asked for.
    """
    if workers == 0:
        yield from map(draw, steps)
        return
    pool, drawn = ThreadPoolExecutor(workers), deque()
    try:
        for step in steps:
            drawn.append(pool.submit(draw, step))
            if len(drawn) > 2 * workers:
                yield drawn.popleft().result()
        while drawn:
            yield drawn.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def loss_terms(
    detector: EfficientAD,
    schedule: Schedule,
    image: Tensor,
    augmented: Tensor,
    pretraining_image: Tensor | None,
    teacher_output: Tensor | None = None,
    inside: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of L_total for one iteration (lines 14-40), by name: see `TERMS`.

    The student's passes over the three images are one batch, and of its last layer only the half
    that a loss reads is computed.

    Args:
        detector: with mu and sigma.
        schedule: for its hard_quantile and precision.
        image: I_train, uint8, shape (3, H, W).
        augmented: I_aug, the same image augmented.
        pretraining_image: P of the same shape, or None to leave the penalty out.
        teacher_output: the normalised teacher's of `image`, shape (1, C, h, w), where it is known.
        inside: the cells of the region, boolean, shape (h, w), with one True at least; the hard
            feature loss looks at no others. None: at all.

    Returns:
        Scalars with gradients; L_total is their sum (line 41).
    """
    device, half = detector.device, detector.out_channels
    images = [augmented, image] + ([] if pretraining_image is None else [pretraining_image])
    images = normalise(torch.stack(images).to(device))  # (3, 3, H, W)
    images = images.contiguous(memory_format=torch.channels_last)
    precision = resolve_precision(schedule.precision, device, "training", size=detector.size)
    with computing_in(precision, device):
        with torch.no_grad():  # Algorithm 1, lines 14-15 and 33-34
            teacher = detector.normalised_teacher(images[: 2 if teacher_output is None else 1])
        teacher = teacher.float()
        if teacher_output is not None:
            teacher = torch.cat([teacher, teacher_output])
        trunk = detector.student.trunk(images)  # Algorithm 1, lines 16, 22 and 35
        y_st = detector.student.head(trunk[1:], slice(0, half)).float()  # Algorithm 1, line 17
        y_stae = detector.student.head(trunk[:1], slice(half, None)).float()  # line 36
        y_ae = detector.autoencoder(images[:1]).float()  # Algorithm 1, line 32
    d_st = (teacher[1:] - y_st[:1]).square()  # Algorithm 1, line 18
    if inside is not None:
        d_st = d_st[..., inside.to(device)][..., None]
    terms = {"L_hard": hard_feature_loss(d_st, schedule.hard_quantile)}  # lines 19-20
    if pretraining_image is not None:
        terms["penalty"] = pretraining_penalty(y_st[1:])  # Algorithm 1, line 22
    terms["L_AE"] = mean_squared_difference(y_ae, teacher[:1])  # Algorithm 1, lines 37, 39
    terms["L_STAE"] = mean_squared_difference(y_stae, y_ae)  # Algorithm 1, lines 38, 40
    return terms


def autoencoder_loss(
    detector: EfficientAD, precision: str, images: Tensor, teacher_output: Tensor
) -> Tensor:
    """L_AE on a batch of training images: the steps of the autoencoder alone.

    Args:
        detector: its autoencoder is trained.
        precision: resolved.
        images: uint8, shape (N, 3, H, W), on the detector's device.
        teacher_output: the normalised teacher's of these images, shape (N, C, h, w), of any
            floating-point format.

    Returns:
        A scalar with gradients.
    """
    with computing_in(precision, detector.device):
        images = normalise(images).contiguous(memory_format=torch.channels_last)
        output = detector.autoencoder(images)
    return mean_squared_difference_to(output, teacher_output)


class TeacherFeatures:
    """The teacher's output on training images, normalised, computed once for each image.

    Every output is rounded to half precision (an error of at most 0.05 %), whether or not it is
    kept, so that a training does not depend on how many of them fit, or on being resumed.

    Args:
        detector: its mu and sigma are found by `find_statistics`, or are there already.
        images: the training images.
        precision: resolved.
        megabytes: memory for the outputs; those that do not fit are computed when they are needed.
    """

    def __init__(
        self, detector: EfficientAD, images: ResizedImages, precision: str, megabytes: float
    ):
        self.detector, self.images, self.precision = detector, images, precision
        self._left = megabytes * 2**20  # bytes
        self._kept: dict[int, Tensor] = {}

    def find_statistics(self) -> None:
        """Set the detector's mu and sigma, and keep the outputs that they are found from.

        Algorithm 1, lines 3-10.

        Raises:
            ValueError: as `channel_statistics`.
        """
        mu, sigma = channel_statistics(map(self._keep, range(len(self.images))))
        self.detector.mu.copy_(mu[:, None, None])
        self.detector.sigma.copy_(sigma[:, None, None])
        for index, output in self._kept.items():
            self._kept[index] = self._normalised(output)
            self._left += output.nbytes - self._kept[index].nbytes

    def __getitem__(self, index: int) -> Tensor:
        """Of image `index`, float32, shape (1, C, h, w)."""
        return self.half(index).float()

    def half(self, index: int) -> Tensor:
        """The same in float16, as it is kept."""
        output = self._kept.get(index)
        if output is None:
            output = self._normalised(self._output(index))
            if output.nbytes <= self._left:
                self._kept[index] = output
                self._left -= output.nbytes
        return output

    def _keep(self, index: int) -> Tensor:
        """The teacher's output, not normalised, float32; kept as it was computed, if it fits."""
        output = self._output(index)
        if output.nbytes <= self._left:
            self._kept[index] = output
            self._left -= output.nbytes
        return output.float()

    @torch.no_grad()
    def _output(self, index: int) -> Tensor:
        """The teacher's output, not normalised, in the format in which it was computed."""
        device = self.detector.device
        image = normalise(to_tensor(self.images[index])[None].to(device))
        with computing_in(self.precision, device):
            return self.detector.teacher(image.contiguous(memory_format=torch.channels_last))

    def _normalised(self, output: Tensor) -> Tensor:
        return ((output - self.detector.mu) / self.detector.sigma).half()


def _log_row(step: int, learning_rate: float, window: list[dict]) -> dict[str, float]:
    """Means of the terms since the last row; NaN for a term that no step had."""
    means = {
        name: float(np.mean([terms[name] for terms in window if name in terms] or [np.nan]))
        for name in (*TERMS, "L")
    }
    return {"step": step, **means, "learning_rate": learning_rate}
