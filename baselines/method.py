"""What the methods share: profiles, fitting that resumes, and one file that holds everything."""

import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Self

from effad_core.acceleration.devices import choose_device
from effad_core.acceleration.memory import keep_freed_memory
from effad_core.acceleration.precision import computing_in
from effad_core.datasets import ResizedImages, Scenario
from effad_core.datasets.checks import check_images
from effad_core.datasets.transforms import to_tensor
from effad_core.detector import DETECTOR, POINTS, points_of, set_points
from effad_core.errors import RunError
from effad_core.evaluation.methods import KIND, find_method
from effad_core.prediction import Predictor
from effad_core.schedule import PROFILES
from effad_core.storage.digests import combined, inventory
from effad_core.storage.files import as_path, check_folder, one_line
from effad_core.storage.runs import Run
from effad_core.storage.weights import fingerprint, load_weights, read_tensors, write_tensors

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

LOG_EVERY = 20  # steps between rows of the log
MOST_PIXELS = 4096**2  # of an image that a damaged file may make a method ask for


@dataclass(frozen=True)
class Schedule:
    """How long a method is fitted.

    Attributes:
        lengths: of each of its phases, in steps; in passes over the training images if `epochs`.
            Empty for a method that is not trained step by step.
        batch_size: training images in a step.
        epochs: whether the lengths are epochs.
    """

    lengths: tuple[int, ...] = ()
    batch_size: int = 8
    epochs: bool = False

    def steps(self, images: int) -> list[int]:
        """Steps of each phase with so many training images."""
        each = math.ceil(images / self.batch_size) if self.epochs else 1
        return [length * each for length in self.lengths]


@dataclass(frozen=True)
class Profile:
    """What a method is in a profile: arguments of its class, and how long it is fitted."""

    arguments: Mapping
    schedule: Schedule = field(default_factory=Schedule)


@dataclass
class Phase:
    """A part of a training: what one optimiser does.

    Attributes:
        optimizer: its learning rates are those of the beginning.
        loss: numbers of training images, and a random generator -> terms by name, scalars with
            gradients, whose sum is the loss.
        begin: is called before the phase's first step, and when a run is resumed within it, or, in
            the last phase, after it.
        rate: share of the phase that is done, in [0, 1) -> what learning rates are multiplied by.
    """

    optimizer: torch.optim.Optimizer
    loss: Callable[[Sequence[int], np.random.Generator], dict[str, Tensor]]
    begin: Callable[[], None] = lambda: None
    rate: Callable[[float], float] = lambda done: 1.0


