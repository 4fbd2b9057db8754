"""The number format of a computation: float32, the reference, or bfloat16 where it is fast."""

import torch

PRECISIONS = ("auto", "float32", "bfloat16")


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" becomes "bfloat16" where the processor computes in it, else "float32".

    Raises:
        ValueError: for any other name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if device.type == "cpu" and capabilities.get("avx512_bf16", False):
        return "bfloat16"
    return "float32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context for a resolved precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
