"""Memory that the C library keeps or returns when a tensor is gone: with glibc, on Linux. Elsewhere nothing happens."""
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
LARGE = 2 ** 23  # bytes


def keep_freed_memory():
    """Let the C library keep freed memory for the next tensors.

    By default it returns large pieces at once, and the system clears every page that it hands out again. What is kept
    has gaps: a tenth to a quarter more memory.
    """
    _mallopt(M_TRIM_THRESHOLD, -1)  # keep all that is free,
    _mallopt(M_MMAP_MAX, 0)         # and ask for no piece by itself


def return_freed_memory():
    """Let the C library ask for every large piece of memory by itself, and return it as soon as it is free.

    By default it comes to treat pieces of up to 32 MB as small, whose gaps may be an eighth of a training's memory.
    """
    _mallopt(M_MMAP_THRESHOLD, LARGE)


def _mallopt(parameter, value):
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        mallopt(parameter, value)
