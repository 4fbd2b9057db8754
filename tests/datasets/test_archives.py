"""Archives as they are published unpack; archives that are damaged or mean harm leave nothing."""

import errno
import hashlib
import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

from effad_core.datasets import archives, open_scenario
from effad_core.datasets.archives import main, unpack
from effad_core.errors import DataError

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

SUFFIXES = ("tar", "tar.gz", "tar.xz", "zip")


def png(value=0):
    buffer = io.BytesIO()
    Image.new("L", (6, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


BOTTLE = {
    "bottle/license.txt": b"CC BY-NC-SA 4.0",
    **{f"bottle/train/good/{i:03}.png": png(i) for i in range(4)},
    "bottle/test/broken_large/000.png": png(9),
    "bottle/ground_truth/broken_large/000_mask.png": png(255),
}


def tar(path, files, *members, mode=0o644):
    """A tar of files, after the members given, compressed as the name says."""
    suffix = path.suffix[1:]
    with tarfile.open(path, "w" if suffix == "tar" else f"w:{suffix}") as out:
        for member in members:
            out.addfile(member)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            out.addfile(info, io.BytesIO(content))
    return path


def pack(path, files):
    if path.suffix != ".zip":
        return tar(path, files)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        warnings.simplefilter("ignore", UserWarning)  # a name that comes twice
        for name, content in files.items():
            out.writestr(name, content)
    return path


def special(name, kind, target="", mode=0o644):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, target, mode
    return info


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(archive, folder, *args, **options):
    """The message; whatever was there before is there, and nothing else."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(DataError) as error:
        unpack(archive, folder, *args, **options)
    assert sorted(folder.parent.rglob("*")) == before
    assert "\n" not in str(error.value) and ": " in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_unpacked_is_what_was_packed(tmp_path, suffix):
    archive = pack(tmp_path / f"a.{suffix}", BOTTLE)
    folder = tmp_path / "new/mvtec"
    assert unpack(archive, str(folder)) == folder
    assert contents(folder) == BOTTLE
    assert sorted(path.name for path in folder.parent.iterdir()) == ["mvtec"]
    scenario = open_scenario(folder / "bottle")
    assert (len(scenario.train), len(scenario.validation), len(scenario.test)) == (3, 1, 1)
    assert scenario.test[0].load_mask().all()


def test_the_kind_is_read_from_the_content_not_from_the_name(tmp_path):
    for suffix in SUFFIXES:
        archive = pack(tmp_path / f"a.{suffix}", BOTTLE).rename(tmp_path / f"{suffix}.download")
        assert contents(unpack(archive, tmp_path / suffix)) == BOTTLE
    archive = pack(tmp_path / "b.tar", {"PK.txt": b"no zip"})
    assert contents(unpack(archive, tmp_path / "b")) == {"PK.txt": b"no zip"}


def test_folders_and_long_names(tmp_path):
    long = "x" * 90 + "/" + "ü" * 60 + ".png"  # more than a tar header holds
    root = special("./", tarfile.DIRTYPE, mode=0o000)
    archive = tar(tmp_path / "a.tar", {long: b"1"}, root, special("empty", tarfile.DIRTYPE))
    folder = unpack(archive, tmp_path / "new")
    assert contents(folder) == {long: b"1"} and (folder / "empty").is_dir()


def test_modes_are_those_of_data(tmp_path):
    setuid = special("s", tarfile.DIRTYPE, mode=0o7777)
    folder = unpack(
        tar(tmp_path / "a.tar", {"s/run": b"#!"}, setuid, mode=0o7666), tmp_path / "new"
    )
    for path in (folder, folder / "s", folder / "s/run"):
        assert path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX) == 0
    assert not os.access(folder / "s/run", os.X_OK)
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "../.new.unpacking-evil", "a/../../.."]
)
def test_paths_of_a_tar_that_escape(tmp_path, name):
    archive = pack(tmp_path / "a.tar", {"first": b"1", name: b"2"})
    message = refused(archive, tmp_path / "deep/er/new")
    assert "outside the destination" in message and str(archive) in message


@pytest.mark.parametrize(
    "name", ["/evil", "//evil", "../evil", "a/../../evil", "C:evil", "..\\evil"]
)
def test_other_odd_paths_stay_inside(tmp_path, name):
    """The standard library takes the slash, and a zip's dots, from a name."""
    for suffix in ("tar", "zip"):
        if suffix == "zip" or ".." not in name.split("/"):
            archive = pack(tmp_path / f"a.{suffix}", {"first": b"1", name: b"2"})
            assert len(contents(unpack(archive, tmp_path / f"{suffix}/new"))) == 2
            assert [path.name for path in (tmp_path / suffix).iterdir()] == ["new"]


@pytest.mark.parametrize("target", ["/outside", "first"])
@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
)
def test_links_and_devices_in_a_tar(tmp_path, kind, target):
    (tmp_path / "outside").mkdir()
    member = special("door", kind, target.replace("/", f"{tmp_path}/"))
    archive = tar(tmp_path / "a.tar", {"door/evil": b"1"}, member)
    assert "'door' is a special file" in refused(archive, tmp_path / "new")
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_link_in_a_zip_becomes_a_file(tmp_path):
    info = zipfile.ZipInfo("door")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        out.writestr(info, "/etc")
    folder = unpack(tmp_path / "a.zip", tmp_path / "new")
    assert contents(folder) == {"door": b"/etc"} and not (folder / "door").is_symlink()


def test_a_python_without_filters_unpacks_no_tar(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    assert "needs Python 3.11.4" in refused(pack(tmp_path / "a.tar", BOTTLE), tmp_path / "new")
    assert contents(unpack(pack(tmp_path / "a.zip", BOTTLE), tmp_path / "new")) == BOTTLE


def test_a_name_that_no_terminal_should_show(tmp_path):
    message = refused(pack(tmp_path / "a.tar", {"../a\n\x1b[31m": b"2"}), tmp_path / "new")
    assert "\x1b" not in message and "\\x1b[31m" in message


def test_a_name_of_bytes_that_are_no_characters(tmp_path, capsys):
    """It is unpacked as it is, and said in a way that every terminal shows."""
    files = {f"bottle\udcff/{name.partition('/')[2]}": data for name, data in BOTTLE.items()}
    main([str(tar(tmp_path / "a.tar", files)), str(tmp_path / "new")])
    assert "bottle\\udcff" in capsys.readouterr().out
    assert os.listdir(os.fsencode(tmp_path / "new")) == [b"bottle\xff"]


def test_a_file_that_is_a_folder_too(tmp_path):
    for number, names in enumerate([("a", "a/b"), ("a/b", "a"), ("a", "a/..")]):
        archive = pack(tmp_path / f"{number}.tar", dict.fromkeys(names, b"1"))
        assert "damaged" in refused(archive, tmp_path / "new")


def test_nothing_is_overwritten(tmp_path):
    archive = pack(tmp_path / "a.tar", BOTTLE)
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "mine").write_text("1")
    assert str(folder / "a") in refused(archive, folder)
    assert "not an empty folder" in refused(archive, archive)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert contents(unpack(archive, tmp_path / "link")) == BOTTLE
    assert contents(tmp_path / "empty") == BOTTLE


def header(name=b"a", size=0, kind=b"0", *parts):
    """A tar's header byte by byte; a size that is no octal number is written as GNU tar does."""
    block = bytearray(512)
    fields = [(0, name), (100, b"0000644"), (156, kind), (257, b"ustar\x0000"), *parts]
    fields.append((124, (size & (2**96 - 1) | (size >= 0) << 95).to_bytes(12, "big")))
    for start, value in fields:
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)


