"""TARQ of order 1: the student expands the teacher's own attention around its codewords (ours)."""

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from tarq_jax.attention import attention_weights
from tarq_jax.corrections import damping
from tarq_jax.expansion import first_order
from tarq_jax.models.target_attention import TargetAttentionOutput
from tarq_jax.models.tarq import AttentionComparison, Tarq, flat_queries
from tarq_jax.types import Batch, QuantizerOutput


class FirstOrderTarq(Tarq):
    """As `Tarq`, with projected queries as latents and the teacher's keys and values as history.

    Level 1 is the point of expansion; levels 2 to L quantize the residual that the Jacobian
    multiplies: `o = W (m_c + d J_c sum_{l>1} C_l[c_l])`, see `tarq_jax.expansion`. The factor d damps long
    residuals, see `tarq_jax.corrections.damping`. The student's only parameters are its head and one radius
    of d per attention head, which weight decay pulls towards 1. There is neither encoder nor decoder: the
    quantized latent is compared with the latent itself, and the attribute `decoded` has no effect.
    """

    def _setup_approximation(self):
        """One radius per head, in the units of its queries; all other parameters are the teacher's."""
        if self.num_levels < 2:
            raise ValueError(f"num_levels is {self.num_levels}, expected at least 2 for order 1")
        self.log_radius = self.param("log_radius", nn.initializers.constant(2.0), (self.num_heads, 1, 1))

    def latents(self, teacher: TargetAttentionOutput) -> jax.Array:
        """The vectors to quantize: the teacher's projected queries, [B, G, D]."""
        return flat_queries(teacher)

    def item_latents(self, items: jax.Array) -> jax.Array:
        """The latents of items, from their embeddings x_item alone, [..., G, D]."""
        return jnp.swapaxes(self.teacher.query(items), -2, -3).reshape(items.shape)

    def attend(
        self, codewords: jax.Array, quantizer: QuantizerOutput, teacher: TargetAttentionOutput,
        mask: chex.Array, num_aligned: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Each level's term of the output, [B, G, L, D], and `W m_c` [A, 1, K, D] of the first A requests.

        Levels after the first have no personalised codebook, because their terms depend on the first code.
        """
        frozen = self.student_gradient != "teacher"
        project = self.teacher.attention.frozen_outputs if frozen else self.teacher.attention.outputs

        def attend(queries, rows=slice(None)):
            return self.compute.attend(queries, teacher.keys[rows], teacher.values[rows], mask[rows])

        centre, residuals = self.centre_and_residuals(quantizer)
        mean, changes = first_order(attend, centre, residuals)
        damped = (self.damping(residuals) * changes).astype(changes.dtype)
        mean, changes = first_order(project, mean, damped)
        level_1 = jnp.swapaxes(codewords[0].reshape(-1, *teacher.keys.shape[1::2]), 0, 1)  # [H, K, E]
        aligned = jnp.broadcast_to(level_1, (num_aligned, *level_1.shape))
        personalized = project(attend(aligned, slice(num_aligned)))[:, None]
        return jnp.stack([mean, *changes], axis=2), personalized

    def centre_and_residuals(self, quantizer: QuantizerOutput) -> tuple[jax.Array, jax.Array]:
        """The codeword of level 1, [B, H, G, E], and those of the other levels, [L - 1, B, H, G, E]."""
        heads = (self.num_heads, self.width // self.num_heads)
        chosen = quantizer.chosen.reshape(*quantizer.chosen.shape[:-1], *heads)
        chosen = jnp.moveaxis(chosen, (2, 3), (0, 2))
        return chosen[0], chosen[1:]

    def damping(self, residuals: jax.Array) -> jax.Array:
        """Factor [B, H, G, 1] by which to damp the Jacobian's products with residuals [L - 1, B, H, G, E].

        The factor depends on the sum of the residuals. The product is linear, so the residuals could be
        damped before it; but then the gradient of the radius would go back through the attention.
        """
        return damping(residuals.sum(axis=0), radius=jnp.exp(self.log_radius))

    def compare_attention(self, batch: Batch, codewords: jax.Array) -> dict[str, AttentionComparison]:
        """By head, before their outputs are projected.

        To first order the weights still sum to one, but may be negative.
        """
        teacher = self.teacher(batch)
        quantizer = self.encode_candidates(codewords, self.latents(teacher), batch)
        mask = batch.history_mask[:, None, None]
        centre, residuals = self.centre_and_residuals(quantizer)
        value, changes = first_order(
            lambda queries: attention_weights(queries, teacher.keys, mask), centre, residuals)
        student = value + self.damping(residuals) * changes.sum(axis=0)
        weights = student, attention_weights(teacher.queries, teacher.keys, mask)
        arrays = *weights, *(each @ teacher.values for each in weights)
        return {f"head {index + 1}": AttentionComparison(*(array[:, index] for array in arrays))
                for index in range(self.num_heads)}

    def decode(self, passed: jax.Array, teacher: TargetAttentionOutput) -> tuple[jax.Array, jax.Array]:
        """The quantized latents unchanged, and the latents as their target, [B, G, D] each."""
        return passed, self.latents(teacher)
