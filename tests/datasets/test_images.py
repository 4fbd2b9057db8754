"""Every file becomes 8-bit RGB with values that can be computed by hand, or one clear sentence."""

import io
import os

from effad_core.datasets.images import list_images, read_image, read_mask
from effad_core.errors import DataError

import numpy as np
import PIL
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)  # 5 high, 7 wide
GRAY = RGB[..., 0]


def save(folder, array, name="image.png", mode=None, **options):
    image = Image.fromarray(array)
    path = folder / name
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def read(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def sentence(error, path):
    """The message: names the file, offers a remedy after the colon, has one line, no chain."""
    message = str(error.value)
    assert str(path) in message and ": " in message and "\n" not in message, message
    assert error.value.__context__ is None or error.value.__suppress_context__
    return message


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "TIFF", "webp"])
def test_lossless_rgb_is_exact(tmp_path, suffix):
    path = save(tmp_path, RGB, f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read(path), RGB)
    assert read_image(str(path)).size == (7, 5)


def test_gray_and_bilevel_repeat_in_three_channels(tmp_path):
    expected = np.repeat(GRAY[..., None], 3, axis=2)
    np.testing.assert_array_equal(read(save(tmp_path, GRAY)), expected)
    np.testing.assert_array_equal(
        read(save(tmp_path, GRAY > 127)), np.where(expected > 127, 255, 0)
    )


def test_palette_gives_its_colours(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 255, 1])
    image.save(tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as stored:
        assert stored.mode == "P"
    assert read(tmp_path / "p.png").tolist() == [
        [[10, 20, 30], [200, 0, 0]],
        [[0, 255, 1], [200, 0, 0]],
    ]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_over_white(tmp_path, mode):
    alpha = np.linspace(0, 255, 35).astype(np.uint8).reshape(5, 7)
    colour = RGB if mode == "RGBA" else GRAY[..., None]
    path = save(tmp_path, np.dstack([colour, alpha]))
    share = alpha[..., None] / 255
    expected = np.broadcast_to(share * colour + (1 - share) * 255, RGB.shape)
    assert np.abs(read(path) - expected).max() <= 1
    assert read(path)[0, 0].tolist() == [255, 255, 255]  # fully transparent


def test_transparent_palette_colour_is_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.save(tmp_path / "p.png", transparency=0)
    assert read(tmp_path / "p.png").tolist() == [[[255, 255, 255], [200, 0, 0]]]


def test_cmyk_jpeg(tmp_path):
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 0] = 255  # all cyan
    Image.fromarray(ink, "CMYK").save(tmp_path / "c.jpg", quality=100)
    assert np.abs(read(tmp_path / "c.jpg").astype(int) - [0, 255, 255]).max() <= 4


@pytest.mark.parametrize(
    ("dtype", "name"), [("uint16", "a.png"), ("uint16", "a.tif"), ("int32", "a.tif")]
)
def test_16_bit_is_divided_by_257_whatever_the_image_holds(tmp_path, dtype, name):
    values = np.array([[0, 128, 129, 257, 32768, 65535]])
    assert read(save(tmp_path, values.astype(dtype), name))[0, :, 0].tolist() == [
        0, 0, 1, 1, 128, 255,
    ]  # fmt: skip
    dim = np.full((3, 3), 2570, dtype)  # a constant, dark image stays dark: no stretching
    assert read(save(tmp_path, dim, name)).tolist() == np.full((3, 3, 3), 10).tolist()


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_integers_beyond_16_bit_are_refused(tmp_path, value):
    path = save(tmp_path, np.array([[0, value]], np.int32), "a.tif")
    with pytest.raises(DataError) as error:
        read_image(path)
    assert "65535" in sentence(error, path)


def test_float_lies_in_0_to_1(tmp_path):
    path = save(tmp_path, np.array([[0, 0.5, 1.0, 0.1]], np.float32), "a.tif")
    assert read(path)[0, :, 1].tolist() == [0, 128, 255, 26]


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.1, 255.0])
def test_other_floats_are_refused(tmp_path, value):
    path = save(tmp_path, np.array([[0.5, value]], np.float32), "a.tif")
    with pytest.raises(DataError) as error:
        read_image(path)
    assert "0..1" in sentence(error, path)


@pytest.mark.parametrize("mode", ["LAB", "YCbCr"])
def test_other_colour_spaces(tmp_path, mode):
    path = tmp_path / "a.tif"
    Image.new(mode, (4, 4), (255, 128, 128)).save(path)  # white
    with Image.open(path) as stored:
        if stored.mode == "RGB":  # Pillow before 13 expects the pixels of a YCbCr TIFF elsewhere
            assert mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13
            with pytest.raises(DataError) as error:
                read(path)
            assert "truncated" in sentence(error, path)
            return
        assert stored.mode == mode
    assert read(path).min() >= 253


# EXIF orientation -> what numpy does to the stored array to set it upright
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, RGB, "a.png", exif=exif)
    np.testing.assert_array_equal(read(path), UPRIGHT[orientation](RGB))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.tif"])
def test_first_frame_of_an_animation(tmp_path, name):
    red, blue = Image.new("RGB", (4, 3), "red"), Image.new("RGB", (4, 3), "blue")
    red.save(tmp_path / name, save_all=True, append_images=[blue])
    assert read(tmp_path / name)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
