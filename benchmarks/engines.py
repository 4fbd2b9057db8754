"""The same benchmark by the loop and by Ray: how long each takes, and whether all find the same.

    python -m benchmarks.engines solar-mono tray --methods patchcore simplenet --seeds 0 1

Everything but the engine goes to `effad benchmark` as it stands; the profile is `quick` unless you
say otherwise. Three ways, one after another: the loop with all threads, Ray with as many runs at a
time as there are processors, one thread each, and the loop with one thread. Ray's metrics must be
those of the last one, to the last digit. Runs go into build/engines and are made anew.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from effad_core.acceleration.threads import usable_processors
from effad_core.evaluation.timing import machine

import torch

FOLDER = Path("build/engines")
WHOLE, RAY, SINGLE = "the loop, all threads", "Ray, one thread a run", "the loop, one thread"
WAYS = {
    WHOLE: (),
    RAY: ("--threads", "1", "--engine", "ray"),
    SINGLE: ("--threads", "1"),
}


def main() -> None:
    asked = sys.argv[1:]
    if not asked or "-h" in asked or "--help" in asked:
        sys.exit(__doc__)
    profile = () if "--profile" in asked else ("--profile", "quick")
    print(f"{machine(torch.device('cpu'))}; {usable_processors()} processors", flush=True)
    seconds, found = {}, {}
    for number, (way, options) in enumerate(WAYS.items()):
        folder = FOLDER / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        places = ("--runs", folder / "runs", "--output", folder / "results.json")
        command = (sys.executable, "-m", "effad_core", "benchmark", *asked, *profile, *places)
        start = time.perf_counter()
        with (folder / "output.txt").open("w") as log:
            subprocess.run([*map(str, command), *options], check=True, stdout=log, stderr=log)
        seconds[way] = time.perf_counter() - start
        found[way] = json.loads((folder / "results.json").read_text())["methods"]
        runs = sum(1 for _ in (folder / "runs").glob("*/metrics.json"))
        print(f"{way}: {seconds[way]:.0f} s for {runs} runs", flush=True)
    for way in (WHOLE, SINGLE):
        print(f"Ray against {way}: {seconds[way] / seconds[RAY]:.2f} times as fast")
    same = found[RAY] == found[SINGLE]
    print(f"Ray's metrics are those of {SINGLE}: {same}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
