"""The floors of effad_core: imports run downwards, in no circle, and no room knows too much.

The imports are read from the code, those inside functions too.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "effad_core"
# From the top down: a module imports from its own group and from those below. A room is a folder.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"explorer", "evaluation"},
    {"deployment"},
    {"distillation", "extensions"},
    {"training"},
    {"schedule", "detector"},
    {"prediction"},
    {"figures", "tiles"},
    {"region"},
    {"datasets"},
    {"storage"},
    {"acceleration"},
    {"networks", "losses", "statistics", "metrics", "thresholds"},
    {"errors"},
]


def imports():
    """Of each module the modules of effad_core that it imports, by their names below it."""
    names = {}
    for path in CORE.rglob("*.py"):
        parts = path.relative_to(CORE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    found = {}
    for name, path in names.items():
        package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = ["effad_core", *package[: len(package) + 1 - node.level]]
                whole = [".".join(base if node.level else []), node.module or ""]
                module = ".".join(filter(None, whole))
                targets = [f"{module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                if target.split(".")[0] == "effad_core":
                    below = target.removeprefix("effad_core").strip(".")
                    found[name].add(below if below in names else below.rpartition(".")[0])
        found[name] -= {name, ""}
    return found


@pytest.fixture(scope="module")
def imported():
    found = imports()
    found.pop("__init__")  # it loads modules by name, when they are asked for
    return found


def test_the_imports_are_read(imported):
    assert imported["losses"] == set()
    assert imported["training"] >= {"detector", "losses", "schedule", "storage.runs"}
    assert imported["datasets"] >= {"datasets.images", "datasets.tray", "errors"}  # one is lazy
    assert sum(map(len, imported.values())) > 150


def test_imports_run_downwards(imported):
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    assert {name.split(".")[0] for name in imported} == floor.keys()
    upwards = [
        f"{name} imports {target}"
        for name, targets in imported.items()
        for target in targets
        if floor[name.split(".")[0]] > floor[target.split(".")[0]]
    ]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle(imported):
    left = {name: set(targets) for name, targets in imported.items()}
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}
    assert left == {}  # modules in circles, or above one


def test_rooms_of_one_floor_do_not_know_each_other(imported):
    beside = [
        (name, target)
        for name, targets in imported.items()
        for target in targets
        for rooms in FLOORS[1:4]
        if {name.split(".")[0], target.split(".")[0]} <= rooms
        and name.split(".")[0] != target.split(".")[0]
    ]
    assert beside == []


def test_the_tray_is_drawn_without_effad_core():
    for path in (ROOT / "parts_tray").glob("*.py"):
        assert "effad_core import" not in path.read_text(encoding="utf-8"), path
        assert "import effad_core" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("room", ["explorer", "figures", "metrics", "thresholds", "cli"])
def test_what_takes_arrays_knows_no_torch(room):
    code = f"import sys, effad_core.{room}; assert 'torch' not in sys.modules, 'torch was loaded'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_who_trains_or_predicts_does_not_wait_for_torchvision():
    """It takes as long to import as torch, and is needed by the backbones of Psi alone."""
    names = "EfficientAD, evaluate, open_extractor, open_pretraining, open_scenario, prepare, train"
    code = f"import sys; from effad_core import {names}; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_floors_are_those_of_the_reference():
    """docs/api.md lists the rooms from the ground floor up."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = [line.strip() for line in text.splitlines() if line.startswith("   effad_core.")]
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    order = [floor[name.split(".")[1]] for name in listed]
    assert order == sorted(order, reverse=True)
