"""Studies: short trainings that are alike in all but one thing, each with several seeds.

`make evidence` runs those of evidence.toml that have `variants`. A variant is a change of the
schedule, or another teacher. Everything is scored once, after the training.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from effad_core import (
    DistillationSchedule,
    EfficientAD,
    PatchDescriptionNetwork,
    Sample,
    Scenario,
    Schedule,
    distill,
    evaluate,
    open_extractor,
    open_pretraining,
    open_scenario,
    train,
)
from effad_core.datasets import PretrainingImages, evenly, normalise
from effad_core.evaluation.evidence import FACTS
from effad_core.evaluation.timing import machine
from effad_core.storage.digests import combined, inventory
from effad_core.storage.files import write_text
from effad_core.storage.runs import Run
from effad_core.storage.weights import fingerprint
from effad_core.training import TERMS

import numpy as np
import torch

RESULT = "result.json"  # in the folder of a run: its row of the study
MINUTES = "minutes.json"  # in the folder of a run: what its training took
METRICS = ("image_auroc", "image_auroc_student_teacher", "image_auroc_autoencoder")
SHIPPED, RANDOM, SHORT = "shipped", "random", "quick"  # teachers
EXTRACTOR = "efficientnet-lite0"


def schedules(entry: Mapping) -> Iterator[tuple[str, str, Schedule]]:
    """Each training of a study: the variant's name, its teacher, its schedule.

    Args:
        entry: of evidence.toml; `iterations` may be several, and all variants are trained for each.
    """
    for name, changes in entry["variants"].items():
        teacher = changes.get("teacher", SHIPPED)
        changes = entry["changes"] | {k: v for k, v in changes.items() if k != "teacher"}
        for iterations in entry.get("iterations", [None]):
            length = {} if iterations is None else {"iterations": iterations}
            yield name, teacher, Schedule.named(entry["profile"], **changes | length)


def settings_of(teacher: str, schedule: Schedule, size: str) -> dict:
    """What one training of a study depends on, beside the code and the images."""
    known = {
        SHIPPED: lambda: fingerprint(EfficientAD(size).load_teacher().teacher.state_dict()),
        RANDOM: lambda: "seed 1",
        SHORT: lambda: asdict(DistillationSchedule.named(SHORT)) | {"extractor": EXTRACTOR},
    }
    found = {"teacher": known[teacher](), "schedule": asdict(schedule) | {"precision": "auto"}}
    return json.loads(json.dumps(found))  # tuples become lists, as in a file


def study_settings(entry: Mapping) -> dict:
    """What a study depends on, beside the code: how many images, and each training's settings."""
    trainings = [
        {"variant": name} | settings_of(teacher, schedule, entry["size"])
        for name, teacher, schedule in schedules(entry)
    ]
    return {"images": entry.get("images"), "trainings": trainings}


