"""Where a distillation step spends its time, plain and as effad_core does it.

    python benchmarks/distillation.py
    python benchmarks/distillation.py FOLDER   # of photographs, instead of those in the packages

Plain: the batch norms of Psi as modules of their own; the C library's memory settings, which return
freed memory to the system; and torch's Muon, which computes in bfloat16. The settings last for a
process's life, so each variant runs in processes of its own, in turns, and the ratio is the median
over the turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

from effad_core import (
    DistillationSchedule,
    PatchDescriptionNetwork,
    open_extractor,
    open_pretraining,
)
from effad_core.acceleration.memory import keep_freed_memory
from effad_core.distillation import extractors, muon
from effad_core.distillation.algorithm import make_optimizers
from effad_core.distillation.pairs import Pairs

import torch

PARTS = ("drawing", "Psi", "forward", "backward", "update")


def measure(variant: str, source: str, steps: int) -> dict[str, float]:
    """Median seconds of each part of a step, after as many steps to warm up."""
    if variant == "plain":
        extractors.fold_batch_norms = lambda network: 0
        muon.Instead = nullcontext  # nothing is called instead
    else:
        keep_freed_memory()
    torch.manual_seed(0)
    schedule = DistillationSchedule.laptop()
    extractor = open_extractor()
    pairs = Pairs(extractor, schedule, torch.device("cpu"))
    network = PatchDescriptionNetwork("small", extractor.out_channels)
    network.to(memory_format=torch.channels_last)
    optimizers = make_optimizers(network, schedule)
    size = schedule.batch_size
    batches = [range(i * size, (i + 1) * size) for i in range(2 * steps)]
    drawn = pairs.images(open_pretraining(source), (0, 1), batches)
    seconds = {part: [] for part in PARTS}
    for _ in batches:
        clock = [time.perf_counter()]
        images = next(drawn)
        clock.append(time.perf_counter())
        target = pairs.features(images)
        clock.append(time.perf_counter())
        loss = (network(pairs.teacher_input(images)) - target).square().mean()
        clock.append(time.perf_counter())
        network.zero_grad()
        loss.backward()
        clock.append(time.perf_counter())
        for optimizer in optimizers.values():
            optimizer.step()
        clock.append(time.perf_counter())
        for part, start, end in zip(PARTS, clock, clock[1:], strict=False):
            seconds[part].append(end - start)
    return {part: statistics.median(times[steps:]) for part, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="?", default="photographs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, args.images, args.steps)))
        return
    rounds = {"plain": [], "effad_core": []}
    for _ in range(args.rounds):
        for variant, results in rounds.items():
            call = [sys.executable, __file__, args.images, "--variant", variant]
            call += ["--steps", str(args.steps)]
            output = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(output))
    size = DistillationSchedule.laptop().batch_size
    print(
        f"laptop profile, {torch.get_num_threads()} threads, {args.rounds} rounds; seconds a step"
    )
    print(f"{'':12}" + "".join(f"{part:>10}" for part in PARTS) + f"{'images/s':>10}")
    for variant, results in rounds.items():
        parts = {part: statistics.median(r[part] for r in results) for part in PARTS}
        times = "".join(f"{parts[part]:10.3f}" for part in PARTS)
        print(f"{variant:12}{times}{size / sum(parts.values()):10.1f}")
    totals = [[sum(result.values()) for result in results] for results in rounds.values()]
    ratio = statistics.median(p / t for p, t in zip(*totals, strict=True))
    print(f"effad_core: {ratio:.2f} x plain")


if __name__ == "__main__":
    main()
