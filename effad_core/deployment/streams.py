"""Verdicts on images as they come: from a folder that grows, a video file, or a camera.

effad predict path/to/detector.safetensors path/to/folder --follow
effad predict path/to/detector.safetensors line3.mp4
effad predict path/to/detector.safetensors camera:0
"""

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from effad_core.datasets.images import find_images, read_image
from effad_core.deployment.prepared import PreparedDetector
from effad_core.deployment.verdicts import Inspection, VerdictFiles
from effad_core.errors import DataError, RunError, not_installed, printable
from effad_core.storage.files import as_path

import numpy as np
from PIL import Image

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
SETTLED = 0.2  # seconds without a change, after which a file is taken for complete
PATIENCE = 10.0  # seconds after which a file that cannot be read is given up
POLL = 0.1  # seconds between two looks into a folder: this works on network drives too


@dataclass(frozen=True)
class Frame:
    """An image of a stream.

    Attributes:
        name: what the table calls it, a relative path.
        image: RGB, or why it cannot be read.
        since: when it was there, on the clock `time.monotonic`: of a new file, when it was last
            seen to change.
        passed: frames of the camera that were passed over since the one before.
    """

    name: Path
    image: Image.Image | Exception
    since: float
    passed: int = 0


def is_video(source: str | os.PathLike) -> bool:
    """Whether this names a camera ("camera:0"), an address of a video ("rtsp://..."), or a file."""
    return is_live(source) or Path(source).suffix.lower() in VIDEOS


def is_live(source: str | os.PathLike) -> bool:
    """Whether this names a camera or an address: then frames come whether we look or not."""
    return re.fullmatch(r"camera:\d+|[a-z]+://.*", str(source)) is not None


def folder_frames(
    folder: str | os.PathLike, full_scale: int | None = None, idle: float | None = None
) -> Iterator[Frame]:
    """The images of a folder and those below it, then each new one as soon as it is complete.

    A file that is still being written is waited for: it is taken once it has not changed for a
    fifth of a second and can be read. One that cannot be read is given up after ten seconds
    without a change. A file that is written anew comes again.

    Args:
        folder: may be empty at first.
        full_scale: as in `read_image`.
        idle: end after so many seconds in which nothing came; None never ends.

    Raises:
        DataError: if there is no such folder.
    """
    folder = as_path(folder)
    find_images(folder)  # refuses what is no folder, before anything is written
    return _new_images(folder, full_scale, idle)


def _new_images(folder: Path, full_scale: int | None, idle: float | None) -> Iterator[Frame]:
    there = set(find_images(folder, recursive=True))  # they wait for each other, not for a detector
    seen: dict[Path, tuple] = {}  # what was yielded, as it was then
    changed: dict[Path, tuple] = {}  # what was not, with the time of its last change
    last = time.monotonic()
    while idle is None or changed or time.monotonic() - last < idle:
        for path in find_images(folder, recursive=True):
            state, now = _state(path), time.monotonic()
            if state is None or seen.get(path) == state:
                continue
            if changed.get(path, (None,))[0] != state:
                changed[path] = (state, now)
            waited = now - changed[path][1]
            if waited < SETTLED:
                continue
            try:
                image = read_image(path, full_scale)
            except DataError as error:
                if waited < PATIENCE:
                    continue
                image = error
            if _state(path) != state:  # it was written to meanwhile
                continue
            seen[path] = state
            _, since = changed.pop(path)
            yield Frame(path.relative_to(folder), image, now if path in there else since)
            there.discard(path)
            last = time.monotonic()
        for path in [path for path in changed if not path.exists()]:
            del changed[path]
        time.sleep(POLL)


def _state(path: Path) -> tuple | None:
    """What changes when a file is written; None if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def video_frames(source: str | os.PathLike) -> Iterator[Frame]:
    """The frames of a video file, or the newest ones of a camera.

    A file gives all its frames. A camera's frames come whether the detector is done or not: those
    that came meanwhile are passed over, so that a verdict is never late by more than one frame.

    Args:
        source: a file, "camera:0" for the first camera, or an address that OpenCV opens.

    Raises:
        DataError: if it cannot be opened, or gives no frame.
        RunError: if OpenCV is not installed.
    """
    try:
        import cv2
    except ModuleNotFoundError:
        raise RunError(not_installed("reading videos", "opencv-python-headless", "serve")) from None
    live = is_live(source)
    if not live and not as_path(source).is_file():
        raise DataError(f"The video {source} does not exist: name an existing file.")
    camera = re.fullmatch(r"camera:(\d+)", str(source))
    opened = cv2.VideoCapture(
        int(camera[1]) if camera else str(source if live else as_path(source))
    )
    if not opened.isOpened():
        raise DataError(f"{source} cannot be opened as a video: name a camera or a video file.")
    return _video_frames(opened, live, source)


def _video_frames(opened, live: bool, source: str | os.PathLike) -> Iterator[Frame]:
    number, before = -1, -1
    with closing(_newest(opened.read) if live else _each(opened.read)) as frames:
        for number, pixels, since in frames:
            image = Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))  # OpenCV's is BGR
            yield Frame(Path(f"frame_{number:06d}"), image, since, number - before - 1)
            before = number
    opened.release()
    if live or number < 0:
        more = "more frames" if number >= 0 else "frame"
        raise DataError(f"{source} gives no {more}: see that it runs, then start again.")


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
        for frame in _each(read):
            frames.append(frame)
            arrived.set()
            if ended.is_set():
                return
        ended.set()
        arrived.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while frames or not ended.is_set():
            arrived.wait()
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
    pictures: set[str] = frozenset({"overlays"}),
    say: Callable[[str], object] = print,
) -> Inspection:
    """Judge the images of a stream one by one, as they come; Ctrl-C ends it.

    Args:
        detector: prepared: one image at a time needs what is fastest.
        frames: for example `folder_frames(...)` or `video_frames(...)`.
        folder: receives predictions.csv and the pictures of the images that are anomalous, as in
            `inspect_images`.
        pictures: as in `VerdictFiles`.
        say: gets a line for each image: the time, the verdict, the latency (from `Frame.since`
            until its row is written) and the images per second so far.

    Returns:
        What was found, as `inspect_images` returns it; a last line says the median latency.

    Raises:
        DataError, ValueError: as `inspect_images`.
    """
    files = VerdictFiles(as_path(folder), detector.pixel_threshold, pictures, anomalous_only=True)
    latencies, passed, start = [], 0, None
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
                rate = len(latencies) / max(now - start, 1e-9)
                say(_line(frame.name, verdict, prediction, latencies[-1], rate))
        except KeyboardInterrupt:
            say("ended by Ctrl-C")
    if latencies:
        low, high = 1000 * np.quantile(latencies, (0.5, 0.95))
        over = f", {passed} frames passed over" if passed else ""
        say(f"latency: median {low:.0f} ms, 95 % at most {high:.0f} ms{over}")
    return files.inspection(detector)


def _line(name: Path, verdict: str, prediction, latency: float, rate: float) -> str:
    score = "" if prediction is None else f" {prediction.score:.3f}"
    if prediction is not None and prediction.threshold is not None:
        score += f" (threshold {prediction.threshold:.3f})"
    return printable(
        f"{datetime.now():%H:%M:%S} {name.as_posix()}: {verdict}{score}, {1000 * latency:.0f} ms, "
        f"{rate:.1f} images/s"
    )
