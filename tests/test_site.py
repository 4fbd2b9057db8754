"""What docs/ does to notebooks and links before Sphinx, and the faults it finds after: no browser.

`make site` runs Sphinx itself, and tests/browser looks at what it has built.
"""

import importlib.util
import shutil
from pathlib import Path

from effad_core import figures

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"


def module(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


assemble, check = module("assemble"), module("check")


# --- the pages -----------------------------------------------------------------------------------


def test_the_reference_lists_every_module_once():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = [line.strip() for line in text.splitlines() if line.startswith("   effad_core.")]
    folder = ROOT / "effad_core"
    names = []
    for path in [p for p in folder.rglob("*.py") if not p.stem.startswith("_")]:
        parts = path.relative_to(folder).with_suffix("").parts
        whole = any(f"effad_core.{'.'.join(parts[:n])}" in listed for n in range(1, len(parts)))
        names += [] if whole else [f"effad_core.{'.'.join(parts)}"]  # or its package is listed
    packages = [path.parent.relative_to(folder.parent) for path in folder.rglob("__init__.py")]
    packages = {".".join(path.parts) for path in packages}
    assert sorted(set(listed) - packages) == sorted(names)
    assert len(listed) == len(set(listed))


def picture(alt=None):
    metadata = {"image/png": {"alt": alt}} if alt is not None else {}
    return new_output("display_data", data={"image/png": "aGVsbG8="}, metadata=metadata)


def controls(text):
    return new_output("display_data", data={WIDGET: {"model_id": "1"}, "text/plain": text})


@pytest.fixture
def project(tmp_path):
    """A project of one executed notebook, a README, a module and a data card."""
    root = tmp_path / "project"
    for folder in ("notebooks", "build/notebooks", "docs", "effad_core/parts", "data/teachers"):
        (root / folder).mkdir(parents=True)
    for name in ("index.md", "api.md"):
        shutil.copy(ROOT / "docs" / name, root / "docs")
    (root / "LICENSE").write_text("the licence")
    (root / "docs" / "look.png").write_bytes(b"png")
    for name in ("__init__.py", "losses.py", "parts/__init__.py"):
        (root / "effad_core" / name).touch()
    (root / "data" / "README.md").write_text("# Data\n\n[up](../README.md#start)")
    (root / "README.md").write_text("# Title\n\n[first](notebooks/00_first.ipynb)")
    cells = [
        new_markdown_cell("# 00 · First\n\n[data](../data/README.md)"),
        new_code_cell("report = None\nsize = 1", metadata={"tags": ["parameters"]}),
        new_code_cell("plot()", outputs=[picture("A line that rises")]),
        new_code_cell("solve()", metadata={"tags": ["solution"]}),
    ]
    notebook = new_notebook(cells=cells)
    nbformat.write(notebook, root / "notebooks" / "00_first.ipynb")
    injected = new_code_cell(
        '# Parameters\nsize = 2\nreport = "/somewhere/00_first.json"\n',
        metadata={"tags": ["injected-parameters"]},
    )
    notebook.cells.insert(2, injected)
    notebook.metadata.papermill = {"parameters": {"profile": "quick"}}
    nbformat.write(notebook, root / "build" / "notebooks" / "00_first.ipynb")
    return root


def assembled(root):
    source = root / "build" / "site" / "source"
    shutil.rmtree(source, ignore_errors=True)
    assemble.assemble(root, source)
    return source


def change(project, act):
    """Do something to the executed notebook's cells; the notebook of the course stays."""
    path = project / "build" / "notebooks" / "00_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    act(notebook.cells)
    nbformat.write(notebook, path)


def first_page(project):
    return nbformat.read(assembled(project) / "notebooks" / "00_first.ipynb", as_version=4).cells


def test_pages_lie_where_they_lie_in_the_project(project):
    source = assembled(project)
    written = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    # data/README.md is there because the notebook links to it
    assert written == {
        *("README.md", "index.md", "api.md", "notebooks/00_first.ipynb", "data/README.md")
    }


def test_a_notebook_that_was_not_executed_is_a_sentence(project):
    (project / "build" / "notebooks" / "00_first.ipynb").unlink()
    with pytest.raises(assemble.SiteError, match="00_first.ipynb has not been executed: run `make"):
        assembled(project)


def test_a_notebook_that_has_changed_since_is_a_sentence(project):
    change(project, lambda cells: cells[0].update(source="# 00 · Another title"))
    with pytest.raises(assemble.SiteError, match="00_first.ipynb has changed since it was"):
        assembled(project)


def test_a_figure_has_its_alternative_text(project):
    cells = first_page(project)
    assert cells[3].metadata.mystnb.image.alt == "A line that rises"


@pytest.mark.parametrize("output", [picture(), picture("")])
def test_a_figure_without_alternative_text_is_a_sentence(project, output):
    change(project, lambda cells: cells[3].outputs.append(output))
    with pytest.raises(assemble.SiteError, match="00_first.ipynb, cell 4: its figure has no alt"):
        assembled(project)


def test_the_parameters_of_the_execution_are_folded_without_the_machines_path(project):
    cell = first_page(project)[2]
    assert cell.source == "size = 2"
    assert "hide-cell" in cell.metadata.tags
    assert "profile quick" in cell.metadata.mystnb.code_prompt_show


def test_solutions_are_folded_and_nothing_else(project):
    cells = first_page(project)
    folded = [cell.source for cell in cells if "hide-cell" in cell.metadata.get("tags", ())]
    assert folded == ["size = 2", "solve()"]


def test_progress_bars_go_and_controls_become_a_hint(project):
    bar = controls("training:   0%|          | 0/300 [00:00<?, ?it/s]")
    explorer = controls("ThresholdExplorer at 0.5: recall 0.9")
    change(project, lambda cells: cells[3].update(outputs=[bar, explorer]))
    (output,) = first_page(project)[3].outputs
    assert list(output.data) == ["text/markdown"]
    assert "ThresholdExplorer at 0.5: recall 0.9" in output.data["text/markdown"]
    assert "`make app`" in output.data["text/markdown"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("[n](notebooks/00_first.ipynb)", "[n](notebooks/00_first.ipynb)"),
        ("[d](data/README.md#start)", "[d](data/README.md#start)"),
        ("[me](README.md)", "[me](index.md)"),
        ("[code](effad_core/losses.py)", "[code](api/effad_core.losses.rst)"),
        ("[code](effad_core/parts/__init__.py)", "[code](api/effad_core.parts.rst)"),
        ("[all](effad_core/__init__.py)", "[all](api.md)"),
        ("[folder](effad_core/)", "folder"),
        ("[here](#start)", "[here](#start)"),
        ("[away](https://example.org/a_b)", "[away](https://example.org/a_b)"),
        ("[law](LICENSE)", "[law](LICENSE)"),
        ("![look](docs/look.png)", "![look](docs/look.png)"),
        ("`[x](nowhere)` and ```\n[x](nowhere)\n```", None),
    ],
)
def test_links_lead_into_the_site(project, written, expected):
    (project / "README.md").write_text(written)
    source = assembled(project)
    assert (source / "README.md").read_text() == (written if expected is None else expected)


