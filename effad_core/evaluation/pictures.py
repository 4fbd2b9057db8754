"""A figure with its words, and how it becomes a file."""

import os
from dataclasses import dataclass
from io import BytesIO

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo


@dataclass(frozen=True)
class Picture:
    """A figure, the stem of its file, its title, and in `alt` what it shows, in words."""

    name: str
    figure: Figure
    title: str
    alt: str


def save(picture: Picture, path: str | os.PathLike) -> None:
    """Write a picture as a small PNG, with its title and its alternative text in the file."""
    drawn, words = BytesIO(), PngInfo()
    picture.figure.savefig(drawn, format="png", pil_kwargs={"compress_level": 1})
    words.add_text("Title", picture.title)
    words.add_text("Description", picture.alt)
    Image.open(drawn).convert("RGB").save(path, format="PNG", optimize=True, pnginfo=words)
