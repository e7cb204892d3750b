"""Setting that makes the C library keep freed memory for the next training step."""

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; glibc refuses more


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks, unless the user has set malloc options or chosen another allocator.

    By default glibc returns them at once and gets them anew, page by page: a third of the time of a CPU step.
    """
    chosen = os.environ.keys() & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"}
    if platform.libc_ver()[0] != "glibc" or chosen:
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