@pytest.mark.parametrize("name", ["LICENSE", "docs/look.png"])
def test_files_that_are_linked_come_along(project, name):
    (project / "README.md").write_text(f"[it]({name})")
    assert (assembled(project) / name).read_bytes() == (project / name).read_bytes()


def test_links_of_pages_in_folders_are_relative(project):
    text = "[up](../README.md#start) [code](../effad_core/losses.py)"
    (project / "data" / "README.md").write_text(text)
    page = (assembled(project) / "data" / "README.md").read_text()
    assert page == "[up](../index.md#start) [code](../api/effad_core.losses.rst)"


@pytest.mark.parametrize("target", ["absent.md", "../outside.md", "notebooks/01_absent.ipynb"])
def test_a_link_to_what_does_not_exist_is_a_sentence(project, target):
    (project / "README.md").write_text(f"[x]({target})")
    with pytest.raises(assemble.SiteError, match=r"README.md links to .* does not exist"):
        assembled(project)


# --- the figures ---------------------------------------------------------------------------------


def alternative_text(figure):
    data, metadata = figure._repr_mimebundle_()
    assert data == {}
    return metadata["image/png"]["alt"]


def test_a_figure_is_described_by_its_title():
    line = {"a": (np.arange(3), np.arange(3))}
    figure = figures.curves(line, "x", "y", "Rises\nwith $q_a$")
    assert alternative_text(figure) == "Rises with q_a"
    grey = np.zeros((4, 4), np.uint8)
    figure = figures.image_grid([grey, grey], ["left", "right"], suptitle="Two squares")
    assert alternative_text(figure) == "Two squares"
    assert alternative_text(figures.image_grid([grey, grey], ["left", "right"])) == "left; right"


