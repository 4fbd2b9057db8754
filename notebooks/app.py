"""Serve notebook 06, the threshold explorer, as a page.

    python notebooks/app.py --profile quick --port 8866

Without its executed copy for the profile and scenario, the notebook is executed first, which
trains the detector that it looks at. Only this machine can open the page.
"""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
from run import NOTEBOOKS, parameters_by_notebook, scenario

NOTEBOOK = NOTEBOOKS / "06_threshold_explorer.ipynb"
BUILD = NOTEBOOKS.parent / "build"
QUIET = """from functools import partialmethod
from tqdm.auto import tqdm
tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)"""  # Voila shows an error for each bar
VOILA = ["--no-browser", "--template=offline", "--Voila.ip=localhost", "--Voila.port_retries=0"]
VOILA += ["--show_tracebacks=True"]  # a run of other images is refused with a sentence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", help="a file of profiles/, without .yaml")
    parser.add_argument("--scenario", help="whose detector (default: solar-mono)")
    parser.add_argument("--data", type=Path, help="a folder of images, or of scenarios")
    parser.add_argument("--port", type=int, default=8866)
    arguments = parser.parse_args()
    if taken(arguments.port):
        sys.exit(f"The port {arguments.port} is taken: name another one, for example PORT=8867.")
    known, chosen = parameters_by_notebook(arguments.profile)[NOTEBOOK.stem]
    wanted = chosen | {"scenario": scenario(arguments.scenario, arguments.data)}
    wanted = {name: value for name, value in wanted.items() if name in known}

    executed = BUILD / "notebooks" / NOTEBOOK.name
    if not is_current(executed, wanted):
        run = [NOTEBOOKS / "run.py", "--only", NOTEBOOK.stem, "--profile", arguments.profile]
        run += ["--scenario", arguments.scenario] * bool(arguments.scenario)
        run += ["--data", arguments.data] * bool(arguments.data)
        if failed := subprocess.run([sys.executable, *map(str, run)]).returncode:
            sys.exit(failed)

    # Voila executes it for each visitor, in its folder: one whose parent is the project's.
    page = BUILD / NOTEBOOK.name
    notebook = nbformat.read(executed, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(QUIET))
    nbformat.write(notebook, page)
    templates, kernels = NOTEBOOKS.parent / "docs" / "jupyter", Path(sys.prefix, "share", "jupyter")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(map(str, (templates, kernels)))
    print(f"http://localhost:{arguments.port} is the explorer; Ctrl-C ends it.", flush=True)
    command = [sys.executable, "-m", "voila", str(page), f"--port={arguments.port}", *VOILA]
    os.execv(sys.executable, command)


def taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def is_current(executed: Path, wanted: dict[str, object]) -> bool:
    """Whether the notebook has been executed as it is now, with the wanted parameters."""
    if not executed.is_file() or executed.stat().st_mtime < NOTEBOOK.stat().st_mtime:
        return False
    used = nbformat.read(executed, as_version=4).metadata.papermill.parameters
    return {name: used.get(name) for name in wanted} == wanted


if __name__ == "__main__":
    main()
