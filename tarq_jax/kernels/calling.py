"""What the TPU kernels share: how they are called, padded and how they multiply."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

VMEM_BYTES = 8 * 2**20  # of the arguments that a kernel keeps: half of what the smallest TPU has
ROWS = 256  # candidates, latents or queries of a block
POSITIONS = 512  # of the history, of a block


def call(
    kernel: Callable[..., None], *arguments: jax.Array, grid: tuple[int, ...], sequential: int = 0,
    **options: Any,
) -> Any:
    """`pl.pallas_call`, compiled where a TPU runs it and interpreted where a CPU does.

    Args:
      kernel: of references.
      arguments: arrays.
      grid: see `pl.pallas_call`, as the other options.
      sequential: how many of the last axes of the grid depend on the order in which they are run.
    """
    free = len(grid) - sequential
    semantics: Any = ("parallel",) * free + ("arbitrary",) * sequential
    compiled = pl.pallas_call(
        kernel, grid=grid, compiler_params=pltpu.CompilerParams(dimension_semantics=semantics), **options)
    interpreted = pl.pallas_call(kernel, grid=grid, interpret=True, **options)
    return jax.lax.platform_dependent(*arguments, cpu=interpreted, tpu=compiled)


def block_of(size: int, most: int, multiple: int = 8) -> int:
    """The size of blocks of an axis: all of it, rounded up, if it is short, `most` otherwise."""
    return min(-(-size // multiple) * multiple, most)


def padded(array: jax.Array, axis: int, block: int) -> jax.Array:
    """With zeros up to a multiple of `block` along an axis."""
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, -array.shape[axis] % block)
    return jnp.pad(array, padding)


def dot(left: jax.Array, right: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    """Product of two matrices in float32 over the given axes; float32 arguments are multiplied as such."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(left, right, (((axes[0],), (axes[1],)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)


def positions(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Indices along an axis, int32."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def one_hot(codes: jax.Array, size: int, dtype: Any = jnp.float32) -> jax.Array:
    """[M, 1] int32 to [M, size]: a row of a matrix is looked up by a product with it."""
    return (positions((codes.shape[0], size), 1) == codes).astype(dtype)


def repeated(width: int) -> jax.Array:
    """[E, E * E]: multiplies [..., E] to each of its entries E times in a row."""
    return _pattern(width, jax.lax.div)


def tiled(width: int) -> jax.Array:
    """[E, E * E]: multiplies [..., E] to E copies of it side by side."""
    return _pattern(width, jax.lax.rem)


def _pattern(width: int, of: Callable[[jax.Array, int], jax.Array]) -> jax.Array:
    shape = (width, width * width)
    return (of(positions(shape, 1), width) == positions(shape, 0)).astype(jnp.float32)


def too_large(**arrays: Sequence[jax.Array] | jax.Array) -> str | None:
    """Says so where the arrays together do not fit beside the blocks of a kernel."""
    leaves = jax.tree.leaves(arrays)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    names = " and ".join(arrays)
    return None if size <= VMEM_BYTES else f"{names} take {size} bytes, expected at most {VMEM_BYTES}"


def empty(**arrays: jax.Array) -> str | None:
    """Says so where an array has no entries, of which no block could be made."""
    shapes = " and ".join(str(array.shape) for array in arrays.values())
    none = any(array.size == 0 for array in arrays.values())
    return f"{' and '.join(arrays)} are of shapes {shapes}, expected some of each" if none else None


def not_real(*arrays: jax.Array) -> str | None:
    """Says so where an array is neither float32 nor bfloat16, or not of the type of the first."""
    kinds = {array.dtype.name for array in arrays}
    if len(kinds) == 1 and kinds <= {"float32", "bfloat16"}:
        return None
    return f"types are {', '.join(sorted(kinds))}, expected all float32 or all bfloat16"


