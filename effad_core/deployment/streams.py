"""Verdicts on images as they come: from a folder that grows, a video file, or a camera.

    effad predict path/to/detector.safetensors path/to/folder --follow
    effad predict path/to/detector.safetensors line3.mp4
    effad predict path/to/detector.safetensors camera:0

docs/deployment.md says when to use which.
"""

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from effad_core.datasets.images import find_images, open_image, read_image
from effad_core.deployment.prepared import PreparedDetector
from effad_core.deployment.verdicts import Inspection, VerdictFiles, table_cell
from effad_core.errors import DataError, RunError, not_installed, printable
from effad_core.prediction import Prediction
from effad_core.storage.files import as_path

import numpy as np
from PIL import Image

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
SETTLED = 0.2  # seconds without a change, after which a file is taken for complete
PATIENCE = 10.0  # seconds after which a file that cannot be read is given up
LATEST = 10_000  # images whose latencies are kept: a stream may go on for months
POLL = 0.1  # seconds between two looks into a folder: network drives tell nobody of changes


@dataclass(frozen=True)
class Frame:
    """An image of a stream.

    Attributes:
        name: what the table calls it, a relative path.
        image: RGB, or why it cannot be read.
        since: when it was there, on the clock `time.monotonic`: of a new file, when its last change
            was seen.
        passed: frames of the camera that were passed over since the one before.
    """

    name: Path
    image: Image.Image | Exception
    since: float
    passed: int = 0


def is_video(source: str | os.PathLike) -> bool:
    """Whether this names a camera ("camera:0"), an address of a video ("rtsp://..."), or a file."""
    file = Path(source).suffix.lower() in VIDEOS and not as_path(source).is_dir()
    return is_live(source) or file


def is_live(source: str | os.PathLike) -> bool:
    """Whether this names a camera or an address: then frames come whether we look or not."""
    return re.fullmatch(r"(?i)camera:\d+|(?!file:)[a-z][a-z0-9+.-]+://.*", str(source)) is not None


def folder_frames(
    folder: str | os.PathLike,
    full_scale: int | None = None,
    idle: float | None = None,
    judged: Mapping[str, float] | None = None,
) -> Iterator[Frame]:
    """The images of a folder and those below it, then each new one as soon as it is complete.

    A file that is still being written is waited for: it is taken once it has not changed for a
    fifth of a second and can be read. One that cannot be read is given up after ten seconds
    without a change. A file that is written anew comes again. A folder that is away for a while,
    as on a network drive, is waited for.

    Args:
        folder: may be empty at first.
        full_scale: as in `read_image`.
        idle: end after so many seconds in which nothing came, more than 0; None never ends.
        judged: images that have been judged before, and when (see `judged_before`): they come only
            if they have changed since.

    Raises:
        DataError: if there is no such folder.
    """
    folder = as_path(folder)
    find_images(folder)  # refuses what is no folder, before anything is written
    return _new_images(folder, full_scale, idle, judged or {})


@dataclass
class _Waiting:
    """A file that has not been taken yet: its state, since when it is so, when to try it."""

    state: tuple
    since: float
    next_try: float


def _new_images(
    folder: Path, full_scale: int | None, idle: float | None, judged: Mapping[str, float]
) -> Iterator[Frame]:
    there = set(find_images(folder, recursive=True))  # they wait for each other, not for a detector
    taken: dict[Path, tuple] = {}  # with the state they had then
    waiting: dict[Path, _Waiting] = {}
    last = time.monotonic()
    while idle is None or waiting or time.monotonic() - last < idle:
        found = find_images(folder, recursive=True, strict=False)
        for path in found:
            state, now = _state(path), time.monotonic()
            if state is None or taken.get(path) == state:
                continue
            name = path.relative_to(folder)
            if path not in taken and judged.get(table_cell(name.as_posix()), 0) > state[1] / 1e9:
                taken[path] = state
                continue
            file = waiting.get(path)
            if file is None or file.state != state:
                waiting[path] = _Waiting(state, now, now + SETTLED)
                continue
            if now < file.next_try:
                continue
            try:
                image = read_image(path, full_scale)
            except (DataError, OSError) as error:
                if now - file.since < PATIENCE:
                    waited = now - file.since  # 0.2 s, 0.4 s, 0.8 s ...
                    file.next_try = min(now + waited, file.since + PATIENCE)
                    continue
                image = error
            if _state(path) != state:  # it was written to meanwhile
                continue
            taken[path] = state
            del waiting[path]
            yield Frame(name, image, now if path in there else file.since)
            there.discard(path)
            last = time.monotonic()
        for known in (taken, waiting):
            for path in known.keys() - set(found):
                del known[path]
        time.sleep(POLL)


