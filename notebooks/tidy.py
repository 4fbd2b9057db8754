"""Bring notebooks into the state in which they are committed.

    python notebooks/tidy.py [--run] [notebook ...]

Outputs of cells tagged `nbval-check-output` stay, everything else that an execution leaves behind
goes. With --run the notebooks are executed first, with the parameters of the profile smoke.
"""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from smoke import INJECTED, filled

NOTEBOOKS = Path(__file__).resolve().parent
KEPT_METADATA = ("tags", "jupyter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="execute before tidying")
    parser.add_argument("notebooks", nargs="*", type=Path, help="(default: all of the course)")
    arguments = parser.parse_args()
    for path in arguments.notebooks or sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        notebook = filled(path) if arguments.run else nbformat.read(path, as_version=4)
        if arguments.run:
            print(path.name, flush=True)
            NotebookClient(
                notebook,
                kernel_name="python3",
                resources={"metadata": {"path": str(path.parent)}},
                extra_arguments=["--log-level=CRITICAL"],
            ).execute()
        tidy(notebook)
        nbformat.write(notebook, path)


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Strip in place."""
    notebook.cells = [c for c in notebook.cells if INJECTED not in c.metadata.get("tags", ())]
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    number = 0
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in KEPT_METADATA if cell.metadata.get(key)}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type != "code":
            continue
        number += 1
        checked = "nbval-check-output" in cell.metadata.get("tags", ())
        # nbval compares no cell that has no execution count.
        cell.execution_count = number if checked else None
        cell.outputs = cell.outputs if checked else []
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number


if __name__ == "__main__":
    main()
