"""Digests against hashlib, and a cache that never gives the digest of what a file held before."""

import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from effad_core.datasets import PretrainingImages
from effad_core.datasets import pretraining as pretraining_module
from effad_core.errors import DataError
from effad_core.storage import digests
from effad_core.storage.digests import combined, difference, inventory, names_below

import pytest

CONTENTS = {"a/1.png": b"one", "a/2.png": b"two", "b/1.png": b"", "über ü.png": b"three"}


def expected(content):
    return hashlib.sha256(content).hexdigest()[:16]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, which trusts files that were written just now; returns its folder."""
    monkeypatch.setenv("EFFAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "RACY", -(10**12))
    return tmp_path / "cache" / "digests"


@pytest.fixture
def images(tmp_path):
    paths = []
    for name, content in CONTENTS.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        paths.append(path)
    return paths


@pytest.fixture
def read(monkeypatch):
    """The names of the files that were read since the list was cleared."""
    names, file_digest = [], hashlib.file_digest

    def counted(file, name):
        names.append(Path(file.name).name)
        return file_digest(file, name)

    monkeypatch.setattr(digests.hashlib, "file_digest", counted)
    return names


RIGHT = [(name, expected(content)) for name, content in CONTENTS.items()]


def test_digests_are_those_of_the_bytes(cache, images):
    assert inventory(images) == RIGHT
    assert inventory(images[::-1]) == RIGHT[::-1]
    assert inventory([images[0], images[0]]) == [("1.png", expected(b"one"))] * 2
    assert inventory(map(str, images[:2])) == [(n[2:], d) for n, d in RIGHT[:2]]
    assert inventory([]) == []


def test_names_are_those_below_the_shared_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, root = names_below(["x/y/1.png", tmp_path / "x" / "2.png"])
    assert names == ["y/1.png", "2.png"] and root == os.path.join(tmp_path, "x", "")
    assert names_below(["x/1.png"])[0] == ["1.png"]
    assert names_below(["/a.png", "/b/c.png"]) == (["a.png", "b/c.png"], "/")


def test_a_second_call_reads_nothing(cache, images, read):
    inventory(images)
    assert len(read) == 4
    read.clear()
    assert inventory(images) == RIGHT and read == []
    inventory(images[:2] + images[3:])  # another choice of the same folder
    assert inventory(images) == RIGHT and read == []
    (file,) = cache.iterdir()
    before = file.stat().st_mtime_ns
    inventory(images)
    assert file.stat().st_mtime_ns == before  # and writes nothing


def test_a_changed_file_alone_is_read_again(cache, images, read):
    inventory(images)
    read.clear()
    images[1].write_bytes(b"2nd")
    found = inventory(images)
    assert found[1] == ("a/2.png", expected(b"2nd")) and read == ["2.png"]
    images[1].unlink()
    inventory([images[0], *images[2:]])
    images[0].write_bytes(b"longer")
    read.clear()
    inventory([images[0], images[2]])
    inventory([images[0], *images[2:]])  # the image left out before is still known
    assert read == ["1.png"]
    (file,) = cache.iterdir()
    assert "a/2.png" not in json.loads(file.read_text().partition("\n")[2])  # it is gone


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps no time of the last change of all")
def test_a_file_whose_time_is_set_back_is_read_again(cache, images):
    inventory(images)
    before = images[1].stat()
    time.sleep(0.05)  # the clock of the file system goes on
    images[1].write_bytes(b"owt")
    os.utime(images[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert images[1].stat().st_mtime_ns == before.st_mtime_ns
    assert inventory(images)[1] == ("a/2.png", expected(b"owt"))


def test_another_file_in_its_place_with_the_same_times_is_read_again(cache, images, monkeypatch):
    def no_change_time(status):
        return status.st_size, status.st_mtime_ns, 0, status.st_ino

    monkeypatch.setattr(digests, "_stamp", no_change_time)
    inventory(images)
    status = images[1].stat()
    other = images[1].with_name("other")
    other.write_bytes(b"owt")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(images[1])
    assert inventory(images)[1] == ("a/2.png", expected(b"owt"))


def test_a_file_that_was_written_just_now_is_not_trusted(cache, images, read, monkeypatch):
    """It may be written again within the same tick of a coarse clock, at the same size."""
    monkeypatch.setattr(digests, "_stamp", lambda s: (s.st_size, s.st_mtime_ns, 0, 0))
    monkeypatch.setattr(digests, "RACY", 2 * 10**9)
    for path in images[1:]:
        os.utime(path, (1e9, 1e9))
    inventory(images)
    before = images[0].stat()
    images[0].write_bytes(b"eno")
    os.utime(images[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    read.clear()
    assert inventory(images)[0] == ("a/1.png", expected(b"eno"))
    assert read == ["1.png"]  # the others are old enough


def test_a_file_that_changes_while_it_is_read_is_not_kept(cache, images, monkeypatch):
    file_digest = hashlib.file_digest

    def slow(file, name):
        found = file_digest(file, name)
        if file.name.endswith("2.png"):
            images[1].write_bytes(b"two and more")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests.hashlib, "file_digest", slow)
        inventory(images)
    assert inventory(images)[1] == ("a/2.png", expected(b"two and more"))


def other_digit(text):
    """One digit of a digest, which the JSON does not notice."""
    place = text.index(expected(b"two"))
    return text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "", lambda text: "\n", lambda text: text[:-30], lambda text: text[17:],
        lambda text: "[]", lambda text: "[" * 99_999, other_digit,
        lambda text: f"{digests.digest('[1]')}\n[1]", lambda text: f"{digests.digest('1')}\n1",
        lambda text: (damaged := '{"a/1.png": 3}') and f"{digests.digest(damaged)}\n{damaged}",
    ],
)  # fmt: skip
def test_a_damaged_cache_is_written_anew(cache, images, read, damage):
    inventory(images)
    (file,) = cache.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    assert inventory(images) == RIGHT and file.read_text() == whole
    file.write_bytes(b"\xff\xfe")
    assert inventory(images) == RIGHT and file.read_text() == whole
    file.unlink()
    read.clear()
    assert inventory(images) == RIGHT and len(read) == 4


@pytest.mark.parametrize("place", ["file/cache", "file"])
def test_a_cache_that_cannot_be_written_costs_time_alone(images, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EFFAD_CACHE", str(tmp_path / place))
    assert inventory(images) == inventory(images) == RIGHT


def test_the_cache_lies_where_caches_lie(images, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "RACY", -(10**12))
    monkeypatch.delenv("EFFAD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    inventory(images)
    assert len(list((tmp_path / "home/.cache/effad_core/digests").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    inventory(images)
    assert len(list((tmp_path / "other/effad_core/digests").iterdir())) == 1


def test_threads_and_processes_that_write_at_once(cache, images, read):
    code = (
        "import sys; from effad_core.storage import digests; digests.RACY = -(10**12)\n"
        "for _ in range(20): digests.inventory(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *map(str, images)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        choices = [images[i % 3 :] for i in range(200)]
        for paths, found in zip(choices, pool.map(inventory, choices), strict=True):
            assert [d for _, d in found] == [d for _, d in RIGHT[len(RIGHT) - len(paths) :]]
    assert [process.wait() for process in processes] == [0, 0]
    inventory(images)
    read.clear()
    assert inventory(images) == RIGHT and read == []
    assert not [path for path in cache.iterdir() if path.suffix != ".json"]


def test_what_is_no_file_is_one_sentence(cache, images, tmp_path):
    with pytest.raises(DataError, match=r"absent.png cannot be opened \(No such file"):
        inventory([images[0], tmp_path / "absent.png"])
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match="folder.png cannot be opened .* no regular file"):
        inventory([tmp_path / "folder.png"])
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(DataError, match="pipe.png cannot be opened .* no regular file"):
            inventory([tmp_path / "pipe.png"])


def test_names_do_not_count_contents_and_order_do():
    first = [("a", "1"), ("b", "2")]
    assert combined(first) == combined([("x", "1"), ("y", "2")])
    assert len({combined(i) for i in (first, first[::-1], first[:1], [("a", "12")], [])}) == 5


def split(**contents):
    """Training and validation images from "name=digit" pairs; `v` begins the validation's names."""
    pairs = list(contents.items())
    return {
        "training": [pair for pair in pairs if pair[0][0] != "v"],
        "validation": [pair for pair in pairs if pair[0][0] == "v"],
    }


