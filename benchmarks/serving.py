"""How long `effad serve` takes to answer, with one and with several who ask at once.

    python -m benchmarks.serving [--detector DETECTOR] [--seconds 20]

Starts the server on this machine, as a process of its own, and asks it for the verdict on an image
of the parts tray. Everyone asks again as soon as the answer is there.
"""

import argparse
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory

from effad_core import EfficientAD, open_scenario, prepare
from effad_core.evaluation.evidence import open_evidence
from effad_core.evaluation.timing import machine

import numpy as np
import torch

ASKING = (1, 2, 8)  # at once
KIND = {"Content-Type": "multipart/form-data; boundary=x"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(server: subprocess.Popen, port: int) -> None:
    while server.poll() is None:
        try:
            with closing(HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
                connection.request("GET", "/health")
                connection.getresponse().read()
            return
        except OSError:
            time.sleep(0.2)
    sys.exit("the server did not start")


def person(port: int, data: bytes, end: float) -> list[float]:
    """Asks again and again, over one connection; returns the latencies."""
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    latencies = []
    with closing(HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        while time.perf_counter() < end:
            start = time.perf_counter()
            connection.request("POST", "/predict", head + data + b"\r\n--x--\r\n", KIND)
            answer = connection.getresponse()
            said = answer.read()
            if answer.status != 200:
                raise RuntimeError(said.decode())
            latencies.append(time.perf_counter() - start)
    return latencies


def load(port: int, data: bytes, people: int, seconds: float) -> tuple[list[float], float]:
    """The latencies of all answers, and answers per second."""
    start = time.perf_counter()
    with ThreadPoolExecutor(people) as pool:
        asking = [pool.submit(person, port, data, start + seconds) for _ in range(people)]
        latencies = [latency for one in asking for latency in one.result()]
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
        port = free_port()
        command = [sys.executable, "-m", "effad_core", "serve", path, "--port", str(port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        server = subprocess.Popen([*command, "--device", "cpu"], **quiet)
        try:
            wait_for(server, port)
            load(port, image.read_bytes(), 1, 2)  # warms up
            for people in ASKING:
                found, rate = load(port, image.read_bytes(), people, args.seconds)
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
