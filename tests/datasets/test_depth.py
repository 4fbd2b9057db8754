"""Images of more than 8 bits: one white for a scenario, by its files' tags or its training images.

The expected pixels are computed by hand: round(255 * value / white).
"""

import struct
import warnings
import zlib

from effad_core import (
    EfficientAD,
    Schedule,
    evaluate,
    fit_thresholds,
    open_scenario,
    prepare,
    train,
)
from effad_core.datasets.full_scale import find_full_scale
from effad_core.datasets.images import open_image, read_image, read_mask
from effad_core.errors import DataError, RunError

import numpy as np
import pytest
import tifffile
from PIL import Image
from PIL.PngImagePlugin import PngInfo

RNG = np.random.default_rng(0)
TWELVE = RNG.integers(0, 4096, (16, 20)).astype(np.uint16)
TWELVE[0, 0] = 4095


def by_hand(values, white):
    return np.rint(255 * np.minimum(values.astype(float), white) / white).astype(np.uint8)


def gray(image):
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def save(path, values, bits=None):
    """A 16-bit gray PNG, with the chunk sBIT if `bits` is given."""
    info = PngInfo()
    if bits:
        info.add(b"sBIT", bytes([bits]))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint16)).save(path, pnginfo=info)
    return path


def colour_png(path, values, interlaced=False):
    """A 16-bit PNG of colour, or colour with alpha, written by hand."""
    h, w, channels = values.shape

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", w, h, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def part(root, count=5, highest=4095, **options):
    """A folder of 16-bit images of good parts, with values from 0 to `highest`."""
    for number in range(count):
        values = np.random.default_rng(number).integers(0, highest + 1, (264, 264))
        values[0, number] = highest
        save(root / "train/good" / f"{number}.png", values, **options)
    return root


# --- one file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("white", [255, 1023, 4095, 16383, 65535])
def test_full_scale_is_white(tmp_path, white):
    values = RNG.integers(0, white + 1, (16, 20))
    path = save(tmp_path / "x.png", values)
    np.testing.assert_array_equal(gray(read_image(path, white)), by_hand(values, white))


def test_a_png_says_how_many_bits_it_has(tmp_path):
    path = save(tmp_path / "x.png", TWELVE, bits=12)
    np.testing.assert_array_equal(gray(read_image(path)), by_hand(TWELVE, 4095))
    spread = TWELVE << 4 | TWELVE >> 8  # as the PNG specification wants it
    path = save(tmp_path / "y.png", spread, bits=12)
    np.testing.assert_array_equal(gray(read_image(path)), by_hand(spread, 65535))


@pytest.mark.parametrize("tag", [281, 341])  # MaxSampleValue and SMaxSampleValue
@pytest.mark.parametrize(("highest", "white"), [(4095, 4095), (3000, 4095), (1023, 1023)])
def test_a_tiff_says_its_highest_value(tmp_path, tag, highest, white):
    values = np.minimum(TWELVE, highest)
    tifffile.imwrite(tmp_path / "x.tif", values, extratags=[(tag, "H", 1, highest, True)])
    np.testing.assert_array_equal(gray(read_image(tmp_path / "x.tif")), by_hand(values, white))


def test_a_tag_that_the_values_contradict_counts_for_nothing(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", TWELVE * 16, extratags=[(281, "H", 1, 255, True)])
    np.testing.assert_array_equal(gray(read_image(tmp_path / "x.tif")), by_hand(TWELVE * 16, 65535))


def test_a_tiff_of_12_bits_a_sample(tmp_path):
    values = TWELVE.astype(int)
    first, second = values[:, ::2], values[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2)
    entries = [(256, 20), (257, 16), (258, 12), (259, 1), (262, 1), (273, 200), (277, 1)]
    entries += [(278, 16), (279, packed.size)]
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries) + bytes(4)
    path = tmp_path / "x.tif"
    path.write_bytes(head.ljust(200, b"\0") + packed.astype(np.uint8).tobytes())
    for white in (None, 65535):  # the header decides, whatever the detector was trained on
        np.testing.assert_array_equal(gray(read_image(path, white)), by_hand(values, 4095))


@pytest.mark.parametrize("maximum", [1023, 4095])
@pytest.mark.parametrize("plain", [False, True])
def test_a_pgm_says_its_maximum(tmp_path, maximum, plain):
    values = RNG.integers(0, maximum + 1, (5, 7))
    if plain:
        body = b"P2 7 5 %d\n" % maximum + " ".join(map(str, values.ravel())).encode()
    else:
        body = b"P5 7 5 %d\n" % maximum + values.astype(">u2").tobytes()
    (tmp_path / "x.pgm").write_bytes(body)
    for white in (None, 4095):
        shown = gray(read_image(tmp_path / "x.pgm", white)).astype(int)
        assert np.abs(shown - by_hand(values, maximum)).max() <= 1  # Pillow rounds in between


