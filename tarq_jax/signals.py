"""What SIGINT and SIGTERM do while something is trained or written."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """In this context, SIGINT and SIGTERM only make the yielded function return True.

    A second SIGINT raises KeyboardInterrupt, for a person who cannot wait until everything is saved. A second
    SIGTERM does not: launchers send several.
    """
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)

    def catch(number: int, _: object) -> None:
        if number == signal.SIGINT and number in caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = [signal.signal(number, catch) for number in numbers]
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """Context in which SIGTERM raises KeyboardInterrupt, so that what it left half-written can be removed.

    An exception may be lost where the signal arrives, as in a callback; then the end of the context raises it
    again. A second SIGTERM ends the process, as one outside of the context does. Other threads than the main
    one, and handlers that are there already, are left alone; but not those of JAX, so that this is not for
    commands of several processes.
    """
    if (threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL):
        yield
        return
    caught: list[int] = []

    def catch(number: int, _: object) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, catch)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if caught:
        raise KeyboardInterrupt
