"""One training in several processes, on several GPUs or machines, started by torchrun.

Without torchrun there is one process, of rank 0, and nothing here does anything.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from effad_core.acceleration.devices import choose_device

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def processes(device: str | torch.device | None = None) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, for the length of the block.

    Args:
        device: as in `choose_device`; of several GPUs, each of torchrun's processes takes its own.

    Yields:
        This process's device.
    """
    device = choose_device(device)
    cuda = device.type == "cuda"
    if cuda:
        device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', device.index or 0)}")
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:  # torchrun sets it
        yield device
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return rank_and_world()[0] == 0


def wait() -> None:
    """Until all processes are here."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def parallel(network: nn.Module) -> nn.Module:
    """The network, its gradients averaged over the processes."""
    if rank_and_world()[1] == 1:
        return network
    device = next(network.parameters()).device
    return DistributedDataParallel(network, [device] if device.type == "cuda" else None)


def own_batches(iterations: range, batch_size: int) -> list[range]:
    """For each iteration the numbers of the images that this process takes of the joined batch.

    Raises:
        ValueError: if the batch cannot be parted evenly.
    """
    rank, world = rank_and_world()
    own, rest = divmod(batch_size, world)
    if rest:
        raise ValueError(
            f"a batch of {batch_size} images cannot be parted among {world} processes; start "
            f"a number of processes that divides {batch_size}"
        )
    starts = (iteration * batch_size + rank * own for iteration in iterations)
    return [range(start, start + own) for start in starts]


def share(*tensors: Tensor) -> None:
    """Give every process the first one's values, in place."""
    if rank_and_world()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def mean(value: float, device: torch.device) -> float:
    """The mean over the processes."""
    if rank_and_world()[1] == 1:
        return float(value)
    total = torch.tensor(float(value), device=device)
    dist.all_reduce(total)
    return total.item() / rank_and_world()[1]
