"""The method by which a trained model is served, and the parts that all methods share.

A `Method` consists of three pure functions and the weights of each. The user side runs once per request. The
item side scores items, usually by one of `tarq_jax.serving.item_side.SCORES`. `encode` computes what the
index stores for an item. Products that do not depend on the request are folded into the items or the weights.
Everything is served in float32, whatever precision the model was trained in.

The user side takes a request as arrays, in the axis letters of `tarq_jax.types`: `user` and `context`
(name -> [B, ...]), `events` (name -> [B, N, ...]), `embedding` [B, N, D] of the history's items, and `mask`
[B, N].

The functions below take a module that is bound to its variables, or parameters as NumPy arrays.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tarq_jax.expansion import expand
from tarq_jax.models import Compute, TargetAttention, TwoTower
from tarq_jax.schema import ITEM_ID, Schema
from tarq_jax.serving.item_side import SCORES, Arrays, Score
from tarq_jax.types import Batch, Features

SERVED = Compute(attention_block=256)  # splits longer histories: bounds memory, and is faster on CPU
EXPANSION_BLOCK = 2048  # the same for order 1, whose moments are slower in small blocks


class Method(NamedTuple):
    """A trained model, ready to be exported.

    Attributes:
      name: name of the method; a key of `SCORES`, unless `score` is given.
      schema: schema of requests and items.
      user_side: (weights, request) -> state of the users, [B, ...] each.
      encode: (weights, item features name -> [M, ...]) -> what the index stores for items, [M, ...] each.
      user_weights: weights of `user_side`; may hold more than it reads.
      item_weights: weights of the item side.
      encode_weights: weights of `encode`; may hold more than it reads.
      num_codewords: K, or one number per level if levels differ; 0 without a codebook.
      keeps_history: whether the state of a user grows with the length of the history.
      known: arrays [V, ...] for the items of the training data, used instead of those that `encode` computes.
      score: the item side, if `SCORES` does not have it.
    """

    name: str
    schema: Schema
    user_side: Callable[[Any, Arrays], Arrays]
    encode: Callable[[Any, Features], Arrays]
    user_weights: Any
    item_weights: Any
    encode_weights: Any
    num_codewords: int | tuple[int, ...] = 0
    keeps_history: bool = False
    known: Mapping[str, np.ndarray] = {}
    score: Score | None = None

    @property
    def item_side(self) -> Score:
        """(item weights, state of one user, items) -> logits."""
        return self.score or SCORES[self.name]


def bound(function: Callable[..., Any], module: nn.Module) -> Callable[[Any, Any], Any]:
    """`function(bound module, weights, inputs)` as a pure function of weights and inputs."""
    applied = nn.apply(function, module)
    return lambda weights, inputs: applied(weights["variables"], weights, inputs)


def user_and_history(backbone: TwoTower, request: Arrays) -> tuple[jax.Array, jax.Array]:
    """v_user [B, D] and the history X [B, N, D]."""
    layers, history = user_layers_and_history(backbone, request)
    return layers[-1], history


def user_layers_and_history(backbone: TwoTower, request: Arrays) -> tuple[list[jax.Array], jax.Array]:
    """As `user_and_history`, but with the output of every layer of the user tower, [B, any] each."""
    mask = request["mask"]
    nothing = jnp.zeros((mask.shape[0], 0))
    batch = Batch(
        user_id=jnp.zeros(mask.shape[0], jnp.int32), user=request["user"], context=request["context"],
        history=request["events"], history_mask=mask, candidates={}, candidate_mask=nothing > 0,
        labels=nothing, weights=nothing)
    history = backbone.with_events(batch, request["embedding"])
    return backbone.user_layers(batch, history), history


def history_of_teacher(module: TargetAttention, request: Arrays) -> tuple[jax.Array, jax.Array, jax.Array]:
    """v_user [B, D], keys and values [B, H, N, E]."""
    user, history = user_and_history(module.backbone, request)
    return user, *module.attention.keys_values(module.history_encoder(history, request["mask"]))


def item_towers(backbone: TwoTower, features: Features) -> dict[str, jax.Array]:
    """x_item and v_item, [M, D] each."""
    embedding = backbone.item_features(features, features[ITEM_ID].shape)
    return {"embedding": embedding, "vector": backbone.item_tower(embedding)}


def interaction_items(backbone: TwoTower, weights: Arrays, features: Features) -> dict[str, jax.Array]:
    """`item_towers`, and what x_item adds to the first layer of the interaction head, [M, F]."""
    arrays = item_towers(backbone, features)
    head = weights["head"]
    return arrays | {"first": arrays["embedding"] @ head["first_item"] + head["first_bias"]}


def interaction_user(user: jax.Array, weights: Arrays) -> dict[str, jax.Array]:
    """v_user as factors of v_item: `vector` [B, D] for the backbone, `towers` [B, D, F] for the head."""
    towers = user[:, :, None] * weights["head"]["first_towers"]
    return {"vector": user / math.sqrt(user.shape[-1]), "towers": towers}


def tables(attended: jax.Array, weights: Arrays) -> dict[str, jax.Array]:
    """Personalised codebooks [B, L, K, D], unchanged and multiplied by the head's first layer."""
    return {"table": attended, "table_first": attended @ weights["head"]["first_output"]}


def expansion(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> dict[str, Any]:
    """Means [B, K, D], and Jacobians [B, K, E, H, E], query dimension first; see `item_side.change`."""
    found = expand(queries, keys, values, mask, block=EXPANSION_BLOCK)
    means = jnp.swapaxes(found.means, 1, 2)
    return {"means": means.reshape(*means.shape[:2], -1),
            "jacobians": jnp.transpose(found.jacobians, (0, 2, 4, 1, 3))}


def further_levels(levels: Iterable[Any]) -> dict[str, Any]:
    """Codewords [K, H, E] of levels 2 to L, as [K, E, H] each: query dimension first, as in the Jacobians."""
    return {"further": [np.swapaxes(level, 1, 2) for level in levels]}


def side_by_side(heads: jax.Array) -> jax.Array:
    """[H, M, E] to [M, D]."""
    return jnp.swapaxes(heads, 0, 1).reshape(heads.shape[1], -1)


def backbone_bias(params: Any) -> dict[str, np.ndarray]:
    """The bias of a target-attention model's backbone."""
    return {"bias": params["backbone"]["bias"]}


def output_projection(params: Any) -> tuple[Any, Any]:
    """Kernel [D, D] and bias [D] of `o = attended @ kernel + bias`, with the heads side by side."""
    projection = params["attention"]["output_projection"]
    return projection["kernel"].reshape(-1, projection["kernel"].shape[-1]), projection["bias"]


def dense_layers(params: Any) -> list[dict[str, np.ndarray]]:
    """The dense layers of an `MLP`, in order."""
    return [params[f"Dense_{index}"] for index in range(len(params))]


def interaction_head(params: Any) -> dict[str, Any]:
    """An MLP of `[o, x_item, o * x_item, v_user * v_item]`, with its first layer in four parts [D, F]."""
    first, *layers = dense_layers(params)
    names = ("first_output", "first_item", "first_product", "first_towers")
    quarters = dict(zip(names, np.split(first["kernel"], 4), strict=True))
    return quarters | {"first_bias": first["bias"], "layers": layers}


def head_on_attended(params: Any, head: dict[str, Any]) -> dict[str, Any]:
    """Weights of a score head on the attention output of a target-attention model before its projection."""
    kernel, bias = output_projection(params)
    return head | backbone_bias(params) | {"output_kernel": kernel, "output_bias": bias}
