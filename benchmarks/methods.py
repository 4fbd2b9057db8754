"""Gather what `effad benchmark --methods all` measured into the evidence that notebook 11 shows.

    effad benchmark tray solar-mono --methods all --profile quick --runs build/methods
    python -m benchmarks.methods tray solar-mono --profile quick --runs build/methods

Only runs that are whole take part: each method, scenario and seed whose folder holds metrics.json
and took.json. It trains nothing. Latencies are measured here, one method after the other, from the
image's transfer to the map on the host: let nothing else run meanwhile.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from effad_core import EfficientAD
from effad_core.deployment.prepared import prepare
from effad_core.errors import RunError, command_errors
from effad_core.evaluation.costs import count, efficientad
from effad_core.evaluation.methods import SIZES, find_method, method_names, slug
from effad_core.evaluation.scores import METRICS
from effad_core.evaluation.tasks import TOOK
from effad_core.evaluation.timing import measure
from effad_core.schedule import PROFILES, Schedule
from effad_core.storage.files import as_path, write_text

import torch

KEPT = ("image_auroc", "image_auprc", "aupro_0.3", "aupro_0.05")  # metrics
DIGITS = 4
RUNS = 7  # timed passes of an image


def settings_of(name: str, profile: str) -> dict:
    """A method's arguments and schedule: what evidence depends on, beside code and images."""
    if name in SIZES:
        return {"arguments": {"size": SIZES[name]}, "schedule": asdict(Schedule.named(profile))}
    found = find_method(name).profile(profile)
    return json.loads(
        json.dumps({"arguments": found.arguments, "schedule": asdict(found.schedule)})
    )


def own_detector(size: str) -> EfficientAD:
    """EfficientAD as the profiles for a CPU have it, with as many channels as its teacher."""
    channels = EfficientAD(size).load_teacher().out_channels
    detector = EfficientAD(size, out_channels=channels)
    detector.quantiles.copy_(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    return detector


def cost_of(name: str, profile: str) -> tuple[int, int]:
    """Parameters, and FLOPs of an image, of a method as it is in a profile."""
    if name in SIZES:
        channels = own_detector(SIZES[name]).out_channels
        return count(partial(efficientad, SIZES[name], out_channels=channels), 256)
    method = partial(find_method(name).of_profile, profile, pretrained=False)
    with torch.device("meta"):
        size = method().image_size
    return count(lambda: method().counted(), size, torch.uint8)


def latency_of(name: str, profile: str) -> float:
    """Milliseconds of an image, the median of `RUNS`; EfficientAD as it is prepared for a user."""
    if name in SIZES:
        detector = prepare(own_detector(SIZES[name]), precision="auto")
    else:
        detector = find_method(name).untrained(profile)
        detector.use_device()
    found = measure(detector, name, warm_up=2, runs=RUNS, batches=1, batch_size=1, cost=(0, 0))
    return found.percentile(50)


def gathered(scenarios: Sequence[str], profile: str, runs: Path) -> tuple[dict, set[str]]:
    """Results by scenario and method, and the machines that they come from."""
    results, machines = {}, set()
    for scenario in scenarios:
        for name in method_names():
            entry = {"seeds": {}, "minutes": {}}
            part = SIZES.get(name, slug(name))
            for folder in sorted(runs.glob(f"{scenario}-{profile}-{part}-seed*")):
                seed = folder.name.rpartition("seed")[2]
                files = [folder / METRICS, folder / TOOK]
                if not (seed.isdecimal() and all(file.is_file() for file in files)):
                    continue
                found, took = (json.loads(file.read_text(encoding="utf-8")) for file in files)
                entry["seeds"][seed] = {
                    group: {key: round(values[key], DIGITS) for key in KEPT if key in values}
                    for group, values in found["metrics"].items()
                }
                entry["minutes"][seed] = round(took["minutes"], 2)
                machines.add(took["machine"])
            if entry["seeds"]:
                results.setdefault(scenario, {})[name] = entry
    return results, machines


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="+", help="names, as in the runs' folders")
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    parser.add_argument("--runs", type=as_path, default=Path("build/runs"))
    parser.add_argument("--output", type=as_path, default=Path("data/evidence/methods/run.json"))
    args = parser.parse_args(arguments)
    with command_errors("nothing was written"):
        results, machines = gathered(args.scenarios, args.profile, args.runs)
        if not results:
            raise RunError(f"{args.runs} holds no whole run of {', '.join(args.scenarios)}")
        names = [n for n in method_names() if any(n in found for found in results.values())]
        seeds = sorted({s for f in results.values() for e in f.values() for s in e["seeds"]})
        command = f"effad benchmark {' '.join(results)} --methods all --profile {args.profile}"
        content = {
            "profile": args.profile,
            "command": f"{command} --seeds {' '.join(seeds)}",
            "processor": "; ".join(sorted(machines)),
            "settings": {name: settings_of(name, args.profile) for name in names},
            "costs": {name: cost_of(name, args.profile) for name in names},
            "milliseconds": {name: round(latency_of(name, args.profile), 1) for name in names},
            "results": results,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.output, json.dumps(content, indent=1) + "\n")
    print(f"{args.output}: {len(names)} methods, {', '.join(results)}")


if __name__ == "__main__":
    main()