class Method(nn.Module, Predictor):
    """Base class of the paper's other methods: a `Predictor` that fits, saves and loads itself.

    A subclass says what it is in `PROFILES`, builds its networks in `__init__`, and has
    `initialise`, `trained`, `phases`, `finish` as far as it needs them, and `shown_and_judged`.

    Args:
        image_size: images are resized to this before they enter; a side of a square, or
            (height, width), in pixels.
        arguments: all arguments of the class but the weights', JSON-able: what `load` builds the
            same networks from.

    Attributes:
        precision: in which it computes: "float32" or "bfloat16".
        card: how it was fitted, JSON-able, saved with the weights.
    """

    NAME: ClassVar[str]  # the paper's, under which it is registered
    PROFILES: ClassVar[Mapping[str, Profile]]
    NEEDS_VALIDATION: ClassVar[bool] = False  # whether validation images scale its maps
    map_names = ("combined",)
    precision = "float32"

    def __init__(self, image_size: int | Sequence[int], arguments: Mapping):
        super().__init__()
        self.image_size = checked_size(image_size)
        self.arguments = dict(arguments) | {"image_size": self.image_size}
        self.operating_point = self.pixel_operating_point = None
        self.card: dict = {}
        self.register_buffer("_where", torch.empty(0), persistent=False)

    @classmethod
    def of_profile(cls, profile: str = "laptop", **changes) -> Self:
        """A new one, not yet fitted, with the pretrained networks of a profile.

        Args:
            profile: smoke, quick, laptop or paper.
            changes: of its arguments.

        Raises:
            ValueError: for an unknown profile or a wrong argument.
            RunError: if pretrained weights are out of reach.
        """
        return cls(**cls.profile(profile).arguments | changes)

    @classmethod
    def profile(cls, name: str) -> Profile:
        """The profile of that name; ValueError for another."""
        if name not in PROFILES:
            raise ValueError(f"the profile must be one of {', '.join(PROFILES)}, not {name!r}")
        return cls.PROFILES[name]

    @property
    def device(self) -> torch.device:
        return self._where.device

    def use_device(self, device: str | torch.device | None = None) -> None:
        self.to(choose_device(device, now=self.device))

    # --- fitting -------------------------------------------------------------------------------

    def initialise(self) -> None:
        """Give what is trained new random weights, from torch's generator."""

    def trained(self) -> dict[str, nn.Module]:
        """The modules that are trained, by name: what a checkpoint holds."""
        return {}

    def phases(self, images: ResizedImages) -> list[Phase]:
        """One for each length of the schedule.

        Args:
            images: the training images.
        """
        return []

    def finish(self, images: ResizedImages, validation: ResizedImages, seed: int) -> None:
        """Find what is found on images once the training is over.

        Args:
            images: the training images.
            validation: images that nothing was trained on.
            seed: of random choices.
        """

    def fit(
        self,
        scenario: Scenario,
        schedule: Schedule | str = "laptop",
        seed: int = 0,
        run_dir: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Fit it to a scenario's normal images. In place; thresholds are taken away.

        Args:
            scenario: only its training and validation images are used, never its test images.
            schedule: or the name of a profile, whose schedule it is.
            seed: every random choice derives from it and the number of the step.
            run_dir: folder for config.json, log.csv, a checkpoint from which a second call
                resumes, and detector.safetensors; None writes nothing.
            device: where to compute; None takes the GPU where there is one.

        Returns:
            Itself.

        Raises:
            DataError: for images that cannot be read.
            RunError: if run_dir is in use, cannot be written, or holds a run with other settings or
                of other images.
            ValueError: for an unknown profile; without validation images if it needs some; or if
                the loss is no longer finite.
        """
        keep_freed_memory()
        self.use_device(device)
        if run_dir is not None:
            check_folder(run_dir, "run_dir")
            self.check_path(run_dir)
        if isinstance(schedule, str):
            schedule = self.profile(schedule).schedule
        check_images(scenario.train)
        if self.NEEDS_VALIDATION and not scenario.validation:
            raise ValueError(
                f"the scenario {scenario.name} has no validation images, from which {self.NAME} "
                "takes the scales of its maps"
            )
        self.full_scale = scenario.full_scale
        images, validation = (
            ResizedImages(samples, self.image_size)
            for samples in (scenario.train, scenario.validation)
        )
        torch.manual_seed(seed)
        self.initialise()
        self.to(self.device, memory_format=torch.channels_last)
        found = {
            "training": inventory(sample.path for sample in scenario.train),
            "validation": inventory(sample.path for sample in scenario.validation),
        }
        config = {
            "method": self.NAME,
            "arguments": self.arguments,
            # pretrained ones, and the first random ones; not what was found on images before
            "weights": fingerprint(dict(self.named_parameters())),
            "scenario": scenario.name,
            "digests": {split: combined(part) for split, part in found.items()},
            "full_scale": self.full_scale,
            "precision": self.precision,
            "seed": seed,
            "schedule": asdict(schedule),
        }
        phases, lengths = self.phases(images), schedule.steps(len(images))
        run = Run(
            run_dir,
            config,
            self.trained(),
            {f"optimizer{number}": phase.optimizer for number, phase in enumerate(phases)},
            sum(lengths),
            notes={"device": str(self.device)},
            images=found,
        )
        with run:
            done, _ = run.resume()
            if run.folder is not None and self._take_up(run, done):
                return self
            self._train(run, phases, lengths, len(images), schedule.batch_size, done, seed)
            self.eval()
            torch.manual_seed(seed)
            with computing_in(self.precision, self.device), torch.inference_mode():
                self.finish(images, validation, seed)
            self.card = {"training": run.config}
            self.operating_point = self.pixel_operating_point = None
            if run.folder is not None:
                if not phases:  # so that another call with other settings is refused
                    run.save(0)
                self.save(run.folder / DETECTOR)
        return self

    def _take_up(self, run: Run, done: int) -> bool:
        """Load the finished run of a folder, if it holds one."""
        path = run.folder / DETECTOR
        if done < run.total or not path.exists():
            return False
        finished = load_method(path, self.device)
        if finished.card.get("training") != run.config:  # one that lay here before
            return False
        self.resized_buffers(finished.state_dict())
        self.load_state_dict(finished.state_dict())
        self.to(self.device)
        for name in ("card", *POINTS.values()):
            setattr(self, name, getattr(finished, name))
        self.eval()
        return True

    def _train(
        self,
        run: Run,
        phases: Sequence[Phase],
        lengths: Sequence[int],
        images: int,
        batch_size: int,
        done: int,
        seed: int,
    ) -> None:
        """The steps that are not yet done, in all phases."""
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
        begun = None
        name = self.NAME
        progress = tqdm(
            range(done, run.total), initial=done, total=run.total, desc=f"{name} on {self.device}",
            disable=not phases,
        )  # fmt: skip
        self.train()
        if phases and done == run.total:  # interrupted after the last step: `finish` needs it too
            phases[-1].begin()
        for step in progress:
            number = int(np.searchsorted(starts, step, side="right")) - 1
            phase, start = phases[number], starts[number]
            if begun != number:
                phase.begin()
                begun = number
                rates = [group["lr"] for group in phase.optimizer.param_groups]
            rng = np.random.default_rng((seed, step))
            torch.manual_seed(int(rng.integers(2**63)))
            share = phase.rate((step - start) / lengths[number])
            for group, rate in zip(phase.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            chosen = rng.integers(images, size=min(batch_size, images)).tolist()
            with computing_in(self.precision, self.device):
                terms = phase.loss(chosen, rng)
            total = sum(terms.values())
            if not torch.isfinite(total):
                raise ValueError(f"the loss of {name} is {total.item()} at step {step + 1}")
            phase.optimizer.zero_grad()
            total.backward()
            phase.optimizer.step()
            run.window.append({key: value.item() for key, value in (terms | {"L": total}).items()})
            if (step + 1) % LOG_EVERY == 0 or step + 1 in starts:
                names = dict.fromkeys(key for row in run.window for key in row)
                means = {
                    key: float(np.mean([row[key] for row in run.window if key in row]))
                    for key in names
                }
                progress.set_postfix({key: f"{value:.3g}" for key, value in means.items()})
                run.log({"step": step + 1, "phase": number + 1, "L": means["L"]})
                run.window.clear()
            run.after(step + 1)

    # --- maps ----------------------------------------------------------------------------------

    @abstractmethod
    def shown_and_judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The anomaly map, and the map whose maximum is the anomaly score.

        Args:
            images: uint8, shape (N, 3, H, W), at image_size, on the method's device.

        Returns:
            Both float32, shape (N, 1, H, W); the same one twice if the map itself is judged.
        """

    @torch.inference_mode()
    def _shown_and_judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with computing_in(self.precision, self.device):
            found = self.shown_and_judged(images.to(self.device))
        return tuple(m.float() for m in found)

    def forward(self, images: Tensor) -> Tensor:
        """The maps of images: as `combined_maps`."""
        return self.combined_maps(images)

    def combined_maps(self, images: Tensor) -> Tensor:
        """The anomaly map, float32, (N, 1, H, W), of uint8 images (N, 3, H, W) at image_size."""
        return self._shown_and_judged(images)[0]

    def maps_and_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `combined_maps`, and the anomaly scores, shape (N, 1)."""
        shown, judged = self._shown_and_judged(images)
        return self.inspected(shown)[0], self.inspected(judged)[1]

    # --- costs ---------------------------------------------------------------------------------

    def counted(self) -> nn.Module:
        """What is counted: images (N, 3, H, W), uint8 -> whatever is computed of them."""
        return _Counted(self)

    @classmethod
    def untrained(cls, profile: str = "paper", **changes) -> Self:
        """One whose weights are arbitrary: as fast as any other of its kind."""
        found = cls.of_profile(profile, pretrained=False, **changes)
        found.to(memory_format=torch.channels_last)
        return found.eval()

    # --- disk ----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write everything that `load` needs to one safetensors file, atomically.

        Raises:
            RunError: if it cannot be written.
        """
        self.check_path(path)
        header = {
            "kind": KIND,
            "method": self.NAME,
            "arguments": self.arguments,
            "precision": self.precision,
            "full_scale": self.full_scale,
            "operating_points": points_of(self),
            "card": self.card,
        }
        write_tensors(as_path(path), self.state_dict(), header)

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device | None = None) -> Self:
        """Load what `save` wrote; needs no other weights and no network.

        Args:
            path: the file, or the folder of its run.
            device: where it computes from now on; None takes the GPU where there is one.

        Raises:
            RunError: if the file is missing, damaged, or of another method.
        """
        found = load_method(path, device)
        if not isinstance(found, cls):
            raise RunError(f"{path} holds a {type(found).__name__}, not a {cls.__name__}")
        return found

    def check_path(self, path: str | os.PathLike) -> None:
        """Raise RunError, which names the path, if nothing that `load` reads can be written."""

    def resized_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        """Give buffers whose sizes are found on images the sizes that they have in a file."""


