"""Health of the codebook during training, cheap enough for every step."""

import jax
import jax.numpy as jnp

from tarq_jax.types import Codebook, QuantizerOutput

DEAD = 0.01  # fraction of an even share of a level's running count


def codebook_metrics(codebook: Codebook, output: QuantizerOutput, where: jax.Array) -> dict[str, jax.Array]:
    """Scalars for each level, counted from 1; all finite, and global under `jit` over a mesh.

    Args:
      codebook: with running counts.
      output: result of quantizing this step's latents, with leading axes `...`.
      where: [...] bool, True for latents that count.

    Returns:
      `codebook/utilisation_l`: share of codewords that the step used. `codebook/perplexity_l`: perplexity of
      the running counts, the number of codewords in even use with the same entropy. `codebook/dead_l`: number
      of codewords whose running count is below `DEAD` of an even share. `codebook/quantization_error_l`:
      share of the latents' energy that remains after levels 1 to l.
    """
    metrics: dict[str, jax.Array] = {}
    real = where[..., None].astype(output.residuals.dtype)
    energy = jnp.sum(real * output.residuals[..., 0, :] ** 2)
    for index, counts in enumerate(codebook.counts):
        used = jnp.zeros(len(counts)).at[output.codes[..., index]].add(where)
        share = counts / jnp.maximum(counts.sum(), jnp.finfo(counts.dtype).tiny)
        entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0))
        left = jnp.sum(real * (output.residuals[..., index, :] - output.chosen[..., index, :]) ** 2)
        metrics |= {
            f"codebook/utilisation_{index + 1}": jnp.mean(used > 0),
            f"codebook/perplexity_{index + 1}": jnp.exp(entropy),
            f"codebook/dead_{index + 1}": jnp.sum(counts < DEAD * counts.mean()),
            f"codebook/quantization_error_{index + 1}": left / jnp.where(energy > 0, energy, 1.0),
        }
    return metrics
