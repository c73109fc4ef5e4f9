"""What the TPU kernels share: calls, padding, products and checks of arguments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

VMEM_BYTES = 16 * 2**20  # what Mosaic gives a program on a v5e; elsewhere it is more
LANES = 128  # the width of VMEM: rows are padded to a multiple of it
ROWS = 256  # candidates, latents or queries per block
POSITIONS = 512  # history positions per block


def call(
    kernel: Callable[..., None], *arguments: jax.Array, grid: tuple[int, ...], sequential: int = 0,
    **options: Any,
) -> Any:
    """`pl.pallas_call`, compiled on a TPU and interpreted on a CPU.

    Args:
      kernel: function of the references to the blocks.
      arguments: arrays.
      grid: see `pl.pallas_call`.
      sequential: number of trailing axes of the grid whose steps have to run in order.
      options: further options of `pl.pallas_call`.
    """
    free = len(grid) - sequential
    semantics: Any = ("parallel",) * free + ("arbitrary",) * sequential
    compiled = pl.pallas_call(
        kernel, grid=grid, compiler_params=pltpu.CompilerParams(dimension_semantics=semantics), **options)
    interpreted = pl.pallas_call(kernel, grid=grid, interpret=True, **options)
    return jax.lax.platform_dependent(*arguments, cpu=interpreted, tpu=compiled)


def block_of(size: int, most: int, multiple: int = 8) -> int:
    """Block size for an axis: its size rounded up to `multiple`, but not more than `most`."""
    return min(-(-size // multiple) * multiple, most)


def padded(array: jax.Array, axis: int, block: int) -> jax.Array:
    """The array, padded with zeros to a multiple of `block` along an axis."""
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, -array.shape[axis] % block)
    return jnp.pad(array, padding)


def dot(left: jax.Array, right: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    """Product of two matrices over the given axes, in float32; float32 arguments keep full precision."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(left, right, (((axes[0],), (axes[1],)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)


def positions(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Indices along an axis, int32."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def one_hot(codes: jax.Array, size: int, dtype: Any = jnp.float32) -> jax.Array:
    """[M, 1] int32 to [M, size]: a product with it looks up rows of a matrix."""
    return (positions((codes.shape[0], size), 1) == codes).astype(dtype)


def repeated(width: int) -> jax.Array:
    """[E, E * E]: a product with [..., E] repeats each of its entries E times in a row."""
    return _pattern(width, jax.lax.div)


def tiled(width: int) -> jax.Array:
    """[E, E * E]: a product with [..., E] gives E copies of it side by side."""
    return _pattern(width, jax.lax.rem)


def _pattern(width: int, of: Callable[[jax.Array, int], jax.Array]) -> jax.Array:
    shape = (width, width * width)
    return (of(positions(shape, 1), width) == positions(shape, 0)).astype(jnp.float32)


def lanes(width: int) -> int:
    """The width that rows take in VMEM."""
    return -(-width // LANES) * LANES


def too_large(*, copies: int = 1, working: int, **arrays: Any) -> str | None:
    """A message if a kernel would need more than `VMEM_BYTES`.

    This is an estimate from above: libtpu compiles some sizes that it refuses. `benchmarks.compiled` compiles
    the largest that it accepts.

    Args:
      copies: how often each array is held, as a buffer that is filled meanwhile or as a term of a product.
      working: float32 numbers of blocks and of results on the way.
      arrays: arrays or their shapes and types, or lists of them, that the kernel reads whole.
    """
    size = 4 * working + copies * sum(
        leaf.size // leaf.shape[-1] * lanes(leaf.shape[-1]) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arrays))
    if size <= VMEM_BYTES:
        return None
    return f"{' and '.join([*arrays, 'blocks'])} take {size} bytes of VMEM, expected at most {VMEM_BYTES}"


def empty(**arrays: jax.Array) -> str | None:
    """A message if an array has no entries, as no block can be made of it."""
    shapes = " and ".join(str(array.shape) for array in arrays.values())
    none = any(array.size == 0 for array in arrays.values())
    return f"{' and '.join(arrays)} are of shapes {shapes}, expected some of each" if none else None


def not_real(*arrays: jax.Array) -> str | None:
    """A message unless all arrays are float32 or all are bfloat16."""
    kinds = {array.dtype.name for array in arrays}
    if len(kinds) == 1 and kinds <= {"float32", "bfloat16"}:
        return None
    return f"types are {', '.join(sorted(kinds))}, expected all float32 or all bfloat16"


