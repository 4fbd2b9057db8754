"""Every notebook of the course is built alike: each rule is a function that says what breaks it.

The second half of this file breaks a sound notebook in one way at a time and sees its rule object.
"""

import ast
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

COURSE = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(COURSE.glob("[0-9][0-9]_*.ipynb"))
PROFILES = sorted(COURSE.glob("profiles/*.yaml"))

# A title tells what its reader does. A new title may need a new verb here.
VERBS = (
    "Add|Adapt|Augment|Build|Calibrate|Catch|Choose|Combine|Compare|Compute|Deploy|Detect|Distil"
    "|Evaluate|Explain|Explore|Export|Find|Imitate|Inspect|Learn|Load|Localize|Look|Make|Map"
    "|Measure|Meet|Normalize|Plot|Predict|Reconstruct|Run|Score|See|Set|Show|Start|Teach|Test"
    "|Time|Train|Tune|Understand|Use"
)
CARD = ("You will do", "You will learn", "You need", "minutes", "Reads", "Writes")
LONGEST, MEDIAN = 25, 8
IMPORTED = 10  # names at most, before the first section
RUNNER_GIVES = {"scenario", "report"}

Rule = Callable[[NotebookNode, str], Iterator[str]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    RULES.append(function)
    return function


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def checked_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in code_cells(notebook) if "nbval-check-output" in tags(cell)]


def parameters(notebook: NotebookNode) -> dict[str, object]:
    """Names and values of the parameters cell; raises where a value is no literal."""
    found = {}
    for cell in code_cells(notebook):
        if "parameters" in tags(cell):
            for node in ast.parse(cell.source).body:
                found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


@rule
def opens_with_a_card(notebook, following):
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "the first cell is not markdown that starts with a title"
    elif not re.match(rf"# (\d+\W+)?({VERBS}) ", first.source):
        yield "the title does not start with one of VERBS"
    for words in CARD:
        if words not in first.source:
            yield f"the card does not say {words!r}"


@rule
def has_one_cell_of_literal_parameters(notebook, following):
    count = sum("parameters" in tags(cell) for cell in code_cells(notebook))
    if count != 1:
        yield f"{count} cells are tagged 'parameters'"
    try:
        if parameters(notebook).get("report") is not None:
            yield "the default of 'report' is not None"
    except (ValueError, AttributeError, SyntaxError):
        yield "the parameters cell holds more than `name = literal` lines"


@rule
def starts_where_the_package_is_missing(notebook, following):
    started = False
    for cell in code_cells(notebook):
        if "start" in tags(cell):
            started = True
            if "find_spec" not in cell.source or "%pip install" not in cell.source:
                yield "the cell tagged 'start' does not install the package where it is missing"
        elif "effad_core" in cell.source and not started:
            yield "no cell tagged 'start' stands before the first use of effad_core"
            return


@rule
def has_short_cells(notebook, following):
    lengths = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    for cell, length in zip(code_cells(notebook), lengths, strict=True):
        if length > LONGEST:
            yield f"the cell {cell.source.splitlines()[0]!r} has {length} lines"
    if lengths and median(lengths) > MEDIAN:
        yield f"the median code cell has {median(lengths):g} lines"


@rule
def imports_few_names_before_its_first_section(notebook, following):
    names = 0
    for cell in notebook.cells[1:]:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            break
        if cell.cell_type == "code" and "start" not in tags(cell):
            lines = [line for line in cell.source.splitlines() if not line.startswith("%")]
            for node in ast.walk(ast.parse("\n".join(lines))):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names += len(node.names)
    if names > IMPORTED:
        yield f"{names} names are imported before the first section"


@rule
def keeps_no_trace_of_an_execution(notebook, following):
    kernel = notebook.metadata.get("kernelspec", {}).get("name")
    if kernel != "python3":
        yield f"the kernel is {kernel!r}, not 'python3'"
    for name in notebook.metadata.keys() - {"kernelspec", "language_info"}:
        yield f"the notebook's metadata holds {name!r}"
    for cell in code_cells(notebook):
        if cell.execution_count is not None and cell not in checked_cells(notebook):
            yield "a cell that is not checked has an execution count"
        for name in cell.metadata.keys() - {"tags", "jupyter"}:
            yield f"a cell's metadata holds {name!r}"


