"""What one run of a benchmark gets of the machines of a Ray cluster."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from effad_core.acceleration.devices import choose_device
from effad_core.acceleration.precision import resolve_precision, training_pass
from effad_core.evaluation.methods import SIZES, OwnRecipe
from effad_core.evaluation.scores import METRICS
from effad_core.evaluation.tasks import Task

import torch

PROBE_SECONDS = 6.0  # how long each way of sharing the processors is timed
RUN_MEMORY = 3 * 2**30  # bytes for a run on a CPU: assumed, 2 GiB of them teacher features
GPU_MEMORY = 8 * 2**30  # bytes of a GPU for a run: assumed, no GPU has been measured
MOST_ON_A_GPU = 4  # runs at a time, assumed too
MOST_THREADS = 8  # that prepare images for a GPU


@dataclass(frozen=True)
class Share:
    """What the user says of one run's share of the machines; None is decided here.

    Attributes:
        threads: on a CPU.
        gpu: of one GPU.
    """

    threads: int | None = None
    gpu: float | None = None


@dataclass(frozen=True)
class Place:
    """Where a run is computed.

    Attributes:
        device: "cpu", "cuda" or "mps".
        cpus: processors for it, which are also its threads.
        gpus: its share of a GPU.
    """

    device: str
    cpus: int
    gpus: float = 0.0

    def resources(self) -> dict[str, float]:
        """As `ray.remote` takes them."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


def settle(ray, tasks: Sequence[Task], share: Share) -> tuple[Place, dict[str, str]]:
    """Where runs are computed, and the number format of EfficientAD's training, by size.

    A worker that measured for itself would do so beside others, and runs of one table could differ.
    """
    nodes = [node["Resources"] for node in _nodes(ray)]
    if not nodes:
        raise ValueError("the Ray cluster has no node with a processor")
    device = str(tasks[0].device or ("cuda" if any(n.get("GPU") for n in nodes) else "cpu"))
    if ":" in device:
        raise ValueError(f"with --engine ray, Ray chooses the GPU: --device cuda, not {device}")
    sizes = {SIZES[task.recipe.name] for task in tasks if is_auto(task)}
    if device == "cuda":
        with_gpu = [node for node in nodes if node.get("GPU")]
        if not with_gpu:
            raise ValueError("no node of the Ray cluster has a GPU: choose --device cpu")
        gpus = share.gpu or _gpu_share(ray)
        fair = min(int(node["CPU"] * gpus / node["GPU"]) for node in with_gpu)
        place = Place(device, share.threads or max(1, min(MOST_THREADS, fair)), gpus)
        _check_room(place, with_gpu)
        return place, _precisions(ray, place, sizes)
    cores = int(min(node["CPU"] for node in nodes))
    place = Place(device, share.threads or cores)
    _check_room(place, nodes)
    precisions = _precisions(ray, place, sizes)
    left = sum(not (task.run_dir / METRICS).exists() for task in tasks)
    if share.threads is None and left > 1 and cores > 1:
        size = min(sizes, default="small")
        memory = min(node.get("memory", 0) for node in nodes)
        threads = _fastest(ray, cores, memory, device, size, precisions.get(size, "float32"))
        place = replace(place, cpus=threads)
    return place, precisions


def is_auto(task: Task) -> bool:
    return isinstance(task.recipe, OwnRecipe) and task.recipe.schedule.precision == "auto"


def _check_room(place: Place, nodes: Sequence[Mapping[str, float]]) -> None:
    if not any(node["CPU"] >= place.cpus for node in nodes):
        most = int(max(node["CPU"] for node in nodes))
        raise ValueError(f"no node has {place.cpus} processors: --threads can be {most} at most")


def _gpu_share(ray) -> float:
    """As much of a GPU as a run needs, where all GPUs are like the one that is asked."""
    memory = ray.get(ray.remote(num_cpus=0, num_gpus=1)(_gpu_memory).remote())
    return 1 / max(1, min(MOST_ON_A_GPU, round(memory / GPU_MEMORY)))


def _gpu_memory() -> int:
    """On a worker: bytes."""
    return torch.cuda.get_device_properties(0).total_memory


def _precisions(ray, place: Place, sizes: set[str]) -> dict[str, str]:
    if not sizes:
        return {}
    work = ray.remote(**place.resources())(_measured_precisions)
    return ray.get(work.remote(place.device, place.cpus, sorted(sizes)))


def _measured_precisions(device: str, threads: int, sizes: Sequence[str]) -> dict[str, str]:
    """On a worker: what is fastest there, by size."""
    torch.set_num_threads(threads)
    chosen = choose_device(device)
    return {size: resolve_precision("auto", chosen, "training", size=size) for size in sizes}


def _fastest(ray, cores: int, memory: float, device: str, size: str, precision: str) -> int:
    """The number of threads a run with which a machine gets most done: 1, 2, 4, ..., all.

    As many processes as fit are timed together, each with so many threads. It takes a quarter of a
    minute for each number.
    """
    counts = sorted({cores, *(2**k for k in range(cores.bit_length()) if 2**k <= cores)})
    fitting = [n for n in counts if n == cores or cores // n * RUN_MEMORY <= memory]
    rates = {}
    for threads in fitting:
        probe = ray.remote(num_cpus=threads)(_Probe)
        probes = [probe.remote(device, threads, size, precision) for _ in range(cores // threads)]
        ray.get([p.passes.remote(0.0) for p in probes])  # all are ready
        rates[threads] = sum(ray.get([p.passes.remote(PROBE_SECONDS) for p in probes]))
        for p in probes:
            ray.kill(p)
    return max(rates, key=rates.__getitem__)


class _Probe:
    """An actor that repeats a training pass."""

    def __init__(self, device: str, threads: int, size: str, precision: str):
        torch.set_num_threads(threads)
        self._work = training_pass(precision, choose_device(device), size)

    def passes(self, seconds: float) -> float:
        """How many it does in a second: at least one, for at least so long."""
        start, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - start < seconds:
            self._work()
            count += 1
        return count / (time.perf_counter() - start)


def describe(ray, place: Place) -> str:
    """One line: the machines, and what a run gets."""
    found = [node["Resources"] for node in _nodes(ray)]
    cpus, gpus = (int(sum(node.get(name, 0) for node in found)) for name in ("CPU", "GPU"))
    at_once = sum(
        min(
            int(node["CPU"] // place.cpus),
            int(node.get("GPU", 0) / place.gpus) if place.gpus else cpus,
        )
        for node in found
    )
    each = _counted(place.cpus, "thread") + (f", {place.gpus:g} of a GPU" if place.gpus else "")
    machines = ", ".join(
        _counted(count, noun)
        for count, noun in ((len(found), "node"), (cpus, "processor"), (gpus, "GPU"))
    )
    return (
        f"computing on {place.device} with Ray: {machines}; {_counted(at_once, 'run')} at a time, "
        f"{each} for each"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _nodes(ray) -> list[dict]:
    return [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
