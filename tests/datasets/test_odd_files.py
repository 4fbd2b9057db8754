"""Damaged and odd images: each is the right picture, or one sentence that names its file.

`CORPUS` is the table of them: what each is called, how it is made, and what must come out. The
pictures that must come out are made with numpy; PNG, BMP, PPM and the bombs are written by hand,
TIFF by tifffile, and only JPEG, WebP and GIF by Pillow, which also reads them.
"""

import io
import os
import random
import socket
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from effad_core.datasets import images
from effad_core.datasets.images import list_images, open_image, read_image, read_mask
from effad_core.errors import DataError, printable

import numpy as np
import PIL
import pytest
import tifffile
from PIL import Image

UNREAD = "cannot be read as an image"
POSIX = os.name == "posix"
FD = Path("/proc/self/fd")


@dataclass(frozen=True, repr=False)
class Case:
    """A file and what must come out of it.

    Attributes:
        make: writes it to a path.
        pixels: of the picture, (H, W, 3) of uint8; None where it must be refused or is not known.
        tolerance: how far a pixel may be off.
        words: that the sentence must hold, if it may be refused; "" for any.
        file: its name.
    """

    make: Callable[[Path], object]
    pixels: np.ndarray | None = None
    tolerance: int = 0
    words: str | None = None
    file: str = "x.png"


CORPUS: dict[str, Case] = {}


def add(name, content, pixels=None, tolerance=0, words=None, file="x.png"):
    """A case of bytes, or of a function that makes the file."""
    assert name not in CORPUS, name
    make = content if callable(content) else lambda path: path.write_bytes(content)
    if pixels is not None and pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    CORPUS[name] = Case(make, pixels, tolerance, words, file)


# --- pictures and encoders -----------------------------------------------------------------------

H, W = 13, 19
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (H, W, 3), np.uint8)
GRAY, ALPHA = RGB[..., 0], RGB[..., 1]
DEEP = RNG.integers(0, 65536, (H, W, 3)).astype(np.uint16)
Y, X = np.mgrid[:48, :64]
SMOOTH = np.stack([90 + X, 70 + 2 * Y, 120 + X // 2 + Y // 2], axis=2).astype(np.uint8)


def over_white(colour, alpha):
    share = alpha[..., None] / 255
    return np.rint(share * colour + (1 - share) * 255).astype(np.uint8)


def pillow(array, format, mode=None, **options):
    buffer = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, format, **options)
    return buffer.getvalue()


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def chunk(kind, data, checksum=None):
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png_rows(samples, depth):
    """Scan lines of (h, w, channels), each behind the filter type 0."""
    rows = []
    for row in samples.reshape(len(samples), -1):
        if depth == 16:
            packed = row.astype(">u2").tobytes()
        else:
            bits = (row[:, None] >> np.arange(depth - 1, -1, -1)) & 1
            packed = np.packbits(bits.astype(np.uint8).ravel()).tobytes()
        rows.append(b"\0" + packed)
    return b"".join(rows)


ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def png(samples, depth, colour, interlaced=False, before=b"", size=None, data=None, end=True):
    """A PNG of (h, w, channels) samples, by the specification."""
    height, width = size or samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    if data is None:
        passes = [samples[y::dy, x::dx] for x, y, dx, dy in ADAM7] if interlaced else [samples]
        data = zlib.compress(b"".join(png_rows(p, depth) for p in passes if p.size))
    parts = chunk(b"IHDR", header) + before + chunk(b"IDAT", data)
    return b"\x89PNG\r\n\x1a\n" + parts + (chunk(b"IEND", b"") if end else b"")


def bmp(rows, bits, size, palette=b"", compression=0, masks=b""):
    """A BMP of encoded rows (the lowest first, unless the height is negative)."""
    width, height = size
    start = 14 + 40 + len(masks) + len(palette)
    header = struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start)
    fields = (40, width, height, 1, bits, compression, len(rows), 0, 0, len(palette) // 4, 0)
    return header + struct.pack("<IiiHHIIiiII", *fields) + masks + palette + rows


def padded(rows):
    """Rows of bytes, each filled up to four."""
    return b"".join(row + b"\0" * (-len(row) % 4) for row in rows)


def turned(array, orientation):
    """What an image stored as `array` shows, by the definition of EXIF's orientations."""
    if orientation in (2, 3):
        array = array[:, ::-1]
    if orientation in (3, 4):
        array = array[::-1]
    if orientation >= 5:
        array = array.transpose(1, 0, 2)
        array = array[:, ::-1] if orientation in (6, 7) else array
        array = array[::-1] if orientation in (7, 8) else array
    return array


def exif(orientation):
    """An EXIF block with one tag, by hand."""
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 274, 3, 1, orientation, 0, 0)


# --- pictures of every kind ----------------------------------------------------------------------