def test_thin_images(tmp_path, shape):
    path = save(tmp_path, np.full((*shape, 3), 9, np.uint8))
    assert read(path).shape == (*shape, 3)


def test_unicode_names_spaces_and_links(tmp_path):
    path = save(tmp_path, RGB, "Grüße 测试 🔬.png")
    link = tmp_path / "link.png"
    link.symlink_to(path)
    np.testing.assert_array_equal(read(link), read(path))


def test_the_suffix_need_not_tell_the_format(tmp_path):
    path = tmp_path / "jpeg.png"
    Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(path, "JPEG")
    assert np.abs(read(path).astype(int) - 77).max() <= 1


def test_files_are_closed(tmp_path):
    path = save(tmp_path, RGB)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    images = [read_image(path) for _ in range(5)]
    if before is None:
        path.unlink()  # fails where an open file is locked
    else:
        assert len(os.listdir("/proc/self/fd")) == before
    assert len(images) == 5


def broken_files(folder):
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_text("this is a text file")
    (folder / "folder.png").mkdir()
    (folder / "dangling.png").symlink_to(folder / "nowhere")
    (folder / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    for name in ("cut.png", "cut.jpg", "cut.tif", "cut.bmp", "cut.webp"):
        data = save(folder, noise, name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    return ["zero", "text", "folder", "dangling", "postscript", "missing"], [
        "cut.png", "cut.jpg", "cut.tif", "cut.bmp", "cut.webp",
    ]  # fmt: skip


def test_broken_files_are_named_with_a_remedy(tmp_path):
    stems, names = broken_files(tmp_path)
    for path in [tmp_path / f"{stem}.png" for stem in stems] + [tmp_path / n for n in names]:
        for reader in (read_image, lambda p: read_mask(p, (64, 64))):
            with pytest.raises(DataError) as error:
                reader(path)
            sentence(error, path)


def test_postscript_is_never_handed_to_an_interpreter(tmp_path):
    broken_files(tmp_path)
    with pytest.raises(DataError, match="its content is none of PNG, JPEG"):
        read_image(tmp_path / "postscript.png")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path, np.zeros((100, 100), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError) as error:
        read_image(path)
    assert "10000 pixels" in sentence(error, path)


def encoded(format):
    buffer = io.BytesIO()
    noise = np.random.default_rng(2).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(buffer, format)
    return buffer.getvalue()


FILES = {format: encoded(format) for format in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")}


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(format=st.sampled_from(sorted(FILES)), data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_an_image_or_a_sentence(tmp_path, format, data):
    content = bytearray(FILES[format])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.png"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        assert read_image(path).mode == "RGB"
    except DataError as error:
        assert str(path) in str(error)


def test_mask_is_true_where_not_black(tmp_path):
    truth = np.zeros((5, 7), np.uint8)
    truth[1, 2], truth[4, 6], truth[0, 0] = 1, 255, 128
    for name, array in {
        "gray.png": truth,
        "bilevel.png": truth > 0,
        "rgb.png": np.dstack([0 * truth, truth, 0 * truth]),
        "rgba.png": np.dstack([truth, truth, truth, np.full_like(truth, 255)]),
        "16.png": truth.astype(np.uint16),
    }.items():
        mask = read_mask(save(tmp_path, array, name), (7, 5))
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, truth > 0, err_msg=name)


def test_palette_masks_are_judged_by_colour_not_by_index(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    image.putpalette([255, 255, 255, 0, 0, 0])  # index 0 is white
    image.save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", (2, 1)).tolist() == [[True, False]]


def test_mask_of_another_size_is_refused(tmp_path):
    path = save(tmp_path, GRAY)
    with pytest.raises(DataError) as error:
        read_mask(path, (5, 7))  # height and width exchanged
    assert "7x5" in sentence(error, path) and "5x7" in str(error.value)


def test_list_images(tmp_path):
    for name in ["b.png", "a.JPG", "c.TiF", "d.webp", "e.jpeg", "f.bmp", "g.tiff"]:
        (tmp_path / name).touch()
    for name in [".hidden.png", "._b.png", "notes.txt", "Thumbs.db", "png"]:
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "z.png").touch()
    names = ["a.JPG", "b.png", "c.TiF", "d.webp", "e.jpeg", "f.bmp", "g.tiff"]
    assert [path.name for path in list_images(tmp_path)] == names
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path, True)]
    assert found == [*names, "sub/z.png"]  # a link back up neither hangs nor repeats images


def test_recursive_listing_follows_linked_folders(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").touch()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "n01440764").symlink_to(tmp_path / "real")
    (tmp_path / "set" / ".cache").mkdir()
    (tmp_path / "set" / ".cache" / "b.png").touch()
    assert list_images(tmp_path / "set", recursive=True) == [
        tmp_path / "set" / "n01440764" / "a.png"
    ]


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_list_images_refuses(tmp_path, kind):
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
        (path / "notes.txt").touch()
    elif kind == "file":
        path.touch()
    with pytest.raises(DataError) as error:
        list_images(path)
    sentence(error, path)
