"""Break the code in one way at a time, in a copy, and see which test notices.

    python tests/mutations/run.py
    python tests/mutations/run.py "forgotten sigma" resume --jobs 2
    python tests/mutations/run.py --no-notebooks

The mutations are the entries of the TOML files beside this one: a name, a file, a text that occurs
in it exactly once (in a notebook: in its code cells), its replacement, the tests that should notice
and, where it matters to one, the notebook whose checked outputs and assertions should notice too.
First the tests run unbroken. A mutation that a test or its notebook lets pass has SURVIVED, and
makes the command fail.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTEST = (
    *("-x", "-q", "--no-header", "--tb=no", "-rfE", "-p", "no:cacheprovider"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # of what is PRELOADED
)
NBVAL = ("-W", "default", "--nbval-lax", "--nbval-current-env")
DRAWN = ROOT / "data" / "tray"
SURVIVED = "SURVIVED"
# Imported once; each mutation's process is forked from there, and imports effad_core alone anew.
PRELOADED = [
    *("pytest", "nbval.plugin", "hypothesis", "ipywidgets", "matplotlib.figure", "tqdm.auto"),
    *("torch", "torchvision.transforms.v2.functional", "timm", "safetensors.torch"),
    *("scipy.ndimage", "scipy.stats", "skimage.measure", "sklearn.metrics"),
]


@dataclass(frozen=True)
class Mutation:
    """One way to break the code.

    Attributes:
        name: says what is wrong.
        file: relative to the project's folder.
        text: occurs in the file exactly once.
        replacement: what stands there instead.
        tests: pytest's arguments; none for a mutation of a notebook's own code.
        notebook: the stem of the notebook that should notice, if one should.
        retrain: whether the notebook must not take up the run of the unbroken code.
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...] = ()
    notebook: str = ""
    retrain: bool = False

    def apply(self, root: Path) -> None:
        """Break the file below `root`.

        Raises:
            ValueError: if the text does not occur exactly once, or nothing would change.
        """
        path = root / self.file
        content = path.read_text(encoding="utf-8")
        if path.suffix != ".ipynb":
            path.write_text(self._replaced(content), encoding="utf-8")
            return
        notebook = json.loads(content)
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        mark = "\n\0\n"  # between cells
        sources = self._replaced(mark.join("".join(cell["source"]) for cell in cells)).split(mark)
        for cell, source in zip(cells, sources, strict=True):
            cell["source"] = source
        path.write_text(json.dumps(notebook), encoding="utf-8")

    def _replaced(self, content: str) -> str:
        count = content.count(self.text)
        if count != 1 or self.text == self.replacement:
            raise ValueError(f"{self.name}: {self.file} holds the text {count} times, not once")
        return content.replace(self.text, self.replacement)


def mutations() -> list[Mutation]:
    """All of the table, in the order of the files' names."""
    return [
        Mutation(**entry | {"tests": tuple(entry.get("tests", ()))})
        for path in sorted(HERE.glob("*.toml"))
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    ]


