"""Gather what `effad benchmark --methods all` measured into the evidence that notebook 11 shows.

    effad benchmark tray solar-mono --methods all --profile quick --runs build/methods
    python -m benchmarks.methods tray solar-mono --profile quick --runs build/methods

Only runs that are whole take part: each method, scenario and seed whose folder holds metrics.json
and took.json. It trains nothing.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from effad_core.errors import RunError, command_errors
from effad_core.evaluation.benchmark import TOOK
from effad_core.evaluation.costs import count, efficientad
from effad_core.evaluation.methods import SIZES, find_method, method_names, slug
from effad_core.evaluation.scores import METRICS
from effad_core.schedule import PROFILES, Schedule
from effad_core.storage.files import as_path, write_text

import torch

KEPT = ("image_auroc", "image_auprc", "aupro_0.3", "aupro_0.05")  # metrics
DIGITS = 4


def settings_of(name: str, profile: str) -> dict:
    """A method's arguments and schedule: what evidence depends on, beside code and images."""
    if name in SIZES:
        return {"arguments": {"size": SIZES[name]}, "schedule": asdict(Schedule.named(profile))}
    found = find_method(name).profile(profile)
    return json.loads(
        json.dumps({"arguments": found.arguments, "schedule": asdict(found.schedule)})
    )


def cost_of(name: str, profile: str) -> tuple[int, int]:
    """Parameters, and FLOPs of an image, of a method as it is in a profile."""
    if name in SIZES:
        return count(partial(efficientad, SIZES[name]), 256)
    method = partial(find_method(name).of_profile, profile, pretrained=False)
    with torch.device("meta"):
        size = method().image_size
    return count(lambda: method().counted(), size, torch.uint8)


def gathered(scenarios: Sequence[str], profile: str, runs: Path) -> tuple[dict, set[str]]:
    """Results by scenario and method, and the machines that they come from."""
    results, machines = {}, set()
    for scenario in scenarios:
        for name in method_names():
            entry = {"seeds": {}, "minutes": {}, "milliseconds": {}}
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
                entry["milliseconds"][seed] = round(took["milliseconds"], 1)
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
            "results": results,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.output, json.dumps(content, indent=1) + "\n")
    print(f"{args.output}: {len(names)} methods, {', '.join(results)}")


if __name__ == "__main__":
    main()
