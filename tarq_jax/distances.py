"""Distances of points to codewords by one product, precise wherever the points lie."""

import chex
import jax
import jax.numpy as jnp


def inner_products(points: jax.Array, codewords: jax.Array) -> jax.Array:
    """`<x, c>`, [..., M, K], in full precision on every device: codes depend on small differences."""
    return jnp.matmul(points, jnp.swapaxes(codewords, -1, -2), precision="highest")


def negative_distances(points: jax.Array, codewords: jax.Array) -> jax.Array:
    """`-|x - c|^2` up to a constant per point: `2<x, c> - |c|^2`.

    The dropped term `-|x|^2` changes neither an argmax nor a softmax over the codewords, and this form
    never computes a `[..., K, D]` difference. Both terms grow with the distance from the origin, but
    their difference does not: for points far from the origin, use `centred` first.

    Args:
      points: [..., M, D].
      codewords: [..., K, D], with the same leading axes as `points` or none.

    Returns:
      [..., M, K]; a larger value is nearer.
    """
    chex.assert_equal_shape_suffix([points, codewords], 1)
    inner = inner_products(points, codewords)
    return 2.0 * inner - jnp.sum(codewords**2, axis=-1)[..., None, :]


def centred(
    points: jax.Array, codewords: jax.Array, centre: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Both relative to a centre, so that products keep their precision far from the origin.

    As no distance depends on the centre, derivatives take it as a constant.

    Args:
      points: [..., M, D].
      codewords: [..., K, D], with the same leading axes as `points` or none.
      centre: [..., 1, D], one of the codewords; None takes the `central` one.

    Returns:
      Points and codewords, in the same shapes.
    """
    centre = jax.lax.stop_gradient(central(codewords) if centre is None else centre)
    return points - centre, codewords - centre


def central(codewords: jax.Array) -> jax.Array:
    """The codeword nearest to the mean of all: [..., K, D] to [..., 1, D]. Kernels call it too.

    A codeword, because the difference of two close numbers is exact in floating point, and that to a mean is
    not. The nearest to the mean, because it is never an outlier, relative to which all others would be far.
    Zero if a codeword is not finite.

    Example:
      >>> central(jnp.array([[900.0, 0.0], [1.0, 2.0], [2.0, 1.0]])).tolist()
      [[2.0, 1.0]]
    """
    mean = jnp.mean(codewords, axis=-2, keepdims=True)
    spread = jnp.sum((codewords - mean) ** 2, axis=-1, keepdims=True)
    places = jax.lax.broadcasted_iota(jnp.int32, spread.shape, spread.ndim - 2).astype(jnp.float32)
    nearest = spread <= jnp.min(spread, axis=-2, keepdims=True)
    first = jnp.min(jnp.where(nearest, places, spread.shape[-2]), axis=-2, keepdims=True)
    return jnp.sum(jnp.where(places == first, codewords, 0), axis=-2, keepdims=True)
