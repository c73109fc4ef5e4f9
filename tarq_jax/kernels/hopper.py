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


def refuse_device() -> str | None:
    """Why no kernel can run on the GPU of this machine; None if they can.

    This is separate from other refusals, because code may be lowered for another GPU than this machine's.
    """
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if str(capability).split(".")[0] == "9":
        return None
    return f"this GPU is of compute capability {capability}, expected 9.x: wgmma is on Hopper alone"


def call(
    kernel: Callable[..., None], *arguments: jax.Array, out_type: Any, grid: Sequence[int],
    grid_names: Sequence[str], scratch_types: Sequence[Any], interpret: Any = None,
) -> jax.Array:
    """`pallas.mosaic_gpu.kernel`, which gives the kernel a function that casts to a layout first.

    Args:
      kernel: function of that cast, and of the references to arguments, results and scratch memory.
      arguments: arrays.
      out_type: shape and type of the result.
      grid: see `pallas.mosaic_gpu.kernel`; so are the names of its axes and the scratch memory.
      grid_names: one name per axis.
      scratch_types: types of scratch references.
      interpret: parameters of the interpreter; None to compile.
    """
    # The interpreter has no layouts.
    cast: Cast = gpu.layout_cast if interpret is None else lambda array, layout: array
    options = {} if interpret is None else {"interpret": interpret}
    return gpu.kernel(functools.partial(kernel, cast), out_type=out_type, grid=tuple(grid),
                      grid_names=tuple(grid_names), scratch_types=list(scratch_types), **options)(*arguments)


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


def terms(array: jax.Array) -> list[jax.Array]:
    """Arrays of bfloat16 that add up to one of float32."""
    parts = []
    for _ in range(TERMS):
        parts.append(array.astype(jnp.bfloat16))
        array = array - parts[-1].astype(jnp.float32)
    return parts


def across(words: jax.Array) -> jax.Array:
    """Terms of codewords as factors of `inner_products`: [..., K, D] to bfloat16 [..., TERMS * D, K]."""
    return jnp.swapaxes(jnp.concatenate(terms(words), axis=-1), -1, -2)


def inner_products(points_ref: Any, across_ref: Any) -> jax.Array:
    """Inner products in float32: terms [TERMS, 64, D] with `across` of codewords, [TERMS * D, columns].

    Of the nine products of terms, six matter in float32.
    """
    width, columns = points_ref.shape[-1], across_ref.shape[-1]
    return product(columns, *(
        (points_ref.at[left], across_ref.at[pl.ds(right * width, width)])
        for left in range(TERMS) for right in range(TERMS - left)))


def by_row(array: jax.Array, columns: int = COLUMNS) -> jax.Array:
    """[64] to [64, columns]."""
    return jax.lax.broadcast_in_dim(array, (ROWS, columns), [0])


def by_column(array: jax.Array) -> jax.Array:
    """[columns] to [64, columns]."""
    return jax.lax.broadcast_in_dim(array, (ROWS, len(array)), [1])
