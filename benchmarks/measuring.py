"""Compiles one program of an operation: its memory, its cost, and its error relative to `plain`."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import operations
from benchmarks.workloads import WORKLOADS

DIRECTIONS = ("forward", "gradient")
LEAST = 0.01  # share of the largest number of all outputs; differences are relative to at least this
WORST = 1e-3  # relative difference from `plain` above which numbers are called wrong
MOST_MB = 6144  # memory without arguments; programs that need more are reported and not run


class Key(NamedTuple):
    """Names a program."""

    operation: str
    workload: str
    implementation: str
    direction: str

    @property
    def name(self) -> str:
        """The key as one string."""
        return "/".join(self)


class Program(NamedTuple):
    """A compiled program."""

    call: Callable[[], Any] | None  # None if it needs too much memory
    row: Mapping[str, Any]  # its costs, known without running it, and a hash of its text


def keys(names: list[str], sizes: list[str], implementations: list[str]) -> list[Key]:
    """All programs of these operations, workloads and implementations."""
    return [
        Key(name, workload, implementation, direction)
        for name in names for workload in sizes for direction in DIRECTIONS
        for implementation, _ in operations.OPERATIONS[name].implementations.items()
        if implementation in implementations and (direction == "forward" or (
            operations.OPERATIONS[name].differentiable
            and implementation not in operations.OPERATIONS[name].prepared))
    ]


def compile_program(key: Key) -> Program:
    """Lowers and compiles a program.

    Raises:
      NotImplementedError: the implementation does not support these arguments.
    """
    operation, function = operations.OPERATIONS[key.operation], function_of(key)
    arguments = operations.make_arguments(operation, WORKLOADS[key.workload])
    if key.implementation in operation.prepared:
        arguments = operation.prepared[key.implementation](*arguments)
    # Host values become constants of the program, as the order of an index does.
    traced = {place: value for place, value in enumerate(arguments) if isinstance(value, jax.Array)}

    def program(arrays):
        return function(*(arrays.get(place, value) for place, value in enumerate(arguments)))

    start = time.perf_counter()
    lowered = jax.jit(program).lower(traced)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    row: dict[str, Any] = {
        "lower_ms": 1e3 * (middle - start), "compile_ms": 1e3 * (end - middle),
        "program": hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16],
        **memory_of(compiled), **cost_of(compiled)}
    if row["peak_mb"] > MOST_MB:
        return Program(None, row | {"note": f"takes {row['peak_mb']:,.0f} MB"})
    return Program(lambda: compiled(traced), row)


def function_of(key: Key) -> Callable[..., Any]:
    """The function to compile; it takes the operation's arguments, or the prepared ones."""
    operation = operations.OPERATIONS[key.operation]
    function = operation.implementations[key.implementation]
    return operations.gradient(operation, function) if key.direction == "gradient" else function


def memory_of(compiled: Any) -> dict[str, float]:
    """MB without the arguments, MB without arguments and results, and bytes of arguments and results."""
    memory = compiled.memory_analysis()
    return {"peak_mb": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20,
            "temporary_mb": memory.temp_size_in_bytes / 2**20,
            "bytes": float(memory.argument_size_in_bytes + memory.output_size_in_bytes)}


def cost_of(compiled: Any) -> dict[str, float]:
    """XLA's count of the cost, without numbers that it does not know; it counts the body of a loop once."""
    cost = compiled.cost_analysis()
    found = {"flops": cost.get("flops", 0.0), "exponentials": cost.get("transcendentals", 0.0),
             "bytes_accessed": cost.get("bytes accessed", 0.0)}
    return {name: value for name, value in found.items() if value >= 0}  # XLA says -1


def counted(key: Key) -> list[Key]:
    """The forms of a program whose costs XLA counts right, because they have no loops."""
    return [key._replace(implementation=name) for name in ("plain", "xla_whole")
            if name in operations.OPERATIONS[key.operation].implementations]


def least(costs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The least FLOPs and exponentials of some forms of an operation; without what XLA knows of none."""
    costs = list(costs)
    known = {name: [cost[name] for cost in costs if name in cost] for name in ("flops", "exponentials")}
    return {name: min(values) for name, values in known.items() if values}


def error(found: Any, expected: Any) -> float:
    """Largest relative difference of any float output, or largest share of different codes; NaN is kept.

    A difference is relative to the largest number of its output, or to `LEAST` times the largest number of
    all outputs if that is more: smaller numbers are rounding.
    """
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    floats = [pair for pair in pairs if jnp.issubdtype(pair[1].dtype, jnp.floating)]
    codes = [pair for pair in pairs if not jnp.issubdtype(pair[1].dtype, jnp.floating)]
    scales = np.array([float(jnp.max(jnp.abs(other))) for _, other in floats])
    scales = np.maximum(scales, LEAST * scales.max(initial=0.0))
    differences = [float(jnp.max(jnp.abs(one - other))) / (scale or 1.0)
                   for (one, other), scale in zip(floats, scales, strict=True)]
    return float(np.max(differences + [float(jnp.mean(one != other)) for one, other in codes]))
