"""Large images: cut into overlapping tiles, with maps that are put together again.

At 256x256 pixels, a defect of eight pixels in an image of 6000x4000 is a third of a pixel. Tiles of
256x256 at the image's own resolution keep it. Not in the paper, whose detector sees the whole image
at once: with tiles, its autoencoder knows only what belongs into a tile, not into the image.

* `cutting`: `Tiles`, from an image to its tiles and from their maps to its own
* `crops`: `Crops`, what a detector with tiles is trained on
* `options`: the options of commands
"""

from .crops import Crops
from .cutting import Tiles

__all__ = ["Crops", "Tiles"]
