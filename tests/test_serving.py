"""Verdicts over HTTP are those of `predict`; what is wrong is answered with one sentence."""

import io
import sys
import threading
import time
import urllib.request

from effad_core import RunError, prepare
from effad_core.deployment.overlays import bounding_boxes, overlay
from effad_core.deployment.serving import main, server

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image


@pytest.fixture
def prepared(judging):
    return prepare(judging, "cpu")


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
    (tmp_path / "in/link").symlink_to(tmp_path)
    client = TestClient(server(prepared, tmp_path / "in"))
    rows = client.get("/folder", params={"path": "today"}).json()
    assert [row["image"] for row in rows] == ["0.png", "1.png", "empty.png"]
    assert [row["score"] for row in rows[:2]] == [prepared.predict(p).score for p in drawn[:2]]
    assert "is empty" in rows[2]["error"] and "score" not in rows[2]
    assert len(client.get("/folder").json()) == 3  # not those that the link leads to
    outside = ("link", "link/in/../..", "..", "/", "../secret.png", "today/../..", "c:\\", "a\0b")
    for path in (*outside, "\\\\host\\share"):
        assert client.get("/folder", params={"path": path}).status_code == 403
    answer = client.get("/folder", params={"path": "none"})
    said = answer.json()["detail"]
    assert answer.status_code == 422 and "--images/none holds no image" in said
    assert str(tmp_path) not in said + rows[2]["error"]
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
    assert client.get("/health").status_code == 200


def test_what_is_too_large_is_refused_before_it_is_read(prepared, drawn, monkeypatch):
    monkeypatch.setattr("effad_core.deployment.serving.MOST_BYTES", 1000)
    monkeypatch.setattr("effad_core.deployment.serving.HEAD_BYTES", 0)
    client, read = TestClient(server(prepared)), []

    def chunks():
        for _ in range(3):
            read.append(1)
            yield b"x"

    assert client.post("/predict", files=sent(drawn[0])).status_code == 413
    assert client.post("/predict", content=chunks()).status_code == 411  # no length is said


def test_what_the_detector_cannot_compute_is_one_sentence(narrow, drawn):
    broken = narrow()
    broken.student[-1].weight.data[:] = np.inf
    client = TestClient(server(broken), raise_server_exceptions=False)
    answer = client.post("/predict", files=sent(drawn[0]))
    assert answer.status_code == 500
    assert "This cannot be judged: the anomaly map of" in answer.json()["detail"]


def test_only_the_hosts_that_were_named_are_answered(prepared):
    client = TestClient(server(prepared, hosts=("127.0.0.1",)))
    assert client.get("/health").status_code == 400  # it calls the server "testserver"
    assert client.get("/health", headers={"host": "127.0.0.1:8000"}).status_code == 200


def test_one_image_is_judged_at_a_time(prepared, drawn, monkeypatch):
    """Networks that compute at the same time would share the memory of all."""
    computing, most = [], []

    def stream(images):
        computing.append(1)
        most.append(len(computing))
        time.sleep(0.05)
        computing.pop()
        yield from type(prepared).stream(prepared, images)

    monkeypatch.setattr(prepared, "stream", stream, raising=False)
    client = TestClient(server(prepared))
    asking = [
        threading.Thread(target=client.post, args=("/predict",), kwargs={"files": sent(path)})
        for path in drawn[:4]
    ]
    for one in asking:
        one.start()
    for one in asking:
        one.join()
    assert most == [1, 1, 1, 1]


def test_several_ask_at_once(prepared, drawn):
    """A real server on this machine: each gets the verdict on its own image."""
    config = uvicorn.Config(server(prepared), host="127.0.0.1", port=0, log_level="error")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    deadline = time.monotonic() + 60
    while not running.started:
        assert time.monotonic() < deadline and thread.is_alive()
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
    assert "no/where is no folder" in refusal(main, weights, "--images", "no/where")
    assert "--port must be 1 to 65535" in refusal(main, weights, "--port", "70000")
    started = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **where: started.update(where, app=app))
    main([str(weights), "--port", "8123", "--device", "cpu"])
    assert (started["host"], started["port"]) == ("127.0.0.1", 8123)
    client = TestClient(started["app"], base_url="http://localhost:8123")
    assert client.get("/health").json()["image_size"] == [256, 256]


def test_without_fastapi(narrow, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(RunError, match=r'fastapi: run `pip install "effad-core\[serve\]"`'):
        server(prepare(narrow(), "cpu"))
