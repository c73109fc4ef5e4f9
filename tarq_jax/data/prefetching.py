"""Background transfer: elements are made and moved to the device while the step before them runs."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any


def prefetch(iterator: Iterable[Any], size: int,
             transfer: Callable[[Any], Any] = lambda element: element) -> Generator[Any, None, None]:
    """Keeps `size` transferred elements ready, made by a background thread.

    The thread starts with the first element asked for and ends with the iterator, or as soon as this one
    is closed or garbage-collected. What the iterator or `transfer` raises is raised at the consumer, in its
    place in the order.

    Args:
      iterator: what to draw from.
      size: elements kept ahead, at least 1.
      transfer: applied to each element in the thread, e.g. `jax.device_put`.

    Returns:
      A generator of `transfer(element)`.

    Raises:
      ValueError: size is below 1.
    """
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1")
    return _consume(iterator, queue.Queue(size), transfer)


def _consume(iterator: Iterable[Any], buffer: queue.Queue,
             transfer: Callable[[Any], Any]) -> Generator[Any, None, None]:
    stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(iterator, buffer, transfer, stop), daemon=True)
    thread.start()
    try:
        while (message := buffer.get()) is not None:
            element, error = message
            if error is not None:
                raise error
            yield element
    finally:
        stop.set()
        while not buffer.empty():  # frees a producer that waits for room
            buffer.get_nowait()
        thread.join()


def _produce(iterator: Iterable[Any], buffer: queue.Queue, transfer: Callable[[Any], Any],
             stop: threading.Event) -> None:
    """Puts (element, None) for each element, (None, error) if one fails, then None; quits when stopped."""
    try:
        for element in iterator:
            if stop.is_set():
                return
            buffer.put((transfer(element), None))
            if stop.is_set():
                return
        buffer.put(None)
    except BaseException as error:  # whatever it is, the consumer must see it
        buffer.put((None, error))
