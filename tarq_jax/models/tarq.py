"""TARQ: a student that looks target attention up in personalised codebooks (arXiv 2509.16931)."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from tarq_jax import quantization, shards
from tarq_jax.attention import attention_weights, personalized_codebook
from tarq_jax.models.embedding import ONE_DEVICE, Tables
from tarq_jax.models.layers import MLP, Compute, LevelAttention
from tarq_jax.models.target_attention import TargetAttention, TargetAttentionOutput, interaction_features
from tarq_jax.models.two_tower import TwoTowerOutput
from tarq_jax.quantization.encoding import bind_where
from tarq_jax.schema import Schema
from tarq_jax.types import Batch, QuantizerOutput

Head = Literal["scalar", "dot", "mlp"]
Decoded = Literal["query", "item"]
Reach = Literal["student", "backbone", "teacher"]

# Without blocks, because `jit` may split a batch over devices.
encode_batch = functools.partial(quantization.encode, block=0)


class TarqOutput(struct.PyTreeNode):
    """The student's logits, and everything that its losses need."""

    logits: jax.Array  # [B, G], student
    teacher: TargetAttentionOutput
    latents: jax.Array  # [B, G, D], z
    quantizer: QuantizerOutput
    personalized: jax.Array  # [A, L, K, D], of the first A requests, for the alignment loss
    aligned: jax.Array  # [A] bool, which of these count; A is the same on all shards, but some use one less
    attended: jax.Array  # [B, G, L, D], A_l[c_l]
    attention_output: jax.Array  # [B, G, D], o
    reconstruction: jax.Array  # [B, G, D], output of the decoder
    decoder_target: jax.Array  # [B, G, D], what the decoder should reconstruct


class AttentionComparison(struct.PyTreeNode):
    """Each candidate's attention in one head or level, of the student and of the teacher."""

    student_weights: jax.Array  # [B, G, N], over the history
    teacher_weights: jax.Array  # [B, G, N]
    student_output: jax.Array  # [B, G, E] of a head, [B, G, D] of a level
    teacher_output: jax.Array


def flat_queries(teacher: TargetAttentionOutput) -> jax.Array:
    """The teacher's projected queries with their heads concatenated, [B, G, D] float32."""
    flat = jnp.swapaxes(teacher.queries, 1, 2).reshape(teacher.attention_output.shape)
    return flat.astype(jnp.float32)


