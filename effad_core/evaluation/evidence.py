"""Evidence: runs long enough to show what a notebook claims, shipped with the package.

A folder of `data/evidence` holds what several seeds of one training found: run.json (how it was
trained, how long it took on which processor, metrics, the scores of the test images), log.csv of
one seed and, where a notebook looks at maps, that seed's detector and its maps of many images. A
study, which compares variants of one short training, has a run.json alone. `make evidence` makes
them.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from effad_core.acceleration.precision import WINOGRAD, resolve_precision
from effad_core.datasets import Sample, Scenario, open_pretraining
from effad_core.detector import DETECTOR, EfficientAD
from effad_core.errors import RunError
from effad_core.evaluation.known import KnownMaps
from effad_core.evaluation.tables import Metrics, headline
from effad_core.schedule import Schedule
from effad_core.storage.digests import combined, inventory
from effad_core.storage.files import as_path
from effad_core.storage.runs import Run
from effad_core.storage.shipped import shipped
from effad_core.storage.weights import fingerprint, load_weights, read_tensors
from effad_core.training import train

import numpy as np
import torch

FOLDER, FACTS = "evidence", "run.json"
TEACHER = "teacher."  # names of its weights in a detector's state
FLOAT32 = ("auto", "float32", WINOGRAD)  # ways to compute with the quantiles of float32
ROUNDING = 0.05  # of an image's mean level: a difference that nobody sees


@dataclass(frozen=True)
class Evidence:
    """What `open_evidence` gives.

    Attributes:
        folder: where it is.
        facts: run.json: "scenario", "profile", "changes" (of the profile), "schedule", "size",
            "teacher_weights" and "training_images" (fingerprints), "training_levels" (see
            `mean_levels`), "command", "processor", "minutes" by seed (None where nobody took the
            time), "metrics" by seed, "detector_seed", and of that seed "labels" and "scores" of the
            test images in the scenario's order.
    """

    folder: Path
    facts: Mapping

    def __str__(self) -> str:
        facts = self.facts
        minutes = [m for m in facts["minutes"].values() if m is not None]
        took = f", {np.mean(minutes):.0f} minutes each" if minutes else ""
        changes = "".join(f", {name}={value}" for name, value in facts["changes"].items())
        return (
            f"evidence: {facts['scenario']}, profile {facts['profile']}{changes}, "
            f"{len(facts['metrics'])} seeds{took} on {facts['processor']} (make evidence)"
        )

    def metric(self, name: str = "image_auroc", group: str | None = None) -> np.ndarray:
        """A metric of every seed, shape (seeds,).

        Args:
            name: as in `Evaluation.metrics`.
            group: of images, as there; None takes the one that stands for the scenario.

        Example:
            >>> open_evidence("tray").metric(group="logical_anomalies").shape
            (3,)
        """
        found: Sequence[Metrics] = list(self.facts["metrics"].values())
        return np.array([(headline(m) if group is None else m[group])[name] for m in found])

    @cached_property
    def log(self) -> np.ndarray:
        """The rows of log.csv, with its columns as names."""
        return np.genfromtxt(self.folder / Run.LOG, delimiter=",", names=True)

    def detector(self, device: str | torch.device | None = None) -> EfficientAD:
        """The shipped detector, with the shipped teacher.

        Args:
            device: where it computes; None takes the GPU where there is one.

        Raises:
            RunError: if there is none, it is damaged, or belongs to another teacher.
        """
        path = self.folder / DETECTOR
        tensors, header = read_tensors(path, "evidence", size=str, card=dict, teacher=str)
        detector = EfficientAD(header["size"]).load_teacher()
        if header["teacher"] != fingerprint(detector.teacher.state_dict()):
            raise RunError(f"{path} was trained with another teacher: run make evidence")
        own = {n: t for n, t in detector.state_dict().items() if n.startswith(TEACHER)}
        load_weights(detector, own | tensors, path)
        detector.full_scale, detector.card = header.get("full_scale"), header["card"]
        detector.use_device(device)
        return detector.eval()


def open_evidence(name: str) -> Evidence:
    """Evidence that is shipped with the package.

    Args:
        name: its folder in `data/evidence`; a scenario's name stands for the profile `laptop`.

    Raises:
        RunError: if there is none of that name, or its run.json is damaged.

    Example:
        >>> evidence = open_evidence("solar-mono")
        >>> evidence.facts["profile"], evidence.detector("cpu").size
        ('laptop', 'small')
    """
    return Evidence(shipped(f"{FOLDER}/{name}"), _facts(name))


@dataclass(frozen=True)
class Study:
    """What `open_study` gives: trainings alike in all but the variant, the length and the seed.

    Attributes:
        facts: run.json: "scenario", "profile", "seeds", "size", "images" (how many were trained on,
            and how many were scored), "command", "processor", "settings" and "training_images"
            (what it depends on), and "rows": one training each, with its "variant", "iterations",
            "seed", "minutes" (None where nobody took the time), "metrics" by group of images,
            "losses" (the last row of its log), and "photographs": mean squares of the student's
            output and of its "difference" from the teacher on photographs.
    """

    facts: Mapping

    def __str__(self) -> str:
        facts, minutes = self.facts, [row["minutes"] for row in self.facts["rows"]]
        took = f", {sum(minutes):.0f} minutes" if None not in minutes else ""
        trained, scored = facts["images"]
        return (
            f"evidence: {facts['scenario']}, {trained} training and {scored} test images, "
            f"{len(minutes)} trainings with {len(facts['seeds'])} seeds{took} "
            f"on {facts['processor']} ({facts['command']})"
        )

    @property
    def variants(self) -> list[str]:
        """Their names, in the order of the list."""
        return list(dict.fromkeys(row["variant"] for row in self.facts["rows"]))

    def iterations(self, variant: str) -> list[int]:
        """The lengths of a variant's trainings, ascending."""
        return sorted({r["iterations"] for r in self.facts["rows"] if r["variant"] == variant})

    def metric(
        self,
        variant: str,
        name: str = "image_auroc_student_teacher",
        group: str = "all",
        iterations: int | None = None,
    ) -> np.ndarray:
        """A metric of every seed, shape (seeds,).

        Args:
            variant: which.
            name: a metric; a term of the loss, such as "L_AE"; "student" or "difference" for what
                is measured on photographs.
            group: of test images, as in `Evaluation.metrics`.
            iterations: how long the trainings were; None takes the longest.

        Example:
            >>> study = open_study("losses-tray")  # three seeds
            >>> study.metric("plain mean, penalty", group="structural_anomalies").shape
            (3,)
        """
        length = iterations or self.iterations(variant)[-1]
        rows = [
            r for r in self.facts["rows"] if (r["variant"], r["iterations"]) == (variant, length)
        ]
        return np.array(
            [{**r["metrics"][group], **r["losses"], **r["photographs"]}[name] for r in rows]
        )


