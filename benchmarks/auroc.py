"""AU-ROC of a scenario over several seeds: the numbers in the README.

    python benchmarks/auroc.py --scenario solar-mono --profile laptop --seeds 0 1 2

Each seed is a run of its own in build/runs; a second call resumes where the first one stopped. The
test images are scored once, after training, and decide nothing.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from effad_core import EfficientAD, Schedule, evaluate, open_pretraining, open_scenario, train
from effad_core.evaluation import MAPS
from effad_core.runs import write_text

BUILD = Path(__file__).resolve().parent.parent / "build"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", default="solar-mono", help="a name or a folder")
    parser.add_argument("--profile", default="laptop", help="smoke, quick, laptop or paper")
    parser.add_argument("--size", choices=("small", "medium"), default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretraining", help="a folder of photographs, or 'imagenette'")
    args = parser.parse_args()

    scenario = open_scenario(args.scenario)
    pretraining = open_pretraining(args.pretraining)
    print(scenario.summary(), pretraining.describe(), sep="\n")
    rows = []
    for seed in args.seeds:
        name = f"{scenario.name}-{args.profile}-{args.size}-seed{seed}"
        detector = EfficientAD(args.size).load_teacher()
        start = time.perf_counter()
        train(
            detector, scenario, Schedule.named(args.profile), pretraining,
            run_dir=BUILD / "runs" / name, seed=seed,
        )  # fmt: skip
        minutes = (time.perf_counter() - start) / 60
        rows.append(evaluate(detector, scenario.test).auroc())
        shown = "  ".join(f"{m} {rows[-1][m]:.3f}" for m in MAPS)
        print(f"seed {seed}: {shown}   ({minutes:.1f} min)", flush=True)
    print(f"AU-ROC, {scenario.name}, {args.profile}, mean and deviation over {len(rows)} seeds")
    for m in MAPS:
        values = [row[m] for row in rows]
        print(f"{m:16} {np.mean(values):.3f} +- {np.std(values, ddof=min(1, len(rows) - 1)):.3f}")
    path = BUILD / "results" / f"{scenario.name}-{args.profile}-{args.size}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(dict(zip(map(str, args.seeds), rows, strict=True)), indent=2))


if __name__ == "__main__":
    main()
