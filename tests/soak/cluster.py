"""Kill workers, nodes and the command of a benchmark on a cluster; it must end as the loop does.

    python tests/soak/cluster.py --kills 10 --seed 0

Two Ray nodes run on this machine. At random moments a worker or a node is killed, or the command is
killed or interrupted and called again. In the end the table's file and every run's files must be
those of the engine `loop`, byte by byte, and no run may have done many steps twice.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests" / "plugin"
SCENARIOS = ("bolt", "clip", "nut")
KILLS = ("worker", "node", "command", "ctrl-c")
STEPS = 60  # of a run of the method Slow
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(map(str, (PLUGIN, ROOT))),
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # whether or not somebody has a token here
}


def load_conftest():
    spec = importlib.util.spec_from_file_location("drawing", ROOT / "tests" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw_scenarios(folder: Path, names=SCENARIOS) -> list[Path]:
    """Scenarios of ten training images and four test images, two of them with a white corner."""
    from PIL import Image

    draw = load_conftest().draw
    (folder / "drawn").mkdir(parents=True)
    paths = [draw(folder / "drawn" / f"{seed}.png", seed) for seed in range(14)]
    for name in names:
        for split, chosen in (("train/good", paths[:10]), ("test/good", paths[10:12])):
            (folder / name / split).mkdir(parents=True)
            for path in chosen:
                shutil.copy(path, folder / name / split)
        (folder / name / "test" / "spot").mkdir()
        for path in paths[12:]:
            image = Image.open(path)
            image.paste("white", (0, 0, 80, 80))
            image.save(folder / name / "test" / "spot" / path.name)
    return [folder / name for name in names]


class Nodes:
    """A Ray cluster of two nodes on this machine, a processor each. Only the second one is killed.

    Args:
        seconds: that a step of the method Slow takes there.
    """

    def __init__(self, seconds: float = 0.1):
        self.seconds = seconds

    def __enter__(self) -> "Nodes":
        from ray.cluster_utils import Cluster

        before = dict(os.environ)
        os.environ.update(ENVIRONMENT, SLOW_METHOD_SECONDS=str(self.seconds))
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        self._second = self._cluster.add_node(num_cpus=1)
        self._before = before
        self.address = self._cluster.address
        return self

    def __exit__(self, *_) -> None:
        self._cluster.shutdown()
        os.environ.clear()
        os.environ.update(self._before)

    def lose_one(self) -> None:
        """Kill the second node, with all its processes, and start another one."""
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = self._cluster.add_node(num_cpus=1)


def command(sources, folder: Path, *options) -> list[str]:
    """The benchmark's, with its runs and its table below the folder."""
    fixed = ["--methods", "slow", "--profile", "quick", "--seeds", "0", "1", "--threads", "1"]
    places = ["--runs", folder / "runs", "--output", folder / "results.json"]
    whole = [sys.executable, "-m", "effad_core", "benchmark", *sources, *fixed, *places, *options]
    return [str(part) for part in whole]


def contents(folder: Path) -> dict[str, bytes]:
    """What must be the same: every file but locks and what holds times or processes."""
    beside = ("took.json", "pid", "steps.txt", ".lock")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(beside)
    }


def steps_done(folder: Path) -> dict[str, int]:
    """How many steps each run did, in all its attempts."""
    return {p.parent.name: len(p.read_bytes()) for p in (folder / "runs").glob("*/steps.txt")}


def a_worker(folder: Path, rng: random.Random) -> int | None:
    """The process of a run that is under way."""
    found = []
    for path in (folder / "runs").glob("*/pid"):
        process = int(path.read_text() or 0)
        ended = (path.parent / "metrics.json").exists()
        if not ended and process and Path(f"/proc/{process}").exists():
            found.append(process)
    return rng.choice(found) if found else None


def disturbed(nodes: Nodes, sources, folder: Path, kills, rng: random.Random, pause: float):
    """Run the benchmark on the cluster to its end, with these kills at random moments.

    Args:
        nodes: the cluster.
        sources: scenarios.
        folder: for runs and table.
        kills: of `KILLS`, in this order; none happens before a run is under way.
        rng: chooses moments and workers.
        pause: seconds between two kills, at most.

    Returns:
        How often each kind happened, and what the commands printed.
    """
    left, happened, printed = list(kills), Counter(), []
    environment = os.environ | ENVIRONMENT
    while True:
        output = folder / "output.txt"
        with output.open("w") as file:
            process = subprocess.Popen(
                command(sources, folder, "--engine", "ray", "--address", nodes.address),
                env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
            )  # fmt: skip
            while left and process.poll() is None:
                if (worker := a_worker(folder, rng)) is None:
                    time.sleep(0.05)
                    continue
                time.sleep(rng.uniform(0, pause))
                kind = left[0]
                if kind == "worker":
                    if (worker := a_worker(folder, rng)) is None:
                        continue
                    os.kill(worker, signal.SIGKILL)
                elif kind == "node":
                    nodes.lose_one()
                elif process.poll() is None:
                    process.send_signal(signal.SIGKILL if kind == "command" else signal.SIGINT)
                    process.wait()
                happened[left.pop(0)] += 1
            code = process.wait()
        printed.append(output.read_text())
        if code == 0:
            return happened, printed
        expected = {-signal.SIGKILL, 130}
        assert code in expected, f"the command ended with {code}:\n{printed[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as work, Nodes() as nodes:
        work = Path(work)
        sources = draw_scenarios(work / "parts")
        subprocess.run(
            command(sources, work / "loop"), env=os.environ | ENVIRONMENT | {
                "SLOW_METHOD_SECONDS": "0"}, cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
        (work / "ray").mkdir()
        kills = [rng.choice(KILLS) for _ in range(args.kills)]
        happened, _ = disturbed(nodes, sources, work / "ray", kills, rng, pause=3.0)
        whole, found = contents(work / "loop"), contents(work / "ray")
        del found["output.txt"]
        assert found.keys() == whole.keys(), found.keys() ^ whole.keys()
        assert found == whole, [name for name in whole if found[name] != whole[name]]
        twice = sum(steps_done(work / "ray").values()) - STEPS * 2 * len(sources)
        assert twice < 2 * 30 * args.kills, twice  # two runs are under way, which save after 0.2 s
        (killer,) = draw_scenarios(work / "killer", ["killer"])  # the method Slow dies of this name
        options = ("--engine", "ray", "--address", nodes.address)
        ended = subprocess.run(
            command([killer, sources[0]], work / "dying", *options),
            env=os.environ | ENVIRONMENT, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert ended.returncode == 1 and "2 of the runs FAILED" in ended.stderr, ended.stderr
        results = json.loads((work / "dying" / "results.json").read_text())
        assert all("its worker died 6 times" in reason for reason in results["failed"].values())
        assert list(results["methods"]["Slow"]["bolt"]["seeds"]) == ["0", "1"]
    kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(happened.items()))
    print(f"{kinds}: the files are those of the loop; {twice} steps were done twice")


if __name__ == "__main__":
    main()