def open_study(name: str) -> Study:
    """A study that is shipped with the package.

    Args:
        name: its folder in `data/evidence`.

    Raises:
        RunError: if there is none of that name, or its run.json is damaged.

    Example:
        >>> open_study("teachers").variants
        ['random teacher', 'distilled in notebook 02', 'shipped teacher']
    """
    return Study(_facts(name))


@dataclass(frozen=True)
class Methods:
    """What `open_methods` gives: all methods, each fitted to the same scenarios.

    Attributes:
        facts: run.json: "profile", "command", "processor", "settings" of each method (its arguments
            and schedule), "costs" of each (parameters, FLOPs of an image), its "milliseconds" an
            image, and "results": by scenario and method "seeds" (metrics by group of images) and
            "minutes" of fitting by seed.
    """

    facts: Mapping

    def __str__(self) -> str:
        facts = self.facts
        results = facts["results"]
        count = {len(one["seeds"]) for found in results.values() for one in found.values()}
        seeds = " or ".join(map(str, sorted(count)))
        return (
            f"evidence: {', '.join(results)}, profile {facts['profile']}, {seeds} seed(s) "
            f"on {facts['processor']} ({facts['command']})"
        )

    def metric(
        self, scenario: str, method: str, name: str = "image_auroc", group: str | None = None
    ) -> np.ndarray:
        """A metric of every seed, shape (seeds,).

        Args:
            scenario, method: which.
            name: as in `Evaluation.metrics`.
            group: of images, as there; None takes the one that stands for the scenario.
        """
        found = self.facts["results"][scenario][method]["seeds"].values()
        return np.array([(headline(m) if group is None else m[group])[name] for m in found])


