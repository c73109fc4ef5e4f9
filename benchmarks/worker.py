"""A process that measures programs when it is told to, so that two revisions can be measured in turns.

    python -m benchmarks.worker [OPERATION=FACTOR]

Reads a JSON object a line from standard input and answers with another:

    {"peaks": 0.3}                    device, and what it can do at best
    {"key": [operation, workload, implementation, direction]}
                                      compiles that program: memory, cost, numbers
    {"key": ..., "seconds": 0.1}      runs it for that long: milliseconds of each call
    {"forget": true}                  frees all programs

What cannot be done is answered with a `note`. With OPERATION=FACTOR all calls of that operation but the
`plain` ones take so many times as long: to try out whether it is noticed.
"""

import functools
import json
import sys
import time
from typing import Any

import jax

from benchmarks import machine, measuring
from benchmarks.measuring import Key, Program
from benchmarks.timing import seconds_of
from tarq_jax import memory

MOST = 200  # calls of a turn
SHORT = 0.02  # seconds of a call before which another is made, uncounted: its data are in the cache then


@functools.cache
def program(key: Key) -> Program:
    """Compiled once, and touched."""
    found = measuring.compile_program(key)
    jax.block_until_ready(found.call())
    return found


def describe(key: Key) -> dict[str, Any]:
    """What is known of a program without timing it, and how far its numbers are from those of `plain`."""
    found = program(key)
    row = dict(found.row)
    try:
        expected = program(key._replace(implementation="plain")).call()
    except NotImplementedError:
        return row | {"error": None}  # nothing to compare with
    difference = measuring.error(found.call(), expected)
    if not difference <= measuring.WORST:
        return row | {"error": difference, "note": f"differs from plain by {difference:.1e} of its range"}
    return row | {"error": difference}


def times(key: Key, seconds: float, slowdowns: dict[str, float]) -> list[float]:
    """Milliseconds of each call."""
    found, factor = program(key), slowdowns.get(key.operation, 1.0)
    if key.implementation == "plain":
        factor = 1.0

    def call():
        start = time.perf_counter()
        result = jax.block_until_ready(found.call())
        until = start + factor * (time.perf_counter() - start)
        while time.perf_counter() < until:
            pass
        return result

    calls = [seconds_of(call)]
    if calls[0] < SHORT:
        calls = []
    while not calls or (sum(calls) < seconds and len(calls) < MOST):
        calls.append(seconds_of(call))
    return [1e3 * value for value in calls]


def answer(request: dict[str, Any], slowdowns: dict[str, float]) -> dict[str, Any]:
    """To one line."""
    if "peaks" in request:
        return {"peaks": machine.peaks(request["peaks"]), "device": jax.devices()[0].device_kind}
    if "forget" in request:
        program.cache_clear()
        return {}
    key = Key(*request["key"])
    try:
        if "seconds" in request:
            return {"times": times(key, request["seconds"], slowdowns)}
        return describe(key)
    except (NotImplementedError, KeyError, TypeError, AttributeError) as reason:  # older code lacks a way
        return {"note": f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"}


def main() -> None:
    """Lines in, lines out."""
    memory.keep_freed()
    slowdowns = {name: float(factor) for name, factor in (text.split("=") for text in sys.argv[1:])}
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), slowdowns)), flush=True)


if __name__ == "__main__":
    main()
