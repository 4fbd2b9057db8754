"""Verdicts on images as they come: each once, when it is whole, with the scores of `predict`."""

import csv
import sys
import threading
import time
from pathlib import Path

from effad_core import DataError, OperatingPoint, RunError, prepare
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

import cv2
import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def judging(narrow, drawn):
    """A detector whose threshold lies between the scores of the drawn images."""
    made = narrow()
    scores = sorted(p.score for p in made.predict(drawn))
    made.operating_point = OperatingPoint((scores[3] + scores[4]) / 2, "labels-f1", 9)
    made.pixel_operating_point = OperatingPoint(scores[3], "labels-f1", 9)
    return made


def rows(folder):
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
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

    writing = threading.Thread(target=write)
    writing.start()
    frames = folder_frames(folder, idle=2.5)
    found = inspect_stream(prepare(judging, "cpu"), frames, tmp_path / "out", say=said.append)
    writing.join()
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


def test_of_a_camera_the_newest_frame_is_taken(monkeypatch, judging, tmp_path):
    """A camera of 100 frames a second; whoever judges takes a tenth of a second."""
    ready, made = threading.Event(), []

    class Camera:
        def __init__(self, source):
            assert source == 3
            self.shown = 0
            made.append(self)

        def isOpened(self):
            return True

        def read(self):
            time.sleep(0.01)
            self.shown += 1
            return self.shown <= 100, np.full((8, 9, 3), (self.shown, 0, 0), np.uint8)

        def release(self):
            ready.set()

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    seen = []
    with pytest.raises(DataError, match="camera:3 gives no more frames: see that it runs"):
        for frame in video_frames("camera:3"):
            number = int(str(frame.name).removeprefix("frame_"))
            assert frame.image.getpixel((0, 0)) == (0, 0, number + 1)  # OpenCV's order is BGR
            assert made[0].shown - number < 5 or made[0].shown > 100  # not one that has waited
            seen.append((number, frame.passed))
            time.sleep(0.1)
    assert ready.is_set() and 5 < len(seen) < 20
    assert sum(passed for _, passed in seen) == seen[-1][0] + 1 - len(seen)


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
    assert code == 0 and "8 images: 4 anomalous" in text and not (out / "overlays").exists()
    for arguments, words in (
        ((tmp_path / "absent", "--follow"), "absent does not exist"),
        ((folder, "--follow", "--output", folder / "out"), "lies inside the images' folder"),
        ((tmp_path / "absent.mp4",), "absent.mp4 does not exist"),
        ((folder, "--idle", "3"), "--idle belongs to --follow"),
    ):
        code, _, error = call(
            *arguments, *(("--output", out) if "--output" not in arguments else ())
        )
        assert code == 2 and words in error.splitlines()[-1]
    (tmp_path / "no.mp4").write_text("no video")
    code, _, error = call(tmp_path / "no.mp4", "--output", out)
    assert code == 2 and "no.mp4 cannot be opened as a video" in error
    assert len(rows(out)) == 8  # what cannot be opened deletes nothing


def test_which_sources_are_videos():
    assert [is_video(name) for name in ("a.MP4", "camera:1", "rtsp://x/1", "a.png", "in")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert is_live("camera:0") and is_live("http://x/y.mp4") and not is_live("a.mp4")


def test_without_opencv(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        RunError, match=r'opencv-python-headless: run `pip install "effad-core\[serve'
    ):
        video_frames(tmp_path / "a.mp4")
