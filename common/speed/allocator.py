"""Set whether the C library keeps or returns the memory of freed tensors (glibc on Linux; elsewhere no effect)."""
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
LARGE = 2 ** 23  # bytes


def keep_freed_memory():
    """Let the C library keep freed memory for the next tensors, at the cost of a tenth to a quarter more of it.

    By default it returns large pieces at once, and the system clears every page that it hands out again.
    """
    _mallopt(M_TRIM_THRESHOLD, -1)  # keep all that is free,
    _mallopt(M_MMAP_MAX, 0)         # and ask for no piece by itself


def return_freed_memory():
    """Let the C library request every large piece of memory separately, and return it as soon as it is free.

    By default it comes to treat pieces of up to 32 MB as small, and gaps between these may take an eighth of a
    training's memory.
    """
    _mallopt(M_MMAP_THRESHOLD, LARGE)


def _mallopt(parameter, value):
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        mallopt(parameter, value)
