"""Make the evidence that the notebooks show: data/evidence, from the list in evidence.toml.

    make evidence
    python -m benchmarks.evidence --only tray --runs build/evidence

Trains what the list names, keeps the runs in --runs, and writes into data/evidence what is shipped
of them. An interrupted run goes on. Entries with variants are studies (studies.py). What was made
by today's code, teacher and schedules stays; `--check` only says what was not. Where only the maps
of a shipped detector are missing, they are computed without a training. Test images are
scored after the training and choose nothing.
"""

import argparse
import json
import os
import shutil
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from benchmarks.studies import make_study, study_settings, train_timed
from effad_core import EfficientAD, Sample, Scenario, Schedule, evaluate, open_scenario, train
from effad_core.datasets import PretrainingImages, ResizedImages, evenly, open_pretraining
from effad_core.detector import DETECTOR
from effad_core.errors import RunError, command_errors
from effad_core.evaluation.evidence import FACTS, FOLDER, TEACHER, Evidence, mean_levels
from effad_core.evaluation.examples import choose_tested
from effad_core.evaluation.known import CELLS, KnownMaps, holds
from effad_core.storage.digests import combined, inventory
from effad_core.storage.files import as_path, write_text
from effad_core.storage.runs import Run
from effad_core.storage.shipped import shipped
from effad_core.storage.weights import fingerprint, write_tensors
from effad_core.training import CELL_IMAGES

import numpy as np
import torch
from torch import Tensor

LIST = Path(__file__).with_name("evidence.toml")
PROBE = "probe.json"
TEST_IMAGES = 120  # `test_images` of the notebooks that look at the shipped detectors
TOLERANCE = 0.02  # of the probe's numbers: processors round differently, and six steps add it up


def entries() -> dict[str, dict]:
    """The list, with what an entry may leave out."""
    found = tomllib.loads(LIST.read_text(encoding="utf-8"))
    return {name: {"changes": {}, "size": "small"} | entry for name, entry in found.items()}


def rounded(detector: EfficientAD, scenario: Scenario) -> EfficientAD:
    """The detector as it is shipped: weights of float16, all numbers found anew in float32.

    So its maps are the same on every machine, within float32.

    Args:
        detector: trained; it is changed.
        scenario: its own.
    """
    for network in (detector.student, detector.autoencoder):
        for weight in network.parameters():
            weight.data.copy_(weight.half())
    detector.precision = "float32"
    training = ResizedImages(scenario.train, detector.image_size)
    if not (detector.cell_means == 1).all():
        detector.find_cell_means(training.batches(8, most=CELL_IMAGES))
    validation = ResizedImages(scenario.validation, detector.image_size)
    detector.find_quantiles(validation.batches(8), len(validation))
    return detector


def write_detector(detector: EfficientAD, path: str | os.PathLike) -> None:
    """Write a detector that `rounded` gave, without its teacher.

    Raises:
        RunError: if it cannot be written.
    """
    networks = ("student.", "autoencoder.")
    tensors: dict[str, Tensor] = {
        name: value.half() if name.startswith(networks) else value
        for name, value in detector.state_dict().items()
        if not name.startswith(TEACHER)
    }
    header = {
        "kind": "evidence",
        "size": detector.size,
        "teacher": fingerprint(detector.teacher.state_dict()),
        "full_scale": detector.full_scale,
        "card": detector.card,
    }
    write_tensors(as_path(path), tensors, header)


def looked_at(scenario: Scenario) -> list[Sample]:
    """The images whose maps are shipped: validation images, as many training images, test images.

    Of many test images those that the notebooks' `test_images` stands for.
    """
    test = scenario.test
    if len(test) > 2 * TEST_IMAGES:
        normal, anomalous = scenario.test_part(TEST_IMAGES)
        test = (*normal, *anomalous, *choose_tested(test, TEST_IMAGES))
    training = evenly(scenario.train, len(scenario.validation))
    return [*dict.fromkeys((*scenario.validation, *training, *test))]


def write_maps(scenario: Scenario, folder: Path) -> None:
    """Compute the maps of an entry's shipped detector anew, and write them beside it."""
    (folder / CELLS).unlink(missing_ok=True)  # it may hold images that nobody looks at any more
    known = KnownMaps(shipped_detector(folder), folder, torch.float16)
    for batch in ResizedImages(looked_at(scenario), known.image_size).batches(8):
        known.cells(batch)
    print(f"{folder.name}: {known}", flush=True)


def shipped_detector(folder: Path) -> EfficientAD:
    """The detector in the folder of an entry."""
    return Evidence(folder, {}).detector("cpu")


def has_maps(folder: Path) -> bool:
    """Whether the maps in the folder of an entry are those of its detector."""
    return holds(folder / CELLS, shipped_detector(folder))


def settings(profile: str, changes: Mapping, size: str) -> dict:
    """What evidence depends on, beside the code: today's schedule and teacher."""
    detector = EfficientAD(size).load_teacher()
    schedule = asdict(Schedule.named(profile, **changes)) | {"precision": "auto"}
    return {
        "schedule": schedule,
        "teacher_weights": fingerprint(detector.teacher.state_dict()),
    }


