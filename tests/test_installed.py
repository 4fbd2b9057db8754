"""What `pip install .` gives is complete: it trains and predicts far from the checkout."""

import subprocess
import sys
import tomllib
from pathlib import Path

from effad_core.storage.shipped import CHECKOUT, drawn_data, shipped

import pytest

USE = """
from pathlib import Path
import json
import effad_core
from effad_core import EfficientAD, Schedule, open_pretraining, open_scenario, train
from effad_core.evaluation.benchmark import PAPER

assert "site" in Path(effad_core.__file__).parts, effad_core.__file__
json.loads(PAPER.read_text(encoding="utf-8"))
scenario = open_scenario("part")
detector = EfficientAD().load_teacher()
schedule = Schedule.smoke(iterations=1, autoencoder_iterations=0)
train(detector, scenario, schedule, open_pretraining("photographs"), "run")
print(EfficientAD.load("run/detector.safetensors").predict("part/train/good/0.png").score)
"""


def test_a_wheel_trains_and_predicts_without_the_checkout(drawn, tmp_path):
    """The wheel is built from a copy of what git knows, and unpacked beside nothing else."""
    source, site = tmp_path / "source", tmp_path / "site"
    subprocess.run(["git", "clone", "-q", str(CHECKOUT), str(source)], check=True)
    changed = subprocess.run(
        ["git", "-C", str(CHECKOUT), "diff", "--binary", "HEAD"], capture_output=True, check=True
    ).stdout
    if changed:
        subprocess.run(["git", "-C", str(source), "apply"], input=changed, check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "--target", str(site), str(source)], check=True)
    good = tmp_path / "part" / "train" / "good"
    good.mkdir(parents=True)
    for index, path in enumerate(drawn[:4]):
        (good / f"{index}.png").write_bytes(path.read_bytes())
    environment = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1])
    assert (site / "effad_core" / "py.typed").is_file()


def test_what_is_shipped_is_what_the_repository_has():
    teacher = "teachers/pdn_small.safetensors"
    assert shipped(teacher) == CHECKOUT / "data" / teacher
    assert shipped("paper_results.json").is_file()


def test_drawn_data_is_in_the_checkout_or_below_the_working_directory(monkeypatch, tmp_path):
    assert drawn_data() == CHECKOUT / "data"
    monkeypatch.setattr("effad_core.storage.shipped.CHECKOUT", tmp_path)
    assert drawn_data() == Path("data")


PACKAGES = sorted({path.parent for path in CHECKOUT.glob("effad_core/**/*.py")})


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_every_package_is_installed(package):
    """pyproject.toml names them one by one, for data/ is among them."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    name = ".".join(package.relative_to(CHECKOUT).parts)
    assert name in project["tool"]["setuptools"]["packages"]