def test_a_pgm_of_16_bits_says_nothing(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P5 20 16 65535\n" + TWELVE.astype(">u2").tobytes())
    assert find_full_scale([tmp_path / "x.pgm"], "x") == 4095
    np.testing.assert_array_equal(gray(read_image(tmp_path / "x.pgm", 4095)), by_hand(TWELVE, 4095))


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("white", [4095, 65535])
def test_16_bit_colour_keeps_what_its_lower_bytes_say(tmp_path, channels, white):
    values = RNG.integers(0, white + 1, (9, 11, channels))
    if channels == 4:
        values[..., 3] = white
    expected = by_hand(values[..., :3], white)
    path = colour_png(tmp_path / "x.png", values)
    np.testing.assert_array_equal(np.asarray(read_image(path, white)), expected)
    assert find_full_scale([path], "x") == white
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(open_image(image, white)), expected)
    array = values.astype(np.uint16)
    np.testing.assert_array_equal(np.asarray(open_image(array, white)), expected)
    if channels == 3:
        for name, options in {
            "a": {},
            "b": {"compression": "zlib"},
            "c": {"byteorder": ">"},
        }.items():
            tifffile.imwrite(tmp_path / f"{name}.tif", array, photometric="rgb", **options)
            found = np.asarray(read_image(tmp_path / f"{name}.tif", white))
            np.testing.assert_array_equal(found, expected, err_msg=name)


def test_16_bit_colour_in_planes_is_refused(tmp_path):
    planes = RNG.integers(0, 65536, (3, 9, 11)).astype(np.uint16)
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate")
    with pytest.raises(
        DataError, match=r"16-bit colour in separate planes\): save it again as PNG"
    ):
        read_image(path)


def test_a_mask_of_16_bit_colour_with_small_values(tmp_path):
    truth = np.zeros((9, 11, 3), np.uint16)
    truth[2:4, 5] = 7
    path = colour_png(tmp_path / "x.png", truth)
    np.testing.assert_array_equal(read_mask(path, (11, 9)), truth.any(axis=2))


