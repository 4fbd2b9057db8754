"""notebooks/tidy.py leaves what is committed and nothing else."""

import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

TIDY = Path(__file__).parents[2] / "notebooks" / "tidy.py"


def tidied(path, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [str(TIDY), *options, str(path)])
    monkeypatch.syspath_prepend(TIDY.parent)
    runpy.run_path(str(TIDY), run_name="__main__")
    return nbformat.read(path, as_version=4)


def test_only_checked_outputs_stay(tmp_path, monkeypatch):
    result = new_output("execute_result", {"text/plain": "33"}, execution_count=4)
    checked, unchecked = (
        new_code_cell("33", execution_count=4, outputs=[result.copy()]) for _ in range(2)
    )
    hidden = {"source_hidden": True}
    checked.metadata = {"tags": ["nbval-check-output"], "jupyter": hidden, "execution": {"at": "9"}}
    notebook = new_notebook(cells=[checked, unchecked], metadata={"widgets": {}, "authors": []})
    path = tmp_path / "01_x.ipynb"
    nbformat.write(notebook, path)

    after = tidied(path, monkeypatch)

    assert after.cells[0].outputs == [{**result, "execution_count": 1}]
    assert after.cells[0].metadata == {"tags": ["nbval-check-output"], "jupyter": hidden}
    assert after.cells[1].outputs == []
    assert [cell.execution_count for cell in after.cells] == [1, None]
    assert after.metadata.keys() == {"kernelspec", "language_info"}
    assert [cell.source for cell in after.cells] == ["33", "33"]
    once = path.read_bytes()
    tidied(path, monkeypatch)
    assert path.read_bytes() == once


def test_run_refreshes_the_checked_outputs(tmp_path, monkeypatch, capsys):
    cell = new_code_cell("import os; print(os.path.basename(os.getcwd()))")
    cell.metadata.tags = ["nbval-check-output"]
    path = tmp_path / "here" / "01_x.ipynb"
    path.parent.mkdir()
    nbformat.write(new_notebook(cells=[cell]), path)
    assert tidied(path, monkeypatch, "--run").cells[0].outputs[0].text == "here\n"


def test_a_notebook_that_fails_is_left_as_it_was(tmp_path, monkeypatch, capsys):
    path = tmp_path / "01_x.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        tidied(path, monkeypatch, "--run")
    assert path.read_bytes() == before
