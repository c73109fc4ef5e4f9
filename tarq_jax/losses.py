"""The losses of TARQ, each a pure function that returns one value per candidate.

Reduce them with `weighted_mean`. Sources: TARQ (arXiv 2509.16931) and docs/mathematics.md. Shapes that do not
fit raise chex's AssertionError; nothing is broadcast.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import optax

from tarq_jax import shards
from tarq_jax.blockwise import best_block, check_block, split_blocks
from tarq_jax.distances import centred, negative_distances
from tarq_jax.kernels import Implementation, pick, with_derivative_of


def weighted_mean(
    values: jax.Array, weights: chex.Array, *, of: chex.Array | None = None,
    axis_name: shards.AxisName = None,
) -> jax.Array:
    """`sum(w x) / sum(w)`: the mean of `values` by non-negative `weights`; 0 if no weight is positive.

    Values of zero weight are left out, even if they are NaN; a NaN of positive weight makes the result NaN.

    Args:
      values: any shape.
      weights: the same shape.
      of: weights of the full batch, of any shape, if `values` are only a part of it. Dividing by their sum
        makes the results of all parts add up to the mean over the full batch. None if `values` are the full
        batch.
      axis_name: axis of the shards of a batch, see `tarq_jax.shards`.

    Returns:
      []; this shard's contribution. Summed over shards, the contributions are the mean over the full batch.

    Example:
      >>> float(weighted_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1.0, 1.0, 0.0])))
      2.0
    """
    chex.assert_equal_shape([values, weights])
    total = shards.total(jnp.sum(weights if of is None else of), axis_name)
    weighted = jnp.where(weights > 0, values * weights, 0.0)
    return jnp.sum(weighted) / jnp.where(total > 0, total, 1.0)


def binary_cross_entropy(logits: jax.Array, labels: chex.Array) -> jax.Array:
    """`-y log p - (1 - y) log(1 - p)` with `p = sigmoid(logit)`, elementwise; labels may be soft."""
    chex.assert_equal_shape([logits, labels])
    return optax.losses.sigmoid_binary_cross_entropy(logits, labels)


def distillation(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """`binary_cross_entropy(student, sg(sigmoid(teacher)))`, elementwise (Hinton et al. 2015).

    It is smallest where student and teacher agree; there it equals the teacher's entropy.
    """
    return binary_cross_entropy(student_logits, jax.lax.stop_gradient(jax.nn.sigmoid(teacher_logits)))


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """`|prediction - sg(target)|^2` over the last axis: [..., D] twice to [...]."""
    chex.assert_equal_shape([prediction, target])
    return jnp.sum((prediction - jax.lax.stop_gradient(target)) ** 2, axis=-1)


def output_reconstruction(student_output: jax.Array, teacher_output: jax.Array) -> jax.Array:
    """`0.5 |o - sg(o_ta)|^2`: the student's attention output against the teacher's, [B, G, D] to [B, G]."""
    return 0.5 * squared_error(student_output, teacher_output)


def commitment(latents: jax.Array, quantized: jax.Array) -> jax.Array:
    """`|z - sg(z_q)|^2` keeps latents near their codewords (van den Oord et al. 2017), [..., D] to [...]."""
    return squared_error(latents, quantized)


def codebook_loss(chosen: jax.Array, residuals: jax.Array) -> jax.Array:
    """`sum_l |C_l[c_l] - sg(r_l)|^2`: pulls each chosen codeword towards its residual.

    Args:
      chosen: [..., L, D], the chosen codewords.
      residuals: [..., L, D], the residuals for which they were chosen.

    Returns:
      [...].
    """
    return jnp.sum(squared_error(chosen, residuals), axis=-1)


def codebook_alignment(
    latents: jax.Array,
    teacher_outputs: jax.Array,
    codewords: jax.Array,
    personalized: jax.Array,
    chosen: jax.Array,
    attended: jax.Array,
    *,
    block: int | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Makes the ranking of codewords by latent agree with their ranking by attention output.

    Level by level, with `v_1 = z` and `w_1 = sg(o_ta)`: `P = softmax_k(-|v_l - C_l[k]|^2)`,
    `Q = softmax_k(-|w_l - A_l[k]|^2)`; adds `KL(P||Q) + KL(Q||P)`, which is
    `sum_k (P - Q)(log P - log Q)`; then `v_{l+1} = v_l - C_l[c_l]`, `w_{l+1} = w_l - A_l[c_l]`
    (TARQ's released code; docs/mathematics.md).

    Args:
      latents: [B, G, D], `z`.
      teacher_outputs: [B, G, D], `o_ta`; gets no gradient.
      codewords: [L, K, D], `C`.
      personalized: [B, L, K, D], `A`.
      chosen: [B, G, L, D], `C_l[c_l]`.
      attended: [B, G, L, D], `A_l[c_l]`.
      block: number of candidates of a request processed together. Memory then grows with B x block x K
        instead of B x G x K, and the backward pass recomputes what it needs. 0 processes all together; None
        chooses, see `tarq_jax.blockwise.best_block`.
      implementation: see `tarq_jax.kernels`.

    Returns:
      [B, G], at least 0; 0 if both distributions agree at every level.

    Raises:
      NotImplementedError: `implementation` is "pallas", and no kernel supports these arguments.
      ValueError: `block` is no whole number or negative, or `implementation` is unknown.
    """
    chex.assert_rank([latents, codewords], 3)
    requests, candidates, width = latents.shape
    chex.assert_shape(codewords, (None, None, width))
    chex.assert_equal_shape([latents, teacher_outputs])
    chex.assert_shape(personalized, (requests, *codewords.shape))
    chex.assert_shape([chosen, attended], (requests, candidates, len(codewords), width))
    arguments = latents, jax.lax.stop_gradient(teacher_outputs), codewords, personalized, chosen, attended
    check_block(block)
    block = best_block(candidates, codewords.shape[1], 256) if block is None else block
    plain = functools.partial(_alignment_in_blocks, block=block) if 0 < block < candidates else _alignment
    kernel = pick("align", implementation, *arguments)
    return (with_derivative_of(plain, kernel) if kernel else plain)(*arguments)


def _alignment(latent, output, codewords, personalized, chosen, attended):
    total = jnp.zeros(latent.shape[:-1], latent.dtype)
    for level in range(codewords.shape[0]):
        log_p = jax.nn.log_softmax(negative_distances(*centred(latent, codewords[level])))
        log_q = jax.nn.log_softmax(negative_distances(*centred(
            output, personalized[:, level], personalized[:, level, :1])))
        total += jnp.sum((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q), axis=-1)
        latent = latent - chosen[:, :, level]
        output = output - attended[:, :, level]
    return total


def _alignment_in_blocks(latents, outputs, codewords, personalized, chosen, attended, *, block):
    requests, candidates = latents.shape[:2]

    @jax.checkpoint
    def of_block(parts):
        latents, outputs, chosen, attended = parts
        return _alignment(latents, outputs, codewords, personalized, chosen, attended)

    parts = tuple(split_blocks(array, block, 1) for array in (latents, outputs, chosen, attended))
    found = jax.lax.map(of_block, parts)
    return jnp.moveaxis(found, 0, 1).reshape(requests, -1)[:, :candidates]
