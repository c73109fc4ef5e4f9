"""Measures in a process of its own, whose memory and caches are those of a fresh run."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_own_process(
    function: Callable[..., Result], *arguments: Any, first: Callable[[], Any] | None = None
) -> Result:
    """Calls a function of a module in a fresh process, after calling `first` there if it is given.

    Raises:
      OSError: the process ended before the function did.
    """
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=first) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise OSError(f"the process that called {function.__name__}{arguments} ended, as if it was killed "
                      "for want of memory") from None
