"""Damage the corpus of odd images at random, and see that each is read or refused as it must be.

    python tests/soak/images.py --minutes 5

Bits flipped, bytes cut, moved, doubled, taken from another file, and numbers set to their extremes,
also in PNGs whose checksums are right again. Each must give RGB of 8 bits, or a DataError of one
line that names the file, within seconds and bounded memory, without a warning or a file left open.
PNGs whose checksums are not mended must give the whole picture or be refused. Another process does
the reading; if it dies or hangs, that file is a failure, too. The file of each failure is kept.
"""

import argparse
import importlib.util
import multiprocessing
import random
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
HANGS = 20  # seconds
MEMORY = 3 * 2**30  # bytes beyond what the imports take: an image of 179 million pixels fits
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def corpus():
    """The module of the tests, whose table and rule are used here."""
    path = ROOT / "tests" / "datasets" / "test_odd_files.py"
    spec = importlib.util.spec_from_file_location("test_odd_files", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def contents(table, folder: Path) -> dict[str, bytes]:
    """The bytes of the files of the table; links, pipes and names without a file are left out."""
    found = {}
    for number, (name, case) in enumerate(table.items()):
        if name.startswith(("not a file", "a picture named", "an empty file named", "a name ")):
            continue
        path = folder / str(number) / case.file
        path.parent.mkdir()
        case.make(path)
        if path.read_bytes():
            found[name] = path.read_bytes()
    return found


def damage(content: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """The content after one to four changes, a third of which flip a bit."""
    data = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        if not data:
            return bytes(data)
        start, length = dice.randrange(len(data)), dice.choice((1, 2, 4, 8, 40, 200))
        kind = dice.randrange(9)
        if kind in (0, 7, 8):
            data[start] ^= 1 << dice.randrange(8)
        elif kind == 1:
            number = struct.pack(dice.choice("<>") + "I", dice.choice(EXTREMES))
            data[start : start + 4] = number if dice.random() < 0.5 else number[2:]
        elif kind == 2:
            del data[start : start + length]
        elif kind == 3:
            data[start:start] = data[start : start + length]
        elif kind == 4:
            del data[start:]
        elif kind == 5:
            other = dice.choice(others)
            begin = dice.randrange(len(other))
            data[start : start + length] = other[begin : begin + length]
        else:
            data[start : start + length] = dice.randbytes(length)
    return bytes(data)


def mend(data: bytes) -> bytes:
    """A PNG with right checksums, as far as its chunks can be told."""
    if not data.startswith(SIGNATURE):
        return data
    parts, start = [SIGNATURE], len(SIGNATURE)
    while start + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, start)
        body = data[start + 4 : start + 8 + length]
        parts += [data[start : start + 4], body, struct.pack(">I", zlib.crc32(body))]
        start += 12 + length
    return b"".join(parts)


def judge(module, path: Path, whole) -> str:
    """Read a file by the rule of the tests: "read" or "refused"; `whole` is the picture, if any."""
    found = module.outcome(path)
    module.outcome(path, lambda path: module.read_mask(path, (module.W, module.H)))
    if isinstance(found, str):
        return "refused"
    assert found.dtype == "uint8" and found.ndim == 3 and found.shape[2] == 3 and found.size
    if whole is not None:
        assert found.shape == whole.shape and (found == whole).all(), "pixels are wrong"
    return "read"


def work(seed: int, folder: Path, pipe) -> None:
    """Damage and read one file after the other; the pipe hears the name before, the end after."""
    module = corpus()
    originals = contents(module.CORPUS, folder)
    path, dice = folder / "damaged.png", random.Random(seed)
    pictures = {}
    for name, content in originals.items():
        path.write_bytes(content)
        pictures[name] = module.outcome(path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    names, others = list(originals), list(originals.values())
    sound = [name for name, picture in pictures.items() if not isinstance(picture, str)]
    while True:
        name = dice.choice(names if dice.random() < 0.2 else sound)
        content = damage(originals[name], others, dice)
        sealed = originals[name].startswith(SIGNATURE) and not isinstance(pictures[name], str)
        if sealed and dice.random() < 0.5:
            content, sealed = mend(content), False
        sealed = sealed and content.startswith(SIGNATURE)
        path.write_bytes(content)
        pipe.send((name, None))
        try:
            result = judge(module, path, pictures[name] if sealed else None)
        except BaseException as error:
            result = f"FAILED: {type(error).__name__}: {error}"
        pipe.send((name, result))


def soak(seconds: float, seed: int, folder: Path, keep: Path) -> Counter:
    """Count the outcomes; print and keep what fails."""
    counts, end, process = Counter(), time.monotonic() + seconds, None
    context = multiprocessing.get_context("spawn")
    while time.monotonic() < end:
        if process is None:
            place = Path(tempfile.mkdtemp(dir=folder))
            pipe, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=work, args=(seed + counts.total(), place, theirs), daemon=True
            )
            process.start()
            theirs.close()
            name, waits = "the start", 120  # imports
        try:
            heard = pipe.poll(waits)
            name, result = pipe.recv() if heard else (name, f"FAILED: longer than {waits} s")
        except EOFError:
            heard, result = False, "FAILED: the process died"
        waits = HANGS
        if result is None:
            continue
        counts[result.partition(":")[0]] += 1
        if result.startswith("FAILED"):
            keep.mkdir(parents=True, exist_ok=True)
            kept = keep / f"{seed}-{counts.total()}.png"
            if (place / "damaged.png").exists():
                kept.write_bytes((place / "damaged.png").read_bytes())
            print(f"{name}: {result[:600]}\n  kept as {kept}", flush=True)
        if not heard:
            process.kill()
            process.join()
            process = None
    if process is not None:
        process.kill()
        process.join()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "soak-images")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = soak(60 * args.minutes, args.seed, Path(folder), args.keep)
    print(*(f"{counts[key]} {key}" for key in ("read", "refused", "FAILED")), sep=", ", end="; ")
    print(f"{counts.total()} files, seed {args.seed}")
    sys.exit(counts["FAILED"] > 0 or counts.total() == 0)


if __name__ == "__main__":
    main()