def with_teacher(
    teacher: str, size: str, photographs: PretrainingImages, runs: Path
) -> EfficientAD:
    """A detector with the teacher of that name; notebook 02 makes and compares the same three."""
    detector = EfficientAD(size).load_teacher()
    if teacher == SHIPPED:
        return detector
    torch.manual_seed(1 if teacher == RANDOM else 0)
    network = PatchDescriptionNetwork(size, out_channels=detector.out_channels)
    if teacher == SHORT:
        psi = open_extractor(EXTRACTOR)
        images, _ = photographs.hold_out(max(2, min(50, len(photographs) // 5)))
        distill(network, psi, images, DistillationSchedule.named(SHORT), run_dir=runs / "teacher")
    detector.teacher.load_state_dict(network.state_dict())
    detector.card["teacher"] = teacher
    return detector


def train_timed(
    detector: EfficientAD,
    scenario: Scenario,
    schedule: Schedule,
    photographs: PretrainingImages,
    run: Path,
    seed: int,
) -> tuple[float | None, str]:
    """Train into a run's folder, or take up the run that is there.

    Returns:
        The minutes that it took, None if nobody took the time; and the processor.
    """
    fresh, start = not run.exists(), time.perf_counter()
    train(detector, scenario, schedule, photographs, run, seed=seed)
    if fresh:
        minutes = round((time.perf_counter() - start) / 60, 1)
        write_text(run / MINUTES, json.dumps([minutes, machine(detector.device)]))
    if not (run / MINUTES).is_file():
        return None, machine(detector.device)
    minutes, processor = json.loads((run / MINUTES).read_text(encoding="utf-8"))
    return minutes, processor


def part_of(scenario: Scenario, images: Sequence[int] | None) -> tuple[Scenario, list[Sample]]:
    """The images of a study: so many for training, so many of the test, half of them normal.

    Args:
        images: the two numbers; None takes all.

    Returns:
        The scenario with these training images, and the test images.
    """
    if images is None:
        return scenario, [*scenario.test]
    tested = [s for samples in scenario.test_part(images[1]) for s in samples]
    few = replace(
        scenario, train=evenly(scenario.train, images[0]), validation=scenario.validation[:12]
    )
    return few, tested


def on_photographs(detector: EfficientAD, photographs: PretrainingImages) -> dict[str, float]:
    """What the penalty acts on: mean squares of the student's output and of its difference from
    the teacher, on squares of photographs that no training drew."""
    fresh = photographs.whole_images(np.random.default_rng(123), 8, detector.image_size)
    fresh = normalise(fresh).to(detector.device)
    with torch.no_grad():
        output = detector.student(fresh)[:, : detector.out_channels]
        away = detector.normalised_teacher(fresh) - output
    return {"student": output.square().mean().item(), "difference": away.square().mean().item()}


def _known(run: Path, settings: Mapping) -> dict | None:
    """The row of a run that is there and has these settings; a training refuses other ones."""
    if not (run / RESULT).is_file():
        return None
    row = json.loads((run / RESULT).read_text(encoding="utf-8"))
    return row if row.pop("settings") == settings else None


def make_study(name: str, entry: Mapping, runs: Path, folder: Path) -> None:
    """Train a study's variants, or take up their runs, and write folder/name/run.json."""
    scenario, photographs = open_scenario(entry["scenario"]), open_pretraining()
    few, tested = part_of(scenario, entry.get("images"))
    training_images = combined(inventory(sample.path for sample in few.train))
    images = {"training_images": training_images, "test_images": len(tested)}
    rows = []
    for variant, teacher, schedule in schedules(entry):
        for seed in entry["seeds"]:
            label = f"{variant.replace(', ', '+').replace(' ', '-')}-{schedule.iterations}"
            run = runs / name / f"{label}-seed{seed}"
            settings = settings_of(teacher, schedule, entry["size"]) | images
            if _known(run, settings) is None:
                detector = with_teacher(teacher, entry["size"], photographs, runs)
                minutes, processor = train_timed(detector, few, schedule, photographs, run, seed)
                found = evaluate(detector, tested, keep_maps=False).metrics()
                row = {"variant": variant, "iterations": schedule.iterations, "seed": seed}
                row |= {"minutes": minutes, "processor": processor}
                row["metrics"] = {g: {m: values[m] for m in METRICS} for g, values in found.items()}
                row["photographs"] = on_photographs(detector, photographs)
                write_text(run / RESULT, json.dumps(row | {"settings": settings}, indent=1) + "\n")
            row = _known(run, settings)
            log = np.genfromtxt(run / Run.LOG, delimiter=",", names=True)
            last = np.atleast_1d(log)[-1]
            rows.append(row | {"losses": {t: float(last[t]) for t in TERMS if last[t] == last[t]}})
            areas = {g: values[METRICS[1]] for g, values in rows[-1]["metrics"].items()}
            print(f"{name}, {variant}, {schedule.iterations} iterations, seed {seed}: {areas}")
    processors = sorted({row.pop("processor") for row in rows})
    facts = {key: entry[key] for key in ("scenario", "profile", "seeds", "size")}
    facts |= {"images": [len(few.train), len(tested)], "command": "make evidence"}
    facts |= {"processor": "; ".join(processors), "settings": study_settings(entry)}
    facts |= {"training_images": training_images, "rows": rows}
    (folder / name).mkdir(parents=True, exist_ok=True)
    write_text(folder / name / FACTS, json.dumps(facts, indent=1) + "\n")
