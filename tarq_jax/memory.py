"""Memory of the host: what programs free stays with the process, for their next calls, or is given back."""

import ctypes
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def give_back() -> bool:
    """Gives what is free back to the system, after more was needed than usual; False if it cannot."""
    trim = _of_glibc("malloc_trim")
    return trim is not None and bool(trim(0))


def keep_freed() -> bool:
    """Tells glibc not to give freed memory back to the system; False on other C libraries.

    Programs of XLA on CPU allocate their buffers anew in each call. From 32 MiB on glibc maps such a buffer
    and unmaps it, and by every call the system clears its pages again: a quarter of the time of a training
    step. The process holds on to the most that it has needed.
    """
    mallopt = _of_glibc("mallopt")
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def _of_glibc(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # no glibc; no process-wide namespace to look in
        return None
