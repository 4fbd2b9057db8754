"""Copy the notebooks with the parameters of the profile smoke filled in, for nbval.

    python notebooks/smoke.py build/smoke [notebook ...]

The notebooks' own defaults train for minutes. The copies lie in FOLDER/notebooks, so that their
runs go to FOLDER/build; data/ is a link to the project's.
"""

import argparse
from pathlib import Path

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from run import NOTEBOOKS, NUMBERED, parameters_by_notebook

INJECTED = "injected-parameters"  # papermill's tag of the cell that it adds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("notebooks", nargs="*", type=Path, help="(default: all of the course)")
    arguments = parser.parse_args()
    target = arguments.folder / "notebooks"
    target.mkdir(parents=True, exist_ok=True)
    for stale in target.glob("*.ipynb"):
        stale.unlink()
    data = arguments.folder / "data"
    if not data.exists():
        data.symlink_to(NOTEBOOKS.parent / "data", target_is_directory=True)
    for path in arguments.notebooks or sorted(NOTEBOOKS.glob(f"{NUMBERED}.ipynb")):
        nbformat.write(filled(path), target / path.name)


def filled(path: Path) -> nbformat.NotebookNode:
    """The notebook with one more cell after its parameters, that of the profile smoke."""
    known, chosen = parameters_by_notebook("smoke").get(path.stem, ({}, {}))
    values = {name: value for name, value in chosen.items() if name in known}
    notebook = load_notebook_node(str(path))
    return parameterize_notebook(notebook, values, kernel_name="python3", language="python")


if __name__ == "__main__":
    main()
