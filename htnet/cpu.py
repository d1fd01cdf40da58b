"""CPU settings of the process: threads, and memory kept between steps."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # names and values of malloc.h
_TOP_PAD_BYTES = 64 << 20


def configure_cpu(threads: int) -> None:
    """Fix the number of threads, which decides last bits, and keep freed memory; call it before training.

    A later call in the same process changes only the threads.
    """
    keep_freed_memory()
    import torch

    torch.set_num_threads(threads)


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory, and torch ask for huge pages; return False if the C library has no ``mallopt``.

    A training step frees and allocates the same gigabytes every time. By default each large buffer goes back to the
    kernel and returns page by page, zeroed; at the paper's size that costs a tenth of a step. Huge pages are asked for
    only if torch has not been imported yet.
    """
    if not sys.platform.startswith("linux"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)
