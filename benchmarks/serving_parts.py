"""The parts of a request: each part of `tarq_jax.serving` compiled separately, with its FLOPs and bytes.

    towers        the two-tower's user side: history encoder, attention, tower
    encoder       the teacher's history encoder, with keys and values
    codebooks     personalised codebooks of order 0 or 1, in the form that the head reads
    personalized  the codebooks of order 0 without any head
    gather        the candidates' rows of the index
    look_ups      only what the head reads; in full target attention, all of the attention
    items         the complete item side: look-ups and head
    top_k         selection
    transfer      request to the device, answer to the host

Items come from the index, user-side inputs are random. FLOPs and exponentials are XLA's count for the same
part without blocks, because XLA counts the body of a loop once. Bytes are those of arguments and results:
each is read or written once, a user's tables completely, of the index only the gathered rows.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.serving_contenders import Contender, personalize, user_stages
from tarq_jax.models.layers import Compute
from tarq_jax.serving import Index
from tarq_jax.serving.item_side import Arrays, attend, first_order, for_all, in_blocks, level_changes, look_up
from tarq_jax.serving.method import SERVED, Method
from tarq_jax.serving.programs import pruned, request_specs
from tarq_jax.serving.vectors import rows

LookUps = Callable[[Any, Arrays, Arrays], Any]  # item weights, state of a user, items -> what the head reads


class Cost(NamedTuple):
    """The cost of a part."""

    flops: float
    exponentials: float  # and other transcendental functions
    bytes: float
    temporary: int  # bytes of temporary memory of the compiled program


class Part(NamedTuple):
    """A compiled part with its arguments."""

    call: Callable[[], Any]
    cost: Cost


def compiled(function: Callable[..., Any], plain: Callable[..., Any], *arguments: Any) -> Part:
    """Compiles a part; its FLOPs and exponentials are counted in the `plain` form of the same function."""
    program = jax.jit(function).lower(*arguments).compile()
    counted: Any = jax.jit(plain).lower(*arguments).cost_analysis()
    memory: Any = program.memory_analysis()
    return Part(lambda: program(*arguments), Cost(
        counted.get("flops", 0.0), counted.get("transcendentals", 0.0),
        memory.argument_size_in_bytes + memory.output_size_in_bytes, memory.temp_size_in_bytes))


def filled(specs: Any) -> Any:
    """Random arrays of the given shapes; masks are True."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda spec: jnp.ones(spec.shape, bool) if spec.dtype == bool else jnp.asarray(
        0.3 * rng.standard_normal(spec.shape, np.float32)), specs)


def user_parts(contender: Contender, history: int, names: Collection[str]) -> dict[str, Part]:
    """The parts in `names` that the contender has: `towers`, `encoder`, `codebooks`, `personalized`."""
    weights = jax.device_put(contender.method.user_weights)
    plain = user_stages(contender.module, Compute())
    found, specs = {}, request_specs(contender.method, history, 1)
    for name, stage in user_stages(contender.module, SERVED).items():
        if name in names:
            found[name] = compiled(stage, plain[name], weights, filled(specs))
        if name == "codebooks" and "personalized" in names:
            alone = (personalize(contender.module, compute) for compute in (SERVED, Compute()))
            found["personalized"] = compiled(*alone, weights, filled(specs))
        specs = jax.eval_shape(stage, weights, specs)
    return found


def state_specs(method: Method, history: int) -> Any:
    """Shapes of the state of a user with a history of length `history`."""
    return jax.eval_shape(method.user_side, method.user_weights, request_specs(method, history, 1))


def item_parts(
    contender: Contender, index: Index, slots: np.ndarray, history: int, names: Collection[str]
) -> dict[str, Part]:
    """The parts in `names` that the contender has: `gather`, `look_ups`, `items`."""
    method, found = contender.method, {}
    state, weights = filled(state_specs(method, history)), jax.device_put(method.item_weights)
    items = jax.device_put({name: values[slots] for name, values in index.arrays.items()})
    if "gather" in names:
        found["gather"] = _gather(method, index, slots, items, state)
    if "look_ups" in names and method.name in LOOK_UPS:
        ways = map(for_all, LOOK_UPS[method.name])
        found["look_ups"] = compiled(*ways, weights, state, items)
    if "items" in names:
        ways = (for_all(way) for way in (method.item_side, inspect.unwrap(method.item_side)))
        found["items"] = compiled(*ways, weights, state, items)
    return found


def _gather(method: Method, index: Index, slots: np.ndarray, items: Any, state: Any) -> Part:
    """Gathers only the arrays that the item side reads."""
    score = for_all(method.item_side)
    _, kept = pruned(lambda items, state: score(method.item_weights, state, items), items, state)

    def gather(arrays, slots):
        return {name: rows(values, slots) for name, values in arrays.items()}

    arrays = jax.device_put({name: index.arrays[name] for name in kept})
    part = compiled(gather, gather, arrays, jnp.asarray(slots))
    gathered = sum(values.nbytes // len(values) for values in arrays.values()) * len(slots)
    return part._replace(cost=part.cost._replace(bytes=2 * gathered + slots.nbytes))


def answer_parts(slots: np.ndarray, top_k: int) -> dict[str, Part]:
    """`top_k` of random scores, and `transfer`."""
    def select(scores):
        return jax.lax.top_k(scores, min(top_k, len(slots)))

    best = compiled(select, select, filled(jax.ShapeDtypeStruct((1, len(slots)), jnp.float32)))
    answer = best.call()
    moved = slots.nbytes + sum(values.nbytes for values in answer)
    return {"top_k": best, "transfer": Part(
        lambda: (jax.device_put(slots[None]), jax.device_get(answer)), Cost(0.0, 0.0, moved, 0))}


def _table(weights: Any, user: Arrays, items: Arrays) -> jax.Array:
    return look_up(user["table"], items["codes"])


def _tables(weights: Any, user: Arrays, items: Arrays) -> tuple[jax.Array, ...]:
    return _table(weights, user, items), look_up(user["table_first"], items["codes"])


def _levels(weights: Any, user: Arrays, items: Arrays) -> tuple[jax.Array, ...]:
    return rows(user["table"], items["codes"][:, 0].astype(jnp.int32)), level_changes(weights, user, items)


def _attend(weights: Any, user: Arrays, items: Arrays) -> jax.Array:
    return attend(user, items)


# Look-ups by a method's name: as served, and without blocks.
LOOK_UPS: Mapping[str, tuple[LookUps, LookUps]] = {
    "scalar": (_table, _table), "dot": (_table, _table), "mlp": (_tables, _tables),
    "scalar_first_order": (_levels, _levels),
    "dot_first_order": (first_order, first_order), "mlp_first_order": (first_order, first_order),
    "target_attention": (in_blocks(_attend), _attend), "target_attention_whole": (_attend, _attend),
}