COLOURS = {0: "gray", 2: "rgb", 3: "palette", 4: "gray+alpha", 6: "rgb+alpha"}
for colour, depths in (
    (0, (1, 2, 4, 8, 16)),
    (2, (8, 16)),
    (3, (1, 2, 4, 8)),
    (4, (8, 16)),
    (6, (8, 16)),
):
    for depth in depths:
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        samples = RNG.integers(0, 2**depth, (H, W, channels))
        table = RNG.integers(0, 256, (2**depth, 3), np.uint8) if colour == 3 else None
        eight = samples * 255 // (2**depth - 1)
        if depth == 16:  # Pillow leaves gray with alpha its upper bytes alone
            eight = samples >> 8 if colour == 4 else np.rint(samples / 257).astype(int)
        if colour == 3:
            shown = table[samples[..., 0]]
        elif colour == 0:
            shown = eight
        else:
            shown = eight if colour == 2 else over_white(eight[..., :-1], eight[..., -1])
        shown = np.broadcast_to(shown, (H, W, 3)).astype(np.uint8)
        before = chunk(b"PLTE", table.tobytes()) if colour == 3 else b""
        for interlaced in (False, True):
            add(
                f"png {COLOURS[colour]} {depth} bit{' interlaced' * interlaced}",
                png(samples, depth, colour, interlaced, before),
                shown,
                tolerance=1 if colour in (4, 6) else 0,
            )

plain = png(RGB, 8, 2)
table = RNG.integers(0, 256, (256, 3), np.uint8)
see_through = RNG.integers(0, 256, 256).astype(np.uint8)
add(
    "png palette with transparency",
    png(GRAY, 8, 3, before=chunk(b"PLTE", table.tobytes()) + chunk(b"tRNS", see_through.tobytes())),
    over_white(table[GRAY], see_through[GRAY]),
    tolerance=1,
)
key = RGB[2, 3]
add(
    "png with a transparent colour",
    png(RGB, 8, 2, before=chunk(b"tRNS", key.astype(">u2").tobytes())),
    np.where((key == RGB).all(axis=2, keepdims=True), 255, RGB).astype(np.uint8),
)
add("png in many chunks", png(RGB, 8, 2, data=b"", end=False) + b"".join(
    chunk(b"IDAT", bytes([b])) for b in zlib.compress(png_rows(RGB, 8))
) + chunk(b"IEND", b""), RGB)  # fmt: skip
add("png with bytes behind its end", plain + b"\0" * 100, RGB)
add("png with a text chunk", png(RGB, 8, 2, before=chunk(b"tEXt", b"Comment\0hello")), RGB)
add("png with an unknown chunk", png(RGB, 8, 2, before=chunk(b"abCd", b"1234")), RGB)
for name, profile in (("text", b"profile"), ("nothing", b""), ("a megabyte", bytes(2**20))):
    packed = chunk(b"iCCP", b"p\0\0" + zlib.compress(profile))
    add(f"png whose colour profile is {name}", png(RGB, 8, 2, before=packed), RGB)
    add(f"tiff whose colour profile is {name}", tiff(RGB, iccprofile=profile or None), RGB)
    blurred = pillow(SMOOTH, "JPEG", quality=95, icc_profile=profile)
    add(f"jpeg whose colour profile is {name}", blurred, SMOOTH, 6, file="x.jpg")

