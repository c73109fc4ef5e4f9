"""Measures the peak rates of this machine, from which lower bounds on programs' times follow."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.timing import in_turns

MATRIX = 2048  # rows and columns of float32 values
CHANGED = 2**26  # float32 values, more than any cache holds
EXPONENTIALS = 2**18  # float32 values, few enough for a cache


class Peaks(NamedTuple):
    """Rates per second."""

    flops: float  # of a matrix product
    bytes: float  # read plus written, of an array that is changed in place, so that no new page is touched
    exponentials: float

    def bounds(self, flops: float, moved: float, exponentials: float) -> dict[str, float]:
        """Lower bounds in milliseconds on the time of a program with these costs, by rate."""
        return {"flop_bound_ms": 1e3 * flops / self.flops, "byte_bound_ms": 1e3 * moved / self.bytes,
                "exp_bound_ms": 1e3 * exponentials / self.exponentials}


def peaks(seconds: float = 1.0) -> Peaks:
    """The best rate of several calls for each kind, measured in turns."""
    square = jnp.ones((MATRIX, MATRIX))
    long, short = jnp.ones(CHANGED), jnp.ones(EXPONENTIALS)
    product, exponential = jax.jit(jnp.matmul), jax.jit(jnp.exp)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def change():
        nonlocal long
        long = add(long)
        return long

    calls: Any = {"product": lambda: product(square, square), "change": change,
                  "exponential": lambda: exponential(short)}
    best = {name: times.min() for name, times in in_turns(calls, seconds=seconds).items()}
    return Peaks(flops=2 * MATRIX**3 / best["product"], bytes=2 * 4 * CHANGED / best["change"],
                 exponentials=EXPONENTIALS / best["exponential"])
