"""Execute the course's notebooks in order and show what they measured.

    python notebooks/run.py --profile quick --scenario solar-mono

A notebook receives the values of `profiles/<profile>.yaml` whose names its parameters cell knows,
`scenario` (a name, or the folder given with --data), and `report`: the path of a JSON file to which
it may write a flat mapping of names to numbers, which the closing table shows. Before the first
notebook, all images and masks of the scenario are looked at.
"""

import argparse
import ast
import json
import os
import sys
import time
from pathlib import Path

from effad_core import DataError, open_scenario
from effad_core.datasets.checks import check_scenario
from effad_core.evaluation.tables import layout

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

NOTEBOOKS = Path(__file__).resolve().parent
NUMBERED = "[0-9][0-9]_*"

Parameters = dict[str, object]


def main() -> None:
    arguments = parse_arguments()
    notebooks = [
        path
        for path in sorted(NOTEBOOKS.glob(f"{NUMBERED}.ipynb"))
        if path.stem.startswith(arguments.only)
    ]
    if not notebooks:
        sys.exit(f"There is no notebook {arguments.only}*.ipynb in {NOTEBOOKS}.")
    given: Parameters = {"scenario": scenario(arguments.scenario, arguments.data)}
    plan = parameters_by_notebook(arguments.profile)

    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for stale in (*output.glob(f"{NUMBERED}.ipynb"), *output.glob(f"{NUMBERED}.json")):
        if stale.stem.startswith(arguments.only):
            stale.unlink()

    # The kernel is this very Python, whatever kernels the user has installed; figures go inline.
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"

    print(f"profile {arguments.profile}, scenario {given['scenario']}, into {output}", flush=True)
    if any("scenario" in plan[notebook.stem][0] for notebook in notebooks):
        print(*lacking(given["scenario"]), sep="", end="", flush=True)
    rows = []
    for notebook in notebooks:
        report = output / f"{notebook.stem}.json"
        known, chosen = plan[notebook.stem]
        offered = {**chosen, **given, "report": str(report)}
        passed = {name: value for name, value in offered.items() if name in known}
        seconds = execute(notebook, output / notebook.name, passed)
        rows.append((notebook.stem, seconds, measured(report)))
    print(table(rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", help="a file of profiles/, without .yaml")
    parser.add_argument("--scenario", help="what to train on (default: solar-mono)")
    parser.add_argument("--data", type=Path, help="a folder of images, or of scenarios")
    parser.add_argument("--only", default="", metavar="03", help="notebooks that start with this")
    parser.add_argument("--output", type=Path, default=NOTEBOOKS.parent / "build" / "notebooks")
    return parser.parse_args()


def scenario(name: str | None, data: Path | None) -> str:
    """The scenario's name; with --data its folder, or the folder of that name inside it."""
    if data is None:
        return name or "solar-mono"
    folder = data.expanduser().resolve() / (name or "")
    if not folder.is_dir():
        sys.exit(f"The dataset {folder} is not a folder.")
    return str(folder)


def lacking(source: str) -> list[str]:
    """What the scenario cannot show, each a line; one that cannot be used ends the command."""
    try:
        return [f"{sentence}\n" for sentence in check_scenario(open_scenario(source))]
    except DataError as error:
        sys.exit(str(error))


def parameters_by_notebook(profile: str) -> dict[str, tuple[Parameters, Parameters]]:
    """For each notebook, its parameters with their defaults, and those that the profile chooses."""
    path = NOTEBOOKS / "profiles" / f"{profile}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        sys.exit(f"The profile '{profile}' is unknown; choose one of {names}.")
    sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    common = sections.pop("common", None) or {}
    known = {p.stem: defaults(p) for p in sorted(NOTEBOOKS.glob(f"{NUMBERED}.ipynb"))}

    plan = {stem: (known[stem], common | (sections.pop(stem, None) or {})) for stem in known}
    for stem in sections:
        sys.exit(f"{path.name} has a section '{stem}', but there is no such notebook.")
    for stem, (names, chosen) in plan.items():
        for name, value in chosen.items():
            if name in names:
                check_type(f"{path.name}, {stem}: {name}", value, names[name])
            elif name not in common:
                sys.exit(f"{path.name} sets '{name}', which {stem}'s parameters cell lacks.")
    for name in common:
        if not any(name in names for names in known.values()):
            sys.exit(f"{path.name} sets '{name}', which no notebook's parameters cell has.")
    return plan


def defaults(notebook: Path) -> Parameters:
    """Names and literals of the assignments in the cell tagged `parameters`."""
    cells = nbformat.read(notebook, as_version=4).cells
    source = "\n".join(c.source for c in cells if "parameters" in c.metadata.get("tags", ()))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source).body}


def check_type(where: str, value: object, default: object) -> None:
    """Refuse a wrong type before any kernel starts: YAML reads 1e-3 as text, 1.0e-3 as a number."""
    expected = (int, float) if isinstance(default, float) else type(default)
    if value is not None and default is not None and not isinstance(value, expected):
        sys.exit(f"{where} is {value!r}, a {type(value).__name__}; the notebook has {default!r}.")


def execute(notebook: Path, executed: Path, parameters: Parameters) -> float:
    """Run one notebook; its seconds. Where it fails, say so and stop."""
    print(f"{notebook.stem} ... ", end="", flush=True)
    start = time.monotonic()
    try:
        papermill.execute_notebook(
            notebook,
            executed,
            parameters,
            kernel_name="python3",
            language="python",
            cwd=NOTEBOOKS,
            progress_bar=False,
            start_timeout=120,
            shutdown_kernel="immediate",  # all cells are done; an orderly exit takes two seconds
            extra_arguments=["--log-level=CRITICAL"],
        )
    except PapermillExecutionError as error:
        failed(notebook, executed, f"{error.ename}: {error.evalue}")
    except DeadKernelError:
        failed(notebook, executed, "The kernel died; the usual reason is too little memory.")
    except RuntimeError as error:
        sys.exit(f"failed\n\n{notebook.stem}: the kernel did not start: {error}.")
    seconds = time.monotonic() - start
    print(f"{seconds:.0f} s", flush=True)
    return seconds


def failed(notebook: Path, executed: Path, reason: str) -> None:
    cells = nbformat.read(executed, as_version=4).cells
    started = [c for c in cells if c.cell_type == "code" and c.metadata.papermill.start_time]
    sys.exit(
        f"failed\n\n{notebook.stem}, cell {len(started)}: {started[-1].source.splitlines()[0]}\n"
        f"{reason}\nThe half-executed notebook: {executed}"
    )


def measured(report: Path) -> dict[str, float]:
    return json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}


def table(rows: list[tuple[str, float, dict[str, float]]]) -> str:
    lines = [("notebook", "time", "measured", "")]
    for stem, seconds, values in rows:
        left = (stem, f"{seconds:.0f} s")
        for name, value in values.items() or [("", "")]:
            lines.append((*left, name, value if isinstance(value, str) else number(value)))
            left = ("", "")
    lines.append(("total", f"{sum(seconds for _, seconds, _ in rows):.0f} s", "", ""))
    return "\n" + layout(lines, left=(0, 2))


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted; what was executed so far is kept.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(
            f"The notebooks cannot be written: {where}{error.strerror or error}; free some space "
            "or name another folder with --output, and what was trained so far is used again."
        )
