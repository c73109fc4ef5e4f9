"""A COLD-style pre-ranker (Wang et al. 2020, arXiv 2007.16122) on the vectors of two towers.

Features of a candidate come in four groups of D: `g = [v_user, x_item, v_item, v_user * v_item]`.
Squeeze-and-excitation weighs them by one number each, `s = sigmoid(W g + b)`, and an MLP scores
`[s_1 g_1, ..., s_4 g_4]`. `method` serves it as ours are served: what depends on the user or on the item
alone is computed once for each; `logits` is the same, plain.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tarq_jax.models import TwoTower
from tarq_jax.serving.method import Method, bound, item_towers, user_and_history
from tarq_jax.serving.scoring import Arrays, in_blocks_on_cpu
from tarq_jax.serving.vectors import read

GROUPS = 4


def random_weights(width: int, hidden: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """`gates` and `layers`, dense layers from `GROUPS * width` values, of random numbers."""
    rng = np.random.default_rng(seed)

    def dense(inputs: int, outputs: int) -> dict[str, np.ndarray]:
        drawn = rng.normal(size=(inputs + 1, outputs)).astype(np.float32) / math.sqrt(inputs)
        return {"kernel": drawn[1:], "bias": drawn[0]}

    sizes = (GROUPS * width, *hidden, 1)
    return {"gates": dense(GROUPS * width, GROUPS),
            "layers": [dense(*pair) for pair in itertools.pairwise(sizes)]}


def logits(weights: Any, user: jax.Array, embedding: jax.Array, vector: jax.Array) -> jax.Array:
    """Logits [M] of items by v_user [D], x_item and v_item [M, D]."""
    user = jnp.broadcast_to(user, vector.shape)
    groups = jnp.stack([user, embedding, vector, user * vector], axis=1)
    gates = jax.nn.sigmoid(_dense(weights["gates"], groups.reshape(len(groups), -1)))
    first, *rest = weights["layers"]
    return _rest(rest, _dense(first, (groups * gates[..., None]).reshape(len(groups), -1)))


def method(module: TwoTower, variables: Any, head: Any) -> Method:
    """Serves the head, as of `random_weights`, on the vectors of a two-tower model."""
    gates, (first, *rest) = head["gates"], head["layers"]
    kernels = {"gate": np.split(gates["kernel"], GROUPS), "first": np.split(first["kernel"], GROUPS)}

    def user_side(module, weights, request):
        user = user_and_history(module, request)[0]
        state = {"gate": gates["bias"], "first": 0.0}
        for name, (of_user, _, _, of_product) in weights["kernels"].items():
            state[name] += user @ of_user
            state[f"{name}_product"] = user[:, :, None] * of_product
        return state

    def encode(module, weights, features):
        arrays = item_towers(module, features)
        of_gate, of_first = weights["kernels"]["gate"], weights["kernels"]["first"]
        embedding, vector = arrays["embedding"], arrays["vector"]
        return arrays | {"gate": embedding @ of_gate[1] + vector @ of_gate[2],
                         "first_embedding": embedding @ of_first[1], "first_vector": vector @ of_first[2]}

    weights = {"variables": variables, "kernels": kernels}
    return Method("cold", module.schema, bound(user_side, module), bound(encode, module), weights,
                  {"bias": first["bias"], "layers": rest}, weights, score=score)


@in_blocks_on_cpu
def score(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """As `logits`, from the folded parts."""
    vectors = read(items, "vector")
    gates = jax.nn.sigmoid(user["gate"] + read(items, "gate") + vectors @ user["gate_product"])
    parts = (user["first"], read(items, "first_embedding"), read(items, "first_vector"),
             vectors @ user["first_product"])
    return _rest(weights["layers"], weights["bias"] + sum(
        gates[:, index, None] * part for index, part in enumerate(parts)))


def _dense(layer: Arrays, inputs: jax.Array) -> jax.Array:
    return inputs @ layer["kernel"] + layer["bias"]


def _rest(layers: Any, first: jax.Array) -> jax.Array:
    for layer in layers:
        first = _dense(layer, jax.nn.gelu(first))
    return first[:, 0]