def load_method(path: str | os.PathLike, device: str | torch.device | None = None) -> Method:
    """Load whichever method a file holds.

    Args:
        path: the file, or the folder of its run.
        device: where it computes from now on; None takes the GPU where there is one.

    Raises:
        RunError: if the file is missing, damaged, or holds no method of this package.
    """
    path = as_path(path)
    path = path / DETECTOR if path.is_dir() else path
    tensors, header = read_tensors(
        path, KIND, method=str, arguments=dict, precision=str, card=dict, operating_points=dict
    )
    try:
        method = find_method(header["method"])(**header["arguments"], pretrained=False)
        if header["precision"] not in ("float32", "bfloat16"):
            raise ValueError(f"the precision {header['precision']!r} is unknown")
        white = header.get("full_scale")
        if white is not None and (type(white) is not int or not 255 <= white <= 65535):
            raise ValueError(f"full_scale must be 255 to 65535, not {white!r}")
        method.precision, method.full_scale = header["precision"], white
        set_points(method, header["operating_points"])
        method.resized_buffers(tensors)
    except (ValueError, TypeError, LookupError, OverflowError, RuntimeError) as error:
        raise RunError(
            f"{path} has a header that does not describe a method: {one_line(error)}"
        ) from None
    load_weights(method, tensors, path)
    method.card = header["card"]
    method.to(memory_format=torch.channels_last)
    method.use_device(device)
    return method.eval()


