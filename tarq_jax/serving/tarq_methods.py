"""Methods of TARQ models of order 0 and 1, with each of the score heads."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from tarq_jax.models import FirstOrderTarq, Tarq
from tarq_jax.serving.item_side import Arrays
from tarq_jax.serving.method import (
    Method,
    backbone_bias,
    bound,
    dense_layers,
    expansion,
    further_levels,
    head_on_attended,
    history_of_teacher,
    interaction_head,
    interaction_items,
    interaction_user,
    item_towers,
    output_projection,
    tables,
    user_and_history,
)


def order_0(module: Tarq, variables: Any, codewords: np.ndarray) -> Method:
    """The method of order 0: personalised codebooks are tables that items look up, level by level.

    Their rows hold all of the head that can be computed before the item is known: a scalar for `scalar`, a
    vector that multiplies v_item for `dot`, the output and its product with the head's first layer for `mlp`.
    """
    params = variables["params"]
    weights = {"variables": variables, "codewords": codewords}
    if module.head == "mlp":
        weights["head"] = interaction_head(params["student_head"])

    def user_side(module, weights, request):
        user, history = user_and_history(module.teacher.backbone, request)
        encoded = module.teacher.history_encoder(history, request["mask"])
        return codebooks(module, weights, {"user": user, "history": encoded, "mask": request["mask"]})

    def encode(module, weights, features):
        backbone = module.teacher.backbone
        arrays = (interaction_items(backbone, weights, features) if module.head == "mlp"
                  else item_towers(backbone, features))
        latents = module.item_latents(arrays["embedding"])
        return arrays | {"codes": module.encode(weights["codewords"], latents).codes}

    item_weights = weights.get("head", {}) | backbone_bias(params["teacher"])
    return Method(module.head, module.schema, bound(user_side, module), bound(encode, module),
                  weights, item_weights, weights, num_codewords=codewords.shape[1])


def codebooks(module: Tarq, weights: Any, encoded: Arrays) -> dict[str, Any]:
    """The tables of order 0, from v_user, the teacher's encoding of the history and its mask."""
    user = encoded["user"]
    table = module.personalize(weights["codewords"], encoded["history"], encoded["mask"])
    if module.head == "mlp":
        return interaction_user(user, weights) | tables(table, weights)
    scale = math.sqrt(module.width)
    if module.head == "dot":
        projection = weights["variables"]["params"]["student_head"]
        return {"vector": (user + projection["bias"]) / scale,
                "table": table @ (projection["kernel"] / scale)}
    levels = (jnp.swapaxes(values, -2, -3) for values in (table, weights["codewords"]))  # [.., K, L, D]
    scores = module.codeword_scores(*jnp.broadcast_arrays(*levels))
    return {"vector": user / scale, "table": jnp.swapaxes(scores, -1, -2)}


def first_order(module: FirstOrderTarq, variables: Any, codewords: np.ndarray) -> Method:
    """The method of order 1: the state of a user is the means and Jacobians of level 1.

    Items store codes; the codewords of further levels are weights of the item side.
    """
    params = variables["params"]
    teacher, width = params["teacher"], module.width
    kernel, bias = output_projection(teacher)
    weights = {"variables": variables, "codewords": codewords}
    if module.head == "mlp":
        head = weights["head"] = interaction_head(params["student_head"])
        item_weights = head_on_attended(teacher, head)
    elif module.head == "dot":
        projection = params["student_head"]
        weights["key_kernel"] = (kernel @ projection["kernel"]).T / math.sqrt(width)
        weights["added"] = bias @ projection["kernel"] + projection["bias"]
        item_weights = backbone_bias(teacher)
    else:
        heads = [params[f"level_scores_{level}"] for level in range(1, module.num_levels)]
        item_weights = backbone_bias(teacher) | _level_heads(heads, kernel, codewords[1:])
    item_weights |= further_levels(codewords[1:].reshape(*codewords[1:].shape[:2], module.num_heads, -1))
    item_weights["radius"] = np.exp(params["log_radius"]).reshape(-1)

    def user_side(module, weights, request):
        user, keys, values = history_of_teacher(module.teacher, request)
        return expansions(
            module, weights, {"user": user, "keys": keys, "values": values, "mask": request["mask"]})

    def encode(module, weights, features):
        backbone = module.teacher.backbone
        arrays = (interaction_items(backbone, weights, features) if module.head == "mlp"
                  else item_towers(backbone, features))
        if module.head == "dot":
            arrays["key"] = arrays["vector"] @ weights["key_kernel"]
        latents = module.item_latents(arrays["embedding"])
        return arrays | {"codes": module.encode(weights["codewords"], latents).codes}

    return Method(f"{module.head}_first_order", module.schema, bound(user_side, module),
                  bound(encode, module), weights, item_weights, weights, num_codewords=codewords.shape[1])


def expansions(module: FirstOrderTarq, weights: Any, encoded: Arrays) -> dict[str, Any]:
    """Means and Jacobians, from v_user, the teacher's keys and values of the history and its mask."""
    user, keys = encoded["user"], encoded["keys"]
    level_1 = weights["codewords"][0]
    heads = jnp.swapaxes(level_1.reshape(len(level_1), *keys.shape[1::2]), 0, 1)  # [H, K, E]
    state = expansion(heads, keys, encoded["values"], encoded["mask"])
    if module.head == "mlp":
        return state | interaction_user(user, weights)
    if module.head == "dot":
        return state | {"vector": (user + weights["added"]) / math.sqrt(module.width)}
    kernel, bias = output_projection(weights["variables"]["params"]["teacher"])
    outputs = state["means"] @ kernel + bias
    inputs = jnp.concatenate([outputs, jnp.broadcast_to(level_1, outputs.shape)], axis=-1)
    return state | {"vector": user / math.sqrt(module.width),
                    "table": module.level_scores[0](inputs)[..., 0]}


def _level_heads(heads: Sequence[Any], output_kernel: np.ndarray, codewords: np.ndarray) -> dict[str, Any]:
    """MLPs of `[change of o, codeword]`, one per level; projection and the codeword's part are folded in.

    `attended` is block-diagonal, [(L - 1) D, (L - 1) F]: one product computes the first layers of all levels.
    """
    attended, levels = [], []
    for params, level in zip(heads, codewords, strict=True):
        first, *layers = dense_layers(params)
        of_change, of_codeword = np.split(first["kernel"], 2)
        attended.append(output_kernel @ of_change)
        levels.append({"codeword_first": level @ of_codeword + first["bias"], "layers": layers})
    return {"attended": scipy.linalg.block_diag(*attended), "levels": levels}
