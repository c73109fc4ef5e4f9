"""A product quantizer instead of the residual one: level l quantizes the l-th slice of the latent.

    python -m examples.product_quantization

Adds `encode` of type (codewords, latents) -> QuantizerOutput, for `Tarq(encode=...)`, and `fit` of type
(rng, latents) -> Codebook, for `Objective.fit`. Codewords are [L, K, D] as usual, zero outside their slice.
"""

import functools

import jax
import jax.numpy as jnp

from examples import small
from tarq_jax import quantization
from tarq_jax.models import Tarq
from tarq_jax.training.modules import common, of_tarq
from tarq_jax.training.objectives import tarq


def slices(levels, width):
    """1 in each level's slice of the width, 0 elsewhere: [L, D]."""
    return (jnp.arange(width) * levels // width == jnp.arange(levels)[:, None]).astype(jnp.float32)


def encode(codewords, latents):
    """[L, K, D] and [..., D] to QuantizerOutput; the input of a level is its slice of the latents."""
    own = slices(*codewords.shape[::2])
    output = quantization.encode(codewords * own[:, None], latents)
    return output.replace(residuals=output.residuals * own)  # so EMA and revival stay in the slice too


def fit(rng, latents, *, levels, size):
    """A codebook by k-means in each slice of the latents [M, D]."""
    parts = latents * slices(levels, latents.shape[-1])[:, None]
    kmeans = functools.partial(quantization.kmeans, num_codewords=size)
    return quantization.fitted(jax.vmap(kmeans)(jax.random.split(rng, levels), parts), latents, encode=encode)


def product(model, loss_weights, schema, tables, axis_name):
    """TARQ of order 0 with this quantizer."""
    module = Tarq(**common(model, schema, tables), **of_tarq(model) | {"encode": encode})
    start = functools.partial(fit, levels=model.num_levels, size=model.num_codewords)
    return tarq(module, loss_weights, axis_name=axis_name)._replace(fit=start)


def compare(config, dataset):
    """A row per quantizer: the student trained with it."""
    config.model.order = 0
    return small.table(config, dataset, ("tarq", "examples.product_quantization:product"))


if __name__ == "__main__":
    small.run(compare)