class Tarq(nn.Module):
    """Teacher and student in one module; the codewords are an argument, not a parameter.

    `z = RMSNorm(encoder(sg(x_item)))`, codes `c` by residual quantization, `A_l = MHA_l(C_l, H_t, H_t)`
    once per request, `o = sum_l A_l[c_l]`, and a head on top (TARQ; docs/mathematics.md, order 0).

    Attributes:
      schema: fields of the data.
      width: D.
      num_heads: H.
      hidden: hidden widths of all MLPs.
      num_levels: L.
      head: `scalar` adds `sum_l g_l(A_l, C_l)[c_l]` to the backbone's logit, L scalar look-ups per
        candidate; `dot` adds `<W o, v_item> / sqrt(D)`; `mlp` adds an MLP of
        `[o, x_item, o * x_item, v_user * v_item]`.
      decoded: what the decoder reconstructs from the quantized latent: `query`, the teacher's projected
        query, so that codewords resolve the differences that matter to attention (ours); or `item`, the
        item embedding (TARQ).
      aligned_share: share of a batch's requests, the first ones, for which training computes the whole
        personalised codebook. Only the alignment loss needs it; candidates attend with their own
        codewords, which gives the same result and is cheaper.
      student_gradient: how far the student's gradients reach. `student`: only its own parameters, so that
        the teacher trains as if alone. `backbone`: also the towers and item embeddings that its head
        reads, but not the teacher's history encoding nor the item embedding that is quantized.
        `teacher`: everywhere, which makes the teacher worse.
      encode: (codewords, latents) -> QuantizerOutput, e.g. with another `assign`. If it has a keyword
        `where`, as `quantization.encode` does, it is passed the mask of real candidates, [B, G] bool.
      pass_through: (latents, quantized) -> the quantized value with a gradient for the latent,
        `quantization.straight_through` or `quantization.rotate`.
      compute: see `Compute`.
      tables: how embedding tables are stored and looked up.
      axis_name: see `tarq_jax.shards`.
    """

    schema: Schema
    width: int = 32
    num_heads: int = 2
    hidden: Sequence[int] = (64,)
    num_levels: int = 3
    head: Head = "mlp"
    decoded: Decoded = "query"
    aligned_share: float = 1.0
    student_gradient: Reach = "student"
    encode: Callable[..., QuantizerOutput] = encode_batch
    pass_through: Callable[[jax.Array, jax.Array], jax.Array] = quantization.straight_through
    compute: Compute = Compute()
    tables: Tables = ONE_DEVICE
    axis_name: shards.AxisName = None

    def setup(self):
        """Creates the parts; raises ValueError for an option that is unknown or out of range."""
        if self.head not in get_args(Head):
            raise ValueError(f"head is {self.head!r}, expected one of {get_args(Head)}")
        if self.decoded not in get_args(Decoded):
            raise ValueError(f"decoded is {self.decoded!r}, expected one of {get_args(Decoded)}")
        if self.student_gradient not in get_args(Reach):
            raise ValueError(
                f"student_gradient is {self.student_gradient!r}, expected one of {get_args(Reach)}"
            )
        if not 0 < self.aligned_share <= 1:
            raise ValueError(f"aligned_share is {self.aligned_share}, expected a share in (0, 1]")
        self.teacher = self.make_teacher()
        self._setup_approximation()
        if self.head == "scalar":
            self.level_scores = [MLP(self.hidden, 1, self.compute) for _ in range(self.num_levels)]
        else:
            dot = self.head == "dot"
            self.student_head = nn.Dense(self.width, dtype=self.compute.dtype) if dot else MLP(
                self.hidden, 1, self.compute)

    def _setup_approximation(self):
        self.encoder = MLP(self.hidden, self.width, self.compute)
        self.latent_norm = nn.RMSNorm(use_scale=False, dtype=jnp.float32)
        self.decoder = MLP(self.hidden, self.width, self.compute)
        self.level_attention = LevelAttention(self.num_levels, self.num_heads, self.width, self.compute)

    def make_teacher(self) -> TargetAttention:
        """The teacher, as a separate model."""
        sizes = self.schema, self.width, self.num_heads, self.hidden
        return TargetAttention(*sizes, self.compute, self.tables, parent=None)

    def __call__(self, batch: Batch, codewords: jax.Array, quantize: jax.Array | bool = True) -> TarqOutput:
        """Scores every candidate with the student and with the teacher.

        Args:
          batch: requests.
          codewords: [L, K, D].
          quantize: False passes the unquantized latent to the decoder, to warm up the encoder before
            there are useful codewords.

        Raises:
          ValueError: the number of levels of codewords is not `num_levels`.
        """
        if len(codewords) != self.num_levels:
            raise ValueError(f"codewords: {len(codewords)} levels, expected num_levels={self.num_levels}")
        teacher = self.teacher(batch)
        gate, gate_backbone = (
            (lambda tree: tree) if self.student_gradient in reached else jax.lax.stop_gradient
            for reached in (("teacher",), ("teacher", "backbone"))
        )
        seen = gate(teacher)
        latents = self.latents(seen)
        quantizer = self.encode_candidates(codewords, latents, batch)
        aligned = shards.first(self.aligned_share, len(batch.history_mask), self.axis_name)
        attended, personalized = self.attend(codewords, quantizer, seen, batch.history_mask, len(aligned))
        passed = jnp.where(quantize, self.pass_through(latents, quantizer.quantized), latents)
        reconstruction, target = self.decode(passed, teacher)
        return TarqOutput(
            logits=self.student_logits(gate_backbone(teacher.backbone), attended, quantizer.chosen),
            teacher=teacher,
            latents=latents,
            quantizer=quantizer,
            personalized=personalized,
            aligned=aligned,
            attended=attended,
            attention_output=attended.sum(axis=-2),
            reconstruction=reconstruction,
            decoder_target=target,
        )

    def latents(self, teacher: TargetAttentionOutput) -> jax.Array:
        """The vectors to quantize: normalised encodings of the item embeddings, [B, G, D]."""
        return self.item_latents(teacher.backbone.candidates)

    def item_latents(self, items: jax.Array) -> jax.Array:
        """The latents of items, from their embeddings x_item alone, [..., G, D]."""
        return self.latent_norm(self.encoder(items))

    def candidate_latents(self, batch: Batch) -> jax.Array:
        """The latents [B, G, D] of a batch's candidates, for fitting a codebook."""
        return self.latents(self.teacher(batch))

    def encode_candidates(self, codewords: jax.Array, latents: jax.Array, batch: Batch) -> QuantizerOutput:
        """Encodes the latents [B, G, D] of candidates; padding does not affect other codes."""
        return bind_where(self.encode, batch.candidate_mask)(codewords, latents)

    def attend(
        self, codewords: jax.Array, quantizer: QuantizerOutput, teacher: TargetAttentionOutput,
        mask: chex.Array, num_aligned: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Each candidate's entries `A_l[c_l]` [B, G, L, D], and `A_l` [A, L, K, D] of the first A requests.

        The candidates attend with their own codewords. The result equals the look-up in the personalised
        codebook, and is cheaper if there are fewer candidates than codewords, as in training.
        """
        keys, values = self.level_attention.keys_values(teacher.history)
        queries = self.level_attention.queries(jnp.swapaxes(quantizer.chosen, 1, 2))
        attended = self.level_attention.outputs(self.compute.attend(queries, keys, values, mask))
        first = slice(num_aligned)
        return jnp.swapaxes(attended, 1, 2), self._personalize(
            codewords, keys[first], values[first], mask[first]
        )

    def personalize(self, codewords: jax.Array, history: jax.Array, mask: chex.Array) -> jax.Array:
        """`A_l = MHA_l(C_l, H_t, H_t)`: [L, K, D] and [B, N, D] to [B, L, K, D], once per request."""
        return self._personalize(codewords, *self.level_attention.keys_values(history), mask)

    def _personalize(
        self, codewords: jax.Array, keys: jax.Array, values: jax.Array, mask: chex.Array
    ) -> jax.Array:
        queries = self.level_attention.queries(codewords)
        block = self.compute.attention_block
        return self.level_attention.outputs(personalized_codebook(queries, keys, values, mask, block=block))

    def compare_attention(self, batch: Batch, codewords: jax.Array) -> dict[str, AttentionComparison]:
        """By level, as the student's heads are not the teacher's.

        Weights are averages over heads. The student's output is the sum of the levels up to this one, which
        is to equal the teacher's.
        """
        teacher = self.teacher(batch)
        mask = batch.history_mask[:, None, None]
        exact = attention_weights(teacher.queries, teacher.keys, mask).mean(axis=1)
        chosen = self.encode_candidates(codewords, self.latents(teacher), batch).chosen
        queries = self.level_attention.queries(jnp.swapaxes(chosen, 1, 2))
        keys, values = self.level_attention.keys_values(teacher.history)
        weights = attention_weights(queries, keys, mask[:, None])
        outputs = jnp.cumsum(self.level_attention.outputs(weights @ values), axis=1)
        return {f"level {index + 1}": AttentionComparison(
            weights[:, index].mean(axis=1), exact, outputs[:, index], teacher.attention_output)
            for index in range(self.num_levels)}

    def decode(self, passed: jax.Array, teacher: TargetAttentionOutput) -> tuple[jax.Array, jax.Array]:
        """The decoder's output for the quantized latents [B, G, D], and its target."""
        target = teacher.backbone.candidates if self.decoded == "item" else flat_queries(teacher)
        return self.decoder(passed), target

    def student_logits(self, backbone: TwoTowerOutput, attended: jax.Array, chosen: jax.Array) -> jax.Array:
        """Backbone logit plus the head's term, from `A_l[c_l]` and `C_l[c_l]` [B, G, L, D] each: [B, G]."""
        if self.head == "scalar":
            added = self.codeword_scores(attended, chosen).sum(axis=-1, dtype=jnp.float32)
        elif self.head == "dot":
            projected = self.student_head(attended.sum(axis=-2))
            added = jnp.sum(projected * backbone.item, axis=-1, dtype=jnp.float32) / jnp.sqrt(self.width)
        else:
            added = self.student_head(interaction_features(attended.sum(axis=-2), backbone))[..., 0]
        return backbone.logits + added

    def codeword_scores(self, attended: jax.Array, codewords: jax.Array) -> jax.Array:
        """`s_l = g_l(A_l, C_l)` of the scalar head: [..., L, D] twice to [..., L]."""
        inputs = jnp.concatenate([attended, codewords], axis=-1)
        levels = [score(inputs[..., index, :])[..., 0] for index, score in enumerate(self.level_scores)]
        return jnp.stack(levels, axis=-1)
