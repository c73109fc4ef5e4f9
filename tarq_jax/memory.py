"""Host memory: a process's heaps, and whether memory that it frees stays with it or returns to the system."""

import ctypes
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # parameters of mallopt(3)


def give_back() -> bool:
    """Returns free memory to the system, after a peak of use; False if nothing was returned."""
    trim = _of_glibc("malloc_trim")
    return trim is not None and bool(trim(0))


def keep_freed() -> bool:
    """Makes glibc keep freed memory instead of returning it to the system; False with other C libraries.

    XLA programs on CPU allocate their buffers anew in each call. glibc maps and unmaps each buffer of 32 MiB
    or more, so the system must clear its pages again in every call. With this setting, the process keeps as
    much memory as it has ever needed. Threads other than the first keep only buffers below 64 MiB, unless all
    share one heap (`MALLOC_ARENA_MAX=1`), which in turn makes small allocations slower.
    """
    return _set(M_MMAP_MAX, 0) and _set(M_TRIM_THRESHOLD, -1)


def few_heaps() -> bool:
    """Makes glibc use two heaps for all threads that start later; False with other C libraries.

    By default up to eight per core are used, each of which keeps pages that are only partly in use. A process
    that compiles programs again and again in several threads thus grows.
    """
    return _set(M_ARENA_MAX, 2)


def _set(parameter: int, value: int) -> bool:
    mallopt = _of_glibc("mallopt")
    return mallopt is not None and bool(mallopt(parameter, value))


def _of_glibc(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # not glibc, or no process-wide namespace to search
        return None
