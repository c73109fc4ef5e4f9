"""From trained models to what serves them: the user side, the encoding of items, and folded weights.

A `Method` is three pure functions with the weights of each. The user side runs once a request, the item side
is one of `tarq_jax.serving.scoring.SCORES`, and `encode` makes what the index keeps of an item. Products
that do not depend on the request are folded into the items or the weights here. Everything is served in
float32, whatever a model computed in while it trained.

A request as the user side sees it, with shapes of `tarq_jax.types`: `user` and `context` (name -> [B, ...]),
`events` (name -> [B, N, ...]), `embedding` [B, N, D] of the history's items, and `mask` [B, N].
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import linen as nn

from tarq_jax import quantization
from tarq_jax.conversion import ItemIndex
from tarq_jax.corrections import damping
from tarq_jax.expansion import expand
from tarq_jax.models import Compute, FirstOrderTarq, TargetAttention, Tarq, TwoTower
from tarq_jax.schema import ITEM_ID, Schema
from tarq_jax.serving.scoring import Arrays
from tarq_jax.types import Batch, Features

SERVED = Compute(attention_block=256)  # longer histories attend in blocks: bounded memory, and faster on CPU
REACH = 2.0  # radius of the damping of new items' corrections, in lengths of all but a tenth of the others
EXPANSION_BLOCK = 2048  # the same for order 1, whose moments are slower in small blocks


class Method(NamedTuple):
    """A trained model, ready to be exported.

    Attributes:
      name: of the item side, in `SCORES`.
      schema: of requests and items.
      user_side: (weights, request) -> state of the users, [B, ...] each.
      encode: (weights, item features name -> [M, ...]) -> what the index keeps of items, [M, ...] each.
      user_weights: of `user_side`; may hold more than it reads.
      item_weights: of the item side.
      encode_weights: of `encode`; may hold more than it reads.
      num_codewords: K of the largest level; 0 without a codebook.
      keeps_history: whether the state of a user grows with the history.
      known: arrays [V, ...] of the items of the training data that take the place of what `encode` finds.
    """

    name: str
    schema: Schema
    user_side: Callable[[Any, Arrays], Arrays]
    encode: Callable[[Any, Features], Arrays]
    user_weights: Any
    item_weights: Any
    encode_weights: Any
    num_codewords: int = 0
    keeps_history: bool = False
    known: Mapping[str, np.ndarray] = {}


def from_module(module: TwoTower | TargetAttention | Tarq, variables: Any, codewords: Any = None) -> Method:
    """The method that serves a trained module.

    Args:
      module: as it predicts.
      variables: of the module.
      codewords: [L, K, D], of TARQ.
    """
    variables = jax.tree.map(np.asarray, variables)
    module = module.clone(compute=SERVED)
    if isinstance(module, TwoTower):
        return _two_tower(module, variables)
    if isinstance(module, TargetAttention):
        return _target_attention(module, variables)
    if isinstance(module, FirstOrderTarq):
        return _first_order(module, variables, np.asarray(codewords))
    return _order_0(module, variables, np.asarray(codewords))


def _two_tower(module: TwoTower, variables: Any) -> Method:
    def user_side(module, weights, request):
        return {"vector": _user(module, request)[0] / math.sqrt(module.width)}

    def encode(module, weights, features):
        return _towers(module, features)

    weights = {"variables": variables}
    return Method("two_tower", module.schema, _bound(user_side, module), _bound(encode, module),
                  weights, {"bias": variables["params"]["bias"]}, weights)


def _target_attention(module: TargetAttention, variables: Any) -> Method:
    def user_side(module, weights, request):
        user, keys, values = _teacher(module, request)
        state = {"keys": keys, "values": values, "mask": request["mask"]}
        return state | _user_of_interaction(user, weights)

    def encode(module, weights, features):
        arrays = _items_of_interaction(module.backbone, weights, features)
        return arrays | {"query": _flat(module.query(arrays["embedding"]))}

    params = variables["params"]
    head = _interaction_head(params["head"])
    weights = {"variables": variables, "head": head}
    return Method("target_attention", module.schema, _bound(user_side, module), _bound(encode, module),
                  weights, _on_attended(params, head), weights, keeps_history=True)


def converted(module: TargetAttention, variables: Any, index: ItemIndex) -> Method:
    """A trained target-attention model, served by an index of its items, see `tarq_jax.conversion`.

    Items of the index keep its codes, and its corrections where it is of order 1. Of new items the
    correction is the residual of their query, damped where it is longer than most of the index.
    """
    variables = jax.tree.map(np.asarray, variables)
    module = module.clone(compute=SERVED)
    level_1 = np.asarray(index.levels[0])  # [K, H, E]
    corrected = len(index.levels) > 1
    params = variables["params"]
    head = _interaction_head(params["head"])

    def user_side(module, weights, request):
        user, keys, values = _teacher(module, request)
        queries, state = jnp.swapaxes(weights["level_1"], 0, 1), _user_of_interaction(user, weights)
        if corrected:
            return state | _expansion(queries, keys, values, request["mask"])
        queries = jnp.broadcast_to(queries, (keys.shape[0], *queries.shape))
        attended = module.attention.outputs(module.compute.attend(queries, keys, values, request["mask"]))
        return state | _tables(attended[:, None], weights)

    def encode(module, weights, features):
        arrays = _items_of_interaction(module.backbone, weights, features)
        queries = _flat(module.query(arrays["embedding"]))
        flat = weights["level_1"].reshape(len(level_1), -1)
        found = quantization.encode(flat[None], queries)
        arrays |= {"codes": found.codes}
        if corrected:
            residuals = (queries - found.quantized).reshape(-1, *weights["level_1"].shape[1:])
            arrays["correction"] = (residuals * damping(residuals, radius=weights["radius"])).reshape(
                queries.shape)
        return arrays

    weights = {"variables": variables, "head": head, "level_1": level_1}
    known = {"codes": np.asarray(index.codes[:, :1])}
    if corrected:
        further = index.chosen(np.arange(len(index.codes)))[1:]
        corrections = np.sum([np.asarray(level) for level in further], axis=0)
        known["correction"] = corrections.reshape(len(corrections), -1)
        lengths = np.linalg.norm(corrections[1:], axis=-1)
        longest = np.quantile(lengths, 0.9, axis=0).astype(np.float32)[:, None]
        weights["radius"] = REACH * longest + np.finfo(np.float32).tiny
    return Method(
        "mlp_first_order" if corrected else "mlp", module.schema, _bound(user_side, module),
        _bound(encode, module), weights, _on_attended(params, head) if corrected else head | _bias(params),
        weights, num_codewords=len(level_1), known=known)


def _order_0(module: Tarq, variables: Any, codewords: np.ndarray) -> Method:
    params = variables["params"]
    backbone_bias = _bias(params["teacher"])
    weights = {"variables": variables, "codewords": codewords}
    if module.head == "mlp":
        weights["head"] = _interaction_head(params["student_head"])

    def user_side(module, weights, request):
        user, history = _user(module.teacher.backbone, request)
        encoded = module.teacher.history_encoder(history, request["mask"])
        table = module.personalize(weights["codewords"], encoded, request["mask"])
        if module.head == "mlp":
            return _user_of_interaction(user, weights) | _tables(table, weights)
        scale = math.sqrt(module.width)
        if module.head == "dot":
            projection = weights["variables"]["params"]["student_head"]
            return {"vector": (user + projection["bias"]) / scale,
                    "table": table @ (projection["kernel"] / scale)}
        levels = (jnp.swapaxes(values, -2, -3) for values in (table, weights["codewords"]))  # [.., K, L, D]
        scores = module.codeword_scores(*jnp.broadcast_arrays(*levels))
        return {"vector": user / scale, "table": jnp.swapaxes(scores, -1, -2)}

    def encode(module, weights, features):
        backbone = module.teacher.backbone
        arrays = (_items_of_interaction(backbone, weights, features) if module.head == "mlp"
                  else _towers(backbone, features))
        latents = module.item_latents(arrays["embedding"])
        return arrays | {"codes": module.encode(weights["codewords"], latents).codes}

    item_weights = weights.get("head", {}) | backbone_bias
    return Method(module.head, module.schema, _bound(user_side, module), _bound(encode, module),
                  weights, item_weights, weights, num_codewords=codewords.shape[1])


def _first_order(module: FirstOrderTarq, variables: Any, codewords: np.ndarray) -> Method:
    params = variables["params"]
    teacher, width = params["teacher"], module.width
    kernel, bias = _output_projection(teacher)
    weights = {"variables": variables, "codewords": codewords}
    if module.head == "mlp":
        head = weights["head"] = _interaction_head(params["student_head"])
        item_weights = _on_attended(teacher, head)
    elif module.head == "dot":
        projection = params["student_head"]
        weights["key_kernel"] = (kernel @ projection["kernel"]).T / math.sqrt(width)
        weights["added"] = bias @ projection["kernel"] + projection["bias"]
        item_weights = _bias(teacher)
    else:
        heads = [params[f"level_scores_{level}"] for level in range(1, module.num_levels)]
        item_weights = _bias(teacher) | _level_heads(heads, kernel, codewords[1:])

    def user_side(module, weights, request):
        user, keys, values = _teacher(module.teacher, request)
        level_1 = weights["codewords"][0]
        heads = jnp.swapaxes(level_1.reshape(len(level_1), *keys.shape[1::2]), 0, 1)  # [H, K, E]
        state = _expansion(heads, keys, values, request["mask"])
        if module.head == "mlp":
            return state | _user_of_interaction(user, weights)
        if module.head == "dot":
            return state | {"vector": (user + weights["added"]) / math.sqrt(width)}
        kernel, bias = _output_projection(weights["variables"]["params"]["teacher"])
        outputs = state["means"] @ kernel + bias
        inputs = jnp.concatenate([outputs, jnp.broadcast_to(level_1, outputs.shape)], axis=-1)
        return state | {"vector": user / math.sqrt(width), "table": module.level_scores[0](inputs)[..., 0]}

    def encode(module, weights, features):
        backbone = module.teacher.backbone
        arrays = (_items_of_interaction(backbone, weights, features) if module.head == "mlp"
                  else _towers(backbone, features))
        found = module.encode(weights["codewords"], module.item_latents(arrays["embedding"][None]))
        _, corrections = module.centre_and_residuals(found)  # [L - 1, 1, H, M, E]
        corrections = jnp.moveaxis(corrections[:, 0], 2, 0).reshape(-1, module.num_levels - 1, width)
        if module.head == "dot":
            arrays["key"] = arrays["vector"] @ weights["key_kernel"]
        if module.head != "scalar":
            corrections = corrections.sum(axis=1)
        return arrays | {"codes": found.codes[0], "correction": corrections}

    return Method(f"{module.head}_first_order", module.schema, _bound(user_side, module),
                  _bound(encode, module), weights, item_weights, weights, num_codewords=codewords.shape[1])


# What the methods share: with a bound module, or on folded parameters


def _bound(function: Callable[..., Any], module: nn.Module) -> Callable[[Any, Any], Any]:
    """`function(bound module, weights, inputs)` as a pure function of weights and inputs."""
    applied = nn.apply(function, module)
    return lambda weights, inputs: applied(weights["variables"], weights, inputs)


def _user(backbone: TwoTower, request: Arrays) -> tuple[jax.Array, jax.Array]:
    """v_user [B, D] and the history X [B, N, D]."""
    mask = request["mask"]
    nothing = jnp.zeros((mask.shape[0], 0))
    batch = Batch(
        user_id=jnp.zeros(mask.shape[0], jnp.int32), user=request["user"], context=request["context"],
        history=request["events"], history_mask=mask, candidates={}, candidate_mask=nothing > 0,
        labels=nothing, weights=nothing)
    history = backbone.with_events(batch, request["embedding"])
    return backbone.user_vector(batch, history), history


def _teacher(module: TargetAttention, request: Arrays) -> tuple[jax.Array, jax.Array, jax.Array]:
    """v_user [B, D], keys and values [B, H, N, E]."""
    user, history = _user(module.backbone, request)
    return user, *module.attention.keys_values(module.history_encoder(history, request["mask"]))


def _towers(backbone: TwoTower, features: Features) -> dict[str, jax.Array]:
    """x_item and v_item, [M, D] each."""
    embedding = backbone.item_features(features, features[ITEM_ID].shape)
    return {"embedding": embedding, "vector": backbone.item_tower(embedding)}


def _items_of_interaction(backbone: TwoTower, weights: Arrays, features: Features) -> dict[str, jax.Array]:
    arrays = _towers(backbone, features)
    head = weights["head"]
    return arrays | {"first": arrays["embedding"] @ head["first_item"] + head["first_bias"]}


def _user_of_interaction(user: jax.Array, weights: Arrays) -> dict[str, jax.Array]:
    towers = user[:, :, None] * weights["head"]["first_towers"]
    return {"vector": user / math.sqrt(user.shape[-1]), "towers": towers}


def _tables(attended: jax.Array, weights: Arrays) -> dict[str, jax.Array]:
    """Personalised codebooks [B, L, K, D], as they are and multiplied by the head's first layer."""
    return {"table": attended, "table_first": attended @ weights["head"]["first_output"]}


