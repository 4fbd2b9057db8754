"""The oldest release that pyproject.toml admits of each dependency, as pip's constraints.

    python tests/oldest.py > constraints.txt

`make test-oldest` installs them and runs the unit tests. Releases are asked for with `pip index`.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def oldest(requirement: Requirement, releases: str) -> str:
    """The constraint, given what `pip index versions` says: "...Available versions: 1.1, 1.0"."""
    found = re.search(r"Available versions: (.*)", releases)
    versions = map(Version, found[1].split(", ")) if found else ()
    admitted = [version for version in versions if version in requirement.specifier]
    if not admitted:
        sys.exit(f"no release of {requirement} is to be had")
    return f"{requirement.name}=={min(admitted)}"


def main() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, extras = settings["project"], settings["project"]["optional-dependencies"]
    lines = settings["build-system"]["requires"] + project["dependencies"]
    # the extras that `make test` installs
    for extra in ("cluster", "course", "distill", "export", "serve", "test"):
        lines += extras[extra]
    for requirement in map(Requirement, lines):
        command = [sys.executable, "-m", "pip", "index", "versions", requirement.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(oldest(requirement, done.stdout), flush=True)


if __name__ == "__main__":
    main()
