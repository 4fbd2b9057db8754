"""Damage the files that effad_core reads, at random, and see that it reads or refuses them.

    python tests/soak/files.py --minutes 5

Detectors, teachers, checkpoints with their config.json and log.csv, operating points, metrics.json,
LOCO's defects_config.json and archives: bits flipped, bytes cut, moved and put in, values of their
headers replaced, with checksums that are right again. Each must give a usable result, or a RunError
or DataError of one line that names the file, within seconds and bounded memory. The work is done by
a process with little memory, which is started anew when it dies or hangs; what it was reading then
is a failure, too. The file of each failure is kept.
"""

import argparse
import gzip
import importlib.util
import io
import json
import lzma
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

HANGS = 20  # seconds
MEMORY = 2 * 2**30  # bytes beyond what the imports take
STRANGE = [None, True, False, 0, -1, 1, 2.5, 10**9, 10**40, 1e300, float("nan"), float("inf")]
STRANGE += ["", "x" * 300, "a\nb", "\ud800", "../a", [], [[]], {}, {"a": 1}]
STRANGE += [[256] * 3, [10**9] * 2]  # image sizes
ROOT = Path(__file__).parents[2]


# ---- whole files ---------------------------------------------------------------------------------


def prepare() -> None:
    """Networks so small that a detector is read in milliseconds."""
    from effad_core import detector

    import torch
    from torch import nn

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("conftest", ROOT / "tests" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)

    class TinyAutoencoder(nn.Sequential):
        """Of an autoencoder's interface only its constructor."""

        def __init__(self, out_channels: int = 384, padding: bool = False):
            super().__init__(nn.Conv2d(3, 4, 8, stride=4), nn.Conv2d(4, out_channels, 8))

    detector.PatchDescriptionNetwork = conftest.NarrowPDN
    detector.Autoencoder = TinyAutoencoder


def new_run(folder: Path):
    from effad_core.storage.runs import Run

    import torch

    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters())
    return Run(folder, {"seed": 0, "lr": [0.1]}, {"net": network}, {"adam": optimizer}, total=2)


def write_originals(folder: Path) -> None:
    from effad_core import EfficientAD, OperatingPoint
    from effad_core.distillation.algorithm import save_teacher

    import torch

    torch.manual_seed(0)
    detector = EfficientAD(out_channels=8)
    detector.quantiles.copy_(torch.tensor([0.1, 0.4, 0.01, 0.05]))
    point = OperatingPoint(0.5, "fpr-average", 9, 0.2, 0.95, 0.1, 0.3)
    detector.operating_point = point
    detector.pixel_operating_point = OperatingPoint(1.5, "labels-f1", 4)
    detector.save(folder / "detector.safetensors")
    save_teacher(folder / "teacher.safetensors", detector.teacher, {"loss": float("nan")})
    run = new_run(folder)
    with run:
        run.resume()
        for step in (1, 2):
            run.modules["net"](torch.ones(1, 3)).sum().backward()
            run.optimizers["adam"].step()
            run.log({"iteration": step, "loss": 1 / step})
        run.save(2)
    (folder / "point.json").write_text(json.dumps(point.to_dict()))
    metrics = {"all": {"image_auroc": 0.5}, "spot": {"image_auroc": 0.25}}
    (folder / "metrics.json").write_text(json.dumps({"detector": "ab", "metrics": metrics}))
    defect = {"defect_name": "a", "pixel_value": 9, "saturation_threshold": 0.5}
    defects = [defect | {"relative_saturation": True}]
    (folder / "defects_config.json").write_text(json.dumps(defects))
    write_archives(folder)


