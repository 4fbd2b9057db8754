"""The methods that are fitted and measured beside one another: EfficientAD and those of others.

Others join by an entry point of the group `effad.methods`, whose name is the method's, and which
loads a class, as `baselines` does for the paper's other eight methods. The class is a `Predictor`
with

* `of_profile(profile, **changes)`: a new one, with the pretrained networks of a profile;
* `fit(scenario, profile, seed, run_dir, device)`: fit it, or take up a run where it was
  interrupted, and leave it in run_dir/detector.safetensors;
* `load(path, device)`: what that file holds;
* `counted()`: the networks whose parameters and FLOPs are counted;
* `untrained(profile, **changes)`: one to be timed, whose numbers are arbitrary.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from effad_core.datasets import PretrainingImages, Scenario
from effad_core.detector import DETECTOR, EfficientAD
from effad_core.errors import RunError
from effad_core.prediction import Predictor
from effad_core.schedule import Schedule
from effad_core.storage.files import as_path
from effad_core.storage.weights import header_of
from effad_core.training import train

import torch

GROUP = "effad.methods"
KIND = "method"  # of a file that such a method wrote
SIZES = {"EfficientAD-S": "small", "EfficientAD-M": "medium"}
ORDER = (  # the paper's
    "GCAD", "SimpleNet", "S-T", "FastFlow", "DSR", "PatchCore", "PatchCore Ens", "AST", *SIZES,
)  # fmt: skip


@cache
def _registered() -> dict:
    return {point.name: point for point in entry_points(group=GROUP)}


def method_names() -> list[str]:
    """All methods that are there, the paper's ten in its order, then others."""
    names = [*SIZES, *_registered()]
    return sorted(
        names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name)
    )


def chosen_methods(names: Iterable[str]) -> list[str]:
    """Methods as a command's user names them: "all", or any way of writing a name.

    Raises:
        ValueError: for an unknown one.

    Example:
        >>> chosen_methods(["patchcore-ens", "efficientad-s"])
        ['PatchCore Ens', 'EfficientAD-S']
    """
    known = {_plain(name): name for name in method_names()}
    found = []
    for name in names:
        if _plain(name) == "all":
            found += known.values()
        elif _plain(name) in known:
            found.append(known[_plain(name)])
        else:
            raise ValueError(f"the method must be one of {', '.join(known.values())}, not {name!r}")
    return list(dict.fromkeys(found))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def slug(name: str) -> str:
    """A method's name as part of a folder's name."""
    return name.lower().replace(" ", "-")


def find_method(name: str) -> type:
    """The class of a method other than EfficientAD.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _registered():
        known = ", ".join(_registered())
        raise ValueError(f"the method must be one of {known}, not {name!r}")
    return _registered()[name].load()


def load_detector(
    path: str | Path, device: str | torch.device | None = None
) -> tuple[str, Predictor]:
    """Whatever a detector's file holds, with the name of its method.

    Args:
        path: the file, or the folder of its run.
        device: where it computes from now on; None takes the GPU where there is one.

    Raises:
        RunError: if the file is missing, damaged, or of a method that is not installed.
    """
    path = as_path(path)
    path = path / DETECTOR if path.is_dir() else path
    header = header_of(path)
    if header.get("kind") != KIND:
        detector = EfficientAD.load(path, device)
        return f"EfficientAD-{detector.size[0].upper()}", detector
    name = str(header.get("method"))
    try:
        method = find_method(name)
    except ValueError as error:
        raise RunError(f"{path} cannot be loaded: {error}") from None
    return name, method.load(path, device)


@dataclass(frozen=True)
class OwnRecipe:
    """How a benchmark fits EfficientAD.

    Attributes:
        detector: gives a new one, with a teacher.
        schedule, pretraining: as in `train`.
        name: of the method.
    """

    detector: Callable[[], EfficientAD]
    schedule: Schedule
    pretraining: PretrainingImages
    name: str = "EfficientAD-S"

    def in_precision(self, precision: str) -> "OwnRecipe":
        """The same, with that precision in its schedule, and with memory for decoded images.

        A recipe that came from another process has none: see `PretrainingImages.__getstate__`.
        """
        images = self.pretraining
        return replace(
            self,
            schedule=replace(self.schedule, precision=precision),
            pretraining=PretrainingImages(images.paths, images.source, images.licence),
        )

    def fit(
        self, scenario: Scenario, seed: int, run_dir: Path, device: str | torch.device | None
    ) -> Predictor:
        """Fit one, or take up the run of a folder."""
        detector = self.detector()
        train(
            detector, scenario, self.schedule, self.pretraining, run_dir, seed=seed, device=device
        )
        return detector


@dataclass(frozen=True)
class Recipe:
    """How a benchmark fits another method.

    Attributes:
        name: of the method.
        profile: which it is fitted by.
    """

    name: str
    profile: str

    def fit(
        self, scenario: Scenario, seed: int, run_dir: Path, device: str | torch.device | None
    ) -> Predictor:
        """Fit one, or take up the run of a folder."""
        method = find_method(self.name).of_profile(self.profile)
        return method.fit(scenario, self.profile, seed, run_dir, device)
