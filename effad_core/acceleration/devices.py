"""The one place that decides where to compute: the GPU where there is one."""

import torch

DEVICE_HELP = "cpu, cuda, cuda:1, ... or mps; the GPU where there is one without it"  # of --device


def choose_device(
    device: str | torch.device | None = None, now: torch.device | None = None
) -> torch.device:
    """The device to compute on.

    Args:
        device: for example "cpu" or "cuda:1"; None takes the first of these that this machine has:
            a CUDA GPU, Apple's GPU (MPS), the CPU.
        now: where the detector is; if that is a GPU, None takes it.

    Returns:
        The device, a GPU with its number.

    Raises:
        ValueError: for a device that torch does not know, or that this machine does not have.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if device is None:
        if now is not None and now.type != "cpu":
            return now
        has_mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"the device must be cpu, cuda, cuda:1, ... or mps, not {device!r}"
        ) from None
    there = {
        "cuda": torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(chosen.type, True):
        raise ValueError(f"this machine has no device {device}: choose another, for example cpu")
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen
