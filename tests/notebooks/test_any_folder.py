"""The course on folders such as people have: each notebook runs through, or says what is missing.

Here some of them run in this process, on networks with few channels inside, a small tray, and the
profile smoke. `soak/folders.py` runs all of them on these folders, each as `make tutorial` does.
"""

import io
import json
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

from effad_core import EfficientAD

import nbformat
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SIZES = ((300, 280), (120, 90), (64, 400), (801, 333), (256, 256))


def draw(path, size=(300, 280), defect=None, kind=None):
    """Write a noisy slope with a disc; with a defect also its mask, where its path is given."""
    width, height = size
    rng = np.random.default_rng(len(list(path.parent.glob("*"))) if path.parent.exists() else 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:height, :width]
    image = np.stack([90 + 80 * x // width, 60 + 80 * y // height, 120 + (x + y) // 8], 2)
    image[(x - width // 2) ** 2 + (y - height // 2) ** 2 < (min(size) // 5) ** 2] = (200, 180, 40)
    place = slice(height // 4, height // 3), slice(width // 4, width // 3)
    if kind is not None:
        image[place] = 0
    image = np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
    Image.fromarray(image).save(path)
    if defect is not None:
        mask = np.zeros((height, width), np.uint8)
        mask[place] = 255
        defect.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(defect)


def draw_scenario(folder, good=3, kinds=("crack", "dirt"), masked=(), sizes=SIZES[:1]):
    """A folder in MVTec AD's layout, with masks of some kinds."""
    for split, count in (("train", 6), ("test", good)):
        for n in range(count):
            draw(folder / split / "good" / f"{n}.png", sizes[n % len(sizes)])
    for kind in kinds:
        for n in range(2):
            mask = folder / "ground_truth" / kind / f"{n}_mask.png" if kind in masked else None
            draw(folder / "test" / kind / f"{n}.png", sizes[n % len(sizes)], mask, kind)
    return folder


def draw_images(folder, count):
    for n in range(count):
        draw(folder / f"Bild {n}.png")
    return folder


ONE_KIND = "no test images of both kinds"
# name -> what draws it, the notebooks besides 00, 05 and 06, and what they have to say of it
FOLDERS = {
    "good images alone, in a path with umlauts and spaces": (
        lambda root: draw_images(root / "Größe & Maß" / "schöne Teile (alle)", 6),
        ("10",),
        ("has no test images", ONE_KIND, "There are no further good images"),
    ),
    "no masks": (lambda root: draw_scenario(root / "unmasked"), ("04",), ("has no masks",)),
    "masks for one kind": (
        lambda root: draw_scenario(root / "half_masked", masked=("crack",)),
        ("07",),
        ("have no mask (dirt: 2)", "of crack alone"),
    ),
    "anomalous test images alone": (
        lambda root: draw_scenario(root / "only_anomalous", good=0, masked=("crack", "dirt")),
        ("09",),
        ("has no normal test images", ONE_KIND, "no normal test images: nothing checks"),
    ),
    "normal test images alone": (
        lambda root: draw_scenario(root / "only_normal", kinds=()),
        ("07",),
        ("has no anomalous test images", ONE_KIND),
    ),
    "images of many sizes": (
        lambda root: draw_scenario(root / "sizes", masked=("crack", "dirt"), sizes=SIZES),
        ("09",),
        (),
    ),
    "two images": (
        lambda root: draw_images(root / "two", 2),
        ("03",),
        ("has no test images", ONE_KIND),
    ),
}


def run(shell, notebook, **parameters):
    """Execute a notebook's code cells; what they printed, and the texts that they ended with."""
    shell.reset(new_session=False)
    said = io.StringIO()
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        source = cell.source
        if "parameters" in cell.metadata.get("tags", ()):
            source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
        with redirect_stdout(said):
            done = shell.run_cell(source)
        assert done.success, f"{notebook.stem}: {source}\n{said.getvalue()[-2000:]}"
        if isinstance(done.result, str):
            said.write(done.result)
    return said.getvalue()


@pytest.fixture(scope="module")
def shell():
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The folder in which the notebooks run, with a small tray in it."""
    course = tmp_path_factory.mktemp("course")
    (course / "notebooks").mkdir()
    kinds = ("structural_anomalies", "logical_anomalies")
    tray = draw_scenario(course / "data" / "tray", good=4, kinds=kinds, masked=kinds)
    entry = {"saturation_threshold": 1.0, "relative_saturation": True, "pixel_value": 255}
    (tray / "defects_config.json").write_text(json.dumps([{"defect_name": "spot"} | entry]))
    return course


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOLDERS)
def test_the_course_on(name, shell, course, narrow, monkeypatch, tmp_path):
    teacher = narrow(out_channels=384).teacher.state_dict()

    def load_teacher(self, path=None):
        self.teacher.load_state_dict(teacher)
        self.card["teacher"] = "narrow"
        return self

    monkeypatch.setattr(EfficientAD, "load_teacher", load_teacher)
    monkeypatch.setattr("effad_core.datasets.tray.tray_folder", lambda: course / "data" / "tray")
    monkeypatch.chdir(course / "notebooks")
    draw_folder, more, sentences = FOLDERS[name]
    folder = str(draw_folder(tmp_path))
    chosen = [path for path in NOTEBOOKS if path.stem[:2] in ("00", "05", "06", *more)]
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    profile = import_module("run").parameters_by_notebook("smoke")
    said = ""
    for notebook in chosen:
        known, values = profile[notebook.stem]
        values = {name: value for name, value in values.items() if name in known}
        said += run(shell, notebook, **values | {"scenario": folder})
    for sentence in sentences:
        assert sentence in said
    assert (ONE_KIND in said) == (ONE_KIND in sentences)


@pytest.mark.parametrize("name", ["my part", "it's 5\" wide", "100 % {place} $HOME", "größe,maß;1"])
def test_the_file_that_notebook_10_writes_may_lie_anywhere(name, shell, tmp_path, monkeypatch):
    (own_images,) = [path for path in NOTEBOOKS if path.stem == "10_your_own_images"]
    sources = [cell.source for cell in nbformat.read(own_images, as_version=4).cells]
    (writes,) = [source for source in sources if source.startswith("%%writefile")]
    (chooses,) = [line for s in sources for line in s.splitlines() if line.startswith("place = ")]
    shell.reset(new_session=False)
    shell.user_ns |= {"ROOT": tmp_path, "source": type("Source", (), {"name": name})}
    assert shell.run_cell(chooses).success
    place = shell.user_ns["place"]
    place.mkdir(parents=True)
    assert shell.run_cell(writes).success
    assert [path.name for path in place.iterdir()] == ["judge.py"]
    assert place == tmp_path / "build" / "own_images" / name.replace('"', "'")
