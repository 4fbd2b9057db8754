"""What readers of the built site would stumble over: dead links, bare images, the network."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

# What a style sheet loads from another host.
LOADED = re.compile(r"(?:url\(\s*|@import\s+)['\"]?((?:https?:)?//[^)'\"\s]+)")


def faults(html: Path) -> list[str]:
    """All faults of the site in a folder, each a line that names the page."""
    found = []
    for page in sorted(html.rglob("*.html")):
        found += [f"{page.relative_to(html)}: {fault}" for fault in faults_of_page(page)]
    for sheet in sorted(html.rglob("*.css")):
        for url in LOADED.findall(sheet.read_text(encoding="utf-8")):
            found.append(f"{sheet.relative_to(html)}: {url} is loaded from the network")
    return found


def faults_of_page(page: Path) -> Iterator[str]:
    soup = parsed(page)
    for image in soup.find_all("img"):
        if not image.get("alt", "").strip():
            yield f"the image {image.get('src', '')} has no alternative text"
    for tag in soup.find_all(["img", "script", "link", "iframe", "source", "video", "audio"]):
        target = tag.get("src") or tag.get("href")
        if target and urlsplit(target).netloc:
            yield f"{target} is loaded from the network"
        elif target and tag.get("rel") != ["index"] and (fault := dead(page, target)):
            yield fault
    for tag in soup.find_all("a", href=True):
        target = tag["href"]
        if urlsplit(target).scheme in ("http", "https"):
            if not re.fullmatch(r"https?://[\w.-]+\.\w+(:\d+)?([/?#]\S*)?", target):
                yield f"{target!r} is no address"
        elif fault := dead(page, target):
            yield fault
    if "vnd.jupyter.widget" in soup.decode():
        yield "there are controls that answer only while Python runs"


def dead(page: Path, target: str) -> str | None:
    """What is wrong with a link inside the site; None if it leads somewhere."""
    parts = urlsplit(target)
    if parts.scheme == "data":
        return None
    file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if parts.scheme or not file.is_file():
        return f"the link {target} leads nowhere"
    if parts.fragment and file.suffix == ".html" and unquote(parts.fragment) not in anchors(file):
        return f"the link {target} leads to a page without that heading"
    return None


@cache
def parsed(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


@cache
def anchors(page: Path) -> set[str]:
    return {tag["id"] for tag in parsed(page).find_all(id=True)}
