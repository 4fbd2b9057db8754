"""Every format of pictures that Pillow reads, by path and in folders; masks that lost detail."""

import io

from effad_core import DataError, inspect_images, open_pretraining, open_scenario
from effad_core.datasets import mvtec
from effad_core.datasets.formats import FORMATS, SUFFIXES
from effad_core.datasets.images import (
    list_images,
    open_image,
    read_image,
    read_mask,
    skipped_files,
)

import numpy as np
import pytest
from PIL import ExifTags, Image, features

Y, X = np.mgrid[:264, :280]
SMOOTH = np.stack([60 + X // 3, 50 + Y // 3, 90 + (X + Y) // 5], axis=2).astype(np.uint8)
LOSSLESS = {".webp": {"lossless": True}, ".avif": {"quality": 100, "subsampling": "4:4:4"}}
WRITTEN = [".pgm", ".ppm", ".pnm", ".jp2", ".j2k", ".avif", ".gif", ".tga", ".pcx", ".sgi", ".dib"]
WRITTEN += [".png", ".apng", ".jpg", ".jpeg", ".jfif", ".tif", ".TIFF", ".bmp", ".webp", ".JP2"]


def needs(suffix):
    if suffix.lower() == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")


def save(path, pixels=SMOOTH):
    path.parent.mkdir(parents=True, exist_ok=True)
    gray = path.suffix.lower() in (".pgm", ".gif")
    Image.fromarray(pixels[..., 1] if gray else pixels).save(
        path, **LOSSLESS.get(path.suffix.lower(), {})
    )
    return path


@pytest.mark.parametrize("suffix", WRITTEN)
def test_a_picture_of_any_format_is_read_and_found(tmp_path, suffix):
    needs(suffix)
    path = save(tmp_path / "part" / f"0{suffix}")
    expected = SMOOTH[..., [1, 1, 1]] if suffix in (".pgm", ".gif") else SMOOTH
    for image in (read_image(path), open_image(str(path))):
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 8
    for number in range(1, 4):
        save(tmp_path / "part" / f"{number}{suffix}", SMOOTH + np.uint8(number))
    scenario = open_scenario(tmp_path / "part")
    assert len(scenario.train) + len(scenario.validation) == 4
    assert len(open_pretraining(tmp_path / "part")) == 4
    assert len(list_images(tmp_path / "part")) == 4


def test_vectors_films_and_tables_are_no_pictures():
    no = {".eps", ".ps", ".pdf", ".wmf", ".emf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr"}
    assert not no & SUFFIXES and not {"EPS", "PDF", "WMF", "MPEG", "HDF5"} & set(FORMATS)
    assert not SUFFIXES - set(Image.registered_extensions())
    assert mvtec.SUFFIXES is SUFFIXES


def test_a_folder_of_pgm_among_png_is_all_of_it(tmp_path):
    for number in range(4):
        save(tmp_path / f"train/good/{number}.pgm")
        save(tmp_path / f"train/good/{number}_.png")
    scenario = open_scenario(tmp_path)
    assert len(scenario.train) + len(scenario.validation) == 8


def test_what_is_skipped_has_a_reason(tmp_path, narrow):
    for name in ("a.png", "sub/b.pgm", "c.RAW", "notes", ".hidden.png", "sub/d.txt", ".git/x.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path) if path.suffix in (".png", ".pgm") else path.write_text("no picture")
    found = {
        path.relative_to(tmp_path / "in").as_posix(): why
        for path, why in skipped_files(str(tmp_path / "in") + "/", recursive=True).items()
    }
    assert found == {
        ".hidden.png": "hidden",
        "c.RAW": ".raw is no format of pictures that Pillow reads",
        "notes": "no suffix",
        "sub/d.txt": ".txt is no format of pictures that Pillow reads",
    }
    assert list(found) == sorted(found)
    assert [path.name for path in skipped_files(tmp_path / "in")] == [
        ".hidden.png",
        "c.RAW",
        "notes",
    ]
    inspection = inspect_images(narrow(), tmp_path / "in", tmp_path / "out", overlays=False)
    assert inspection.images == 2 and len(inspection.skipped) == 4
    assert "not taken as images: .hidden.png (hidden), c.RAW (.raw is no" in str(inspection)
    assert "and 1 more" in str(inspection)
    alone = inspect_images(narrow(), tmp_path / "in/a.png", tmp_path / "out", overlays=False)
    assert alone.skipped == () and "no images" not in str(alone)


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "b.nef").write_bytes(b"raw")
    (tmp_path / "a.doc").write_bytes(b"text")
    with pytest.raises(DataError, match=r"no image but 2 other files \(a.doc: .doc is no format"):
        list_images(tmp_path)
    (tmp_path / "a.doc").unlink()
    with pytest.raises(DataError, match=r"no image but 1 other file \(b.nef: "):
        list_images(tmp_path)


# --- masks ---------------------------------------------------------------------------------------

TRUTH = np.zeros((64, 80), np.uint8)
TRUTH[20:31, 33:50] = 255
EXIF = Image.Exif()
EXIF[ExifTags.Base.Artist] = "nobody"
MASKS = {  # name -> format, how it is saved, what it is refused for
    "jpeg": ("JPEG", {"quality": 100}, "is a JPEG,"),
    "webp": ("WEBP", {"quality": 90}, "is a WebP with loss"),
    "webp of an animation": ("WEBP", {"save_all": True, "quality": 90}, "is a WebP with loss"),
    "webp without loss": ("WEBP", {"lossless": True}, None),
    "webp without loss, more": ("WEBP", {"lossless": True, "exif": EXIF}, None),
    "webp, more": ("WEBP", {"quality": 90, "exif": EXIF}, "is a WebP with loss"),
    "jp2": ("JPEG2000", {"irreversible": True}, "is a JPEG 2000 with loss"),
    "jp2 cut short": (
        "JPEG2000",
        {"quality_mode": "rates", "quality_layers": [30]},
        "is a JPEG 2000 with loss",
    ),
    "jp2 without loss": ("JPEG2000", {"irreversible": False}, None),
    "codestream": ("JPEG2000", {"irreversible": True, "no_jp2": True}, "JPEG 2000 with loss"),
    "tiff": ("TIFF", {}, None),
    "tiff, deflated": ("TIFF", {"compression": "tiff_adobe_deflate"}, None),
    "tiff of a jpeg": ("TIFF", {"compression": "jpeg"}, "is a TIFF with JPEG or WebP inside"),
    "avif": ("AVIF", {"quality": 95}, "is an AVIF,"),
    "png": ("PNG", {}, None),
    "gif": ("GIF", {}, None),
    "pgm": ("PPM", {}, None),
    "bmp": ("BMP", {}, None),
    "tga in a png's name": ("TGA", {}, "cannot be read as an image"),
}


@pytest.mark.parametrize("suffix", [".png", ".mask"])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_judged_by_its_content(tmp_path, name, suffix):
    format, options, words = MASKS[name]
    needs(".avif" if format == "AVIF" else "")
    content, image = io.BytesIO(), Image.fromarray(TRUTH)
    if options.get("save_all"):
        options = options | {"append_images": [Image.fromarray(255 - TRUTH)]}
    image.save(content, format, **options)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content.getvalue())
    if words is None:
        np.testing.assert_array_equal(read_mask(path, (80, 64)), TRUTH > 0)
        return
    with pytest.raises(DataError, match=words) as error:
        read_mask(path, (80, 64))
    assert "as PNG" in str(error.value)


# --- upright -------------------------------------------------------------------------------------

UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".avif"])
def test_an_opened_image_is_upright_as_its_file(tmp_path, suffix, orientation):
    needs(suffix)
    path, exif = tmp_path / f"x{suffix}", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(SMOOTH).save(path, exif=exif, **LOSSLESS.get(suffix, {}))
    expected = UPRIGHT[orientation](SMOOTH).astype(int)
    from_file = np.asarray(read_image(path))
    assert from_file.shape == expected.shape and np.abs(from_file - expected).max() <= 8
    with Image.open(path) as image:
        for _ in range(2):  # the first one decodes it
            np.testing.assert_array_equal(np.asarray(open_image(image)), from_file)
    with Image.open(path) as image:
        converted = image.convert("RGB")
    np.testing.assert_array_equal(np.asarray(open_image(converted)), from_file)
    np.testing.assert_array_equal(np.asarray(open_image(read_image(path))), from_file)


def test_an_opened_16_bit_image_is_its_file_until_it_is_changed(tmp_path):
    values = np.linspace(0, 65535, 99).reshape(9, 11).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        np.testing.assert_array_equal(
            np.asarray(open_image(image)), np.asarray(read_image(tmp_path / "x.png"))
        )
        image.putpixel((0, 0), 65535)
        assert np.asarray(open_image(image))[0, 0].tolist() == [255, 255, 255]
