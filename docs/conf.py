"""Sphinx's settings for the site that `make site` builds; see build.py."""

import pkgutil
import re
import sys
from pathlib import Path
from textwrap import dedent, indent

import effad_core

from numpy.typing import ArrayLike
from sphinx.util.typing import stringify_annotation

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))  # for mathml

project = "EfficientAD, step by step"
html_title = project
language = "en"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "mathml",
]
exclude_patterns = ["README.md"]  # index.md includes it
templates_path = [str(DOCS / "templates")]

# Notebooks are shown as `make tutorial` executed them.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The docstrings: Google's style, and `name` in backticks is a link where it names something here.
default_role = "py:obj"
autosummary_context = {"submodules": {}}  # package -> its public modules
for module in pkgutil.walk_packages(effad_core.__path__, "effad_core."):
    package, _, name = module.name.rpartition(".")
    if not name.startswith("_"):
        autosummary_context["submodules"].setdefault(package, []).append(name)
autodoc_default_options = {"exclude-members": "set"}  # matplotlib gives it to each figure class
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_static_path = [str(DOCS / "static")]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"


def setup(app):
    app.connect("autodoc-process-docstring", as_restructured_text, priority=100)  # then napoleon
    app.connect("autodoc-process-signature", with_short_types)
    # A page opened from the disk may not read its neighbours, which search summaries are made of.
    app.add_js_file(
        None,
        body='if (location.protocol === "file:")'
        " DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;",
        priority=600,
    )


def as_restructured_text(app, what, name, obj, options, lines):
    """What docstrings write for the eye, in Sphinx's words.

    Text in columns (folders and what they hold) and a module's indented examples stay as they
    were written, and `name`s, the plural of a link, gets the mark that ends the link.
    """
    paragraphs = re.sub(r"(`[^`\s]+`)(?=\w)", r"\1\\ ", "\n".join(lines)).split("\n\n")
    for index, paragraph in enumerate(paragraphs):
        example = what == "module" and paragraph.startswith("    ")
        if example or re.search(r"\S {3,}\S", paragraph):
            text = indent(dedent(paragraph.strip("\n")), "    ")
            paragraphs[index] = f".. code-block:: text\n\n{text}"
    lines[:] = "\n\n".join(paragraphs).split("\n")


def with_short_types(app, what, name, obj, options, signature, returned):
    """Signatures with numpy's ArrayLike by its name, instead of the union that it stands for."""
    if signature:
        return signature.replace(stringify_annotation(ArrayLike, "smart"), "ArrayLike"), returned