def _expansion(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> dict[str, Any]:
    """Means [B, K, D], and Jacobians [B, K, E, H, E] by query first, see `scoring.change`."""
    found = expand(queries, keys, values, mask, block=EXPANSION_BLOCK)
    means = jnp.swapaxes(found.means, 1, 2)
    return {"means": means.reshape(*means.shape[:2], -1),
            "jacobians": jnp.transpose(found.jacobians, (0, 2, 4, 1, 3))}


def _flat(heads: jax.Array) -> jax.Array:
    """[H, M, E] to [M, D]."""
    return jnp.swapaxes(heads, 0, 1).reshape(heads.shape[1], -1)


def _bias(params: Any) -> dict[str, np.ndarray]:
    return {"bias": params["backbone"]["bias"]}


def _output_projection(params: Any) -> tuple[Any, Any]:
    """`o = attended @ kernel + bias`, the heads side by side: [D, D] and [D]."""
    projection = params["attention"]["output_projection"]
    return projection["kernel"].reshape(-1, projection["kernel"].shape[-1]), projection["bias"]


def _layers(params: Any) -> list[dict[str, np.ndarray]]:
    """The dense layers of an `MLP`, in order."""
    return [params[f"Dense_{index}"] for index in range(len(params))]


def _interaction_head(params: Any) -> dict[str, Any]:
    """An MLP of `[o, x_item, o * x_item, v_user * v_item]`, its first layer in four parts [D, F]."""
    first, *layers = _layers(params)
    names = ("first_output", "first_item", "first_product", "first_towers")
    quarters = dict(zip(names, np.split(first["kernel"], 4), strict=True))
    return quarters | {"first_bias": first["bias"], "layers": layers}


def _on_attended(params: Any, head: dict[str, Any]) -> dict[str, Any]:
    """Weights of a head on what the heads of a target-attention model attended."""
    kernel, bias = _output_projection(params)
    return head | _bias(params) | {"output_kernel": kernel, "output_bias": bias}


def _level_heads(heads: Sequence[Any], output_kernel: np.ndarray, codewords: np.ndarray) -> dict[str, Any]:
    """MLPs of `[change of o, codeword]`, one a level: the projection and the codeword's part are folded.

    `attended` is block-diagonal, [(L - 1) D, (L - 1) F]: one product for the first layers of all levels.
    """
    attended, levels = [], []
    for params, level in zip(heads, codewords, strict=True):
        first, *layers = _layers(params)
        of_change, of_codeword = np.split(first["kernel"], 2)
        attended.append(output_kernel @ of_change)
        levels.append({"codeword_first": level @ of_codeword + first["bias"], "layers": layers})
    return {"attended": scipy.linalg.block_diag(*attended), "levels": levels}
