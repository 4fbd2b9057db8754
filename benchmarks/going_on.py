"""New normal images for a trained detector: going on from it, beside training anew.

    python -m benchmarks.going_on [solar-mono] [--profile quick] [--seeds 0 1 2]

A first detector learns half of the training images. Then all of them are there, and another is
trained from the first one's weights, and one from random weights, with the same profile and with a
quarter of its iterations. Image AU-ROC of the combined map on the test images.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from effad_core import EfficientAD, Scenario, Schedule, open_scenario, train
from effad_core.evaluation.timing import machine
from effad_core.metrics import image_auroc


def area(
    scenario: Scenario, schedule: Schedule, run: Path, seed: int, start: EfficientAD | None = None
) -> tuple[EfficientAD, float]:
    """A trained detector and its image AU-ROC."""
    detector = EfficientAD().load_teacher()
    train(detector, scenario, schedule, run_dir=run, seed=seed, start=start)
    scores = [p.score for _, p in detector.stream([sample.path for sample in scenario.test])]
    return detector, image_auroc([sample.label for sample in scenario.test], scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", default="solar-mono")
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("build/going_on"))
    args = parser.parse_args()
    whole = open_scenario(args.source)
    half = replace(whole, train=whole.train[::2])
    schedule = Schedule.named(args.profile)
    quarter = replace(
        schedule,
        iterations=schedule.iterations // 4,
        autoencoder_iterations=schedule.autoencoder_iterations // 4,
    )
    print(machine(EfficientAD().device))
    print("seed  half   all: anew  going on  anew, a quarter  going on, a quarter")
    for seed in args.seeds:
        runs = args.runs / f"{whole.name}-{args.profile}-seed{seed}"
        first, before = area(half, schedule, runs / "half", seed)
        found = [
            area(whole, times, runs / f"{name}-{begin}", seed, {"anew": None, "on": first}[begin])[
                1
            ]
            for name, times in (("whole", schedule), ("quarter", quarter))
            for begin in ("anew", "on")
        ]
        anew, on, anew_quarter, on_quarter = found
        print(
            f"{seed:4}  {before:.3f}  {anew:9.3f}  {on:8.3f}  {anew_quarter:15.3f}  "
            f"{on_quarter:19.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
