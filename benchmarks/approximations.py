"""The baselines of `tarq_jax.models` as they would be served: for the frontier, not for export by users.

As in the methods of `tarq_jax.serving`, whatever depends on only the user or only the item is computed once
per user or item. Linear attention and SDIM keep sums of the history. DIN compares every pair of candidate and
event. ETA searches by Hamming distance and attends to the events that it finds. IntTower takes the best of a
few products. COLD gates the vectors of two towers and feeds them to an MLP.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tarq_jax.approximate_attention import EPSILON, hash_planes, positive_features, sides, signature_codes
from tarq_jax.attention import attention_sums
from tarq_jax.models import Din, HardSearch, IntTower, LinearAttention, Sdim
from tarq_jax.serving.item_side import (
    Arrays,
    Score,
    after_first,
    in_blocks,
    in_blocks_on_cpu,
    look_up,
    on_attended,
)
from tarq_jax.serving.method import (
    SERVED,
    Method,
    bound,
    dense_layers,
    head_on_attended,
    interaction_head,
    interaction_items,
    interaction_user,
    item_towers,
    side_by_side,
    user_and_history,
    user_layers_and_history,
)
from tarq_jax.serving.vectors import read

ROUNDS, BITS, SELECTED = 16, 3, 16  # the models' default values


class Attention(NamedTuple):
    """How a baseline attends, in three parts.

    Attributes:
      user: (module, encoded history, history X, mask) -> arrays of the user's state, [B, ...] each.
      item: (module, x_item) -> arrays that the index stores for the attention, [M, ...] each.
      score: function that scores the items.
      num_codewords: exclusive upper bound of the integers that the index stores.
      keeps_history: whether the state grows with the history.
      weights: parameters -> weights of the item side, in addition to the head's.
    """

    user: Callable[..., dict[str, Any]]
    item: Callable[..., dict[str, Any]]
    score: Score
    num_codewords: int = 0
    keeps_history: bool = False
    weights: Callable[[Any], dict[str, Any]] = lambda params: {}


def linear_user(module: nn.Module, encoded: jax.Array, history: jax.Array, mask: jax.Array) -> dict[str, Any]:
    """Sums over the history: `sums` [B, H, E, E] and `totals` [B, H, E]."""
    keys, values = module.attention.keys_values(encoded)
    features = jnp.where(mask[:, None, :, None], positive_features(keys), 0.0)
    return {"sums": jnp.swapaxes(features, -1, -2) @ values, "totals": features.sum(axis=-2)}


def linear_item(module: nn.Module, embedding: jax.Array) -> dict[str, Any]:
    """Positive features of the queries, [M, D]."""
    return {"query": positive_features(side_by_side(module.query(embedding)))}


@in_blocks_on_cpu
def linear(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """One product per head."""
    heads, width, _ = user["sums"].shape
    queries = jnp.swapaxes(read(items, "query").reshape(-1, heads, width), 0, 1)
    attended = queries @ user["sums"] / (queries @ user["totals"][..., None] + EPSILON)
    return on_attended(weights, user, items, side_by_side(attended))


def codes_of(vectors: jax.Array) -> jax.Array:
    """The code of each round's signature: [..., D] to [..., R]."""
    return signature_codes(vectors, hash_planes(vectors.shape[-1], ROUNDS, BITS))


def sdim_user(module: nn.Module, encoded: jax.Array, history: jax.Array, mask: jax.Array) -> dict[str, Any]:
    """Buckets of every round: sums of their values [B, R, S, D] and numbers of their events [B, R, S]."""
    filled = jnp.where(mask[..., None, None], jax.nn.one_hot(codes_of(history), 2**BITS), 0.0)
    values = jnp.swapaxes(module.attention.values(encoded), 1, 2)
    values = values.reshape(*values.shape[:2], -1)
    return {"buckets": jnp.einsum("bnrs,bnd->brsd", filled, values), "counts": filled.sum(axis=1)}


def sdim_item(module: nn.Module, embedding: jax.Array) -> dict[str, Any]:
    """One code per round, [M, R]."""
    return {"codes": codes_of(embedding)}


