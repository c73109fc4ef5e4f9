"""Methods of two-tower and target-attention models, the latter unchanged or converted to TARQ.

`from_module` makes the method of any model that can be served.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tarq_jax import quantization
from tarq_jax.conversion import ItemIndex
from tarq_jax.corrections import damping, damping_radius
from tarq_jax.models import FirstOrderTarq, TargetAttention, Tarq, TwoTower
from tarq_jax.serving.method import (
    SERVED,
    Method,
    backbone_bias,
    bound,
    expansion,
    further_levels,
    head_on_attended,
    history_of_teacher,
    interaction_head,
    interaction_items,
    interaction_user,
    item_towers,
    side_by_side,
    tables,
    user_and_history,
)
from tarq_jax.serving.tarq_methods import first_order, order_0

# Classes that can be served, subclasses included. The item side reimplements the listed methods on index
# arrays, so a subclass that overrides one of them would be served with wrong scores and is refused.
RESTATED: dict[type[nn.Module], tuple[str, ...]] = {
    FirstOrderTarq: ("__call__", "latents", "attend", "centre_and_residuals", "damping", "student_logits",
                     "codeword_scores"),
    Tarq: ("__call__", "latents", "attend", "student_logits"),
    TargetAttention: ("__call__", "score"),
    TwoTower: ("__call__", "embed", "user_vector", "score"),
}


def from_module(module: nn.Module, variables: Any, codewords: Any = None) -> Method:
    """The method that serves a trained module.

    Args:
      module: the trained module.
      variables: variables of the module.
      codewords: [L, K, D], for TARQ alone.

    Raises:
      ValueError: there is no method for modules of this class, or its scores would differ from the module's.
    """
    variables, module = jax.tree.map(np.asarray, variables), check_served(module).clone(compute=SERVED)
    if isinstance(module, TwoTower):
        return _two_tower(module, variables)
    if isinstance(module, TargetAttention):
        return _target_attention(module, variables)
    if isinstance(module, FirstOrderTarq):
        return first_order(module, variables, np.asarray(codewords))
    return order_0(module, variables, np.asarray(codewords))


def check_served(module: nn.Module) -> TwoTower | TargetAttention | Tarq:
    """Returns the module; ValueError unless the library's method for its class gives the same scores."""
    found = next((served for served in RESTATED if isinstance(module, served)), None)
    if found is None or not isinstance(module, TwoTower | TargetAttention | Tarq):
        raise ValueError(f"a model of class {type(module).__name__} is not served, expected one of "
                         f"{', '.join(served.__name__ for served in RESTATED)}")
    for name in RESTATED[found]:
        if getattr(type(module), name) is not getattr(found, name):
            raise ValueError(f"{type(module).__name__}.{name} is not that of {found.__name__}, whose scores "
                             f"would be served; expected Objective.to_method to make the one that serves it")
    if isinstance(module, Tarq):
        check_served(module.make_teacher().make_backbone())
    elif isinstance(module, TargetAttention):
        check_served(module.make_backbone())
    return module


def _two_tower(module: TwoTower, variables: Any) -> Method:
    def user_side(module, weights, request):
        return {"vector": user_and_history(module, request)[0] / math.sqrt(module.width)}

    def encode(module, weights, features):
        return item_towers(module, features)

    weights = {"variables": variables}
    return Method("two_tower", module.schema, bound(user_side, module), bound(encode, module),
                  weights, {"bias": variables["params"]["bias"]}, weights)


def _target_attention(module: TargetAttention, variables: Any) -> Method:
    def user_side(module, weights, request):
        user, keys, values = history_of_teacher(module, request)
        state = {"keys": keys, "values": values, "mask": request["mask"]}
        return state | interaction_user(user, weights)

    def encode(module, weights, features):
        arrays = interaction_items(module.backbone, weights, features)
        return arrays | {"query": side_by_side(module.query(arrays["embedding"]))}

    params = variables["params"]
    head = interaction_head(params["head"])
    weights = {"variables": variables, "head": head}
    return Method("target_attention", module.schema, bound(user_side, module), bound(encode, module),
                  weights, head_on_attended(params, head), weights, keeps_history=True)


def converted(module: TargetAttention, variables: Any, index: ItemIndex) -> Method:
    """The method of a trained target-attention model with an index of its items, see `tarq_jax.conversion`.

    Items of the index keep their codes; if corrections are exact, they keep the code of level 1 and the
    correction itself. The correction of a new item is the residual of its query, damped if it is longer than
    most corrections of the index.

    Raises:
      ValueError: its scores would differ from the module's, as in `from_module`.
    """
    check_served(module)
    variables = jax.tree.map(np.asarray, variables)
    module = module.clone(compute=SERVED)
    level_1, *further = (np.asarray(level) for level in index.levels)  # [K, H, E]
    corrected, exact = bool(further), index.exact
    params = variables["params"]
    head = interaction_head(params["head"])

    def user_side(module, weights, request):
        user, keys, values = history_of_teacher(module, request)
        queries, state = jnp.swapaxes(weights["level_1"], 0, 1), interaction_user(user, weights)
        if corrected:
            return state | expansion(queries, keys, values, request["mask"])
        queries = jnp.broadcast_to(queries, (keys.shape[0], *queries.shape))
        attended = module.attention.outputs(module.compute.attend(queries, keys, values, request["mask"]))
        return state | tables(attended[:, None], weights)

    def encode(module, weights, features):
        arrays = interaction_items(module.backbone, weights, features)
        queries = side_by_side(module.query(arrays["embedding"]))
        flat = weights["level_1"].reshape(len(level_1), -1)
        found = quantization.encode(flat[None], queries)
        arrays |= {"codes": found.codes}
        if not corrected:
            return arrays
        residuals = (queries - found.quantized).reshape(-1, *weights["level_1"].shape[1:])
        correction = (residuals * damping(residuals, radius=weights["radius"])).reshape(queries.shape)
        if exact:
            return arrays | {"correction": correction}
        levels = [level.reshape(len(level), -1) for level in weights["further"]]
        codes = quantization.encode(levels, correction).codes
        return arrays | {"codes": jnp.concatenate([found.codes, codes], axis=1)}

    known = {"codes": np.asarray(index.codes)}
    weights = {"variables": variables, "head": head, "level_1": level_1}
    item_weights = head_on_attended(params, head) if corrected else head | backbone_bias(params)
    if corrected:
        corrections = np.sum(index.chosen(np.arange(len(index.codes)))[1:], axis=0)
        weights["radius"] = np.asarray(damping_radius(corrections[1:]))
    if exact:
        known = {"codes": known["codes"][:, :1], "correction": corrections.reshape(len(corrections), -1)}
        further = []
    weights["further"] = further
    item_weights |= further_levels(further)
    return Method("mlp_first_order" if corrected else "mlp", module.schema, bound(user_side, module),
                  bound(encode, module), weights, item_weights, weights, known=known,
                  num_codewords=tuple(map(len, [level_1, *further])))
