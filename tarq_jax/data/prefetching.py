"""Background transfer: makes elements and moves them to the device while earlier steps run."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any


def prefetch(iterator: Iterable[Any], size: int,
             transfer: Callable[[Any], Any] = lambda element: element) -> Generator[Any, None, None]:
    """Keeps `size` transferred elements ready, made by a background thread.

    The thread starts when the first element is requested. It ends with the iterator, or as soon as the
    generator is closed or garbage-collected. An exception of the iterator or of `transfer` is raised in the
    consumer, after the elements before it.

    Args:
      iterator: the source of elements.
      size: number of elements kept ready, at least 1.
      transfer: function applied to each element in the thread, e.g. `jax.device_put`.

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
        while not buffer.empty():  # unblocks a producer that waits for room
            buffer.get_nowait()
        thread.join()


def _produce(iterator: Iterable[Any], buffer: queue.Queue, transfer: Callable[[Any], Any],
             stop: threading.Event) -> None:
    """Puts (element, None) per element and None at the end, or (None, error); returns when stopped."""
    try:
        for element in iterator:
            if stop.is_set():
                return
            buffer.put((transfer(element), None))
            if stop.is_set():
                return
        buffer.put(None)
    except BaseException as error:  # the consumer must see every error
        buffer.put((None, error))
