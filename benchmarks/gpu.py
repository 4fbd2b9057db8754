"""What one GPU does with EfficientAD: inference, training, distillation, and a run of `paper`.

    python benchmarks/gpu.py [--minutes 9] [--device cuda:1]

Prints each line as soon as it is measured, so that what is finished counts if the time is cut off:

1. latency and throughput by the paper's protocol (supplement, Section 5), beside its Tables 11 and
   12, and the share of the rate at which the GPU multiplies large matrices in half precision;
2. seconds per iteration of Algorithm 1 with the profile `paper`, and how much of them the loop
   waits for images; and with `torch.compile`, to see what fusing and CUDA graphs would gain;
3. images per second of Algorithm 3 with the profile `paper`;
4. with what is left of the time, `paper` on solar-mono: the AU-ROC that it reaches.

`--tiny` takes a few steps of each, to see that everything runs, on a CPU too.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from effad_core import (
    DistillationSchedule,
    EfficientAD,
    PatchDescriptionNetwork,
    Schedule,
    choose_device,
    evaluate,
    open_extractor,
    open_pretraining,
    open_scenario,
    train,
    training,
)
from effad_core.acceleration.devices import DEVICE_HELP
from effad_core.deployment.prepared import prepare
from effad_core.distillation.algorithm import make_optimizers
from effad_core.distillation.pairs import Pairs
from effad_core.evaluation.costs import count, efficientad
from effad_core.evaluation.timing import (
    PAPER_GPU,
    machine,
    measure,
    paper_timings,
    untrained_detector,
)

import torch
from torch import Tensor

NAMES = {"small": "EfficientAD-S", "medium": "EfficientAD-M"}
KEPT_BACK = 45  # seconds: to find the quantiles and to evaluate


def say(*words: object) -> None:
    print(*words, flush=True)


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds(work: Callable[[], object], device: torch.device, warm_up: int, times: int) -> float:
    """Of one call, the mean of several in a row: a GPU works on while the next is prepared."""
    for _ in range(warm_up):
        work()
    wait(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return (time.perf_counter() - start) / times


def rate_of_products(device: torch.device, side: int) -> float:
    """FLOPs per second of a product of two matrices in float16."""
    a, b = (torch.randn(side, side, device=device).half() for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device, 3, 20)


def inference(device: torch.device, size: str, rate: float, options: dict) -> None:
    """Latency and throughput of one size, as written and compiled."""
    flops = count(partial(efficientad, size), 256)[1]
    paper = paper_timings()[NAMES[size]]
    for compiled in (False, True) if device.type == "cuda" else (False,):
        try:
            prepared = prepare(untrained_detector(size), device, "auto", compiled)
            timing = measure(prepared, NAMES[size], **options)
        except Exception as error:  # what a compiler raises must not end the rest
            say(f"{NAMES[size]}, compiled: failed ({type(error).__name__}: {str(error)[:200]})")
            continue
        say(
            f"{NAMES[size]}, {timing.precision}{', compiled' if compiled else ''}: "
            f"{timing.mean:.2f} ms (median {timing.percentile(50):.2f}, "
            f"99 % {timing.percentile(99):.2f}), {timing.throughput:.0f} images/s in batches of "
            f"{timing.batch_size}, {flops * timing.throughput / rate:.0%} of the limit"
        )
    latencies = ", ".join(f"{ms} ms on {gpu}" for gpu, ms in paper["latency_ms"].items())
    say(f"  the paper's: {latencies}; {paper['throughput']} images/s on {PAPER_GPU}")


def iteration(device: torch.device, size: str, precision: str, compiled: bool) -> Callable:
    """An iteration of Algorithm 1 on images that are there already."""
    detector = EfficientAD(size).to(device, memory_format=torch.channels_last).train()
    weights = [*detector.student.parameters(), *detector.autoencoder.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-4, weight_decay=1e-5, fused=True)
    images = torch.randint(256, (3, 3, 256, 256), dtype=torch.uint8, device=device)
    terms = partial(training.loss_terms, detector, Schedule.paper(precision=precision))
    if compiled:
        terms = torch.compile(terms, mode="max-autotune-no-cudagraphs")

    def step() -> None:
        total = sum(terms(*images).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return step


class Clock:
    """How long `train` takes per iteration, and how long of that it waits for images.

    Inside the block, `train` records when each iteration ends and how long the next images took.
    """

    def __enter__(self) -> "Clock":
        self.ends, self.waited = [], []
        self.parts = training.Run, training.ahead
        run, ahead = self.parts

        class TimedRun(run):
            def after(timed, done: int) -> None:
                super().after(done)
                self.ends.append(time.perf_counter())

        def timed_ahead(*arguments) -> Iterator:
            drawn = ahead(*arguments)
            while True:
                start = time.perf_counter()
                images = next(drawn, None)
                self.waited.append(time.perf_counter() - start)
                if images is None:
                    return
                yield images

        training.Run, training.ahead = TimedRun, timed_ahead
        return self

    def __exit__(self, *_) -> None:
        training.Run, training.ahead = self.parts

    def per_iteration(self) -> tuple[float, float]:
        """Seconds, and the share of them spent waiting, without the first fifth."""
        first = len(self.ends) // 5
        took = self.ends[-1] - self.ends[first]
        return took / (len(self.ends) - 1 - first), sum(self.waited[first + 1 : -1]) / took


def training_speed(device: torch.device, size: str, tiny: bool) -> float:
    """Print seconds per iteration of `paper`; returns those of `train`."""
    scenario, pretraining = open_scenario("solar-mono"), open_pretraining()
    steps = 6 if tiny else 1_500 if device.type == "cuda" else 20
    with Clock() as clock:
        train(
            EfficientAD(size),
            scenario,
            Schedule.paper(iterations=steps),
            pretraining,
            device=device,
        )
    took, waited = clock.per_iteration()
    say(
        f"{NAMES[size]}, an iteration of `paper` in float32: {1000 * took:.2f} ms, of which "
        f"{waited:.0%} waiting for images; 70,000 take {70_000 * took / 60:.1f} minutes"
    )
    ways = [("float32", False), ("bfloat16", False)]
    if device.type == "cuda":
        ways += [("float32", True), ("bfloat16", True)]
    for precision, compiled in ways:
        name = f"{precision}{', compiled' if compiled else ''}"
        try:
            step = iteration(device, size, precision, compiled)
            alone = seconds(step, device, 1 if tiny else 20, 2 if tiny else 200)
        except Exception as error:  # what a compiler raises must not end the rest
            say(f"  {name}: failed ({type(error).__name__}: {str(error)[:200]})")
            continue
        say(f"  the same without images to wait for, {name}: {1000 * alone:.2f} ms")
    return took


def distillation_speed(device: torch.device, tiny: bool) -> None:
    """Images per second of Algorithm 3, images that are there already."""
    schedule = DistillationSchedule.paper()
    extractor = open_extractor("efficientnet-lite0")
    pairs = Pairs(extractor, schedule, device)
    channels = extractor.out_channels
    network = PatchDescriptionNetwork("small", channels, schedule.padding)
    network.to(device, memory_format=torch.channels_last)
    optimizers = make_optimizers(network, schedule)
    number = 2 if tiny else schedule.batch_size
    images = torch.randint(256, (number, 3, pairs.psi_size, pairs.psi_size), dtype=torch.uint8)
    mu, sigma = (make(channels, 1, 1, device=device) for make in (torch.zeros, torch.ones))

    def step() -> Tensor:
        loss = pairs.loss(network, images, mu, sigma)
        network.zero_grad()
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
        return loss

    took = seconds(step, device, 1 if tiny else 5, 1 if tiny else 50)
    say(f"distillation from {extractor.name}, `paper`: {number / took:.0f} images/s")


def paper_run(device: torch.device, iterations: int) -> None:
    """`paper` on solar-mono, shortened to so many iterations."""
    detector, scenario = EfficientAD().load_teacher(), open_scenario("solar-mono")
    start = time.perf_counter()
    train(detector, scenario, Schedule.paper(iterations=iterations), device=device)
    minutes = (time.perf_counter() - start) / 60
    areas = evaluate(detector, scenario, device=device).auroc()
    found = ", ".join(f"{name} {area:.4f}" for name, area in areas.items())
    say(f"`paper` on solar-mono, {iterations:,} iterations, {minutes:.1f} minutes: AU-ROC {found}")


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument("--minutes", type=float, default=9, help="of all together")
    parser.add_argument("--size", nargs="+", choices=tuple(NAMES), default=tuple(NAMES))
    parser.add_argument("--tiny", action="store_true", help="a few steps of each")
    args = parser.parse_args(arguments)
    device = choose_device(args.device)
    say(machine(device))
    rate = rate_of_products(device, 64 if args.tiny else 8192 if device.type == "cuda" else 1024)
    say(f"products of large matrices in float16: {rate / 1e12:.3g} TFLOP/s, the limit below")
    options = {"warm_up": 200, "runs": 1000, "batches": 100}
    if device.type == "cpu":
        options = {"warm_up": 1, "runs": 5, "batches": 1}
    if args.tiny:
        options = {"warm_up": 0, "runs": 1, "batches": 1, "batch_size": 1}
    for size in args.size:
        inference(device, size, rate, options)
    took = {size: training_speed(device, size, args.tiny) for size in args.size}
    distillation_speed(device, args.tiny)
    if "small" in took:
        left = 60 * args.minutes - (time.perf_counter() - start) - KEPT_BACK
        iterations = 2 if args.tiny else min(70_000, int(left / took["small"]))
        if iterations < 1:
            say("no time is left for a run of `paper`: give more --minutes")
            return
        paper_run(device, iterations)


if __name__ == "__main__":
    main()
