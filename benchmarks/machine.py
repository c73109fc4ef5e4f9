"""Measures the peak rates of this machine, from which lower bounds on programs' times follow."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.timing import in_turns

MATRIX = 2048  # rows and columns of float32 values
CHANGED = 2**26  # float32 values, more than any cache holds
FROM_EACH = 16  # exponentials from each value, so that memory does not count


class Load(NamedTuple):
    """How much is measured together."""

    repeats: int  # in one program, so that its start does not count
    exponentials: int  # float32 values to take exponentials of


ON_CPU = Load(1, 2**18)  # few enough values for a cache
ELSEWHERE = Load(64, 2**24)  # enough values for all cores of an accelerator


class Peaks(NamedTuple):
    """Rates per second."""

    flops: float  # of a matrix product
    bytes: float  # read plus written, of an array that is changed in place, so that no new page is touched
    exponentials: float

    def bounds(self, flops: float, moved: float, exponentials: float) -> dict[str, float]:
        """Lower bounds in milliseconds on the time of a program with these costs, by rate."""
        return {"flop_bound_ms": 1e3 * flops / self.flops, "byte_bound_ms": 1e3 * moved / self.bytes,
                "exp_bound_ms": 1e3 * exponentials / self.exponentials}


def highest(bounds: Mapping[str, float]) -> dict[str, Any]:
    """The largest bound, and what gives it.

    Example:
      >>> highest(Peaks(1e9, 1e9, 1e9).bounds(flops=2e6, moved=3e6, exponentials=0.0))
      {'bound_ms': 3.0, 'bound': 'byte'}
    """
    name = max(bounds, key=lambda name: bounds[name])
    return {"bound_ms": bounds[name], "bound": name.removesuffix("_bound_ms")}


def peaks(seconds: float = 1.0) -> Peaks:
    """The best rate of several calls for each kind, measured in turns."""
    load = ON_CPU if jax.default_backend() == "cpu" else ELSEWHERE
    square, long, values = jnp.eye(MATRIX), jnp.ones(CHANGED), jnp.ones(load.exponentials)

    def repeated(function):
        return lambda x: jax.lax.fori_loop(0, load.repeats, lambda _, x: function(x), x)

    product = jax.jit(repeated(lambda x: x @ square))
    add = jax.jit(repeated(lambda x: x + 1), donate_argnums=0)

    # None of the exponentials from one value waits for another.
    exponentials = jax.jit(repeated(lambda x: 1e-8 * sum(jnp.exp(x + shift) for shift in range(FROM_EACH))))
    def change():
        nonlocal long
        long = add(long)
        return long

    calls: Any = {"product": lambda: product(square), "change": change,
                  "exponential": lambda: exponentials(values)}
    best = {name: times.min() for name, times in in_turns(calls, seconds=seconds).items()}
    return Peaks(flops=load.repeats * 2 * MATRIX**3 / best["product"],
                 bytes=load.repeats * 2 * 4 * CHANGED / best["change"],
                 exponentials=load.repeats * FROM_EACH * load.exponentials / best["exponential"])
