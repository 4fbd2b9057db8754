"""Build the site: the executed notebooks and the docstrings as one searchable book.

    python docs/build.py

Reads build/notebooks, which `make tutorial` writes, and writes build/site/html. Nothing is
loaded from the network, here or by the pages.
"""

import shutil
import sys
from pathlib import Path

from assemble import SiteError, assemble
from check import faults
from sphinx.cmd.build import main as sphinx

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SITE = ROOT / "build" / "site"


def main() -> None:
    source, html = SITE / "source", SITE / "html"
    shutil.rmtree(source, ignore_errors=True)
    try:
        assemble(ROOT, source)
    except SiteError as error:
        sys.exit(str(error))
    for folder in (html, SITE / "doctrees"):
        shutil.rmtree(folder, ignore_errors=True)
    options = ["-q", "-W", "--keep-going", "-c", str(DOCS), "-d", str(SITE / "doctrees")]
    if sphinx([*options, str(source), str(html)]):
        sys.exit("Sphinx's warnings above are errors of the site.")
    if found := faults(html):
        sys.exit("\n".join([*found, f"{len(found)} faults in {html}"]))
    print(f"{len([*html.rglob('*.html')])} pages: open {html / 'index.html'}")


if __name__ == "__main__":
    main()