def pax(**values):
    """An extended header of these values; each counts its own length."""
    lines = b""
    for name, value in values.items():
        line = f" {name}={value}\n"
        length = len(line) + 2 if len(line) < 97 else len(line) + 3
        lines += f"{length}{line}".encode()
    return header(b"pax", len(lines), b"x") + lines.ljust(-(-len(lines) // 512) * 512, b"\0")


FORGED = {
    "a negative size": (header(size=-1024), "a file of -1024 bytes"),
    "a folder's negative size": (header(size=-512, kind=b"5"), "a file of -512 bytes"),
    "an extended negative size": (pax(size="-512") + header(), "a file of -512 bytes"),
    "an extended endless size": (pax(size="9" * 30) + header(), "damaged"),
    "a size beyond every disk": (header(size=2**80), "damaged"),
    "a name of negative length": (header(b"././@LongLink", -512, b"L"), "damaged"),
    "an extended path": (pax(path="../evil") + header(), "outside the destination"),
    "an extended number": (pax(**{"GNU.sparse.map": "0,a"}) + header(), "damaged"),
    "a sparse file": (header(b"a", 0, b"S", (386, b"0" * 24), (483, b"7" * 11)), "a special file"),
    "an extended sparse file": (pax(**{"GNU.sparse.map": "0,0"}) + header(), "a special file"),
    "headers of headers": (pax(comment="x") * 800 + header(), "maximum recursion depth"),
    "names of names": ((header(b"L", 2, b"L") + bytes(512)) * 800 + header(), "maximum recursion"),
    "a sparse file that goes on after the end": (
        header(b"a", 0, b"S", (386, b"0" * 24), (482, b"1" * 12)),
        "damaged",
    ),
    "an unknown kind": (header(kind=b"Z"), "a special file"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_tars(tmp_path, case):
    content, word = FORGED[case]
    (tmp_path / "a.tar").write_bytes(content + END * ("after the end" not in case))
    assert word in refused(tmp_path / "a.tar", tmp_path / "new")
    (tmp_path / "fine.tar").write_bytes(header(b"x") + END)  # a header written here is one
    assert contents(unpack(tmp_path / "fine.tar", tmp_path / "fine")) == {"x": b""}


def forged_zip(path, **places):
    """A zip with one file of 1000 bytes, and these fields of its directory's entry changed."""
    content = bytearray(pack(path, {"a": b"1" * 1000}).read_bytes())
    entry = content.index(b"PK\x01\x02")
    for place, value in places.items():
        start = entry + {"flags": 8, "method": 10, "size": 24, "offset": 42}[place]
        content[start : start + len(value)] = value
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"size": (10).to_bytes(4, "little")}, "damaged"),
        ({"offset": (10**9).to_bytes(4, "little")}, "damaged"),
        ({"method": b"\x63"}, "compression method"),
        ({"flags": b"\x01"}, "has a password"),
        ({"flags": b"\x40"}, "strong encryption"),
        ({"flags": b"\x20"}, "patched data"),
    ],
)
def test_forged_zips(tmp_path, change, word):
    archive = forged_zip(tmp_path / "a.zip", **change)
    message = refused(archive, tmp_path / "new")
    assert word in message and "the disk" not in message