@rule
def keeps_exactly_the_checked_outputs(notebook, following):
    if not checked_cells(notebook):
        yield "no cell is tagged 'nbval-check-output'"
    for cell in code_cells(notebook):
        line = cell.source.partition("\n")[0]
        checked = cell in checked_cells(notebook)
        if cell.outputs and not checked:
            yield f"the cell {line!r} keeps an output that nothing checks"
        if checked and not any(text_of(output).strip() for output in cell.outputs):
            yield f"the cell {line!r} is checked but keeps no text"
        if checked and cell.execution_count is None:
            yield f"the cell {line!r} has no execution count, so nbval skips it"
        for output in cell.outputs:
            for kind in output.get("data", {}):
                if not kind.startswith("text/"):
                    yield f"the cell {line!r} keeps {kind}"


def text_of(output: NotebookNode) -> str:
    return output.get("text", "") or output.get("data", {}).get("text/plain", "")


@rule
def has_exercises_with_hidden_solutions(notebook, following):
    exercises, unsolved = 0, None
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and re.search(r"^### Exercise", cell.source, re.M):
            if unsolved:
                yield f"{unsolved!r} has no cell tagged 'solution'"
            exercises, unsolved = exercises + 1, cell.source.partition("\n")[0]
        elif "solution" in tags(cell):
            if not cell.metadata.get("jupyter", {}).get("source_hidden"):
                yield "a solution is not hidden (metadata jupyter.source_hidden)"
            if not exercises:
                yield "a solution stands before the first '### Exercise'"
            unsolved = None
    if unsolved:
        yield f"{unsolved!r} has no cell tagged 'solution'"
    if not 2 <= exercises <= 3:
        yield f"{exercises} cells start with '### Exercise', not 2 or 3"


@rule
def ends_with_a_link_onward(notebook, following):
    last = notebook.cells[-1]
    if last.cell_type != "markdown" or f"]({following}" not in last.source:
        yield f"the last cell does not link to {following or 'anything'}"


def faults(notebook: NotebookNode, following: str) -> list[str]:
    return [f"{rule.__name__}: {fault}" for rule in RULES for fault in rule(notebook, following)]


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


# --- the course --------------------------------------------------------------------------------


def test_the_course_has_notebooks_numbered_from_zero():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers[0] == "00" and len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    following = [other.name for other in NOTEBOOKS if other.name > path.name] or [""]
    assert faults(read(path), following[0]) == []
    nbformat.validate(read(path))


@pytest.mark.parametrize("installed", [True, False])
def test_the_start_cell_installs_the_package_only_where_it_is_missing(installed, monkeypatch):
    (start,) = {
        cell.source
        for path in NOTEBOOKS
        for cell in code_cells(read(path))
        if "start" in tags(cell)
    }
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    calls = []
    shell = SimpleNamespace(run_line_magic=lambda *words: calls.append(words))
    exec(TransformerManager().transform_cell(start), {"get_ipython": lambda: shell})
    wanted = ("pip", 'install --quiet "..[course,distill,export]"')
    assert calls == ([] if installed else [wanted])


def test_enough_outputs_are_checked():
    assert sum(len(checked_cells(read(path))) for path in NOTEBOOKS) >= 2 * len(NOTEBOOKS) > 0


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_key_of_a_profile_is_some_notebooks_parameter(path):
    known = {notebook.stem: parameters(read(notebook)).keys() for notebook in NOTEBOOKS}
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    common = sections.pop("common") or {}
    assert common.keys() <= set().union(*known.values()) - RUNNER_GIVES
    assert sections.keys() <= known.keys()
    for stem, section in sections.items():
        assert section.keys() <= known[stem] - RUNNER_GIVES, stem


def test_the_four_profiles_exist():
    assert [path.stem for path in PROFILES] == ["laptop", "paper", "quick", "smoke"]


# --- the rules themselves ----------------------------------------------------------------------


KERNEL = {"name": "python3", "display_name": "Python 3"}


def sound_notebook() -> NotebookNode:
    card = "# 03 · Train the student\n" + "\n".join(CARD)
    cells = [
        new_markdown_cell(card),
        new_code_cell('scenario = "solar-mono"\nreport = None', metadata={"tags": ["parameters"]}),
        new_code_cell("print(33)", metadata={"tags": ["nbval-check-output"]}),
        new_markdown_cell("## On your own\n\n### Exercise 1"),
        new_code_cell("1 + 1", metadata={"tags": ["solution"], "jupyter": {"source_hidden": True}}),
        new_markdown_cell("### Exercise 2"),
        new_code_cell("2 + 2", metadata={"tags": ["solution"], "jupyter": {"source_hidden": True}}),
        new_markdown_cell("[Next](04_next.ipynb)"),
    ]
    cells[2].update(outputs=[new_output("stream", name="stdout", text="33\n")], execution_count=2)
    return new_notebook(cells=cells, metadata={"kernelspec": KERNEL})