BEFORE = split(a="1", b="2", c="3", v="4")


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            split(a="1", b="9", c="8", v="4"),
            "2 of 4 training and validation images have other content, the first is b",
        ),
        (split(a="1", b="2", c="3", d="5", v="4"), "1 image was added, the first is d"),
        (split(a="1", v="4"), "2 images are missing, the first is b"),
        (
            split(a="1", b="2", d="3", v="5"),
            "1 of 4 training and validation images has other content, the first is v; "
            "1 image was added, the first is d; 1 image is missing, the first is c",
        ),
        (split(b="2", a="1", c="3", v="4"), "the same images in another order, or held out in"),
        (
            {"training": [("a", "1"), ("v", "4")], "validation": [("b", "2"), ("c", "3")]},
            "the same images in another order, or held out in another way",
        ),
        (split(**{"a\n": "1"}), r"1 image was added, the first is a\\n; 4 images"),
    ],
)
def test_what_differs_is_said(now, message):
    assert message.replace(r"\\", "\\") in difference(BEFORE, now)


def pretraining(paths):
    return PretrainingImages(paths, "a folder", "a licence")


def test_pretraining_images_are_recognised_by_their_content(cache, images):
    first = pretraining(images).identity()
    assert first == pretraining(images).identity() == combined(inventory(images))
    images[1].write_bytes(b"owt")
    assert pretraining(images).identity() != first


def test_many_pretraining_images_are_recognised_by_name_and_size(cache, images, read, monkeypatch):
    monkeypatch.setattr(pretraining_module, "MANY", 3)
    first = pretraining(images).identity()
    images[1].write_bytes(b"owt")
    assert pretraining(images).identity() == first and read == []  # thousands are not read
    images[1].write_bytes(b"longer")
    second = pretraining(images).identity()
    images[1] = images[1].rename(images[1].with_name("3.png"))
    assert len({first, second, pretraining(images).identity()}) == 3
    images[1].unlink()
    with pytest.raises(DataError, match="The pretraining image .*3.png cannot be opened"):
        pretraining(images).identity()