def test_a_directory_that_begins_outside_of_the_zip(tmp_path):
    content = bytearray(pack(tmp_path / "a.zip", {"a": b"1"}).read_bytes())
    end = content.index(b"PK\x05\x06")
    content[end + 16 : end + 20] = b"\xff\xff\xff\x7f"
    (tmp_path / "a.zip").write_bytes(content)
    assert "check the archive" in refused(tmp_path / "a.zip", tmp_path / "new")


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_forged_fields_whose_checksums_are_right(tmp_path, data):
    """Damage alone is mostly noticed by a checksum; whoever means harm writes the right one."""
    blocks = []
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(
            st.sampled_from([b"0", b"0", b"5", b"1", b"2", b"L", b"K", b"S", b"x", b"g"])
        )
        size = data.draw(st.sampled_from([0, 1, 512, 700, -1, -512, 2**33, 2**70]))
        name = data.draw(
            st.sampled_from([b"a", b"b/c", b"..", b"/e", b"a/", b""]) | st.binary(max_size=9)
        )
        blocks.append(
            header(
                name,
                size,
                kind,
                (257, data.draw(st.sampled_from([b"ustar\x0000", b"ustar  \0", b""]))),
            )
        )
        lines = [
            b"",
            b"11 path=a/b\n",
            b"12 size=-512\n",
            b"9 path=..\n",
            b"9999999 a=b\n",
            b"0 =\n",
        ]
        if 0 < size < 2**20:
            content = data.draw(st.sampled_from(lines) | st.binary(max_size=40))
            blocks.append(content.ljust(-(-size // 512) * 512, b"\0"))
    (tmp_path / "bad").write_bytes(b"".join(blocks) + data.draw(st.sampled_from([END, b""])))
    folder = tmp_path / "new"
    try:
        unpack(tmp_path / "bad", folder)
        assert all(path.resolve().is_relative_to(folder) for path in folder.rglob("*"))
        assert not any(path.is_symlink() for path in folder.rglob("*"))
    except DataError as error:
        assert not folder.exists() and "\n" not in str(error)
    shutil.rmtree(folder, ignore_errors=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_disk_space_is_checked_before_anything_is_written(tmp_path, monkeypatch, suffix):
    archive = pack(tmp_path / f"a.{suffix}", BOTTLE)
    free = archive.stat().st_size - 1
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free)
    )
    with monkeypatch.context() as patch:
        patch.setattr(archives, "tqdm", None)
        assert f"{free} are free" in refused(archive, tmp_path / "new")
    free += 1
    assert contents(unpack(archive, tmp_path / "new")) == BOTTLE


def test_a_disk_that_fills_up_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    packed = [pack(tmp_path / f"a.{suffix}", BOTTLE) for suffix in ("tar", "zip")]
    for module, archive in zip((tarfile, shutil), packed, strict=True):
        monkeypatch.setattr(module, "copyfileobj", full)
        message = refused(archive, tmp_path / "new")
        assert "No space left" in message and "the disk and the permissions" in message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_truncation_is_noticed(tmp_path, suffix):
    whole = pack(tmp_path / f"a.{suffix}", {"a": b"1" * 700, "b": bytes(range(256)) * 5})
    content = whole.read_bytes()
    # A plain tar: headers, contents and a block of zeros. The padding after that carries nothing.
    last = 512 + 1024 + 512 + 1536 + 512 if suffix == "tar" else len(content)
    cut = tmp_path / f"cut.{suffix}"
    for size in {0, 1, 5, 511, 512, 513, 1024, 1536, 2048, 2100, last - 513, last - 9, last - 1}:
        if 0 <= size < last:
            cut.write_bytes(content[:size])
            assert "download it again" in refused(cut, tmp_path / "new"), size
    cut.write_bytes(content[:last])
    assert len(contents(unpack(cut, tmp_path / "new"))) == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_is_an_error_or_changes_nothing_outside(tmp_path, suffix, data):
    whole = tmp_path / f"a.{suffix}"
    if not whole.exists():
        pack(whole, {"a/b": b"1" * 700, "c": bytes(range(256))})
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 3000) - 1))] = data.draw(
            st.integers(0, 255)
        )
    (tmp_path / "bad").write_bytes(content)
    folder = tmp_path / "new"
    try:
        unpack(tmp_path / "bad", folder)
    except DataError:
        assert not folder.exists()
    shutil.rmtree(folder, ignore_errors=True)
    assert {path.name for path in tmp_path.iterdir()} == {whole.name, "bad"}