def probe() -> dict[str, list[float]]:
    """What the code of today computes in a training of six steps on photographs, in float32.

    A change of the networks, losses, draws, training or inference changes these numbers: evidence
    that was made beside other numbers was made by other code. Between processors they differ by
    rounding.
    """
    photographs = open_pretraining()
    samples = tuple(Sample(path, 0, "good") for path in photographs.paths)
    scenario = Scenario("probe", samples[:4], samples[4:7], samples[7:9], "photographs", "free")
    detector = EfficientAD().load_teacher()
    schedule = Schedule.smoke(precision="float32", hard_quantile=0.999)  # whatever profiles have
    last = train(detector, scenario, schedule, _few(photographs), seed=0, device="cpu")
    return {
        "losses": [last[name] for name in ("L_hard", "penalty", "L_AE", "L_STAE")],
        "quantiles": detector.quantiles.tolist(),
        "scores": evaluate(detector, scenario, device="cpu").scores["combined"].tolist(),
    }


def _few(photographs: PretrainingImages) -> PretrainingImages:
    return PretrainingImages(photographs.paths[9:], photographs.source, photographs.licence)


def same(found: Mapping, expected: Mapping) -> bool:
    """Whether two probes are of the same code."""
    return found.keys() == expected.keys() and all(
        np.allclose(found[name], expected[name], rtol=TOLERANCE, atol=1e-3) for name in found
    )


def outdated(name: str, entry: Mapping, folder: Path) -> str | None:
    """Why an entry's evidence is not of today's list, teacher and schedules; None if it is."""
    path = folder / name / FACTS
    if not path.is_file():
        return "it is missing"
    facts = json.loads(path.read_text(encoding="utf-8"))
    if "variants" in entry:
        keys = ("scenario", "profile", "seeds", "size")
        if any(facts[key] != entry[key] for key in keys):
            return "evidence.toml says something else now"
        return (
            None if facts["settings"] == study_settings(entry) else "schedules or teachers changed"
        )
    if any(facts[key] != entry[key] for key in ("scenario", "profile", "changes", "size")):
        return "evidence.toml says something else now"
    made = [*map(int, facts["metrics"])], facts["detector_seed"]
    if made != (entry["seeds"], entry["detector"]):
        return "evidence.toml names other seeds now"
    for key, value in settings(entry["profile"], entry["changes"], entry["size"]).items():
        if facts[key] != value:
            return f"the {key.replace('_', ' ')} changed"
    return None


def make(name: str, entry: Mapping, runs: Path, folder: Path) -> None:
    """Train an entry's seeds, or take up their runs, and write what is shipped of them."""
    scenario, pretraining = open_scenario(entry["scenario"]), open_pretraining()
    schedule = Schedule.named(entry["profile"], **entry["changes"])
    facts = {key: entry[key] for key in ("scenario", "profile", "changes", "size")}
    facts |= settings(entry["profile"], entry["changes"], entry["size"])
    facts |= {"command": "make evidence", "minutes": {}, "metrics": {}}
    facts["training_images"] = combined(inventory(sample.path for sample in scenario.train))
    facts["training_levels"] = mean_levels(scenario.train).round(3).tolist()
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    for seed in entry["seeds"]:
        run = runs / f"{name}-{entry['profile']}-{entry['size']}-seed{seed}"
        detector = EfficientAD(entry["size"]).load_teacher()
        minutes, processor = train_timed(detector, scenario, schedule, pretraining, run, seed)
        facts["processor"] = processor
        facts["minutes"][str(seed)] = minutes
        shown = seed == entry["detector"]
        evaluation = evaluate(rounded(detector, scenario) if shown else detector, scenario)
        facts["metrics"][str(seed)] = evaluation.metrics()
        print(f"{name}, seed {seed}: {evaluation.auroc()}", flush=True)
        if shown:
            write_detector(detector, target / DETECTOR)
            write_maps(scenario, target)
            shutil.copyfile(run / Run.LOG, target / Run.LOG)
            scores = {m: [round(float(s), 4) for s in v] for m, v in evaluation.scores.items()}
            facts |= {"detector_seed": seed, "labels": evaluation.labels.tolist(), "scores": scores}
    write_text(target / FACTS, json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*entries()], default=[*entries()])
    parser.add_argument("--runs", type=as_path, default=Path("build/evidence"))
    parser.add_argument("--check", action="store_true", help="say what is out of date, and stop")
    args = parser.parse_args()
    folder, today = shipped(FOLDER), probe()
    old = folder / PROBE
    other_code = not old.is_file() or not same(json.loads(old.read_text()), today)
    kept = args.runs / PROBE
    found = {
        name: "the code computes something else now"
        if other_code
        else outdated(name, entry, folder)
        for name, entry in entries().items()
    }
    for name, reason in found.items():
        print(f"{name}: {reason or 'up to date'}", flush=True)
    if args.check:
        sys.exit(any(found.values()))
    with command_errors():
        if kept.is_file() and not same(json.loads(kept.read_text()), today):
            raise RunError(f"{args.runs} holds runs of other code: delete it or name other --runs")
        write_text(kept, json.dumps(today, indent=1) + "\n")
        for name in args.only:
            entry = entries()[name]
            if found[name]:
                made = make_study if "variants" in entry else make
                made(name, entry, args.runs, folder)
            elif "detector" in entry and not has_maps(folder / name):
                write_maps(open_scenario(entry["scenario"]), folder / name)
    if other_code and set(args.only) == {*entries()}:
        write_text(old, json.dumps(today, indent=1) + "\n")


if __name__ == "__main__":
    main()