def test_few_gray_levels_are_told(tmp_path):
    path = save(tmp_path / "x.png", TWELVE)
    with pytest.warns(UserWarning, match=r"x.png keeps 17 of its \d+ gray levels.*full_scale"):
        read_image(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(path, 4095)
        read_image(save(tmp_path / "full.png", TWELVE.astype(int) * 16))
        read_image(save(tmp_path / "eight.png", np.full((9, 9), 300)))  # one level, and it is kept


def test_what_is_brighter_than_white(tmp_path):
    spot = TWELVE.copy()
    spot[3, 4] = 9000
    with pytest.warns(UserWarning, match=r"x.png has values up to 9000; what is above 4095"):
        shown = read_image(save(tmp_path / "x.png", spot), 4095)
    np.testing.assert_array_equal(gray(shown), by_hand(spot, 4095))
    with pytest.raises(DataError, match=r"y.png has values up to 65520 and 9\d% .* above 4095"):
        read_image(save(tmp_path / "y.png", TWELVE.astype(int) * 16), 4095)


# --- a scenario ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("highest", "white"),
    [(255, 255), (256, 1023), (1023, 1023), (1024, 4095), (4095, 4095), (4096, 16383),
     (16383, 16383), (16384, 65535), (65535, 65535)],
)  # fmt: skip
def test_training_images_decide(tmp_path, highest, white):
    paths = [save(tmp_path / f"{n}.png", np.arange(0, highest + 1, highest / 9)) for n in range(2)]
    paths = [
        save(tmp_path / f"{n}.png", np.linspace(0, h, 90).reshape(9, 10))
        for n, h in enumerate((highest // 2, highest, 3))
    ]
    assert find_full_scale(paths, "x") == white


@pytest.mark.filterwarnings("ignore:the 16-bit training images of x keep")
def test_tags_decide_before_values(tmp_path):
    dark = save(tmp_path / "a.png", TWELVE // 16, bits=12)
    darker = save(tmp_path / "b.png", TWELVE // 16, bits=10)
    assert find_full_scale([dark, darker], "x") == 4095
    assert find_full_scale([darker], "x") == 1023
    brighter = save(tmp_path / "c.png", TWELVE.astype(int) * 4)
    assert find_full_scale([dark, brighter], "x") == 16383


def test_8_bit_files_and_damaged_ones_do_not_count(tmp_path):
    Image.fromarray(np.full((9, 9), 200, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(save(tmp_path / "c.png", TWELVE).read_bytes()[:200])
    (tmp_path / "d.png").write_text("text")
    paths = [tmp_path / f"{name}.png" for name in ("a", "b", "d", "absent")]
    assert find_full_scale(paths, "x") is None
    assert find_full_scale([*paths, tmp_path / "c.png"], "x") == 4095


def test_a_bright_spot_that_takes_the_gray_levels_is_told(tmp_path):
    part(tmp_path / "part")
    values = TWELVE.copy()
    values[0, 0] = 65535
    save(tmp_path / "part/train/good/spot.png", values)
    with pytest.warns(
        UserWarning, match=r"of part keep 1\d of 4\d+ gray levels: 65535 is .*spot.png"
    ):
        assert find_full_scale((tmp_path / "part/train/good").iterdir(), "part") == 65535


def test_all_images_of_a_scenario_have_one_white(tmp_path):
    root = part(tmp_path / "part")
    save(root / "test/good/0.png", TWELVE)
    save(root / "test/dark/0.png", TWELVE // 8)
    scenario = open_scenario(root)
    assert scenario.full_scale == 4095
    for sample in (*scenario.train, *scenario.validation, *scenario.test):
        with Image.open(sample.path) as image:
            np.testing.assert_array_equal(gray(sample.load()), by_hand(np.array(image), 4095))


def test_a_scenario_of_8_bit_images_has_none(scenario):
    assert scenario.full_scale is None


SHORT = Schedule.named("smoke")


def test_a_detector_keeps_its_white(narrow, tmp_path, pretraining):
    """Training, thresholds, evaluation and prediction see 12-bit images as their 8-bit copies."""
    twelve = part(tmp_path / "twelve" / "part")
    eight = tmp_path / "eight" / "part"
    for number in range(2):
        values = np.random.default_rng(9 + number).integers(0, 4096, (270, 280))
        save(twelve / "test" / ("good", "spot")[number] / "0.png", values)
    for path in twelve.rglob("*.png"):
        copy = eight / path.relative_to(twelve)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            Image.fromarray(by_hand(np.array(image), 4095)).save(copy)
    found = {}
    for root in (twelve, eight):
        detector, scenario = narrow(), open_scenario(root)
        train(detector, scenario, SHORT, pretraining, tmp_path / "run" / root.parent.name)
        fit_thresholds(detector, scenario.validation, 0.9, guarantee="average")
        scores = evaluate(detector, scenario).scores["combined"]
        detector.save(tmp_path / root.parent.name / "d.safetensors")
        loaded = EfficientAD.load(tmp_path / root.parent.name / "d.safetensors")
        again = loaded.predict(root / "test/spot/0.png")
        ready = prepare(loaded).predict(root / "test/spot/0.png")
        found[root] = (*scores, ready.score, loaded.threshold, again.score)
        assert loaded.full_scale == (4095 if root == twelve else None)
        assert ("full_scale" in loaded.card["training"]) == (root == twelve)
        finished = narrow()
        train(finished, scenario, SHORT, pretraining, tmp_path / "run" / root.parent.name)
        assert finished.full_scale == loaded.full_scale
    assert found[twelve] == found[eight]
    array = np.asarray(Image.open(twelve / "test/spot/0.png")).astype(np.uint16)
    detector = EfficientAD.load(tmp_path / "twelve/d.safetensors")
    for item in (array, array[..., None], np.dstack([array] * 3), Image.fromarray(array)):
        assert detector.predict(item).score == found[twelve][-1]


@pytest.mark.parametrize("value", [0, 254, 65536, True, 4095.5, "4095"])
def test_a_damaged_white_is_refused(narrow, tmp_path, value):
    detector = narrow()
    detector.full_scale = value
    detector.save(tmp_path / "d.safetensors")
    with pytest.raises(RunError, match=r"header that does not .* full_scale must be 255 to 65535"):
        EfficientAD.load(tmp_path / "d.safetensors")


# --- arrays --------------------------------------------------------------------------------------


def test_an_array_is_the_picture_in_its_file(tmp_path):
    eight = RNG.integers(0, 256, (9, 11, 4), np.uint8)
    for array in (eight[..., 0], eight[..., :3], eight):
        Image.fromarray(array).save(tmp_path / "x.png")
        expected = np.asarray(read_image(tmp_path / "x.png"))
        wide = array.astype(np.uint16) * 257
        for given in (array, np.asfortranarray(array), wide, wide.astype(">u2"), array[::1]):
            np.testing.assert_array_equal(np.asarray(open_image(given)), expected)
        if array.ndim == 2:
            np.testing.assert_array_equal(np.asarray(open_image(array[..., None])), expected)
            np.testing.assert_array_equal(np.asarray(open_image(wide[..., None])), expected)


@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 9, 9), (9, 9, 2), (9, 9, 5), (9,), (0, 9, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_arrays_of_other_shapes_are_refused(shape, dtype):
    with pytest.raises(
        DataError, match=r"must be uint8 or uint16.*order RGB.*not uint\d+ of shape"
    ):
        open_image(np.zeros(shape, dtype))


@pytest.mark.parametrize("dtype", [bool, np.float32, np.float64, np.int16, np.int32, np.uint32])
def test_arrays_of_other_types_are_refused(dtype):
    with pytest.raises(DataError, match=rf"not {np.dtype(dtype).name} of shape .*np.uint8\(255"):
        open_image(np.zeros((9, 9, 3), dtype))