def test_what_is_no_archive(tmp_path):
    page = tmp_path / "mvtec.tar.xz"
    page.write_text("<html>Please accept the licence.</html>" * 50)
    assert "no .tar, .tar.gz, .tar.xz or .zip archive" in refused(page, tmp_path / "new")
    assert "does not exist" in refused(tmp_path / "absent.tar", tmp_path / "new")
    assert "is a folder" in refused(tmp_path, tmp_path / "new")


def test_a_zip_with_a_password(tmp_path):
    archive = pack(tmp_path / "a.zip", {"a": b"1"})
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the directory
    archive.write_bytes(content)
    assert "password" in refused(archive, tmp_path / "new")


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    archive = pack(tmp_path / "a.tar", BOTTLE)
    written = []

    def interrupted(*args):
        if written:
            assert (tmp_path / ".new.unpacking/bottle/license.txt").is_file()
            raise KeyboardInterrupt
        written.append(copy(*args))

    copy = tarfile.copyfileobj
    monkeypatch.setattr(tarfile, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, tmp_path / "new")
    assert written and list(tmp_path.iterdir()) == [archive]


def test_a_killed_unpacking_is_not_mistaken_for_a_finished_one(tmp_path):
    archive = pack(tmp_path / "a.tar", BOTTLE)
    (tmp_path / ".new.unpacking").mkdir()
    (tmp_path / ".new.unpacking/half.png").touch()
    assert "remove that folder" in refused(archive, tmp_path / "new")


def test_a_checksum_given(tmp_path):
    archive = pack(tmp_path / "a.tar", BOTTLE)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    message = refused(archive, tmp_path / "new", "0" * 64)
    assert digest in message and "given" in message and "if you trust" not in message
    for wrong in ("", "abc", "g" * 64, digest + "0"):
        assert "64 hexadecimal digits" in refused(archive, tmp_path / "new", wrong)
    assert contents(unpack(archive, tmp_path / "new", f" {digest.upper()}\n")) == BOTTLE


def test_a_checksum_published(tmp_path):
    archive = pack(tmp_path / "VisA_20220922.tar", BOTTLE)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    message = refused(archive, tmp_path / "new")
    assert archives.PUBLISHED["VisA_20220922.tar"] in message and "published" in message
    assert f"pass the SHA-256 {digest} if you trust" in message
    assert contents(unpack(archive, tmp_path / "new", digest)) == BOTTLE
    assert all(len(bytes.fromhex(digest)) == 32 for digest in archives.PUBLISHED.values())


def test_the_command(tmp_path):
    archive = pack(tmp_path / "a.tar.xz", BOTTLE | {"cable/train/good/0.png": png()})
    command = [sys.executable, "-m", "effad_core", "unpack", str(archive)]
    options = {"capture_output": True, "text": True, "cwd": Path(__file__).parents[2]}
    result = subprocess.run([*command, str(tmp_path / "new")], **options)
    assert result.returncode == 0 and "Warning" not in result.stderr
    assert "new: bottle, cable" in result.stdout  # by name alone it is not MVTec AD
    assert f'open_scenario("{tmp_path / "new/bottle"}")' in result.stdout


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, refusal):
    archive = pack(tmp_path / "a.tar", BOTTLE)
    assert "not 0000" in refusal(main, archive, tmp_path / "new", "--sha256", "0" * 64)
    assert not (tmp_path / "new").exists()


def test_the_command_looks_one_folder_down_and_says_if_there_is_none(tmp_path, capsys):
    nested = {f"mine/{name}": content for name, content in BOTTLE.items()}
    main([str(pack(tmp_path / "a.zip", nested)), str(tmp_path / "new")])
    assert "new/mine/bottle" in capsys.readouterr().out
    main([str(pack(tmp_path / "b.zip", {"a": b"1"})), str(tmp_path / "other")])
    assert "no scenario found" in capsys.readouterr().out