def write_archives(folder: Path) -> None:
    files = {"a/b.png": b"1" * 700, "c": bytes(range(256)), "ü" * 90: b"", "d/" * 50 + "e": b"5"}
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    (folder / "archive.tar").write_bytes(plain.getvalue())
    (folder / "archive.tar.xz").write_bytes(lzma.compress(plain.getvalue()))
    (folder / "archive.tar.gz").write_bytes(gzip.compress(plain.getvalue()))
    with zipfile.ZipFile(folder / "archive.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)


# ---- what reads them -----------------------------------------------------------------------------


def read_detector(path: Path) -> None:
    from effad_core import EfficientAD

    detector = EfficientAD.load(path)
    values = detector.state_dict()
    assert all(v.isfinite().all() for name, v in values.items() if name != "quantiles")
    assert (detector.sigma > 0).all() and (detector.cell_means > 0).all()
    assert detector.out_channels == 8
    assert 256 <= min(detector.image_size) <= max(detector.image_size) <= 2**17
    if not values["quantiles"].isnan().all():
        detector.check_quantiles()
    for point in (detector.operating_point, detector.pixel_operating_point):
        assert point is None or str(point)
    detector.save(path.with_name("again"))
    EfficientAD.load(path.with_name("again"))


def read_teacher(path: Path) -> None:
    from effad_core import EfficientAD

    detector = EfficientAD(out_channels=8).load_teacher(path)
    assert all(p.isfinite().all() for p in detector.teacher.parameters())
    assert isinstance(detector.card["teacher"], dict)


def read_run(path: Path) -> None:
    """The whole folder; then one step more."""
    import torch

    run = new_run(path.parent)
    with run:
        done, row = run.resume()
        assert type(done) is int and isinstance(row, dict)
        loss = run.modules["net"](torch.ones(1, 3)).sum()
        assert loss.isfinite()
        loss.backward()
        run.optimizers["adam"].step()
        run.log({"iteration": done + 1, "loss": 0.5})
        run.save(done + 1)


def read_point(path: Path) -> None:
    """The file is JSON; who read it is not asked here, so a ValueError needs no name."""
    from effad_core import OperatingPoint, RunError

    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    try:
        point = OperatingPoint.from_dict(content)
    except ValueError as error:
        raise RunError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    assert str(point) and OperatingPoint.from_dict(point.to_dict()) == point


def read_metrics(path: Path) -> None:
    from effad_core.evaluation import tables, tasks

    metrics = tasks._read_metrics(path, {"detector": "ab"})
    if metrics is not None:
        tables.tables({"x": {"a": {"dataset": "b", "seeds": {"0": metrics}}}})


def read_defects(path: Path) -> None:
    from effad_core.datasets.loco import read_defect_kinds

    assert read_defect_kinds(path)


def unpack(path: Path) -> None:
    from effad_core.datasets.archives import unpack

    folder = path.with_name("new")
    before = sorted(path.parent.iterdir())
    try:
        unpack(path, folder)
        for found in folder.rglob("*"):
            assert not found.is_symlink() and found.resolve().is_relative_to(folder.resolve())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert sorted(path.parent.iterdir()) == before, "something is left"


READERS: dict[str, Callable[[Path], None]] = {
    "detector.safetensors": read_detector,
    "teacher.safetensors": read_teacher,
    "checkpoint.safetensors": read_run,
    "config.json": read_run,
    "log.csv": read_run,
    "point.json": read_point,
    "metrics.json": read_metrics,
    "defects_config.json": read_defects,
    **dict.fromkeys(["archive.tar", "archive.tar.xz", "archive.tar.gz", "archive.zip"], unpack),
}
FOLDER = {"checkpoint.safetensors", "config.json", "log.csv"}  # read together


# ---- damage --------------------------------------------------------------------------------------


def damage(content: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """One to three changes of any file."""
    content = bytearray(content)
    for _ in range(dice.randint(1, 3)):
        size = len(content)
        start = (
            dice.randrange(size + 1) if dice.random() < 0.5 else dice.randrange(min(size, 600) + 1)
        )
        length = dice.choice([1, 1, 2, 4, 8, 30, 512])
        match dice.randrange(7):
            case 0 if start < size:
                content[start] ^= 1 << dice.randrange(8)
            case 1:
                content[start : start + length] = dice.randbytes(length)
            case 2:
                del content[start : start + length]
            case 3:
                del content[start:]
            case 4:  # a piece of it, or of another file
                source = dice.choice([bytes(content), *others])
                where = dice.randrange(len(source) + 1)
                content[start:start] = source[where : where + length]
            case 5:
                content[start : start + length] = dice.choice([b"\0", b"\xff"]) * length
            case _:
                content[start : start + length] = b"%d" % dice.choice([0, -1, 9**9, 2**63, 10**30])
    return bytes(content)


def change_json(value: object, dice: random.Random) -> object:
    """Something in it becomes strange, is gone, or is there twice as deep."""
    if isinstance(value, dict | list) and value and dice.random() < 0.8:
        value = value.copy()
        key = dice.choice(list(value)) if isinstance(value, dict) else dice.randrange(len(value))
        match dice.randrange(6):
            case 0:
                del value[key]
            case 1 if isinstance(value, dict):
                value[dice.choice(["x", "\n" * 300, key + "x", ""])] = value[key]
            case _:
                value[key] = change_json(value[key], dice)
        return value
    if isinstance(value, str) and dice.random() < 0.9:
        with suppress(ValueError):  # a header of ours is JSON in a text
            return json.dumps(change_json(json.loads(value), dice))
    return dice.choice([*STRANGE, [value], str(value)])


def damage_header(content: bytes, dice: random.Random) -> bytes:
    """A safetensors file whose header is JSON as before, with other values."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for _ in range(dice.randint(1, 2)):
        header = change_json(header, dice)
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def mend_tar(content: bytes) -> bytes:
    """The checksum of each header becomes right."""
    content = bytearray(content)
    for start in range(0, len(content) - 511, 512):
        if content[start + 257 : start + 262] == b"ustar":
            content[start + 148 : start + 156] = b" " * 8
            total = sum(content[start : start + 512])
            content[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(content)


def damaged(name: str, originals: dict[str, bytes], dice: random.Random) -> bytes:
    content, others = originals[name], list(originals.values())
    if name.endswith(".safetensors") and dice.random() < 0.6:
        return damage_header(content, dice)
    if name.endswith(".json") and dice.random() < 0.6:
        return json.dumps(change_json(json.loads(content), dice)).encode()
    if name.startswith("archive.tar") and dice.random() < 0.7:
        plain = mend_tar(damage(originals["archive.tar"], others, dice))
        pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix, bytes)
        return pack(plain)
    return damage(content, others, dice)


# ---- the process that reads, and the one that watches --------------------------------------------


def judge(name: str, path: Path) -> str:
    """What came of it: "read", "refused", or what is wrong."""
    from effad_core import RunError
    from effad_core.errors import DataError

    try:
        READERS[name](path)
        return "read"
    except (RunError, DataError) as error:
        said = str(error)
        named = str(path) in said or (name in FOLDER and str(path.parent) in said)
        if named and "\n" not in said and len(said) < 1500:
            return "refused"
        return f"a sentence that is long, or of several lines, or names no file: {said[:500]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]!r}"


def work(originals: dict[str, bytes], names: list[str], folder: Path, seed: int, pipe) -> None:
    """Tell of each file before it is read, and what came of it."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  progress bars
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY,) * 2)
    dice = random.Random(seed)
    while True:
        name = dice.choice(names)
        content = damaged(name, originals, dice)
        place = folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for other in FOLDER if name in FOLDER else ():
            (place / other).write_bytes(originals[other])
        (place / name).write_bytes(content)
        pipe.send((name, content, None))
        pipe.send((name, content, judge(name, place / name)))


