"""Run the course on folders such as people have, a notebook and a folder at random each time.

    python tests/soak/folders.py --minutes 5

The folders are those of `notebooks/test_any_folder.py`; each notebook runs as `make tutorial` runs
it, with the profile smoke, in a copy of the course without any runs. Without --minutes, each
notebook runs once on each folder.
"""

import argparse
import importlib.util
import itertools
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tests():
    """The module of the tests, whose folders are used here."""
    path = ROOT / "tests" / "notebooks" / "test_any_folder.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="all pairs, however long, without it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    end = float("inf") if args.minutes is None else time.monotonic() + 60 * args.minutes
    module = tests()
    pairs = list(itertools.product(module.FOLDERS, module.NOTEBOOKS))
    random.Random(args.seed).shuffle(pairs)
    done = failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folders = {
            name: draw(Path(temporary, str(number)))
            for number, (name, (draw, *_)) in enumerate(module.FOLDERS.items())
        }
        course = Path(temporary, "course")
        shutil.copytree(ROOT / "notebooks", course / "notebooks")
        (course / "data").symlink_to(ROOT / "data")
        for name, notebook in pairs:
            if time.monotonic() > end:
                break
            command = [sys.executable, course / "notebooks" / "run.py", "--profile", "smoke"]
            command += ["--only", notebook.stem, "--data", folders[name]]
            ran = subprocess.run([*map(str, command)], capture_output=True, text=True)
            done += 1
            if ran.returncode:
                failed += 1
                print(f"{name}: {ran.stdout}{ran.stderr}", flush=True)
    print(f"{done} of {len(pairs)} pairs of a notebook and a folder, {failed} FAILED")
    sys.exit(failed > 0 or done == 0)


if __name__ == "__main__":
    main()
