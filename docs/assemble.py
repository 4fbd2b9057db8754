"""Gather what the site shows into one folder, each page where it lies in the project.

Relative links between pages thereby hold; those to other things of the project are turned into
links that a site can follow (`Pages.link`).
"""

import os
import re
import shutil
from pathlib import Path

import nbformat
from nbformat import NotebookNode

NUMBERED = "[0-9][0-9]_*.ipynb"
# Code, in which nothing is a link, or the target of a link or an image.
CODE_OR_LINK = re.compile(r"```.*?```|`[^`\n]*`|(?P<text>!?\[[^]]*\])\((?P<target>[^)\s]+)\)", re.S)
WIDGET = "application/vnd.jupyter.widget-view+json"
HINT = (
    "*Controls stand here that answer while Python runs: `make lab` opens this notebook, and "
    "`make app` serves the explorer of notebook 06 as a page.*"
)


class SiteError(Exception):
    """Why there is no site, in a sentence."""


def assemble(root: Path, source: Path) -> None:
    """Write the pages of the project at `root` into the folder `source`.

    Raises:
        SiteError: if a notebook has not been executed, or a page links to what does not exist.
    """
    source.mkdir(parents=True)
    shutil.copy(root / "docs" / "index.md", source)
    shutil.copy(root / "docs" / "api.md", source)
    pages = Pages(root, source)
    pages.add(Path("README.md"))
    for path in executed_notebooks(root):
        notebook = nbformat.read(path, as_version=4)
        name = Path("notebooks") / path.name
        prepare(notebook, path)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = pages.relinked(cell.source, name)
        (source / name).parent.mkdir(exist_ok=True)
        nbformat.write(notebook, source / name)


class Pages:
    """Markdown pages with the pages and files that they link to."""

    def __init__(self, root: Path, source: Path):
        self.root, self.source = root, source

    def add(self, name: Path) -> None:
        """Write the page and everything that it links to; `name` is relative to the project."""
        target = self.source / name
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.suffix != ".md":
            shutil.copy(self.root / name, target)
            return
        target.touch()  # pages may link to one another
        text = (self.root / name).read_text(encoding="utf-8")
        target.write_text(self.relinked(text, name), encoding="utf-8")

    def relinked(self, text: str, page: Path) -> str:
        """The Markdown with the links that hold in the site."""

        def replace(match: re.Match) -> str:
            if match["target"] is None or re.match(r"[a-z]+:|#", match["target"]):
                return match[0]
            target = self.link(match["target"], page)
            return f"{match['text']}({target})" if target else match["text"].strip("![]")

        return CODE_OR_LINK.sub(replace, text)

    def link(self, target: str, page: Path) -> str | None:
        """Where a relative link of a page leads in the site; None for a folder.

        Python files of the module lead to their documentation, the README to the first page.
        """
        path, _, anchor = target.partition("#")
        name = Path(os.path.normpath(page.parent / path))
        if name.parts[0] == ".." or not (self.root / name).exists():
            raise SiteError(f"{page} links to {target}, which does not exist.")
        if (self.root / name).is_dir():
            return None
        if name.parts[0] == "effad_core" and name.suffix == ".py":
            module = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
            name = Path("api.md" if module == "effad_core" else f"api/{module}.rst")
        elif name.suffix != ".ipynb":
            self.add(name)
        name = Path("index.md") if name == Path("README.md") else name
        relative = os.path.relpath(name, page.parent).replace(os.sep, "/")
        return f"{relative}#{anchor}" if anchor else relative


def executed_notebooks(root: Path) -> list[Path]:
    """The executed copies of all the course's notebooks, in order."""
    found = []
    for path in sorted((root / "notebooks").glob(NUMBERED)):
        executed = root / "build" / "notebooks" / path.name
        again = (
            f"run `make tutorial`, or `.venv/bin/python notebooks/run.py --only {path.name[:2]}`"
        )
        if not executed.is_file():
            raise SiteError(f"{path.name} has not been executed: {again}, first.")
        if sources(executed) != sources(path):
            raise SiteError(f"{path.name} has changed since it was executed: {again}, again.")
        found.append(executed)
    return found


def sources(path: Path) -> list[str]:
    """The cells as they were written: without those that papermill puts in."""
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if "injected-parameters" not in tags(cell)]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def prepare(notebook: NotebookNode, path: Path) -> None:
    """Make an executed notebook a page, in place: figures described, long things folded.

    Raises:
        SiteError: if a figure has no alternative text.
    """
    notebook.metadata.pop("widgets", None)
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        cell.outputs = [static(output) for output in cell.outputs if not is_progress(output)]
        if "injected-parameters" in tags(cell):
            lines = cell.source.splitlines()[1:]  # the first is papermill's comment
            cell.source = "\n".join(line for line in lines if not line.startswith("report = "))
            profile = notebook.metadata.papermill.parameters.get("profile", "smoke")
            fold(cell, f"the parameters of this execution, profile {profile}")
        elif "solution" in tags(cell):
            fold(cell, "the solution")
        elif "start" in tags(cell):
            fold(cell, "where the package is missing")
        images = [o for o in cell.outputs if "image/png" in o.get("data", {})]
        texts = [o.metadata.get("image/png", {}).get("alt", "") for o in images]
        if not all(texts):
            raise SiteError(
                f"{path.name}, cell {number + 1}: its figure has no alternative text. Figures of "
                "effad_core.figures have their titles': execute the notebook again, or draw it so."
            )
        if texts:
            page_metadata(cell)["image"] = {"alt": "; ".join(texts)}


def page_metadata(cell: NotebookNode) -> dict:
    return cell.metadata.setdefault("mystnb", {})


def fold(cell: NotebookNode, what: str) -> None:
    """Hide the cell behind a line that can be clicked."""
    cell.metadata["tags"] = [*tags(cell), "hide-cell"]
    page_metadata(cell).update(code_prompt_show=f"Show {what}", code_prompt_hide=f"Hide {what}")


def is_progress(output: NotebookNode) -> bool:
    """Whether the output is a progress bar of tqdm's, as a widget."""
    data = output.get("data", {})
    return WIDGET in data and "[00:00" in data.get("text/plain", "")


def static(output: NotebookNode) -> NotebookNode:
    """The output; of controls their text and a hint."""
    data = output.get("data", {})
    if WIDGET not in data:
        return output
    text = f"```text\n{data.get('text/plain', '')}\n```\n\n{HINT}"
    return nbformat.v4.new_output("display_data", data={"text/markdown": text})