def soak(seconds: float, seed: int, folder: Path, keep: Path, names: list[str]) -> Counter:
    """Counts by file and outcome."""
    prepare()
    (folder / "originals").mkdir()
    write_originals(folder / "originals")
    originals = {name: (folder / "originals" / name).read_bytes() for name in READERS}
    for name in READERS:  # undamaged, each is read
        place = shutil.copytree(folder / "originals", folder / f"whole {name}")
        assert (found := judge(name, place / name)) == "read", (name, found)
    counts, reasons, end = Counter(), Counter(), time.monotonic() + seconds
    context, worker = multiprocessing.get_context("fork"), None
    while time.monotonic() < end:
        if worker is None:
            pipe, other = context.Pipe(duplex=False)
            worker = context.Process(target=work, args=(originals, names, folder, seed, other))
            worker.start()
            other.close()
            seed += 1
            name, content = "", b""
        outcome = "no answer: it hung"
        try:
            if pipe.poll(HANGS):
                name, content, outcome = pipe.recv()
        except EOFError:
            worker.join()
            outcome = f"the process died ({worker.exitcode})"
        if outcome is None:
            continue
        counts[name, outcome if outcome in ("read", "refused") else "FAILED"] += 1
        if outcome not in ("read", "refused"):
            if reasons[name, outcome[:60]] == 0:
                keep.mkdir(parents=True, exist_ok=True)
                kept = keep / f"{len(reasons)}-{name}"
                kept.write_bytes(content)
                print(f"{name} FAILED: {outcome}\n  kept as {kept}", flush=True)
            reasons[name, outcome[:60]] += 1
        if outcome.startswith(("no answer", "the process")):
            worker.kill()
            worker.join()
            worker = None
    if worker is not None:
        worker.kill()
        worker.join()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "soak-files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        counts = soak(60 * args.minutes, args.seed, Path(work), args.keep, args.only)
    for name in READERS:
        found = [counts[name, outcome] for outcome in ("read", "refused", "FAILED")]
        print("{:24}{:7} read{:7} refused{:5} FAILED".format(name, *found))
    print(f"{counts.total()} files, seed {args.seed}")
    sys.exit(any(outcome == "FAILED" for _, outcome in counts))


if __name__ == "__main__":
    main()
