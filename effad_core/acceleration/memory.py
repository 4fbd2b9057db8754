"""Keep freed memory in the process: on Linux, a CPU training otherwise pays for it again and again.

glibc gives every freed block of more than 32 MiB back to the system, and the system hands out the
next one page by page, each filled with zeros. The feature maps here are such blocks.
`python benchmarks/distillation.py` measures what that costs.
"""

import ctypes
import sys
from functools import cache

# glibc's malloc.h; the functions of the C library that set them are not in Python
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEPT = 2**31 - 1  # bytes: what is free beyond this goes back to the system
STEP = 64 * 2**20  # bytes to ask the system for at once


@cache
def keep_freed_memory() -> bool:
    """Let this process use freed memory again instead of returning it; once, for all its life.

    At most 2 GiB are kept beyond what is in use. On other systems than Linux with glibc this does
    nothing.

    Returns:
        Whether the C library took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # a C library without it, such as musl
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEPT), (M_TOP_PAD, STEP))
    return all([mallopt(option, value) == 1 for option, value in settings])
