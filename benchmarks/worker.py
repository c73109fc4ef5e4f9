"""A process that measures programs on request, so that two revisions can be measured in turns.

    python -m benchmarks.worker [OPERATION=FACTOR]

Reads one JSON object per line from standard input, and answers each with another:

    {"device": true}                  kind and platform of the device
    {"peaks": 0.3}                    its peak rates, each measured for that many seconds
    {"key": [operation, workload, implementation, direction]}
                                      compiles that program: memory, cost, error, milliseconds of a call
    {"key": ..., "seconds": 0.1}      runs it for that long: milliseconds of each call
    {"key": ..., "may_lack": true}    as above, for a revision that may lack what the program calls
    {"forget": true}                  frees all programs

If a program needs too much memory or does not support its arguments, or its revision lacks something, the
answer has a `note` and no `error`, and the program cannot be run; if XLA cannot compile or run it, the answer
also has `failed`. Any other error ends the process. With OPERATION=FACTOR, all calls of
that operation except `plain` take FACTOR times as long, to test whether this is noticed.
"""

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks import machine, measuring
from benchmarks.measuring import Key, Program
from benchmarks.timing import SHORT, seconds_of
from tarq_jax import memory

MOST = 200  # calls in a turn


@functools.cache
def program(key: Key) -> Program:
    """The program, compiled and called once; later calls return the same program."""
    found = measuring.compile_program(key)
    if found.call:
        jax.block_until_ready(found.call())
    return found


def describe(key: Key) -> dict[str, Any]:
    """The costs of a program, and the error of its numbers relative to those of `plain`."""
    found, plain = program(key), program(key._replace(implementation="plain"))
    row = dict(found.row)
    if found.call is None:
        return row
    start = time.perf_counter()
    result = jax.block_until_ready(found.call())
    row["once_ms"] = 1e3 * (time.perf_counter() - start)
    if plain.call is None:
        return row | {"error": None}  # nothing to compare with
    difference = measuring.error(result, plain.call())
    if not difference <= measuring.WORST:
        return row | {"error": difference, "note": f"differs from plain by {difference:.1e} of its range"}
    return row | {"error": difference}


def times(key: Key, seconds: float, slowdowns: dict[str, float]) -> list[float]:
    """Milliseconds of each call. A short first one is not counted, as other programs had the cache before."""
    run, factor = program(key).call, slowdowns.get(key.operation, 1.0)
    if run is None:
        raise ValueError(f"{key.name} takes too much memory to run")
    if key.implementation == "plain":
        factor = 1.0

    def call():
        start = time.perf_counter()
        result = jax.block_until_ready(run())
        until = start + factor * (time.perf_counter() - start)
        while time.perf_counter() < until:
            pass
        return result

    first = seconds_of(call)
    calls = [first] if first > SHORT else []
    while not calls or (sum(calls) < seconds and len(calls) < MOST):
        calls.append(seconds_of(call))
    return [1e3 * value for value in calls]


def answer(request: dict[str, Any], slowdowns: dict[str, float]) -> dict[str, Any]:
    """The answer to one request."""
    if "device" in request:
        return {"device": jax.devices()[0].device_kind, "platform": jax.default_backend()}
    if "peaks" in request:
        return {"peaks": machine.peaks(request["peaks"])}
    if "forget" in request:
        program.cache_clear()
        return {}
    key = Key(*request["key"])
    if "seconds" in request:
        return {"times": times(key, request["seconds"], slowdowns)}
    lacking = (KeyError, TypeError, AttributeError, ImportError) if request.get("may_lack") else ()
    try:
        described = describe(key)
    except (NotImplementedError, *lacking) as reason:
        return {"note": noted(reason)}
    except jax.errors.JaxRuntimeError as reason:
        return {"note": noted(reason), "failed": True}
    if lacking and (name := foreign(Path.cwd())):
        return {"note": f"this revision has no {name}, which would come from another"}
    return described


def noted(reason: Exception) -> str:
    """An error in one line."""
    return f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"


def foreign(tree: Path) -> str | None:
    """A module of the library that is not from `tree`: an installed library has what the tree lacks."""
    library = {name: Path(module.__file__).resolve() for name, module in sys.modules.items()
               if name.split(".")[0] == "tarq_jax" and module.__file__}
    return next((name for name, file in library.items() if not file.is_relative_to(tree.resolve())), None)


def main() -> None:
    """Answers each line of standard input with a line of output."""
    memory.keep_freed()
    jax.config.update("jax_enable_compilation_cache", False)  # a hit is not the time to compile
    if jax.default_backend() != "cpu":  # there, JAX multiplies float32 at lower precision unless told
        jax.config.update("jax_default_matmul_precision", "highest")
    slowdowns = {name: float(factor) for name, factor in (text.split("=") for text in sys.argv[1:])}
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), slowdowns)), flush=True)


if __name__ == "__main__":
    main()
