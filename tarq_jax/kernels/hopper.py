"""What the kernels for NVIDIA's Hopper GPUs share (Mosaic GPU): layouts, products, checks.

A program is one warpgroup. It computes 64 rows at a time, the height of its products on the tensor cores.
Their factors are bfloat16 in shared memory, their sums float32 in registers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

TERMS = 3  # bfloat16 numbers whose sum is a float32
NEVER = 1e30  # squared length of a codeword that only pads a level: none is farther
ROWS, COLUMNS = 64, 64  # rows of a program; columns (positions or codewords) per step
WIDTHS = (16, 32, 64)  # of rows in shared memory: 32, 64 or 128 bytes in bfloat16, the widths of its swizzles
Cast = Callable[[jax.Array, Any], jax.Array]  # of an array in registers to a layout


def call(
    kernel: Callable[..., None], *arguments: jax.Array, out_type: Any, programs: int,
    scratch_types: Sequence[Any], interpret: Any = None,
) -> jax.Array:
    """`pallas.mosaic_gpu.kernel`, which gives the kernel a function that casts to a layout first.

    Args:
      kernel: function of that cast, and of the references to arguments, result and scratch memory.
      arguments: arrays.
      out_type: shape and type of the result.
      programs: how many run; on one axis, because CUDA limits all axes but one to 65,535.
      scratch_types: types of scratch references.
      interpret: parameters of the interpreter; None to compile.
    """
    # The interpreter has no layouts.
    cast: Cast = gpu.layout_cast if interpret is None else lambda array, layout: array
    options = {} if interpret is None else {"interpret": interpret}
    return gpu.kernel(functools.partial(kernel, cast), out_type=out_type,
                      grid=(programs,), grid_names=("program",), scratch_types=list(scratch_types),
                      **options)(*arguments)


def place(rows: int) -> tuple[jax.Array, jax.Array]:
    """The matrix of this program and its first row there, in a stack of matrices of `rows` rows each."""
    program, tiles = jax.lax.axis_index("program"), rows // ROWS
    return jax.lax.div(program, tiles), jax.lax.rem(program, tiles) * ROWS


def where_possible(
    kernel: Callable[..., jax.Array], otherwise: Callable[..., jax.Array], *arguments: Any,
    refusal: str | None,
) -> jax.Array:
    """Calls `kernel` where a program is compiled for NVIDIA and nothing is refused, `otherwise` elsewhere."""
    if refusal:
        return otherwise(*arguments)
    return jax.lax.platform_dependent(*arguments, cuda=kernel, default=otherwise)


def swizzled(width: int, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    """Layout in shared memory of a matrix with rows of this width; factors of a product need the same one."""
    size = jnp.dtype(dtype).itemsize
    columns = min(width, 128 // size)
    return gpu.TilingTransform((8, columns)), gpu.SwizzleTransform(size * columns)


def product(columns: int, *pairs: tuple[Any, Any]) -> jax.Array:
    """Sum of the products of pairs of matrices in shared memory: [64, any] and [any, columns] to float32."""
    def multiply(sums_ref):
        for left, right in pairs:
            gpu.wgmma(sums_ref, left, right)
        return sums_ref[...]

    return pl.run_scoped(multiply, gpu.ACC((ROWS, columns), jnp.float32))


def width_for(size: int) -> int:
    """The smallest of `WIDTHS` that holds rows of this size; the largest if none does."""
    return min((width for width in WIDTHS if width >= size), default=WIDTHS[-1])


def refuse_wide(**arrays: jax.Array) -> str | None:
    """A message if rows of an array are wider than the largest of `WIDTHS`."""
    for name, array in arrays.items():
        if array.shape[-1] > WIDTHS[-1]:
            return f"{name} are {array.shape[-1]} wide, expected at most {WIDTHS[-1]} on a GPU"
    return None


def terms(array: jax.Array, *, in_kernel: bool = False) -> list[jax.Array]:
    """Arrays of bfloat16 that add up to one of float32.

    Outside a kernel `reduce_precision` rounds, because XLA takes a conversion there and back for the identity
    on a GPU, and would leave one term. Mosaic does not, and has no `reduce_precision`.
    """
    parts = []
    for _ in range(TERMS):
        rounded = array if in_kernel else jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
        parts.append(rounded.astype(jnp.bfloat16))
        array = array - parts[-1].astype(jnp.float32)
    return parts


def across(words: jax.Array) -> jax.Array:
    """Terms of codewords as factors of `inner_products`: [..., K, D] to bfloat16 [..., TERMS * D, K]."""
    return jnp.swapaxes(jnp.concatenate(terms(words), axis=-1), -1, -2)


def inner_products(points_ref: Any, across_ref: Any) -> jax.Array:
    """Inner products in float32: terms [TERMS, 64, D] with `across` of codewords, [TERMS * D, columns].

    Of the nine products of terms, six matter in float32. The small ones come first, as tensor cores truncate
    what they add to a large sum.
    """
    width, columns = points_ref.shape[-1], across_ref.shape[-1]
    return product(columns, *(
        (points_ref.at[left], across_ref.at[pl.ds((order - left) * width, width)])
        for order in reversed(range(TERMS)) for left in range(order + 1)))


def by_row(array: jax.Array, columns: int = COLUMNS) -> jax.Array:
    """[64] to [64, columns]."""
    return jax.lax.broadcast_in_dim(array, (ROWS, columns), [0])


def by_column(array: jax.Array) -> jax.Array:
    """[columns] to [64, columns]."""
    return jax.lax.broadcast_in_dim(array, (ROWS, len(array)), [1])
