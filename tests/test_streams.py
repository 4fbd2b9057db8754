"""Verdicts on images as they come: each once, when it is whole, with the scores of `predict`."""

import csv
import json
import shutil
import sys
import threading
import time
from pathlib import Path

from effad_core import DataError, RunError, prepare
from effad_core.deployment import streams
from effad_core.deployment.inspection import main
from effad_core.deployment.streams import (
    Frame,
    folder_frames,
    inspect_stream,
    is_live,
    is_video,
    video_frames,
)
from effad_core.deployment.verdicts import judged_before

import cv2
import numpy as np
import pytest
from PIL import Image


def rows(folder):
    with (folder / "stream.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def video(drawn, tmp_path):
    """The drawn images as frames, and what OpenCV reads of them, as RGB."""
    path = tmp_path / "line.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (280, 264))
    for image in drawn:
        writer.write(cv2.imread(str(image)))
    writer.release()
    reader, frames = cv2.VideoCapture(str(path)), []
    while (found := reader.read())[0]:
        frames.append(cv2.cvtColor(found[1], cv2.COLOR_BGR2RGB))
    assert len(frames) == len(drawn)
    return path, frames


def test_a_growing_folder(judging, drawn, tmp_path):
    """A file that is written in pieces has one row, with the score of the whole file."""
    folder, said = tmp_path / "in", []
    (folder / "below").mkdir(parents=True)
    (folder / "there.png").write_bytes(drawn[0].read_bytes())

    def write():
        data = drawn[1].read_bytes()
        with (folder / "below/slow.png").open("wb") as file:
            for start in range(0, len(data), 1 + len(data) // 4):
                file.write(data[start : start + 1 + len(data) // 4])
                file.flush()
                time.sleep(0.3)
        (folder / "notes.txt").write_text("no image")
        Image.open(drawn[2]).save(folder / "last.png")

    frames, prepared, writing = folder_frames(folder, idle=2.5), prepare(judging, "cpu"), []

    def say(line):
        said.append(line)
        if len(said) == 1:  # the image that was there before
            writing.append(threading.Thread(target=write))
            writing[0].start()

    found = inspect_stream(prepared, frames, tmp_path / "out", say=say)
    writing[0].join()
    table = {row["image"]: row for row in rows(tmp_path / "out")}
    assert list(table) == ["there.png", "below/slow.png", "last.png"] and found.images == 3
    for name, path in zip(table, drawn, strict=False):
        expected = judging.predict(path)
        assert float(table[name]["score"]) == pytest.approx(expected.score, rel=1e-4)
        assert table[name]["is_anomalous"] == str(expected.is_anomalous)
        assert (tmp_path / f"out/overlays/{name}.png").exists() == expected.is_anomalous
    assert len(said) == 4 and "there.png: " in said[0] and said[3].startswith("latency: median")


def test_what_is_written_anew_is_judged_anew(drawn, tmp_path):
    path = tmp_path / "newest.png"
    path.write_bytes(drawn[0].read_bytes())
    frames = folder_frames(tmp_path, idle=5)
    first = next(frames)
    path.write_bytes(drawn[1].read_bytes())
    second = next(frames)
    assert first.name == second.name == Path("newest.png")
    for frame, drawing in ((first, drawn[0]), (second, drawn[1])):
        np.testing.assert_array_equal(frame.image, Image.open(drawing).convert("RGB"))


def test_a_file_that_stays_unreadable_is_given_up(judging, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "PATIENCE", 0.6)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "cut.png").write_bytes(drawn[0].read_bytes()[:-500])
    (folder / "good.png").write_bytes(drawn[1].read_bytes())
    start = time.monotonic()
    frames = list(folder_frames(folder, idle=0.5))
    assert [frame.name.name for frame in frames] == ["good.png", "cut.png"]
    assert isinstance(frames[1].image, DataError) and frames[1].since >= start + 0.5
    found = inspect_stream(prepare(judging, "cpu"), frames, tmp_path / "out", say=str)
    assert (found.images, found.unreadable) == (2, 1) and "cut.png" in found.errors[0]


def test_a_video(judging, video, tmp_path):
    path, pixels = video
    frames = list(video_frames(path))
    assert [str(frame.name) for frame in frames[:2]] == ["frame_000000", "frame_000001"]
    assert [frame.passed for frame in frames] == [0] * len(pixels)
    for frame, expected in zip(frames, pixels, strict=True):
        np.testing.assert_array_equal(frame.image, expected)
    inspect_stream(prepare(judging, "cpu"), frames, tmp_path / "out", say=str)
    for row, image in zip(rows(tmp_path / "out"), pixels, strict=True):
        assert float(row["score"]) == pytest.approx(judging.predict(image).score, rel=1e-4)


class Camera:
    """Stands for OpenCV's: frame n comes when `until` is n or more; its red is n."""

    def __init__(self, last, fails=False):
        self.until, self.shown, self.last, self.fails = 0, -1, last, fails
        self.changed, self.released = threading.Condition(), False

    def __call__(self, source):
        assert source == 3
        return self

    def isOpened(self):
        return True

    def show_until(self, number):
        """Let the frames up to this number come, and wait until they have been read."""
        self.let_come(number)
        with self.changed:
            assert self.changed.wait_for(lambda: self.shown >= number, timeout=60)

    def let_come(self, number):
        with self.changed:
            self.until = number
            self.changed.notify_all()

    def read(self):
        with self.changed:
            assert self.changed.wait_for(lambda: self.until > self.shown, timeout=60)
            self.shown += 1
            self.changed.notify_all()
            if self.shown > self.last and self.fails:
                raise RuntimeError("the driver fails")
            return self.shown <= self.last, np.full((8, 9, 3), (0, 0, self.shown), np.uint8)

    def release(self):
        self.released = True


def test_of_a_camera_the_newest_frame_is_taken(monkeypatch):
    camera = Camera(last=9)
    camera.until = 1
    monkeypatch.setattr(cv2, "VideoCapture", camera)
    frames = video_frames("camera:3")
    first = next(frames)
    camera.show_until(6)  # 6 is asked for, so 5 is there for certain
    second = next(frames)
    numbers = [frame.image.getpixel((0, 0))[0] for frame in (first, second)]  # OpenCV's is BGR
    assert numbers[0] <= 1 and numbers[1] in (5, 6)
    assert second.passed == numbers[1] - numbers[0] - 1
    assert second.name.name.endswith(f"-frame_{numbers[1]:06d}")
    camera.let_come(100)
    with pytest.raises(DataError, match="camera:3 gives no more frames: see that it runs"):
        for frame in frames:
            numbers.append(frame.image.getpixel((0, 0))[0])
    assert numbers == sorted(set(numbers)) and camera.released  # none comes late, or again


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_camera_that_fails_ends_the_stream_with_its_summary(monkeypatch, judging, tmp_path):
    camera, said = Camera(last=0, fails=True), []
    camera.until = 100
    monkeypatch.setattr(cv2, "VideoCapture", camera)
    with pytest.raises(DataError, match="gives no"):
        inspect_stream(
            prepare(judging, "cpu"), video_frames("camera:3"), tmp_path, {"boxes"}, said.append
        )
    assert (tmp_path / "boxes.json").is_file() and camera.released
    assert len(said) in (0, 3)  # the thread may end before the frame is taken


def test_a_restart_goes_on(judging, drawn, tmp_path):
    """Rows stay; images that were judged do not come again unless they have changed."""
    folder, out, prepared = tmp_path / "in", tmp_path / "out", prepare(judging, "cpu")
    folder.mkdir()
    low, high = sorted(drawn, key=lambda path: judging.predict(path).score)[:: len(drawn) - 1]
    (folder / "a.png").write_bytes(high.read_bytes())
    (folder / "b.png").write_bytes(high.read_bytes())

    def call():
        frames = folder_frames(folder, idle=0.7, judged=judged_before(out))
        return inspect_stream(prepared, frames, out, {"overlays", "boxes"}, say=str)

    assert call().images == 2 and call().images == 0
    (folder / "a.png").write_bytes(low.read_bytes())
    assert call().images == 1
    assert [row["image"] for row in rows(out)] == ["a.png", "b.png", "a.png"]
    assert [row["is_anomalous"] for row in rows(out)] == ["True", "True", "False"]
    assert not (out / "overlays/a.png.png").exists() and (out / "overlays/b.png.png").exists()
    assert list(json.loads((out / "boxes.json").read_text())) == ["b.png"]
    times = [row["time"] for row in rows(out)]
    assert times == sorted(times)


def test_what_vanishes_is_passed_over(drawn, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    (folder / "below/a.png").write_bytes(drawn[0].read_bytes())
    read = streams.read_image

    def vanishes(path, full_scale):
        if path.name == "a.png" and path.parent.exists():
            shutil.rmtree(path.parent)
            (folder / "b.png").write_bytes(drawn[1].read_bytes())
            raise FileNotFoundError(path)
        return read(path, full_scale)

    monkeypatch.setattr(streams, "read_image", vanishes)
    assert [str(frame.name) for frame in folder_frames(folder, idle=1)] == ["b.png"]


def test_ctrl_c_ends_a_stream_with_its_summary(judging, drawn, tmp_path):
    def frames():
        yield Frame(Path("a.png"), Image.open(drawn[0]).convert("RGB"), time.monotonic())
        raise KeyboardInterrupt

    said = []
    found = inspect_stream(prepare(judging, "cpu"), frames(), tmp_path, say=said.append)
    assert found.images == 1 and len(rows(tmp_path)) == 1
    assert said[1] == "ended by Ctrl-C" and said[2].startswith("latency")


def test_the_command(judging, drawn, video, tmp_path, capsys):
    weights, folder = tmp_path / "d.safetensors", tmp_path / "in"
    judging.save(weights)
    folder.mkdir()
    for path in drawn[:2]:
        (folder / path.name).write_bytes(path.read_bytes())

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(weights), *map(str, arguments), "--device", "cpu"])
        return stop.value.code, *capsys.readouterr()

    out = tmp_path / "out"
    code, text, _ = call(folder, "--follow", "--idle", "0.5", "--output", out, "--boxes")
    assert code == 0 and "2 images: " in text and "images/s" in text
    assert len(rows(out)) == 2 and (out / "boxes.json").is_file()
    code, text, _ = call(video[0], "--output", out, "--no-overlays")
    assert code == 0 and "8 images: 4 anomalous" in text and len(rows(out)) == 10
    for arguments, words in (
        ((tmp_path / "absent", "--follow"), "absent does not exist"),
        ((folder, "--follow", "--output", folder / "out"), "lies inside the images' folder"),
        ((tmp_path / "absent.mp4",), "absent.mp4 does not exist"),
        ((folder, "--idle", "3"), "--idle belongs to --follow"),
        ((folder, "--follow", "--idle", "0"), "a number of seconds above 0"),
        ((video[0], "--follow"), "--follow is for a folder"),
        ((out / "overlays", "--follow"), "lies among the output's overlays"),
    ):
        code, _, error = call(
            *arguments, *(("--output", out) if "--output" not in arguments else ())
        )
        assert code == 2 and words in error.splitlines()[-1]
    (tmp_path / "no.mp4").write_text("no video")
    code, _, error = call(tmp_path / "no.mp4", "--output", out)
    assert code == 2 and "no.mp4 cannot be opened as a video" in error
    assert len(rows(out)) == 10  # what cannot be opened deletes nothing


def test_which_sources_are_videos():
    assert [is_video(name) for name in ("a.MP4", "camera:1", "rtsp://x/1", "a.png", "in")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert is_live("camera:0") and is_live("RTSP://x/y.mp4") and not is_live("a.mp4")
    assert not is_live("c://data/in")


def test_a_folder_called_like_a_video_is_a_folder(tmp_path):
    (tmp_path / "clip.mp4").mkdir()
    assert not is_video(tmp_path / "clip.mp4")


def test_without_opencv(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        RunError, match=r'opencv-python-headless: run `pip install "effad-core\[serve'
    ):
        video_frames(tmp_path / "a.mp4")