def figure() -> NotebookNode:
    return new_output("display_data", data={"image/png": "aGVsbG8=", "text/plain": "<Figure>"})


BREAKS = {
    "no title": (lambda n: n.cells.pop(0), "not markdown that starts with a title"),
    "a title without a verb": (
        lambda n: n.cells[0].update(source=n.cells[0].source.replace("Train the", "The")),
        "does not start with one of VERBS",
    ),
    "a card without its needs": (
        lambda n: n.cells[0].update(source=n.cells[0].source.replace("You need", "")),
        "the card does not say 'You need'",
    ),
    "no parameters": (lambda n: n.cells[1].metadata.clear(), "0 cells are tagged"),
    "two parameters cells": (
        lambda n: n.cells[2].metadata.tags.append("parameters"),
        "2 cells are tagged",
    ),
    "a computed parameter": (
        lambda n: n.cells[1].update(source="steps = 2 * 3 * len('x')"),
        "more than `name = literal` lines",
    ),
    "a report of its own": (
        lambda n: n.cells[1].update(source="report = 'here.json'"),
        "the default of 'report'",
    ),
    "no start": (
        lambda n: n.cells[4].update(source="import effad_core"),
        "no cell tagged 'start' stands before",
    ),
    "a start that installs nothing": (
        lambda n: n.cells[4].metadata.tags.append("start"),
        "does not install the package",
    ),
    "a long cell": (lambda n: n.cells[4].update(source="x = 1\n" * 26), "has 26 lines"),
    "long cells": (
        lambda n: [cell.update(source="x = 1\n" * 9) for cell in code_cells(n)[1:]],
        "the median code cell has 9 lines",
    ),
    "many imports": (
        lambda n: n.cells[2].update(source="from os import " + ", ".join("abcdefghijk")),
        "11 names are imported before the first section",
    ),
    "an execution count": (
        lambda n: n.cells[4].update(execution_count=3),
        "not checked has an execution count",
    ),
    "an execution time": (
        lambda n: n.cells[4].metadata.update(execution={"shell.execute_reply": "12:00"}),
        "a cell's metadata holds 'execution'",
    ),
    "widget state": (lambda n: n.metadata.update(widgets={}), "metadata holds 'widgets'"),
    "another kernel": (
        lambda n: n.metadata.kernelspec.update(name="mine"),
        "'mine', not 'python3'",
    ),
    "no checked cell": (lambda n: n.cells[2].metadata.tags.clear(), "no cell is tagged"),
    "an unchecked output": (
        lambda n: n.cells[4].update(outputs=n.cells[2].outputs),
        "keeps an output that nothing checks",
    ),
    "a check of nothing": (lambda n: n.cells[2].outputs.clear(), "checked but keeps no text"),
    "a figure": (lambda n: n.cells[2].outputs.append(figure()), "keeps image/png"),
    "a check that nbval skips": (
        lambda n: n.cells[2].update(execution_count=None),
        "has no execution count, so nbval skips it",
    ),
    "an exercise without solution": (
        lambda n: n.cells[4].metadata.tags.clear(),
        "'## On your own' has no cell tagged 'solution'",
    ),
    "a last exercise without solution": (
        lambda n: n.cells[6].metadata.tags.clear(),
        "'### Exercise 2' has no cell tagged 'solution'",
    ),
    "a solution in sight": (lambda n: n.cells[4].metadata.pop("jupyter"), "is not hidden"),
    "a solution too early": (
        lambda n: n.cells[2].metadata.update(n.cells[4].metadata),
        "stands before the first",
    ),
    "one exercise": (lambda n: n.cells.__delitem__(slice(5, 7)), "1 cells start with"),
    "no link": (lambda n: n.cells[-1].update(source="The end."), "does not link to 04_next.ipynb"),
    "a wrong link": (lambda n: n.cells[-1].update(source="[N](05_x.ipynb)"), "does not link to"),
}


def test_a_sound_notebook_has_no_fault():
    assert faults(sound_notebook(), "04_next.ipynb") == []


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_notebook_is_found(name):
    change, fault = BREAKS[name]
    notebook = sound_notebook()
    change(notebook)
    assert any(fault in found for found in faults(notebook, "04_next.ipynb"))


def test_every_rule_is_broken_once():
    fired = set()
    for change, _ in BREAKS.values():
        notebook = sound_notebook()
        change(notebook)
        fired |= {fault.partition(":")[0] for fault in faults(notebook, "04_next.ipynb")}
    assert fired == {rule.__name__ for rule in RULES}