def open_methods() -> Methods:
    """The comparison of all methods that is shipped with the package.

    Raises:
        RunError: if it is missing or damaged.

    Example:
        >>> open_methods().metric("tray", "PatchCore", group="structural_anomalies").shape
        (1,)
    """
    return Methods(_facts("methods"))


def _facts(name: str) -> Mapping:
    """The run.json of an entry of evidence.toml."""
    path = shipped(f"{FOLDER}/{name}") / FACTS
    if not path.is_file():
        names = sorted(path.parent.name for path in shipped(FOLDER).glob(f"*/{FACTS}"))
        raise RunError(f"there is no evidence {name!r}; there is: {', '.join(names)}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise RunError(f"{path} is damaged: take it from the repository again") from None


def mean_levels(samples: Sequence[Sample]) -> np.ndarray:
    """The mean of each image over pixels and colours, 0..255, shape (images,)."""
    return np.array([np.asarray(sample.load()).mean() for sample in samples])


def evidence_of(scenario: Scenario) -> Evidence | None:
    """The evidence whose detector was trained on these images; None if there is none.

    The same files are recognised by their content. Other files count as the same images if the
    mean level of each is nearly that of the evidence's image: the parts tray is drawn on the
    reader's machine, and processors round differently.

    Args:
        scenario: opened as in the evidence: with the same validation images.
    """
    if not (shipped(f"{FOLDER}/{scenario.name}") / DETECTOR).is_file():
        return None
    evidence = open_evidence(scenario.name)
    own = combined(inventory(sample.path for sample in scenario.train))
    if evidence.facts["training_images"] == own:
        return evidence
    expected = np.array(evidence.facts["training_levels"])
    if len(expected) != len(scenario.train):
        return None
    return evidence if np.abs(mean_levels(scenario.train) - expected).max() < ROUNDING else None


def detector_of(
    scenario: Scenario,
    runs: str | os.PathLike,
    train_own: bool = False,
    profile: str = "quick",
    pretraining: str | None = None,
    seed: int = 0,
) -> tuple[EfficientAD, Path]:
    """The detector that a notebook looks at: the shipped one, or one that is trained here.

    It prints which one it is. The shipped one computes in float32, for which its quantiles hold,
    and brings the maps of the images that the notebooks look at (see `KnownMaps`). Of a scenario
    without evidence, or with other images than the evidence was trained on, one is trained.

    Args:
        scenario: whose.
        runs: the folder of runs.
        train_own: train one even if there is evidence.
        profile, pretraining, seed: of that training; `pretraining` as in `open_pretraining`.

    Returns:
        The detector, and a folder with its log.csv and the maps that are known, for what is made
        with it: its run, or `<scenario>-evidence`.
    """
    folder = as_path(runs) / f"{scenario.name}-evidence"
    if not train_own and (evidence := evidence_of(scenario)):
        print(evidence)
        detector = evidence.detector()
        detector.precision = resolve_precision(
            "auto", detector.device, "inference", FLOAT32, detector.size
        )
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(evidence.folder / Run.LOG, folder / Run.LOG)
        KnownMaps(detector, folder).take(evidence.folder)
        return detector, folder
    folder = folder.with_name(f"{scenario.name}-{profile}")
    detector = EfficientAD().load_teacher()
    schedule = Schedule.named(profile)
    train(detector, scenario, schedule, open_pretraining(pretraining), folder, seed=seed)
    print(f"a detector trained here: {scenario.name}, profile {profile}, seed {seed}")
    return detector, folder
