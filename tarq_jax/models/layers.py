"""Layers that the models share: feature encoder, multi-layer perceptron, multi-head attention."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from tarq_jax.attention import multi_head_attention
from tarq_jax.models.embedding import ONE_DEVICE, Embedding, Tables
from tarq_jax.schema import Field
from tarq_jax.types import Features


class Compute(NamedTuple):
    """How a model computes: settings of memory and precision that hardly change its results.

    Attributes:
      dtype: type of the activations inside the networks. Parameters, embeddings, softmax, quantized latents
        and logits stay float32.
      remat: recompute history encoders and attention weights in the backward pass instead of keeping them.
        This saves memory on accelerators; on CPU, XLA's scheduler recomputes too early to save any.
      attention_block: number of queries and of positions that attention processes together, see
        `tarq_jax.attention.attention_sums`; 0 processes all together.
    """

    dtype: Any = jnp.float32
    remat: bool = False
    attention_block: int = 0

    def attend(self, queries: jax.Array, keys: jax.Array, values: jax.Array, mask: chex.Array) -> jax.Array:
        """`multi_head_attention` with these settings."""
        attend = functools.partial(multi_head_attention, block=self.attention_block)
        attend = jax.checkpoint(attend) if self.remat else attend
        return attend(queries.astype(keys.dtype), keys, values, mask)



class FeatureEncoder(nn.Module):
    """Embeds the fields of one side: the sum of one linear map per field, `[..., D]`.

    Categorical fields are embedded; numeric and vector fields are multiplied by a matrix. Without
    fields the output is the bias alone. Padding (id 0) shares one learned row with ids that are not in
    the vocabulary; masks keep padding out.

    Attributes:
      fields: the fields to read from the features.
      width: D.
      tables: how embedding tables are stored and looked up.
    """

    fields: tuple[Field, ...]
    width: int
    tables: Tables = ONE_DEVICE

    @nn.compact
    def __call__(self, features: Features, leading: tuple[int, ...]) -> jax.Array:
        """Features with leading axes `leading` to [*leading, D]."""
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        encoded = jnp.broadcast_to(bias, (*leading, self.width))
        for field in self.fields:
            values = features[field.name]
            chex.assert_shape(values, (*leading, *field.shape))
            if field.kind == "categorical":
                encoded += Embedding(field.size, self.width, self.tables, name=field.name)(values)
            else:
                values = values.reshape(*leading, field.size)
                encoded += nn.Dense(self.width, use_bias=False, name=field.name)(values)
        return encoded


class MLP(nn.Module):
    """Dense layers with GELU between them.

    Attributes:
      hidden: widths of the hidden layers.
      width: width of the output.
      compute: see `Compute`.
    """

    hidden: Sequence[int]
    width: int
    compute: Compute = Compute()

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., any] to [..., width]."""
        return self.layers(inputs)[-1]

    @nn.compact
    def layers(self, inputs: jax.Array) -> list[jax.Array]:
        """The outputs of all layers, [..., any] to [..., width of the layer] each; the last is the result."""
        outputs = []
        for size in self.hidden:
            inputs = nn.gelu(nn.Dense(size, dtype=self.compute.dtype)(inputs))
            outputs.append(inputs)
        return [*outputs, nn.Dense(self.width, dtype=self.compute.dtype)(inputs)]


def heads_of(width: int, num_heads: int) -> tuple[int, int]:
    """`(H, E)` for a width D = H E; raises ValueError if `num_heads` does not divide the width."""
    if width % num_heads:
        raise ValueError(f"num_heads is {num_heads}, expected a divisor of the width {width}")
    return num_heads, width // num_heads