def test_a_figure_without_any_title_is_described_by_what_draws_it():
    assert alternative_text(figures.pipeline_diagram()).startswith("How the three networks")
    assert alternative_text(figures.image_grid([np.zeros((4, 4), np.uint8)])).startswith("Images")


# --- the faults of a built site ------------------------------------------------------------------

SOUND = {
    "index.html": '<h1 id="top">T</h1><a href="#top">up</a><a href="b/c.html#d">c</a>'
    '<a href="https://example.org/x">away</a><img src="i.png" alt="a line">'
    '<script src="s.js?v=1"></script><link rel="stylesheet" href="s.css">',
    "b/c.html": '<p id="d">D</p><a href="../index.html">home</a><img src="data:,x" alt="y">',
    "i.png": "",
    "s.js": "",
    "s.css": "a { background: url(data:image/png;base64,x) } b { background: url('i.png') }",
}


@pytest.fixture
def site(tmp_path):
    def write(**changed):
        for name, text in (SOUND | changed).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        return check.faults(tmp_path)

    return write


def test_a_sound_site_has_no_faults(site):
    assert site() == []


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("index.html", '<img src="i.png">', "i.png has no alternative text"),
        ("index.html", '<img src="i.png" alt=" ">', "i.png has no alternative text"),
        ("index.html", '<img src="gone.png" alt="x">', "gone.png leads nowhere"),
        ("index.html", '<a href="gone.html">x</a>', "gone.html leads nowhere"),
        ("index.html", '<a href="b">x</a>', "the link b leads nowhere"),
        ("index.html", '<a href="b/c.html#gone">x</a>', "without that heading"),
        ("index.html", '<a href="#gone">x</a>', "without that heading"),
        ("index.html", '<a href="https://exam ple.org">x</a>', "no address"),
        ("index.html", '<a href="http://">x</a>', "no address"),
        ("index.html", '<script src="https://cdn.example/x.js"></script>', "from the network"),
        ("index.html", '<script src="//cdn.example/x.js"></script>', "from the network"),
        ("index.html", '<link rel="stylesheet" href="http://cdn.example/x">', "from the network"),
        ("index.html", '<img src="https://example.org/i.png" alt="x">', "from the network"),
        ("s.css", "@font-face { src: url('https://fonts.example/f') }", "from the network"),
        ("s.css", "@import url(//fonts.example/f);", "from the network"),
        ("s.css", '@import "https://fonts.example/f";', "from the network"),
        ("index.html", f'<script type="{WIDGET}">{{}}</script>', "only while Python runs"),
    ],
)
def test_a_fault_is_found(site, name, text, fault):
    (found,) = site(**{name: text})
    assert found.startswith(name) and fault in found
