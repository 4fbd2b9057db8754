"""Options of commands: at which resolution a detector looks at images."""

import argparse
from collections.abc import Mapping

from .cutting import Tiles


def image_side(text: str) -> tuple[int, int]:
    """(height, width) of "256", a square's side, or "256x512"; argparse's type for --image-size."""
    height, _, width = text.partition("x")
    sides = (height, width or height)
    if not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither pixels, such as 256, nor HEIGHTxWIDTH, such as 256x512"
        )
    return int(sides[0]), int(sides[1])


def add_image_size(parser: argparse.ArgumentParser) -> None:
    """Add --image-size; without it the attribute is None."""
    parser.add_argument(
        "--image-size",
        type=image_side,
        metavar="PIXELS",
        help="images are resized to this square, or HEIGHTxWIDTH; 256 without it",
    )


def add_resolution(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that train a detector: --image-size, --tiles, --overlap."""
    add_image_size(parser)
    parser.add_argument(
        "--tiles",
        type=image_side,
        metavar="PIXELS",
        help="cut images into tiles of this size, for small defects in large images",
    )
    parser.add_argument(
        "--overlap", type=int, metavar="PIXELS", help="of neighbouring tiles; a quarter without it"
    )


def resolution_of(args: argparse.Namespace) -> dict[str, object]:
    """The arguments of `EfficientAD` that these options ask for.

    Raises:
        ValueError: for an overlap without tiles, or one that does not fit.
    """
    if args.overlap is not None and args.tiles is None:
        raise ValueError("--overlap needs --tiles: without tiles nothing overlaps")
    found = {} if args.image_size is None else {"image_size": args.image_size}
    return found if args.tiles is None else found | {"tiles": Tiles(args.tiles, args.overlap)}


def resolution_name(resolution: Mapping[str, object]) -> str:
    """What the name of a run's folder says of them: "-256x512-tiles-512x1024-overlap-64"."""
    name = ""
    if (size := resolution.get("image_size")) is not None:
        name += f"-{size[0]}x{size[1]}"
    if (tiles := resolution.get("tiles")) is not None:
        name += f"-tiles-{tiles.size[0]}x{tiles.size[1]}-overlap-{tiles.overlap}"
    return name
