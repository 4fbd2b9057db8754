"""How long `effad serve` takes to answer, with one and with several who ask at once.

    python -m benchmarks.serving [--detector DETECTOR] [--seconds 20]

Starts the server on this machine, as a process of its own, and asks it for the verdict on an image
of the parts tray. Everyone asks again as soon as the answer is there.
"""

import argparse
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory

from effad_core import EfficientAD, open_scenario, prepare
from effad_core.evaluation.evidence import open_evidence
from effad_core.evaluation.timing import machine

import numpy as np
import torch

PORT = 8765
ADDRESS = f"http://127.0.0.1:{PORT}"
ASKING = (1, 2, 8)  # at once


def ask(data: bytes) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{ADDRESS}/predict", head + data + b"\r\n--x--\r\n", kind)
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.read()


def wait_for_the_server(server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{ADDRESS}/health", timeout=5).close()
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    sys.exit("the server did not start")


def load(data: bytes, people: int, seconds: float) -> tuple[list[float], float]:
    """The latencies of all answers, and answers per second."""
    latencies, end = [], time.perf_counter() + seconds

    def person() -> None:
        while time.perf_counter() < end:
            start = time.perf_counter()
            ask(data)
            latencies.append(time.perf_counter() - start)

    start = time.perf_counter()
    threads = [threading.Thread(target=person) for _ in range(people)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, len(latencies) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--detector", type=Path, help="the shipped one of the tray without it")
    parser.add_argument("--seconds", type=float, default=20, help="for each number of people")
    args = parser.parse_args()
    image = open_scenario("tray").test[0].path
    with TemporaryDirectory() as folder:
        path = args.detector or Path(folder, "detector.safetensors")
        if args.detector is None:
            open_evidence("tray").detector("cpu").save(path)
        ready = prepare(EfficientAD.load(path, "cpu"), "cpu")
        times = []
        for _ in range(20):
            start = time.perf_counter()
            ready.predict(image)
            times.append(time.perf_counter() - start)
        print(machine(torch.device("cpu")), ready.precision, sep=", ")
        print(f"predict, without a server: {1000 * np.median(times):.0f} ms an image")
        command = [sys.executable, "-m", "effad_core", "serve", path, "--port", str(PORT)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        server = subprocess.Popen([*command, "--device", "cpu"], **quiet)
        try:
            wait_for_the_server(server)
            load(image.read_bytes(), 1, 2)  # warms up
            for people in ASKING:
                found, rate = load(image.read_bytes(), people, args.seconds)
                low, high = 1000 * np.quantile(found, (0.5, 0.95))
                print(
                    f"{people} at once: median {low:.0f} ms, 95 % within {high:.0f} ms, "
                    f"{rate:.1f} images a second",
                    flush=True,
                )
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
