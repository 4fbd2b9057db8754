"""What PUAD, an extension, adds to trained detectors: image AU-ROC without and with it.

python benchmarks/puad.py build/runs/tray-laptop-small-seed0 tray [RUN SCENARIO ...]
"""

import argparse
import time
from collections.abc import Sequence

from effad_core import PUAD, EfficientAD, evaluate, open_scenario
from effad_core.errors import command_errors
from effad_core.evaluation.scores import KINDS


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="+", help="runs, each followed by its scenario")
    args = parser.parse_args(arguments)
    if len(args.pairs) % 2:
        parser.error("give each run's scenario after it")
    with command_errors():
        for run, source in zip(args.pairs[::2], args.pairs[1::2], strict=True):
            scenario, detector = open_scenario(source), EfficientAD.load(run)
            start = time.perf_counter()
            puad = PUAD(detector).fit(scenario)
            seconds = time.perf_counter() - start
            before, after = (
                evaluate(method, scenario, keep_maps=False).metrics() for method in (detector, puad)
            )
            for kind in [kind for kind in KINDS if kind in before] or ["all"]:
                areas = " -> ".join(f"{m[kind]['image_auroc']:.3f}" for m in (before, after))
                print(
                    f"{run}  {scenario.name} {kind}  {areas}  (fitted in {seconds:.0f} s)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