@in_blocks_on_cpu
def sdim(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """One look-up per round."""
    attended, count = (look_up(user[name], items["codes"]) for name in ("buckets", "counts"))
    return on_attended(weights, user, items, attended / jnp.maximum(count, 1.0)[:, None])


def signs_of(vectors: jax.Array) -> jax.Array:
    """Whether a vector is above each plane: [..., D] to [..., R T] bool."""
    return sides(vectors, hash_planes(vectors.shape[-1], ROUNDS, BITS))


def eta_user(module: nn.Module, encoded: jax.Array, history: jax.Array, mask: jax.Array) -> dict[str, Any]:
    """Keys and values [B, N, H, E], and signs of positions as -1 and 1."""
    keys, values = (jnp.swapaxes(part, 1, 2) for part in module.attention.keys_values(encoded))
    return {"keys": keys, "values": values, "signs": jnp.where(signs_of(history), 1.0, -1.0), "mask": mask}


def eta_item(module: nn.Module, embedding: jax.Array) -> dict[str, Any]:
    """The query [M, D], and signs as 0 and 1."""
    return {"query": side_by_side(module.query(embedding)), "signs": signs_of(embedding).astype(jnp.int32)}


@in_blocks
def eta(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """Computes Hamming distances to all positions and attends over the nearest.

    Raises:
      ValueError: there are more ranks than float32 can distinguish. Ranks are float32 because on CPU XLA
        sorts all integers for a top-k.
    """
    positions, heads, width = user["keys"].shape
    if (ranks := (2 * ROUNDS * BITS + 1) * positions) > 2**24:
        raise ValueError(f"{positions} positions are of {ranks} ranks, expected at most {2**24}")
    products = jnp.where(items["signs"] > 0, 1.0, -1.0) @ user["signs"].T
    rank = jnp.where(user["mask"], (products + ROUNDS * BITS) * positions + jnp.arange(positions), -1.0)
    best, chosen = jax.lax.top_k(rank, min(SELECTED, positions))
    keys, values = (jnp.swapaxes(user[name][chosen], 1, 2) for name in ("keys", "values"))  # [M, H, S, E]
    queries = read(items, "query").reshape(-1, heads, 1, width)
    attended = attention_sums(queries, keys, values, (best >= 0)[:, None, None])
    return on_attended(weights, user, items, attended.reshape(-1, heads * width))


def din_user(module: nn.Module, encoded: jax.Array, history: jax.Array, mask: jax.Array) -> dict[str, Any]:
    """The history X, which the activation unit reads, and the values with their heads side by side."""
    values = jnp.swapaxes(module.attention.values(encoded), 1, 2)
    return {"history": history, "values": values.reshape(*values.shape[:2], -1), "mask": mask}


def din_item(module: nn.Module, embedding: jax.Array) -> dict[str, Any]:
    """Nothing: DIN needs only x_item, which the index stores in any case."""
    return {}


def din_weights(params: Any) -> dict[str, Any]:
    """The activation unit, with its first layer split into four parts."""
    first, last = dense_layers(params["unit"])
    return {"unit": {"first": np.split(first["kernel"], 4), "bias": first["bias"], "last": last}}


@in_blocks
def din(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """Applies the activation unit to every pair, with its first layer split into four parts."""
    unit, queries, keys = weights["unit"], read(items, "embedding"), user["history"]
    of_query, of_key, of_product, of_change = unit["first"]
    products = keys @ (queries[:, :, None] * of_product)  # [M, N, F]
    of_both = (queries @ (of_query + of_change) + unit["bias"])[:, None] + keys @ (of_key - of_change)
    hidden = products + of_both
    pair = (jax.nn.gelu(hidden) @ unit["last"]["kernel"] + unit["last"]["bias"])[..., 0]
    return on_attended(weights, user, items, jnp.where(user["mask"], pair, 0.0) @ user["values"])


ATTENTIONS: Mapping[str, tuple[type[nn.Module], Attention]] = {
    "linear attention": (LinearAttention, Attention(linear_user, linear_item, linear)),
    "SDIM": (Sdim, Attention(sdim_user, sdim_item, sdim, 2**BITS)),
    "ETA": (HardSearch, Attention(eta_user, eta_item, eta, 2, keeps_history=True)),
    "DIN": (Din, Attention(din_user, din_item, din, keeps_history=True, weights=din_weights)),
}
INTTOWER = "IntTower"


def attention_method(name: str, module: nn.Module, variables: Any) -> Method:
    """Serves one of `ATTENTIONS`."""
    attention = ATTENTIONS[name][1]
    params = variables["params"]
    head = interaction_head(params["head"])
    weights: dict[str, Any] = {"variables": variables, "head": head}
    item_weights = head_on_attended(params, head) | attention.weights(params)

    def user_side(module, weights, request):
        user, history = user_and_history(module.backbone, request)
        encoded = module.history_encoder(history, request["mask"])
        state = attention.user(module, encoded, history, request["mask"])
        return state | interaction_user(user, weights)

    def encode(module, weights, features):
        arrays = interaction_items(module.backbone, weights, features)
        return arrays | attention.item(module, arrays["embedding"])

    return Method(name, module.schema, bound(user_side, module), bound(encode, module), weights, item_weights,
                  weights, num_codewords=attention.num_codewords, keeps_history=attention.keeps_history,
                  score=attention.score)


@in_blocks_on_cpu
def inttower(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """The two towers' product, plus the best product with an item vector for each user vector, summed."""
    vectors = read(items, "vectors")
    products = vectors @ user["vectors"].T  # [M, I, U]
    return read(items, "vector") @ user["vector"] + weights["bias"] + products.max(axis=1).sum(axis=-1)


def inttower_method(module: nn.Module, variables: Any) -> Method:
    """Serves IntTower."""
    scale = np.float32(1 / np.sqrt(module.width))

    def user_side(module, weights, request):
        layers, _ = user_layers_and_history(module.backbone, request)
        vectors = [project(layer) for project, layer in zip(module.user_vectors, layers, strict=True)]
        return {"vector": layers[-1] * scale, "vectors": jnp.concatenate(vectors, axis=1) * scale}

    def encode(module, weights, features):
        towers = item_towers(module.backbone, features)
        return towers | {"vectors": module.item_vectors(towers["vector"])}

    weights = {"variables": variables}
    bias = {"bias": variables["params"]["backbone"]["bias"]}
    return Method("inttower", module.schema, bound(user_side, module), bound(encode, module), weights, bias,
                  weights, score=inttower)


@in_blocks_on_cpu
def cold(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """The two towers' product, plus an MLP of `[s_1 g_1, ..., s_4 g_4]`; first layers are split."""
    vectors = read(items, "vector")
    gates = jax.nn.sigmoid(user["gate"] + read(items, "gate") + vectors @ user["gate_product"])
    parts = (user["first"], read(items, "first_embedding"), read(items, "first_vector"),
             vectors @ user["first_product"])
    first = weights["first_bias"] + sum(gates[:, index, None] * part for index, part in enumerate(parts))
    return vectors @ user["vector"] + weights["bias"] + after_first(weights["layers"], first)


def cold_method(module: nn.Module, variables: Any) -> Method:
    """Serves COLD."""
    params = variables["params"]
    gates, (first, *rest) = params["gates"], dense_layers(params["head"])
    kernels = {"gate": np.split(gates["kernel"], 4), "first": np.split(first["kernel"], 4)}

    def user_side(module, weights, request):
        user, _ = user_and_history(module.backbone, request)
        state = {"vector": user / np.float32(np.sqrt(module.width)), "gate": gates["bias"], "first": 0.0}
        for name, (of_user, _, _, of_product) in weights["kernels"].items():
            state[name] += user @ of_user
            state[f"{name}_product"] = user[:, :, None] * of_product
        return state

    def encode(module, weights, features):
        arrays = item_towers(module.backbone, features)
        of_gate, of_first = weights["kernels"]["gate"], weights["kernels"]["first"]
        embedding, vector = arrays["embedding"], arrays["vector"]
        return arrays | {"gate": embedding @ of_gate[1] + vector @ of_gate[2],
                         "first_embedding": embedding @ of_first[1], "first_vector": vector @ of_first[2]}

    weights = {"variables": variables, "kernels": kernels}
    item_weights = {"bias": params["backbone"]["bias"], "first_bias": first["bias"], "layers": rest}
    return Method("cold", module.schema, bound(user_side, module), bound(encode, module), weights,
                  item_weights, weights, score=cold)


def modules(**common: Any) -> Iterator[tuple[str, nn.Module, Callable[[Any], Method]]]:
    """(name, module, parameters -> method) of all but COLD; `common` are the modules' arguments."""
    for name, (module, _) in ATTENTIONS.items():
        served = module(**common, compute=SERVED)
        yield name, module(**common), functools.partial(attention_method, name, served)
    yield INTTOWER, IntTower(**common), functools.partial(inttower_method, IntTower(**common, compute=SERVED))