class Copy:
    """A copy of the tracked files, whose effad_core is the one that Python imports there."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in _tracked():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        if DRAWN.exists():  # takes a minute to draw again
            shutil.copytree(DRAWN, folder / DRAWN.relative_to(ROOT))

    def smoke(self, name: str) -> str:
        """The path of a notebook with the parameters of the profile smoke, made anew."""
        command = [sys.executable, "notebooks/smoke.py", "build/smoke", f"notebooks/{name}.ipynb"]
        subprocess.run(command, cwd=self.folder, check=True)
        return f"build/smoke/notebooks/{name}.ipynb"

    def caught(self, arguments: Sequence[str]) -> str:
        """The first test that fails, or SURVIVED."""
        output = self.folder / "output.txt"
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=_pytest, args=(str(self.folder), output, arguments))
        process.start()
        process.join()
        if process.exitcode == 0:
            return SURVIVED
        if process.exitcode < 0:
            return f"ended by signal {-process.exitcode}"
        text = output.read_text(encoding="utf-8")
        failed = re.search(r"^(?:FAILED|ERROR) (\S+?(?:::.+?)?)(?: - .*)?$", text, re.M)
        if not failed:
            sys.exit(f"pytest {' '.join(arguments)} did not run:\n{text}")
        return failed[1]

    def try_out(self, mutation: Mutation, notebooks: bool) -> list[str]:
        """What catches a mutation: a test, the notebook. The copy is whole again afterwards."""
        path, runs = self.folder / mutation.file, self.folder / "build"
        whole = path.read_bytes()
        mutation.apply(self.folder)
        try:
            found = [self.caught(mutation.tests)] if mutation.tests else []
            if mutation.notebook and notebooks:
                if mutation.retrain:
                    runs.rename(runs.with_name("aside"))
                found.append(self.caught((*NBVAL, self.smoke(mutation.notebook))))
        finally:
            path.write_bytes(whole)
            if runs.with_name("aside").exists():
                shutil.rmtree(runs, ignore_errors=True)
                runs.with_name("aside").rename(runs)
        return found


def _pytest(folder: str, output: Path, arguments: Sequence[str]) -> None:
    """In a process of its own: run pytest in the copy, on the copy's effad_core."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = folder  # for processes that tests start, and kernels
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if not Path(importlib.util.find_spec("effad_core").origin).is_relative_to(folder):
        raise RuntimeError("effad_core would not be imported from the copy")
    import pytest

    code = pytest.main([*PYTEST, *arguments])
    sys.stdout.flush()
    os._exit(code)  # threads that a failed test left behind must not hold it up


def _tracked() -> list[str]:
    """Files that git tracks or would add, and that exist."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with 1 if a mutation survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of mutations' names (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are tried out at once")
    parser.add_argument("--no-notebooks", action="store_true", help="tests alone")
    args = parser.parse_args(arguments)
    notebooks = not args.no_notebooks
    chosen = [m for m in mutations() if not args.names or any(n in m.name for n in args.names)]
    chosen = [m for m in chosen if m.tests or notebooks]
    if not chosen:
        sys.exit(f"no mutation is called like {' or '.join(args.names)}")
    os.environ |= {
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter"),
    }
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies = SimpleQueue()
        for number in range(args.jobs):
            copies.put(Copy(Path(folder) / str(number)))
        unbroken(copies.get(), copies, chosen, notebooks)

        def try_out(mutation: Mutation) -> list[str]:
            copy = copies.get()
            try:
                found = copy.try_out(mutation, notebooks)
            finally:
                copies.put(copy)
            for name in found:
                print(f"{mutation.name:<60}  {name}", flush=True)
            return found

        with ThreadPoolExecutor(args.jobs) as pool:
            results = [name for found in pool.map(try_out, chosen) for name in found]
    survived = results.count(SURVIVED)
    minutes = (time.monotonic() - start) / 60
    print(f"{len(chosen)} mutations, {len(results)} checks, {survived} survived, {minutes:.1f} min")
    sys.exit(1 if survived else 0)


def unbroken(copy: Copy, copies: SimpleQueue, chosen: list[Mutation], notebooks: bool) -> None:
    """Run all tests and notebooks that are needed once; they must pass. Puts the copy back."""
    tests = sorted({test for mutation in chosen for test in mutation.tests})
    names = sorted({m.notebook for m in chosen if m.notebook}) if notebooks else []
    for notebook in [None] * bool(tests) + names:
        arguments = tests if notebook is None else [*NBVAL, copy.smoke(notebook)]
        if (name := copy.caught(arguments)) != SURVIVED:
            sys.exit(f"{name} fails before anything is broken")
    for other in [copies.get() for _ in range(copies.qsize())]:  # they take up the same runs
        if (copy.folder / "build").exists():
            shutil.copytree(copy.folder / "build", other.folder / "build")
        copies.put(other)
    copies.put(copy)
    print(f"unbroken: {len(tests)} tests and {len(names)} notebooks pass", flush=True)


if __name__ == "__main__":
    main()
