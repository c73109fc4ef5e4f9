"""TARQ of order 1: the student expands the teacher's own attention around its codewords (ours)."""

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from tarq_jax.attention import attention_weights
from tarq_jax.corrections import damping
from tarq_jax.expansion import first_order
from tarq_jax.models.target_attention import TargetAttentionOutput
from tarq_jax.models.tarq import AttentionWeights, Tarq, flat_queries
from tarq_jax.types import Batch, QuantizerOutput


class FirstOrderTarq(Tarq):
    """As `Tarq`, with projected queries as latents and the teacher's keys and values as history.

    Level 1 is the point of expansion, levels 2 to L quantize the residual that the Jacobian
    multiplies: `o = W (m_c + d J_c sum_{l>1} C_l[c_l])`, see `tarq_jax.expansion`; d damps long
    residuals, see `tarq_jax.corrections.damping`. The head, and the radius of d for each attention
    head, are all that the student has to learn. There is neither encoder nor decoder: what is decoded is the
    latent itself, and `decoded` does not matter.
    """

    def _setup_approximation(self):
        """A radius a head, in the units of its queries; everything else is the teacher's."""
        if self.num_levels < 2:
            raise ValueError(f"num_levels is {self.num_levels}, expected at least 2 for order 1")
        self.log_radius = self.param("log_radius", nn.initializers.constant(2.0), (self.num_heads, 1, 1))

    def latents(self, teacher: TargetAttentionOutput) -> jax.Array:
        """What is quantized: the teacher's projected queries, [B, G, D]."""
        return flat_queries(teacher)

    def item_latents(self, items: jax.Array) -> jax.Array:
        """The latents of items by their embeddings x_item alone, [..., G, D]."""
        return jnp.swapaxes(self.teacher.query(items), -2, -3).reshape(items.shape)

    def attend(
        self, codewords: jax.Array, quantizer: QuantizerOutput, teacher: TargetAttentionOutput,
        mask: chex.Array, num_aligned: int,
    ) -> tuple[jax.Array, jax.Array]:
        """What each level adds to the output, [B, G, L, D], and `W m_c` [A, 1, K, D] of the first A requests.

        Further levels have no personalised codebook of their own: what they add depends on the first.
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
        """The codeword of level 1, [B, H, G, E], and those of further levels, [L - 1, B, H, G, E]."""
        heads = (self.num_heads, self.width // self.num_heads)
        chosen = quantizer.chosen.reshape(*quantizer.chosen.shape[:-1], *heads)
        chosen = jnp.moveaxis(chosen, (2, 3), (0, 2))
        return chosen[0], chosen[1:]

    def damping(self, residuals: jax.Array) -> jax.Array:
        """Of [L - 1, B, H, G, E], together: [B, H, G, 1], to multiply what the Jacobian makes of them with.

        That is linear, so that it may as well come first; but then the gradient of the radius would go back
        through attention.
        """
        return damping(residuals.sum(axis=0), radius=jnp.exp(self.log_radius))

    def attention_weights(self, batch: Batch, codewords: jax.Array) -> dict[str, AttentionWeights]:
        """Weights head by head; to first order they still sum to one, but may be negative."""
        teacher = self.teacher(batch)
        quantizer = self.encode_candidates(codewords, self.latents(teacher), batch)
        mask = batch.history_mask[:, None, None]
        centre, residuals = self.centre_and_residuals(quantizer)
        value, changes = first_order(
            lambda queries: attention_weights(queries, teacher.keys, mask), centre, residuals)
        student = value + self.damping(residuals) * changes.sum(axis=0)
        pairs = student, attention_weights(teacher.queries, teacher.keys, mask)
        return {f"head {index + 1}": AttentionWeights(*(weights[:, index] for weights in pairs))
                for index in range(self.num_heads)}

    def decode(self, passed: jax.Array, teacher: TargetAttentionOutput) -> tuple[jax.Array, jax.Array]:
        """The quantized latents as they are, beside the latents [B, G, D]."""
        return passed, self.latents(teacher)
