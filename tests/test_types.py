"""The public API has types that a checker reads, the lazily loaded names included."""

import ast
import subprocess
import sys
from pathlib import Path

import effad_core

import PIL
import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(
    not (Path(PIL.__file__).parent / "py.typed").exists(),
    reason="this Pillow has no types, so that every image has any type",
)
def test_what_users_write_has_the_types_that_it_seems_to_have(tmp_path):
    uses = HERE / "types" / "uses.py"
    options = ["--follow-imports=silent", "--ignore-missing-imports", "--warn-unused-ignores"]
    command = [sys.executable, "-m", "mypy", *options, "--cache-dir", str(tmp_path), str(uses)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_public_name_is_in_the_stub_and_can_be_loaded():
    stub = ast.parse((HERE.parent / "effad_core" / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    names = {alias.asname for node in imports for alias in node.names}
    assert names == set(effad_core.__all__) and len(names) > 20
    for name in names:
        assert getattr(effad_core, name).__module__.startswith("effad_core."), name
