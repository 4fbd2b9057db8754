"""One run of a benchmark: a scenario, a method and a seed, wherever it is computed."""

import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from effad_core.datasets import Sample, Scenario, open_scenario
from effad_core.detector import DETECTOR
from effad_core.errors import DataError, RunError
from effad_core.evaluation.methods import OwnRecipe, Recipe
from effad_core.evaluation.scores import METRICS, evaluate
from effad_core.evaluation.tables import COLUMNS, Metrics, headline
from effad_core.evaluation.timing import machine
from effad_core.storage.digests import digest, inventory
from effad_core.storage.files import write_text

import torch

TOOK = "took.json"  # in a run's folder: minutes of fitting, milliseconds an image
EXPECTED = (DataError, RunError, ValueError, OSError)  # what ends a run, and not the others


@dataclass(frozen=True)
class Entry:
    """One scenario of a benchmark: its dataset, its name, and what `open_scenario` takes."""

    dataset: str
    name: str
    source: str | Path | None
    chosen: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def open(self) -> Scenario:
        """The scenario; DataError if it cannot be used."""
        return open_scenario(self.source, **self.chosen)


@dataclass(frozen=True)
class Task:
    """One run of a benchmark.

    Attributes:
        entry: its scenario.
        recipe: how the method is fitted.
        seed: of all its random choices.
        run_dir: its folder, whose name is the run's.
        maps: folder for anomaly maps, if they are wanted.
        device: where to compute, as in `train`.
    """

    entry: Entry
    recipe: OwnRecipe | Recipe
    seed: int
    run_dir: Path
    maps: Path | None = None
    device: str | torch.device | None = None

    @property
    def name(self) -> str:
        return self.run_dir.name

    def run(self, scenario: Scenario) -> Metrics:
        """Fit (or take up, or load) it and evaluate it, unless its metrics are there already.

        metrics.json counts as this run's if it holds the digests of its detector and of its test
        images, their labels and masks. With a folder for maps, it is evaluated in any case and its
        anomaly maps are written there.
        """
        start = time.perf_counter()
        detector = self.recipe.fit(scenario, self.seed, self.run_dir, self.device)
        minutes = (time.perf_counter() - start) / 60
        identity = {
            "detector": sha256((self.run_dir / DETECTOR).read_bytes()).hexdigest(),
            "test_images": tested(scenario.test),
        }
        known = _read_metrics(self.run_dir / METRICS, identity) if self.maps is None else None
        if known is not None:
            print(f"{self.name}: evaluated before", flush=True)
            return known
        start = time.perf_counter()
        keep = None if self.maps is None else True
        evaluation = evaluate(detector, scenario, keep_maps=keep, device=self.device)
        milliseconds = 1000 * (time.perf_counter() - start) / len(scenario.test)
        with warnings.catch_warnings():  # which masks are missing was said before the training
            warnings.simplefilter("ignore")
            metrics = evaluation.save(self.run_dir, seed=self.seed, **identity)
        took = {"minutes": minutes, "milliseconds": milliseconds}
        took["machine"] = machine(detector.device)
        write_text(self.run_dir / TOOK, json.dumps(took, indent=1) + "\n")
        if self.maps is not None:
            print(f"maps in {evaluation.save_maps(self.maps / self.name)}", flush=True)
        found = headline(metrics)
        areas = "  ".join(f"{COLUMNS[n]} {found[n]:.3f}" for n in list(COLUMNS)[:3] if n in found)
        print(f"{self.name}: {areas}   ({minutes:.1f} min of training in this call)", flush=True)
        return metrics


Outcome = tuple[Task, Metrics | None, str]  # the metrics, or why there are none


def in_turn(tasks: Sequence[Task], scenarios: Mapping[str, Scenario]) -> Iterator[Outcome]:
    """Run the tasks one after another, here.

    Args:
        tasks: whatever is to be run.
        scenarios: their scenarios, by name.
    """
    for task in tasks:
        try:
            yield task, task.run(scenarios[task.entry.name]), ""
        except EXPECTED as error:
            yield task, None, str(error)


def tested(samples: Sequence[Sample]) -> str:
    """A digest of everything that metrics are computed from, beside the detector.

    Args:
        samples: the test images.

    Returns:
        16 hexadecimal digits that change with the name, content, label or type of an image, the
        content of a mask, and what defects_config.json says of the kinds of defects.

    Raises:
        DataError: if an image or a mask cannot be opened.
    """
    files = inventory(path for sample in samples for path in (sample.path, *sample.mask_paths))
    contents = iter(content for _, content in files)
    rows = []
    for s in samples:
        found = [next(contents) for _ in (s.path, *s.mask_paths)]
        rows.append((s.anomaly_type, s.path.name, s.label, s.defect_kinds, found))
    return digest(repr(rows))


def _read_metrics(path: Path, identity: Mapping[str, str]) -> Metrics | None:
    """What a metrics.json says, if it is whole and holds these entries."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        if not identity.items() <= found.items():
            return None
        metrics = {
            group: {name: float(value) for name, value in values.items()}
            for group, values in found["metrics"].items()
        }
        if math.isfinite(sum(headline(metrics).values())):
            return metrics
    except (ValueError, AttributeError, KeyError, TypeError, OverflowError, RecursionError):
        pass
    print(f"{path} is damaged and is written anew", flush=True)
    return None
