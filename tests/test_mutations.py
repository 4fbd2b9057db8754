"""The table of mutations fits the present code, and its command notices what survives.

`python tests/mutations/run.py` (`make mutations`) tries them all, which takes minutes.
"""

import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = runpy.run_path(str(ROOT / "tests" / "mutations" / "run.py"))
Mutation, MUTATIONS = RUN["Mutation"], RUN["mutations"]()


def copied(mutation, folder):
    target = folder / mutation.file
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(ROOT / mutation.file, target))


def test_every_mutation_applies_once_to_the_present_code(tmp_path):
    faults = []
    for mutation in MUTATIONS:
        path = copied(mutation, tmp_path)
        try:
            mutation.apply(tmp_path)
            if path.suffix == ".py":
                compile(path.read_text(encoding="utf-8"), path.name, "exec")
        except (ValueError, SyntaxError) as error:
            faults.append(f"{mutation.name}: {error}")
    assert faults == []


def test_every_mutation_names_what_should_notice():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(names) >= 60 and len(set(names)) == len(names)
    assert sum(bool(mutation.notebook) for mutation in MUTATIONS) >= 15
    for mutation in MUTATIONS:
        assert mutation.tests or mutation.notebook, mutation.name
        for test in mutation.tests:
            file, _, function = test.partition("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            assert not function or f"def {function}(" in text, test
        if mutation.notebook:
            assert (ROOT / "notebooks" / f"{mutation.notebook}.ipynb").is_file(), mutation.name


@pytest.mark.parametrize("text", ["absent", "p", "code"])
def test_a_text_that_does_not_occur_once_is_refused(tmp_path, text):
    (tmp_path / "x.py").write_text("pip = code\n")
    replacement = "code" if text == "code" else "other"  # changes nothing
    with pytest.raises(ValueError, match=r"x\.py holds the text [012] times"):
        Mutation("wrong", "x.py", text, replacement).apply(tmp_path)
    assert (tmp_path / "x.py").read_text() == "pip = code\n"


def test_a_notebook_is_broken_in_its_code_alone(tmp_path):
    path = tmp_path / "notebooks" / "x.ipynb"
    path.parent.mkdir()
    cells = [{"cell_type": "markdown", "source": ["a = 1"]}]
    cells += [{"cell_type": "code", "source": ["b = 0\n", "a = 1"]}]
    path.write_text(RUN["json"].dumps({"cells": cells}))
    Mutation("wrong", "notebooks/x.ipynb", "a = 1", "a = 2").apply(tmp_path)
    markdown, code = RUN["json"].loads(path.read_text())["cells"]
    assert markdown["source"] == ["a = 1"] and code["source"] == "b = 0\na = 2"