photometric = {2: "minisblack", 3: "rgb"}
for order in "<>":
    for kind, options in {
        "strips": {},
        "one strip a row": {"rowsperstrip": 1},
        "tiles": {"tile": (16, 16)},
        "deflated": {"compression": "zlib"},
        "deflated tiles": {"compression": "zlib", "tile": (16, 32)},
        "predicted": {"compression": "zlib", "predictor": True},
        "big": {"bigtiff": True},
    }.items():
        for name, array, shown in (
            ("gray", GRAY, GRAY),
            ("rgb", RGB, RGB),
            ("16 bit", DEEP[..., 0], np.rint(DEEP[..., 0] / 257).astype(np.uint8)),
        ):
            side = {"little": "<", "big": ">"}
            end = next(word for word, sign in side.items() if sign == order)
            content = tiff(array, byteorder=order, **options)
            words = "" if kind == "big" else None  # Pillow reads only one of the two
            add(f"tiff {name} {kind} {end}-endian", content, shown, words=words, file="x.tif")
    for name, array, shown in (
        ("float", np.float32(GRAY / 255), GRAY),
        ("16-bit colour", DEEP, np.rint(DEEP / 257).astype(np.uint8)),
        ("signed 16 bit", DEEP[..., 0] // 2, np.rint(DEEP[..., 0] // 2 / 257).astype(np.uint8)),
        ("signed 32 bit", np.int32(DEEP[..., 0]), np.rint(DEEP[..., 0] / 257).astype(np.uint8)),
        ("1 bit", GRAY > 127, np.where(GRAY > 127, 255, 0).astype(np.uint8)),
    ):
        array = array.astype(np.int16) if name == "signed 16 bit" else array
        content = tiff(array, byteorder=order, photometric=photometric[array.ndim])
        add(f"tiff {name} {order}", content, shown, file="x.tif")
for name, array in (
    ("complex", np.complex64(GRAY)),
    ("doubles", GRAY / 255),
    ("64-bit integers", np.uint64(GRAY)),
    ("negative", np.int16(GRAY) - 128),
    ("beyond 16 bit", np.uint32(GRAY) * 2**24),
    ("floats to 255", np.float32(GRAY)),
    ("NaN", np.where(GRAY > 9, np.nan, 0.5).astype(np.float32)),
    ("infinite", np.where(GRAY > 9, np.inf, 0.5).astype(np.float32)),
    ("five channels", np.dstack([RGB, RGB[..., :2]])),
):
    add(f"tiff of {name}", tiff(array, photometric="minisblack"), words="", file="x.tif")
add("tiff of pages", tiff(np.stack([RGB, 255 - RGB]), photometric="rgb"), RGB, file="x.tif")
add("tiff white is zero", tiff(GRAY, photometric="miniswhite"), 255 - GRAY, file="x.tif")
ink = np.dstack([RGB, np.zeros_like(GRAY)])
add("tiff cmyk", tiff(ink, photometric="separated"), 255 - RGB, 1, file="x.tif")
for compression in ("tiff_lzw", "packbits", "tiff_adobe_deflate", "group4"):
    bilevel = compression == "group4"
    array = GRAY > 99 if bilevel else RGB
    shown = np.where(array, 255, 0).astype(np.uint8) if bilevel else RGB
    add(f"tiff {compression}", pillow(array, "TIFF", compression=compression), shown)

order_of = {"bottom-up": (RGB[::-1], H), "top-down": (RGB, -H)}
for name, (array, height) in order_of.items():
    bgr = array[..., ::-1]
    add(f"bmp 24 bit {name}", bmp(padded(r.tobytes() for r in bgr), 24, (W, height)), RGB)
    wide = np.dstack([bgr, np.zeros_like(GRAY)])
    add(f"bmp 32 bit {name}", bmp(wide.tobytes(), 32, (W, height)), RGB)
for bits in (1, 4, 8):
    table, values = RNG.integers(0, 256, (2**bits, 4), np.uint8), RNG.integers(0, 2**bits, (H, W))
    rows = png_rows(values[::-1], bits)
    step = len(rows) // H
    rows = padded(rows[i * step + 1 : (i + 1) * step] for i in range(H))
    add(f"bmp {bits} bit", bmp(rows, bits, (W, H), table.tobytes()), table[values][..., 2::-1])
five = RGB >> 3
rows = (five[..., 0].astype("<u2") << 10) | (five[..., 1].astype("<u2") << 5) | five[..., 2]
expand = np.rint(five * (255 / 31)).astype(np.uint8)
add("bmp 16 bit", bmp(padded(r.tobytes() for r in rows[::-1]), 16, (W, H)), expand, 1)
runs = b"".join(bytes([W, value, 0, 0]) for value in range(H)) + b"\0\1"
table = np.repeat(np.arange(0, 256, dtype=np.uint8)[:, None], 4, axis=1)
add("bmp with runs", bmp(runs, 8, (W, H), table.tobytes(), 1),
    np.repeat(np.arange(H - 1, -1, -1, dtype=np.uint8)[:, None], W, axis=1))  # fmt: skip

for name, head, body, shown in (
    ("P1", b"P1", " ".join(str(v) for v in (GRAY > 99).astype(int).ravel()).encode(), None),
    ("P2", b"P2", " ".join(map(str, GRAY.ravel())).encode(), GRAY),
    ("P3", b"P3", " ".join(map(str, RGB.ravel())).encode(), RGB),
    ("P4", b"P4", np.packbits(GRAY > 99, axis=1).tobytes(), None),
    ("P5", b"P5", GRAY.tobytes(), GRAY),
    ("P6", b"P6", RGB.tobytes(), RGB),
    ("P5 16 bit", b"P5", DEEP[..., 0].astype(">u2").tobytes(), np.rint(DEEP[..., 0] / 257)),
):
    limit = b"" if head in (b"P1", b"P4") else b"65535\n" if "16" in name else b"255\n"
    shown = np.where(GRAY > 99, 0, 255) if shown is None else shown
    content = head + b"\n# comment\n%d %d\n" % (W, H) + limit + body
    add(f"pnm {name}", content, shown.astype(np.uint8), file="x.PNG")

for name, options in {
    "baseline": {},
    "progressive": {"progressive": True},
    "full colour": {"subsampling": 0},
    "restarts": {"restart_marker_rows": 1},
    "optimised": {"optimize": True},
}.items():
    add(f"jpeg {name}", pillow(SMOOTH, "JPEG", quality=95, **options), SMOOTH, 6, file="x.JPG")
add("jpeg gray", pillow(SMOOTH[..., 0], "JPEG", quality=95), SMOOTH[..., 0], 3, file="x.jpeg")
ink = Image.fromarray(np.dstack([255 - SMOOTH, np.zeros_like(SMOOTH[..., 0])]), "CMYK")
add("jpeg cmyk", pillow(ink, "JPEG", quality=95, subsampling=0), SMOOTH, 6, file="x.jpg")
second = Image.fromarray(255 - SMOOTH)
for format, name in (("MPO", "x.jpg"), ("GIF", "x.png"), ("WEBP", "x.webp"), ("PNG", "x.png")):
    animated = pillow(SMOOTH, format, save_all=True, append_images=[second])
    lossy = {"MPO": 12, "GIF": 40, "WEBP": 16, "PNG": 0}[format]
    add(f"{format.lower()} of two frames", animated, SMOOTH, lossy, file=name)
add("webp lossless", pillow(RGB, "WEBP", lossless=True), RGB, file="x.webp")
add("webp with alpha", pillow(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True),
    over_white(RGB, ALPHA), 1, file="x.webp")  # fmt: skip
few = Image.fromarray(GRAY // 8).convert("P")
few.putpalette(bytes(range(96)))
for interlace in (0, 1):
    colours = np.arange(96, dtype=np.uint8).reshape(32, 3)[GRAY // 8]
    add(f"gif interlace {interlace}", pillow(few, "GIF", interlace=interlace), colours)
clear = np.where((GRAY // 8 == 5)[..., None], 255, colours).astype(np.uint8)
add("gif with a transparent colour", pillow(few, "GIF", transparency=5), clear)

for number in range(1, 9):
    right = turned(SMOOTH, number)
    block = chunk(b"eXIf", exif(number)[6:])
    add(f"png orientation {number}", png(SMOOTH, 8, 2, before=block), right)
    content = tiff(SMOOTH, extratags=[(274, 3, 1, number, True)])
    add(f"tiff orientation {number}", content, right, file="x.tif")
    content = tiff(SMOOTH, compression="zlib", extratags=[(274, 3, 1, number, True)])
    add(f"tiff deflated orientation {number}", content, right, file="x.tif")
    content = pillow(SMOOTH, "JPEG", quality=95, exif=exif(number))
    add(f"jpeg orientation {number}", content, right, 6, file="x.jpg")
    content = pillow(SMOOTH, "WEBP", lossless=True, exif=exif(number)[6:])
    add(f"webp orientation {number}", content, right, file="x.webp")
for number in (0, 9, 65535):
    block = chunk(b"eXIf", exif(number)[6:])
    add(f"png orientation {number}", png(SMOOTH, 8, 2, before=block), SMOOTH)
# a date that is no text, as some cameras write: Pillow cannot write this EXIF anew
odd = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIHH", 2, 274, 3, 1, 6, 0)
odd += struct.pack(">HHIII", 306, 7, 4, 0x31323334, 0)
add("jpeg with an odd tag", pillow(SMOOTH, "JPEG", quality=95, exif=odd), turned(SMOOTH, 6), 6)
for name, block in {"text": b"Exif\0\0no tags", "cut": exif(6)[:20]}.items():
    content = pillow(SMOOTH, "JPEG", quality=95, exif=block)
    add(f"jpeg whose exif is {name}", content, SMOOTH, 6, words="", file="x.jpg")

for height, width in ((1, 1), (1, 5000), (5000, 1), (1, 65535), (2, 3)):
    strip = RNG.integers(0, 256, (height, width, 3), np.uint8)
    add(f"png of {width}x{height}", png(strip, 8, 2), strip)
    add(f"tiff of {width}x{height}", tiff(strip, photometric="rgb"), strip, file="x.tif")


# --- damaged files -------------------------------------------------------------------------------

WHOLE = {
    "png": (png(RGB, 8, 2), RGB),
    "interlaced png": (png(RGB, 8, 2, True), RGB),
    "bmp": (pillow(RGB, "BMP"), RGB),
    "tiff": (tiff(RGB), RGB),
    "deflated tiff": (tiff(RGB, compression="zlib"), RGB),
    "tiled tiff": (tiff(RGB, tile=(16, 16)), RGB),
    "ppm": (pillow(RGB, "PPM"), RGB),
    "gif": (pillow(few, "GIF"), colours),
    "webp": (pillow(RGB, "WEBP", lossless=True), RGB),
    "jpeg": (pillow(SMOOTH, "JPEG"), None),
    "progressive jpeg": (pillow(SMOOTH, "JPEG", progressive=True), None),
}
for name, (content, pixels) in WHOLE.items():
    length = len(content)
    for cut in sorted({1, 4, 9, 30, length // 4, length // 2, 3 * length // 4, length - 30}):
        add(f"{name} cut after {cut} bytes", content[:cut], pixels, words=UNREAD)
for count in (1, 4, 11):
    add(f"png without its last {count} bytes", plain[:-count], RGB, words=UNREAD)
add("png without an end", png(RGB, 8, 2, end=False), words=UNREAD)
add("png with a wrong checksum", plain.replace(plain[-16:-12], b"abcd"), words=UNREAD)
add(
    "png with text of a wrong checksum",
    png(RGB, 8, 2, before=chunk(b"tEXt", b"a\0b", 7)),
    words=UNREAD,
)
add("png of too many rows", png(RGB[:5], 8, 2, data=zlib.compress(png_rows(RGB, 8))), RGB[:5])
add("png of stored garbage", png(RGB, 8, 2, data=b"\0" * 500), words=UNREAD)
add(
    "png of an unknown filter",
    png(RGB, 8, 2, data=zlib.compress(b"\x09" + bytes(9**4))),
    words=UNREAD,
)
add("png of an unknown colour type", png(RGB, 8, 5), words=UNREAD)
add("png of 3 bits", png(RGB, 3, 2, data=b""), words=UNREAD)
add("png without a palette", png(GRAY, 8, 3), words="")
add("png without pixels", plain[:33] + chunk(b"IEND", b""), words=UNREAD)
add("png without a header", plain[:8] + plain[33:], words=UNREAD)
add("png as text over FTP", plain.replace(b"\r\n", b"\n"), words=UNREAD)
add("png with a newline before it", b"\n" + plain, words=UNREAD)
add("png without its first byte", plain[1:], words=UNREAD)
add("png twice", plain + plain, RGB)
for size in ((0, W), (H, 0), (0, 0)):
    add(f"png of {size[1]}x{size[0]}", png(RGB, 8, 2, size=size), words=UNREAD)
    empty = bmp(b"", 24, (size[1], size[0]))
    add(f"bmp of {size[1]}x{size[0]}", empty, words=UNREAD)
    add(f"ppm of {size[1]}x{size[0]}", b"P6\n%d %d\n255\n" % (size[1], size[0]), words=UNREAD)
for content in (
    *(b"P6\n3 x\n255\n", b"P6\n3 3\n0\n" + bytes(27), b"P6\n3 3\n99999\n" + bytes(54), b"P7\n"),
    *(b"P2\n2 2\n255\n1 2 three 4", b"P6\n-3 3\n255\n" + bytes(27), b"Pf\n2 2\n0\n"),
):
    add(f"pnm {content[:22]!r}", content, words=UNREAD)
add("tiff without directories", b"II*\0\0\0\0\0", words=UNREAD)
add("tiff whose directory lies behind its end", b"II*\0\xff\xff\xff\x7f", words=UNREAD)
add("tiff whose directory is itself", b"MM\0*\0\0\0\0" + bytes(8), words=UNREAD)
add("jpeg of markers alone", b"\xff\xd8\xff\xd9", words=UNREAD)
add("jpeg of fill bytes", b"\xff\xd8" + b"\xff" * 1000, words=UNREAD)
add("riff that is sound", b"RIFF\x24\0\0\0WAVEfmt " + bytes(28), words=UNREAD)
add("webp without a picture", b"RIFF\x04\0\0\0WEBP", words=UNREAD)


def flipped(content, seed, bits=1):
    damaged, rng = bytearray(content), random.Random(seed)
    for _ in range(bits):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


big_png = pillow(SMOOTH + RNG.integers(0, 4, SMOOTH.shape, np.uint8), "PNG")
big_pixels = np.asarray(Image.open(io.BytesIO(big_png)))
for seed in range(60):
    add(f"png with a flipped bit, {seed}", flipped(big_png, seed), big_pixels, words="")
for name, (content, _) in WHOLE.items():
    for seed in range(6):
        add(f"{name} with flipped bits, {seed}", flipped(content, seed, 1 + seed), words="")


# --- files that are none -------------------------------------------------------------------------

for name, content, words in (
    ("a web page", b"<!DOCTYPE html>\n<html><body>404</body></html>", "is a web page"),
    ("a page without a type", b"\n <HTML><head><title>Error", "is a web page"),
    (
        "a pointer of git lfs",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
        "git lfs pull",
    ),
    ("text", b"this is no image\n", UNREAD),
    ("utf-16 text", "this is no image\n".encode("utf-16"), UNREAD),
    ("an error in json", b'{"error": "not found"}', UNREAD),
    ("xml", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', UNREAD),
    ("svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', UNREAD),
    ("pdf", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", UNREAD),
    ("zip", b"PK\x03\x04" + bytes(60), UNREAD),
    ("gzip", b"\x1f\x8b\x08" + bytes(60), UNREAD),
    ("numpy", b"\x93NUMPY\x01\0v\0{'descr': '|u1'}", UNREAD),
    ("photoshop", b"8BPS\0\x01" + bytes(60), UNREAD),
    ("heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60), UNREAD),
    ("video", b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + bytes(60), UNREAD),
    ("a program", b"\x7fELF\x02\x01\x01" + bytes(60), UNREAD),
    ("dicom", bytes(128) + b"DICM" + bytes(60), UNREAD),
    ("base64", b"iVBORw0KGgoAAAANSUhEUgAAABMAAAANCAIAAAC", UNREAD),
    ("a data url", b"data:image/png;base64,iVBORw0KGgoAAAANSUhEUg", UNREAD),
    ("zeros", bytes(100_000), UNREAD),
    ("noise", random.Random(0).randbytes(100_000), UNREAD),
    ("one byte", b"\x89", UNREAD),
    ("nothing", b"", "is empty (0 bytes)"),
    ("avif", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(60), UNREAD),
    ("targa", pillow(SMOOTH, "TGA"), UNREAD),
    ("a film", b"\0\0\1\xb3" + bytes(60), UNREAD),
):
    add(f"{name}, renamed", content, words=words, file="x.jpg")
for name, format in (("jpeg 2000", "JPEG2000"), ("sgi", "SGI"), ("pcx", "PCX"), ("dib", "DIB")):
    add(f"{name}, renamed", pillow(SMOOTH, format), SMOOTH, file="x.jpg")
add("targa", pillow(SMOOTH, "TGA"), SMOOTH, file="x.TGA")


def special(path, kind):
    """What has an image's name, but is no file with content."""
    target = path.with_name("target.png")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(path.parent)  # the address of a socket must be short
            server.bind(path.name)
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link round":
        target.symlink_to(path)
        path.symlink_to(target)
    elif kind == "link through a file":
        target.touch()
        path.symlink_to(target / "x.png")
    elif kind.startswith("/"):
        path.symlink_to(kind)
    elif kind == "link to a link":
        target.write_bytes(plain)
        path.with_name("between.png").symlink_to(target)
        path.symlink_to("between.png")
    elif kind == "hard link":
        target.write_bytes(plain)
        path.hardlink_to(target)


for kind, words in {
    "pipe": "is no regular file",
    "socket": "is no regular file",
    "/dev/zero": "is no regular file",
    "/dev/null": "is no regular file",
    "/nowhere/x.png": "is a link to nothing",
    "/proc/self/status": "is empty",
    "folder": "is a folder",
    "link to itself": "Too many levels of symbolic links",
    "link round": "Too many levels of symbolic links",
    "link through a file": "is a link to nothing",
    "nothing there": "does not exist",
}.items():
    if POSIX and (sys.platform == "linux" or not kind.startswith("/proc")):
        add(f"not a file: {kind}", lambda path, kind=kind: special(path, kind), words=words)
for kind in ("link to a link", "hard link"):
    add(kind, lambda path, kind=kind: special(path, kind), RGB)

NAMES = (
    *("Grüße 検査 🔬.png", "x" * 251 + ".png", "two\nlines.png", "tab\tand\rreturn.png", "-rf.png"),
    *("'single' \"double\".png", "%s{0}$HOME`id`.png", " spaces .png", "a:b*c?.png", "x.png.png"),
    *("~.png", "=1+2.png", "\x1b[31mred.png", "\u202egnp.png", "e\u0301.png", "back\\slash.png"),
    "\udcff\udcfe.png",
)
for name in NAMES if sys.platform == "linux" else NAMES[:1]:
    add(f"a picture named {name!r}", plain, RGB, file=name)
    add(f"an empty file named {name!r}", b"", words="is empty", file=name)
add("a name too long", lambda path: None, words="File name too long", file="n" * 300 + ".png")
add("a name with a null byte", lambda path: None, words="cannot be opened", file="a\0b.png")


# --- bombs: small files of huge pictures ---------------------------------------------------------

HUGE = {"size": (100_000, 100_000), "data": zlib.compress(bytes(10_000))}


def tiff_of(*tags):
    """A TIFF of tags (number, type, count, value), and nothing behind them."""
    header = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    return header + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(100)


huge_tiff = tiff_of(
    *((256, 4, 1, 300_000), (257, 4, 1, 300_000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)),
    *((273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 300_000), (279, 4, 1, 100)),
)
huge_tiles = tiff_of(
    *((256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1)),
    *((277, 3, 1, 1), (322, 4, 1, 65520), (323, 4, 1, 32752), (324, 4, 1, 8), (325, 4, 1, 100)),
)
huge_text = tiff_of((256, 4, 1, 16), (257, 4, 1, 16), (270, 2, 2**32 - 1, 8))
start_of_frame = b"\xff\xd8\xff\xc0\0\x11\x08\xff\xdc\xff\xdc\x03\x01\x11\0\x02\x11\0\x03\x11\0"
canvas = b"VP8X" + struct.pack("<II", 10, 0) + b"\xff\x3f\0\xff\x3f\0"
zeros = zlib.compress(bytes(3 * 10**7))
BOMBS = {
    "png": png(None, 1, 0, **HUGE),
    "interlaced png": png(None, 16, 6, True, **HUGE),
    "bmp": bmp(bytes(100), 24, (2**30, 2**30)),
    "gif": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\x01\0\0;",
    "tiff": huge_tiff,
    "tiles of a tiff": huge_tiles,
    "text of a tiff": huge_text,
    "ppm": b"P6\n1000000 1000000\n255\n" + bytes(100),
    "jpeg": start_of_frame + bytes(100),
    "webp": b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas,
    "text in a png": png(RGB, 8, 2, before=chunk(b"zTXt", b"a\0\0" + zeros)),
    "profile in a png": png(RGB, 8, 2, before=chunk(b"iCCP", b"a\0\0" + zeros)),
    "rows in a png": png(RGB, 8, 2, data=zeros),
}
UNLIKE = ("jpeg", "webp", "bmp", "text of a tiff")  # refused as no image
for name, content in BOMBS.items():
    known = {"text": RGB, "profile": RGB, "rows": 0 * RGB}.get(name.split()[0])
    words = "" if known is not None or name in UNLIKE else "is too large"
    add(f"bomb: {name}", content, known, words=words)


# --- the rule ------------------------------------------------------------------------------------


def is_open(path):
    """Whether this process has the regular file open; False where that cannot be found out."""
    try:
        opened = {os.path.realpath(number) for number in FD.iterdir()}
        return Path(path).is_file() and os.path.realpath(path) in opened
    except (OSError, ValueError):
        return False


def outcome(path, read=read_image):
    """What a file gives: pixels, or a sentence. Nothing else may happen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = np.asarray(read(path))
        except DataError as error:
            found = str(error)
            assert error.__context__ is None or error.__suppress_context__
    assert not is_open(path), "the file was left open"
    if isinstance(found, str):
        assert printable(str(path)) in found and ": " in found and len(found.splitlines()) == 1
        assert found == printable(found) and found.endswith(".") and ".)" not in found, found
    return found


def keeps_the_rule(case, path):
    case.make(path)
    found = outcome(path)
    if isinstance(found, str):
        assert case.words is not None, found
        assert case.words in found
        return found
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3 and found.size
    assert case.pixels is not None or case.words == "", "this must be refused"
    if case.pixels is not None:
        assert found.shape == case.pixels.shape
        assert np.abs(found.astype(int) - case.pixels).max() <= case.tolerance
    return found


@pytest.mark.parametrize("name", CORPUS)
def test_a_file_gives_its_picture_or_a_sentence(tmp_path, name):
    case = CORPUS[name]
    found = keeps_the_rule(case, tmp_path / case.file)
    as_mask = outcome(tmp_path / case.file, lambda path: read_mask(path, (W, H)))
    assert isinstance(as_mask, str) or (as_mask.shape == (H, W) and as_mask.dtype == bool)
    if isinstance(found, str) and UNREAD in found:
        assert UNREAD in as_mask


def test_the_corpus_is_large_and_its_files_differ(tmp_path):
    contents = set()
    for number, case in enumerate(CORPUS.values()):
        if "\0" not in case.file and len(case.file) < 256:
            folder = tmp_path / str(number)
            folder.mkdir()
            case.make(folder / case.file)
            path = folder / case.file
            kind = path.read_bytes() if path.is_file() and not path.is_symlink() else str(number)
            contents.add((kind, case.file))
    assert len(CORPUS) >= 400 and len(contents) >= 400
    refused = sum(case.pixels is None for case in CORPUS.values())
    assert refused > 150 and len(CORPUS) - refused > 150


# --- what the table cannot hold ------------------------------------------------------------------


def test_what_may_not_be_read(nobody):
    with nobody() as folder:
        (folder / "x.png").write_bytes(plain)
        (folder / "closed").mkdir()
        (folder / "closed" / "x.png").write_bytes(plain)
        (folder / "x.png").chmod(0)
        (folder / "closed").chmod(0)
        for path in (folder / "x.png", folder / "closed" / "x.png"):
            for read in (read_image, lambda path: read_mask(path, (W, H))):
                assert "cannot be opened (Permission denied)" in outcome(path, read)
        for recursive in (False, True):
            with pytest.raises(DataError, match=r"closed cannot be opened \(Permission denied"):
                list_images(folder if recursive else folder / "closed", recursive)
        assert list_images(folder) == [folder / "x.png"]
        (folder / "x.png").chmod(0o400)
        assert np.array_equal(outcome(folder / "x.png"), RGB)


MEASURED = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("images", sys.argv[1])
images = importlib.util.module_from_spec(spec)
spec.loader.exec_module(images)
images.Image.init()
def megabytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024
for path in sorted(Path(sys.argv[2]).iterdir()):
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = megabytes("VmRSS")
    try:
        images.read_image(path)
    except images.DataError:
        pass
    print(path.name, megabytes("VmHWM") - before, sep=",")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux does")
def test_a_bomb_is_refused_before_its_pixels_take_memory(tmp_path):
    for name, content in BOMBS.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "zz control").write_bytes(pillow(Image.new("L", (4000, 4000)), "PNG"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, images.__file__, tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    grown = {name: int(size) for name, size in (r.split(",") for r in done.stdout.splitlines())}
    control = grown.pop("zz control")
    assert set(grown) == set(BOMBS) and max(grown.values()) < 30, grown  # megabytes
    assert control > 30  # 16 million pixels that are wanted: the measure can see them


def test_the_limit_of_pixels(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(plain)
    for limit in (W * H, W * H // 2 + 1):  # Pillow warns between its limit and twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert np.array_equal(outcome(path), RGB)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", W * H // 2 - 1)
    assert "is too large (Image size (247 pixels) exceeds" in outcome(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert np.array_equal(outcome(path), RGB)


MASK = GRAY > 127
BLACK_INK = np.dstack([MASK & False] * 3 + [~MASK])
TRUTHS = {  # name -> file, and what it is refused for
    "gray": (png(MASK[..., None] * 255, 8, 0), None),
    "faint": (png(MASK[..., None] * 1, 8, 0), None),
    "1 bit": (png(MASK[..., None] * 1, 1, 0), None),
    "16 bit": (png(MASK[..., None] * 1, 16, 0), None),
    "blue": (png(MASK[..., None] * np.array([0, 0, 1]), 8, 2), None),
    "opaque": (png(np.dstack([MASK * 3, MASK * 0 + 255]), 8, 4), None),
    "see-through": (png(np.dstack([MASK * 3, MASK * 0]), 8, 4), None),
    "palette": (png(MASK[..., None] * 1, 8, 3, before=chunk(b"PLTE", b"\0\0\0\7\0\0")), None),
    "palette, white first": (
        png(~MASK[..., None] * 1, 8, 3, before=chunk(b"PLTE", b"\7\7\7\0\0\0")),
        None,
    ),
    "float": (tiff(np.float32(MASK * 1e-9)), None),
    "negative": (tiff(np.int16(MASK) * -1), None),
    "cmyk": (tiff(np.uint8(255) * BLACK_INK, photometric="separated"), None),
    "ycbcr": (
        pillow(MASK * np.uint8(255), "TIFF", mode="YCbCr"),
        None if int(PIL.__version__.split(".")[0]) >= 13 else "truncated",
    ),
    "lab": (pillow(np.dstack([MASK * 255, MASK * 0, MASK * 0]).astype(np.uint8), "TIFF"), None),
    "bmp": (pillow(MASK * np.uint8(255), "BMP"), None),
    "gif": (pillow(MASK * np.uint8(255), "GIF"), None),
    "webp": (pillow(MASK * np.uint8(255), "WEBP", lossless=True), None),
    "NaN": (tiff(np.where(MASK, np.nan, 0).astype(np.float32)), "has NaN among its values"),
    "jpeg": (pillow(MASK * np.uint8(255), "JPEG", quality=100), "is a JPEG"),
    "turned": (png(MASK.T[..., None] * 255, 8, 0), f"has {H}x{W} pixels but its image has {W}x{H}"),
    "larger": (png(np.zeros((2 * H, 2 * W, 1), int), 1, 0), "save the mask at the size"),
    "cut": (png(MASK[..., None] * 255, 8, 0)[:60], UNREAD),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "empty": (b"", "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRUTHS)
def test_a_mask_is_the_truth_or_a_sentence(tmp_path, name):
    content, words = TRUTHS[name]
    (tmp_path / "mask").write_bytes(content)
    found = outcome(tmp_path / "mask", lambda path: read_mask(path, (W, H)))
    assert words in found if words else np.array_equal(found, MASK)


def test_images_that_python_hands_over():
    cut = Image.open(io.BytesIO(plain[:100]))
    for item, words in (
        (cut, "the image given cannot be decoded"),
        (Image.new("RGB", (0, 5)), "the image given has no pixels"),
        (Image.new("I;16", (5, 0)), "the image given has no pixels"),
        (Image.new("F", (2, 2), float("nan")), "or NaN"),
        (np.zeros((0, 5, 3), np.uint8), "not uint8 of shape"),
        (np.zeros((5, 5, 3)), "not float64"),
        (b"x.png", "not bytes"),
        (None, "not NoneType"),
    ):
        with pytest.raises(DataError) as error:
            open_image(item)
        assert words in str(error.value)
    for mode in ("1", "L", "P", "PA", "LA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"):
        assert open_image(Image.new(mode, (3, 2))).mode == "RGB", mode