def _state(path: Path) -> tuple | None:
    """What changes when a file is written: size, time, number; None if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def video_frames(source: str | os.PathLike) -> Iterator[Frame]:
    """The frames of a video file, or the newest ones of a camera.

    A file gives all its frames. A camera's frames come whether the detector is done or not. Who
    asks for the next one gets the newest; those that came meanwhile are passed over.

    Args:
        source: a file, "camera:0" for the first camera, or an address that OpenCV opens.

    Raises:
        DataError: if it cannot be opened, gives no frame, or, of a camera, no more frames.
        RunError: if OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError:
        raise RunError(not_installed("reading videos", "opencv-python-headless", "serve")) from None
    live, shown = is_live(source), re.sub(r"//[^/@]*@", "//", str(source))  # without a password
    if not live and not as_path(source).is_file():
        raise DataError(f"The video {source} does not exist: name an existing file.")
    camera = re.fullmatch(r"(?i)camera:(\d+)", str(source))
    name = str(source) if live else str(as_path(source))
    opened = cv2.VideoCapture(int(camera[1]) if camera else name)
    if not opened.isOpened():
        raise DataError(f"{shown} cannot be opened as a video: name a camera or a video file.")
    return _video_frames(opened, live, shown)


def _video_frames(opened: Any, live: bool, shown: str) -> Iterator[Frame]:
    """Of a camera, a frame's name begins with the time of the start: no later start replaces it."""
    prefix = f"{datetime.now():%Y%m%d-%H%M%S}-" if live else ""
    number, before = -1, -1
    try:
        with closing(_newest(opened.read) if live else _each(opened.read)) as frames:
            for number, pixels, since in frames:
                if pixels.ndim == 3:
                    pixels = np.ascontiguousarray(pixels[..., 2::-1])  # OpenCV's order is BGR
                image = open_image(pixels)
                name = Path(f"{prefix}frame_{number:06d}")
                yield Frame(name, image, since, number - before - 1)
                before = number
    finally:
        opened.release()
    if live or number < 0:
        more = "more frames" if number >= 0 else "frame"
        raise DataError(f"{shown} gives no {more}: see that it runs, then start again.")


Read = Callable[[], tuple[bool, np.ndarray]]


def _each(read: Read) -> Iterator[tuple[int, np.ndarray, float]]:
    number = 0
    while (found := read())[0]:
        yield number, found[1], time.monotonic()
        number += 1


def _newest(read: Read) -> Iterator[tuple[int, np.ndarray, float]]:
    """A thread reads all frames; whoever asks gets the newest one that it has not had."""
    frames, arrived, ended = deque(maxlen=1), threading.Event(), threading.Event()

    def run() -> None:
        try:
            for frame in _each(read):
                frames.append(frame)
                arrived.set()
                if ended.is_set():
                    return
        finally:  # also if the camera's driver raises
            ended.set()
            arrived.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while frames or not ended.is_set():
            arrived.wait(1)  # or Windows would not notice Ctrl-C meanwhile
            arrived.clear()
            if frames:
                yield frames.pop()
    finally:
        ended.set()
        thread.join(timeout=5)


def inspect_stream(
    detector: PreparedDetector,
    frames: Iterator[Frame],
    folder: str | os.PathLike,
    pictures: Collection[str] = ("overlays",),
    say: Callable[[str], object] = print,
) -> Inspection:
    """Judge the images of a stream one by one, as they come; Ctrl-C ends it.

    Args:
        detector: prepared: one image at a time needs what is fastest.
        frames: for example `folder_frames(...)` or `video_frames(...)`.
        folder: receives the table stream.csv, to which rows are added: the time, then the columns
            of `inspect_images`; and pictures of the images that are anomalous.
        pictures: as in `VerdictFiles`.
        say: gets a line for each image: the time, the verdict, the latency (from `Frame.since`
            until its row is written) and the images per second so far; then the latencies' median.

    Returns:
        What was found, as `inspect_images` returns it.

    Raises:
        DataError: as `VerdictFiles`; if the frames end with one, after the last line.
        ValueError: as `inspect_images`.
    """
    limit = detector.pixel_threshold
    files = VerdictFiles(as_path(folder), limit, set(pictures), stream=True)
    latencies, passed, start, ended = deque(maxlen=LATEST), 0, None, None
    with files.opened():
        try:
            for frame in frames:
                start = start or time.monotonic()
                image, prediction = frame.image, None
                if not isinstance(image, Exception):
                    image, prediction = next(detector.stream([image], keep_going=True))
                verdict = files.add(frame.name, image, prediction)
                now = time.monotonic()
                latencies.append(now - frame.since)
                passed += frame.passed
                rate = files.counts.total() / max(now - start, 1e-9)
                say(_line(frame.name, verdict, prediction, latencies[-1], rate))
        except KeyboardInterrupt:
            say("ended by Ctrl-C")
        except DataError as error:
            ended = error
    if latencies:
        low, high = 1000 * np.quantile(latencies, (0.5, 0.95))
        over = f", {passed} frames passed over" if passed else ""
        say(f"latency: median {low:.0f} ms, 95 % at most {high:.0f} ms{over}")
    found = files.inspection(detector)
    if ended is not None:
        if found.images:
            say(str(found))
        raise ended
    return found


def _line(
    name: Path, verdict: str, prediction: Prediction | None, latency: float, rate: float
) -> str:
    score = "" if prediction is None else f" {prediction.score:.3f}"
    if prediction is not None and prediction.threshold is not None:
        score += f" (threshold {prediction.threshold:.3f})"
    return printable(
        f"{datetime.now():%H:%M:%S} {name.as_posix()}: {verdict}{score}, {1000 * latency:.0f} ms, "
        f"{rate:.1f} images/s"
    )
