"""Verdicts over HTTP are those of `predict`; what is wrong is answered with one sentence."""

import io
import sys
import threading
import time
import urllib.request

from effad_core import OperatingPoint, RunError, prepare
from effad_core.deployment.overlays import bounding_boxes, overlay
from effad_core.deployment.serving import main, server

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image


@pytest.fixture
def prepared(narrow, drawn):
    """Its threshold lies between the scores of the drawn images."""
    made = narrow()
    scores = sorted(p.score for p in made.predict(drawn))
    made.operating_point = OperatingPoint((scores[3] + scores[4]) / 2, "labels-f1", 9)
    made.pixel_operating_point = OperatingPoint(scores[3], "labels-f1", 9)
    return prepare(made, "cpu")


def sent(path):
    return {"image": (path.name, path.read_bytes())}


def test_an_image_has_the_verdict_of_predict(prepared, drawn):
    client = TestClient(server(prepared))
    for path in drawn:
        found = client.post("/predict", files=sent(path)).json()
        expected = prepared.predict(path)
        assert found == {
            "score": expected.score,
            "threshold": prepared.threshold,
            "is_anomalous": expected.is_anomalous,
            "unit_score": expected.unit_score,
            "height": 264,
            "width": 280,
            "boxes": bounding_boxes(expected),
        }
    shown = client.post("/overlay", files=sent(drawn[0]))
    assert shown.headers["content-type"] == "image/png"
    expected = prepared.predict(drawn[0])
    whole = Image.open(drawn[0]).convert("RGB")
    limit = prepared.pixel_threshold
    np.testing.assert_array_equal(
        Image.open(io.BytesIO(shown.content)), overlay(whole, expected.map, 2 * limit, limit)
    )


def test_sixteen_bits_are_read_as_from_a_disk(prepared, tmp_path):
    """Pillow alone would cut the values of such a file to 8 bits."""
    path = tmp_path / "deep.png"
    values = np.random.default_rng(0).integers(0, 65536, (256, 256), np.uint16)
    Image.fromarray(values).save(path)
    found = TestClient(server(prepared)).post("/predict", files=sent(path)).json()
    assert found["score"] == prepared.predict(path).score


def test_without_thresholds(narrow, drawn):
    client = TestClient(server(prepare(narrow(), "cpu")))
    found = client.post("/predict", files=sent(drawn[0])).json()
    empty = {name for name, value in found.items() if value is None}
    assert empty == {"threshold", "is_anomalous", "unit_score", "boxes"}
    assert client.get("/health").json()["threshold"] is None


def test_a_folder_below_the_one_given(prepared, drawn, tmp_path):
    (tmp_path / "in/today").mkdir(parents=True)
    for path in drawn[:2]:
        (tmp_path / "in/today" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "in/today/empty.png").touch()
    (tmp_path / "secret.png").write_bytes(drawn[2].read_bytes())
    (tmp_path / "in/none").mkdir()
    client = TestClient(server(prepared, tmp_path / "in"))
    rows = client.get("/folder", params={"path": "today"}).json()
    assert [row["image"] for row in rows] == ["0.png", "1.png", "empty.png"]
    assert [row["score"] for row in rows[:2]] == [prepared.predict(p).score for p in drawn[:2]]
    assert "is empty" in rows[2]["error"] and "score" not in rows[2]
    assert len(client.get("/folder").json()) == 3
    for path in ("..", "/", "../secret.png"):
        assert client.get("/folder", params={"path": path}).status_code == 403
    answer = client.get("/folder", params={"path": "none"})
    assert answer.status_code == 422 and "holds no image" in answer.json()["detail"]
    closed = TestClient(server(prepared)).get("/folder")
    assert closed.status_code == 403 and "without --images" in closed.json()["detail"]


def test_what_is_no_image_is_one_sentence(prepared, drawn, monkeypatch):
    client = TestClient(server(prepared))
    for name, data, words in (
        ("cut.png", drawn[0].read_bytes()[:-400], "cut.png"),
        ("page.html", b"<!DOCTYPE html><html>", "page.html"),
        ("empty.png", b"", "empty.png is empty"),
    ):
        answer = client.post("/predict", files={"image": (name, data)})
        said = answer.json()["detail"]
        assert answer.status_code == 422 and words in said and "/tmp" not in said
    assert client.post("/predict").status_code == 422
    monkeypatch.setattr("effad_core.deployment.serving.MOST_BYTES", 1000)
    assert client.post("/predict", files=sent(drawn[0])).status_code == 413
    assert client.get("/health").status_code == 200


def test_several_ask_at_once(prepared, drawn):
    """A real server on this machine: each gets the verdict on its own image."""
    config = uvicorn.Config(server(prepared), host="127.0.0.1", port=0, log_level="error")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    port, found = running.servers[0].sockets[0].getsockname()[1], {}

    def ask(path):
        data = path.read_bytes()
        body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/predict",
            body + data + b"\r\n--x--\r\n",
            {"Content-Type": "multipart/form-data; boundary=x"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found[path] = answer.read()

    asking = [threading.Thread(target=ask, args=(path,)) for path in drawn]
    for one in asking:
        one.start()
    for one in asking:
        one.join()
    running.should_exit = True
    thread.join()
    for path in drawn:
        assert f'"score":{prepared.predict(path).score}' in found[path].decode()


def test_the_command(narrow, tmp_path, refusal, monkeypatch):
    weights = tmp_path / "d.safetensors"
    assert "absent does not exist" in refusal(main, tmp_path / "absent")
    detector = narrow()
    detector.save(weights)
    assert "no/where does not exist" in refusal(main, weights, "--images", "no/where")
    started = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **where: started.update(where, app=app))
    main([str(weights), "--port", "8123", "--device", "cpu"])
    assert (started["host"], started["port"]) == ("127.0.0.1", 8123)
    assert TestClient(started["app"]).get("/health").json()["image_size"] == [256, 256]


def test_without_fastapi(narrow, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(RunError, match=r'fastapi: run `pip install "effad-core\[serve\]"`'):
        server(prepare(narrow(), "cpu"))
