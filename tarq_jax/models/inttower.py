"""IntTower: two towers that meet in many inner products, layer by layer (arXiv 2210.09890)."""

import functools

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from tarq_jax.models.two_tower import InteractionOutput, OnTwoTowers
from tarq_jax.types import Batch


def late_interaction(user: jax.Array, items: jax.Array) -> jax.Array:
    """`sum_u max_m <u, i_m> / sqrt(D)` over the vectors u of a user and i_m of an item.

    This is MaxSim of ColBERT (Khattab and Zaharia 2020), with the user in place of the query.

    Args:
      user: [B, U, D].
      items: [B, G, M, D].

    Returns:
      [B, G] float32.

    Example:
      >>> late_interaction(jnp.array([[[1.0], [-1.0]]]), jnp.array([[[[3.0], [2.0]]]])).tolist()
      [[1.0]]
    """
    chex.assert_shape(items, (user.shape[0], None, None, user.shape[-1]))
    products = jnp.einsum("bud,bgmd->bgum", user, items, preferred_element_type=jnp.float32)
    return products.max(axis=-1).sum(axis=-1) / jnp.sqrt(user.shape[-1])


class IntTower(OnTwoTowers):
    """Backbone logit plus `late_interaction` of vectors from every layer of the user tower with the item's.

    M vectors are computed from every layer of the user tower, and M from v_item (the FE-Block of Li et al.
    2022, arXiv 2210.09890). Left out: Light-SE, which weighs features before the towers, and CIR, a
    contrastive loss on v_user and v_item. The paper adds no inner product of v_user and v_item.

    Attributes:
      num_vectors: M, the number of vectors, each of width D.
    """

    num_vectors: int = 4

    def setup(self):
        """Creates the parts."""
        super().setup()
        vectors = functools.partial(
            nn.DenseGeneral, (self.num_vectors, self.width), dtype=self.compute.dtype)
        self.user_vectors = [vectors() for _ in range(len(self.hidden) + 1)]
        self.item_vectors = vectors()

    def __call__(self, batch: Batch) -> InteractionOutput:
        """Scores every candidate of every request."""
        candidates, history = self.backbone.embed(batch)
        layers = self.backbone.user_layers(batch, history)
        backbone = self.backbone.score(layers[-1], candidates, history)
        user = [project(layer) for project, layer in zip(self.user_vectors, layers, strict=True)]
        added = late_interaction(jnp.concatenate(user, axis=1), self.item_vectors(backbone.item))
        return InteractionOutput(logits=backbone.logits + added, backbone=backbone)