def checked_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels, of a square's side or of both; ValueError for no such size."""
    sides = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
    whole = len(sides) == 2 and all(isinstance(s, int) and s >= 32 for s in sides)
    if not whole or sides[0] * sides[1] > MOST_PIXELS:
        raise ValueError(
            "image_size must be pixels, or (height, width), at least 32 each and "
            f"{MOST_PIXELS} together, not {image_size!r}"
        )
    return sides


def checked_positive(name: str, value: float) -> float:
    """A finite number above 0; ValueError, which names the argument, for anything else."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a number above 0, not {value!r}")
    return float(value)


class _Counted(nn.Module):
    """A method without what stands around its networks: no precision, no inference mode."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.method.shown_and_judged(images)


class Frozen:
    """What a frozen network says of training images, computed once for as many as memory holds.

    The outputs are rounded to half precision, whether or not they are kept, so that a training
    does not depend on how many of them fit.

    Args:
        images: the training images.
        compute: uint8 images (N, 3, H, W), on the device -> tensors, each (N, ...).
        device: where it computes.
        megabytes: memory for the outputs.
    """

    def __init__(
        self,
        images: ResizedImages,
        compute: Callable[[Tensor], Sequence[Tensor]],
        device: torch.device,
        megabytes: float = 2048,
    ):
        self.images, self.compute, self.device = images, compute, device
        self._kept: dict[int, list[Tensor]] = {}
        self._left = megabytes * 2**20

    def __getitem__(self, numbers: Sequence[int]) -> list[Tensor]:
        """The outputs for some images, float32, each (n, ...)."""
        rows = [self._one(number) for number in numbers]
        return [torch.cat(parts).float() for parts in zip(*rows, strict=True)]

    def __iter__(self) -> Iterator[list[Tensor]]:
        """The outputs for each image in turn."""
        return (self[[number]] for number in range(len(self.images)))

    @torch.no_grad()
    def _one(self, number: int) -> list[Tensor]:
        found = self._kept.get(number)
        if found is None:
            found = [t.half() for t in self.compute(pixels(self.images, [number], self.device))]
            size = sum(t.nbytes for t in found)
            if size <= self._left:
                self._kept[number] = found
                self._left -= size
        return found


def pixels(images: ResizedImages, numbers: Sequence[int], device: torch.device) -> Tensor:
    """Some of the images, uint8, shape (n, 3, H, W)."""
    return torch.stack([to_tensor(images[number]) for number in numbers]).to(device)


def train_steps(
    run: Run,
    optimizer: torch.optim.Optimizer,
    terms_of: Callable[[int], dict[str, Tensor]],
    rate: Callable[[float], float],
) -> None:
    """Train what methods build on, on photographs: the steps that a run still lacks.

    Args:
        run: where it is logged, and resumed from.
        optimizer: its learning rates are those of the beginning.
        terms_of: the number of a step -> the terms of its loss, scalars with gradients.
        rate: share of the steps that is done, in [0, 1) -> what learning rates are multiplied by.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    with run:
        done, _ = run.resume()
        progress = tqdm(range(done, run.total), initial=done, total=run.total)
        for step in progress:
            torch.manual_seed(step)
            for group, first in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = first * rate(step / run.total)
            terms = terms_of(step)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            run.window.append({name: value.item() for name, value in terms.items()})
            if (step + 1) % 100 == 0 or step + 1 == run.total:
                row = {name: float(np.mean([r[name] for r in run.window])) for name in terms}
                progress.set_postfix({name: f"{value:.4f}" for name, value in row.items()})
                run.log({"step": step + 1} | row)
                run.window.clear()
            run.after(step + 1)
