"""One detector for several products, beside one detector each: image AU-ROC and false alarms.

    python -m benchmarks.products solar-mono tray path/to/bottle path/to/transistor

Trains one detector on all products, once with the iterations of one product and once with those of
all products added up; then one detector for each product. Quantiles and thresholds are each
product's own. Thresholds are to call one normal image in ten anomalous, on average.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from effad_core import EfficientAD, Scenario, Schedule, fit_thresholds, open_scenario, train
from effad_core.deployment.products import for_product, together
from effad_core.evaluation.timing import machine
from effad_core.metrics import image_auroc

RATE = 0.1


def trained(scenario: Scenario, schedule: Schedule, run: Path) -> EfficientAD:
    detector, start = EfficientAD().load_teacher(), time.perf_counter()
    train(detector, scenario, schedule, run_dir=run)
    print(f"{run.name}: {(time.perf_counter() - start) / 60:.1f} min", flush=True)
    return detector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", help="scenarios or folders, two or more")
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--runs", type=Path, default=Path("build/products"))
    args = parser.parse_args()
    scenarios = [open_scenario(source) for source in args.sources]
    schedule, count = Schedule.named(args.profile), len(scenarios)
    longer = replace(
        schedule,
        iterations=count * schedule.iterations,
        autoencoder_iterations=count * schedule.autoencoder_iterations,
    )
    whole = together(scenarios)
    one = trained(whole, schedule, args.runs / f"together-{args.profile}")
    long = trained(whole, longer, args.runs / f"together-{args.profile}-longer")
    print(machine(one.device), one.precision, sep=", ")
    print(f"{'':16}  one each      together      together, {count} times as long", flush=True)
    for scenario in scenarios:
        alone = trained(scenario, schedule, args.runs / f"{scenario.name}-{args.profile}")
        cells = []
        for detector in (
            alone,
            for_product(one, scenario, schedule),
            for_product(long, scenario, schedule),
        ):
            fit_thresholds(detector, scenario.validation, RATE, guarantee="average")
            scores = [p.score for _, p in detector.stream([s.path for s in scenario.test])]
            labels = [sample.label for sample in scenario.test]
            pairs = zip(scores, labels, strict=True)
            called = [score > detector.threshold for score, label in pairs if not label]
            cells.append(f"{image_auroc(labels, scores):.3f} ({sum(called) / len(called):4.0%})")
        print(f"{scenario.name:16}  " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