class MultiHeadAttention(nn.Module):
    """`MHA(query, key and value)` with its parts as separate methods, so that keys and values can be reused.

    Attributes:
      num_heads: H; has to divide `width`.
      width: D.
      compute: see `Compute`.
    """

    num_heads: int
    width: int
    compute: Compute = Compute()

    def setup(self):
        """Creates the projections; a ValueError if `num_heads` does not divide `width`."""
        heads = heads_of(self.width, self.num_heads)
        dense = functools.partial(nn.DenseGeneral, dtype=self.compute.dtype)
        self.query_projection = dense(heads)
        self.key_projection = dense(heads)
        self.value_projection = dense(heads)
        self.output_projection = dense(self.width, axis=(-2, -1))

    def queries(self, inputs: jax.Array) -> jax.Array:
        """[..., Q, D] to [..., H, Q, E]."""
        return jnp.swapaxes(self.query_projection(inputs), -2, -3)

    def keys_values(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[..., N, D] to keys and values [..., H, N, E]."""
        return jnp.swapaxes(self.key_projection(inputs), -2, -3), self.values(inputs)

    def values(self, inputs: jax.Array) -> jax.Array:
        """[..., N, D] to values [..., H, N, E]."""
        return jnp.swapaxes(self.value_projection(inputs), -2, -3)

    def outputs(self, attended: jax.Array) -> jax.Array:
        """[..., H, Q, E] to [..., Q, D]."""
        return self.output_projection(jnp.swapaxes(attended, -2, -3))

    def frozen_outputs(self, attended: jax.Array) -> jax.Array:
        """As `outputs`, but no gradient reaches the projection."""
        variables = jax.lax.stop_gradient(self.output_projection.variables)
        projection = self.output_projection.clone(parent=None)
        return nn.apply(nn.DenseGeneral.__call__, projection)(variables, jnp.swapaxes(attended, -2, -3))

    def __call__(self, query_inputs: jax.Array, history: jax.Array, mask: chex.Array) -> jax.Array:
        """[B, Q, D] attends over the positions of [B, N, D] that mask [B, N] allows: [B, Q, D]."""
        keys, values = self.keys_values(history)
        return self.outputs(self.compute.attend(self.queries(query_inputs), keys, values, mask))


class LevelAttention(nn.Module):
    """`MHA_l` for all levels l: each level has its own projections; the attention is one batched operation.

    Attributes:
      num_levels: L.
      num_heads: H; has to divide `width`.
      width: D.
      compute: see `Compute`.
    """

    num_levels: int
    num_heads: int
    width: int
    compute: Compute = Compute()

    def setup(self):
        """Creates the projections; a ValueError if `num_heads` does not divide `width`."""
        levels, heads = self.num_levels, heads_of(self.width, self.num_heads)
        scaled = functools.partial(
            nn.initializers.variance_scaling, 1.0, "fan_in", "truncated_normal", batch_axis=0
        )
        into, out_of = scaled(in_axis=1, out_axis=(2, 3)), scaled(in_axis=(1, 2), out_axis=3)
        for name in ("query_kernel", "key_kernel", "value_kernel"):
            setattr(self, name, self.param(name, into, (levels, self.width, *heads)))
        self.value_bias = self.param("value_bias", nn.initializers.zeros, (levels, heads[0], 1, heads[1]))
        self.output_kernel = self.param("output_kernel", out_of, (levels, *heads, self.width))

    def queries(self, inputs: jax.Array) -> jax.Array:
        """[..., L, Q, D] to [..., L, H, Q, E]."""
        return self._einsum("...lqd,ldhe->...lhqe", inputs, self.query_kernel)

    def keys_values(self, history: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, N, D] to keys and values [B, L, H, N, E]."""
        keys = self._einsum("bnd,ldhe->blhne", history, self.key_kernel)
        values = self._einsum("bnd,ldhe->blhne", history, self.value_kernel)
        return keys, values + self.value_bias.astype(values.dtype)

    def outputs(self, attended: jax.Array) -> jax.Array:
        """[..., L, H, Q, E] to [..., L, Q, D]."""
        return self._einsum("...lhqe,lhed->...lqd", attended, self.output_kernel)

    def _einsum(self, axes: str, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.einsum(axes, *promote_dtype(inputs, kernel, dtype=self.compute.dtype))
