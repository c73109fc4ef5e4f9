"""The item side of serving: logits of items from the state of a user, as pure functions of one request.

Each method of `SCORES` takes `(weights, user, items)` and returns logits [M]. What depends on the request
alone was computed into `user` by the user side, what depends on the item alone was folded into `items` when
the index was made (`tarq_jax.serving.method`); `weights` are those of the head. Nothing here has a batch
axis: `for_all` and `for_each` add it.

Look-ups are gathers that promise to be in bounds and are summed where they are read: XLA then fuses them,
and never forms the [M, E, D] Jacobians of order 1. On CPU that is twice as fast as products of blocks that
share a codeword, in any order of the items and for any subset of them. What Jacobians multiply comes one
dimension of the query after the other, as they do: XLA on CPU does not vectorise sums over an axis.

Axis letters are those of `tarq_jax.types`; M items, F units of the head's first hidden layer.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tarq_jax.attention import attention_sums
from tarq_jax.serving.index import SLOTS
from tarq_jax.serving.vectors import read, rows

Arrays = Mapping[str, Any]
Score = Callable[[Any, Arrays, Arrays], jax.Array]


def in_blocks(score: Score) -> Score:
    """Scores a few items at a time: what is computed on the way stays in the cache."""
    @functools.wraps(score)
    def by_block(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
        blocks = {name: values.reshape(-1, SLOTS, *values.shape[1:]) for name, values in items.items()}
        return jax.lax.map(lambda block: score(weights, user, block), blocks).reshape(-1)

    return by_block


def in_blocks_on_cpu(score: Score) -> Score:
    """As `in_blocks` on a CPU, where it halves the time of many items or users; all at once elsewhere."""
    @functools.wraps(score)
    def by_platform(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
        return jax.lax.platform_dependent(weights, user, items, cpu=in_blocks(score), default=score)

    return by_platform


def look_up(table: Sequence[Any], codes: jax.Array) -> jax.Array:
    """Sums the entries that each level's code names: L times [K, ...] and int [M, L] to [M, ...].

    Example:
      >>> look_up(jnp.array([[1.0, 2.0], [30.0, 40.0]]), jnp.array([[0, 1], [1, 1]])).tolist()
      [41.0, 42.0]
    """
    codes = codes.astype(jnp.int32)
    return functools.reduce(jnp.add, (rows(level, codes[:, index]) for index, level in enumerate(table)))


def change(jacobians: jax.Array, codes: jax.Array, corrections: Sequence[jax.Array]) -> jax.Array:
    """`J_c r` of every item, head by head: [K, E, H, E], int [...] and E times [..., H] to [..., H, E].

    `jacobians[k, f, h, e]` is the derivative of output e by query f: a column of it is a row of memory.
    """
    terms = (rows(jacobians[:, f], codes) * column[..., None] for f, column in enumerate(corrections))
    return functools.reduce(jnp.add, terms)


def damping(corrections: Sequence[jax.Array], radius: jax.Array) -> jax.Array:
    """As that of `tarq_jax.corrections`, for E times [M, H], with a radius [H] each: [M, H, 1]."""
    squares = functools.reduce(jnp.add, map(jnp.square, corrections))
    return (1.0 / (1.0 + squares / jnp.square(radius)))[..., None]


def first_order(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """`m_c + J_c r` of every item, its heads side by side: [M, D].

    r is a `correction` of the item's own, or the sum of its codewords of further levels, damped by `radius`.
    """
    codes = items["codes"][:, 0].astype(jnp.int32)
    if "correction" in items:
        _, width, heads, _ = user["jacobians"].shape
        own = read(items, "correction").reshape(-1, heads, width)
        corrections = [own[..., f] for f in range(width)]
    else:
        corrections = _by_query(look_up(weights["further"], items["codes"][:, 1:]))
    changes = change(user["jacobians"], codes, corrections)
    if "radius" in weights:
        changes *= damping(corrections, weights["radius"])
    return rows(user["means"], codes) + changes.reshape(codes.shape[0], -1)


def level_changes(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """`J_c r` of each further level of every item, its heads side by side: [M, L - 1, D]."""
    first, further = jnp.split(items["codes"].astype(jnp.int32), [1], axis=1)
    chosen = [rows(level, further[:, index]) for index, level in enumerate(weights["further"])]
    changes = change(user["jacobians"], jnp.broadcast_to(first, further.shape),
                     _by_query(jnp.stack(chosen, axis=1)))
    factors = damping(_by_query(functools.reduce(jnp.add, chosen)), weights["radius"])
    return (changes * factors[:, None]).reshape(*further.shape, -1)


def _by_query(corrections: jax.Array) -> list[jax.Array]:
    """[..., E, H] to E times [..., H]."""
    return [corrections[..., f, :] for f in range(corrections.shape[-2])]


def attend(user: Arrays, items: Arrays) -> jax.Array:
    """What every item attends over the whole history, its heads side by side: [M, D].

    At once, however many: callers choose their blocks, and programs are exported for other devices too.
    """
    heads, _, width = user["keys"].shape
    queries = jnp.swapaxes(read(items, "query").reshape(-1, heads, width), 0, 1)
    attended = attention_sums(queries, user["keys"], user["values"], user["mask"][None, None], block=0)
    return jnp.swapaxes(attended, 0, 1).reshape(-1, heads * width)


def two_tower(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """`<v_user, v_item> / sqrt(D) + bias`; the user's vector comes divided."""
    return read(items, "vector") @ user["vector"] + weights["bias"]


def scalar(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """Backbone plus L scalar look-ups."""
    return two_tower(weights, user, items) + look_up(user["table"], items["codes"])


def dot(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """`<v_user + W o, v_item> / sqrt(D)`: the table holds `W A_l / sqrt(D)`."""
    vectors = user["vector"] + look_up(user["table"], items["codes"])
    return _sums(vectors * read(items, "vector")) + weights["bias"]


@in_blocks_on_cpu
def mlp(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """The interaction head on `o`; its product with the head's first layer is looked up as well."""
    output, first = (look_up(user[name], items["codes"]) for name in ("table", "table_first"))
    return _interaction(weights, user, items, output, first)


@in_blocks_on_cpu
def scalar_first_order(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """As `scalar` at level 1; each further level scores its own change of the output by an MLP.

    The first layers of all levels are one product: a second reader of the changes would keep XLA from
    computing them in one vectorised loop.
    """
    codes = items["codes"].astype(jnp.int32)
    changes = level_changes(weights, user, items)
    count, further, _ = changes.shape
    first = (changes.reshape(count, -1) @ weights["attended"]).reshape(count, further, -1)
    total = two_tower(weights, user, items) + rows(user["table"], codes[:, 0])
    for level, head in enumerate(weights["levels"]):
        seen = first[:, level] + rows(head["codeword_first"], codes[:, level + 1])
        total += after_first(head["layers"], seen)
    return total


@in_blocks_on_cpu
def dot_first_order(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """As `dot`; the output's projection is folded into a second vector of the item, its `key`."""
    products = first_order(weights, user, items) * read(items, "key")
    return _sums(products + user["vector"] * read(items, "vector")) + weights["bias"]


@in_blocks_on_cpu
def mlp_first_order(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """The interaction head on the output of order 1."""
    return on_attended(weights, user, items, first_order(weights, user, items))


@in_blocks
def target_attention(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """Every item attends over the whole history."""
    return on_attended(weights, user, items, attend(user, items))


def _sums(values: jax.Array) -> jax.Array:
    """Sums over the last axis, [M, D] to [M].

    As a product with ones: XLA on CPU would take a sum into the loop of a look-up before it, which is then
    not vectorised, fifty times slower.
    """
    return values @ jnp.ones(values.shape[-1])


def on_attended(weights: Arrays, user: Arrays, items: Arrays, attended: jax.Array) -> jax.Array:
    """The interaction head on `o = W attended + b`."""
    output = attended @ weights["output_kernel"] + weights["output_bias"]
    return _interaction(weights, user, items, output, output @ weights["first_output"])


def _interaction(
    weights: Arrays, user: Arrays, items: Arrays, output: jax.Array, first: jax.Array
) -> jax.Array:
    """Backbone plus an MLP of `[o, x_item, o * x_item, v_user * v_item]`, its first layer in four parts.

    That of `o` is `first`, that of `x_item` the item's own, that of the towers one matrix a user.
    """
    vectors = read(items, "vector")
    first += read(items, "first") + (output * read(items, "embedding")) @ weights["first_product"]
    first += vectors @ user["towers"]
    return vectors @ user["vector"] + weights["bias"] + after_first(weights["layers"], first)


def after_first(layers: Any, first: jax.Array) -> jax.Array:
    """What follows the first layer of an MLP of one output: [M, F] to [M]."""
    for layer in layers:
        first = jax.nn.gelu(first) @ layer["kernel"] + layer["bias"]
    return first[:, 0]


SCORES: Mapping[str, Score] = {score.__name__: score for score in (
    two_tower, scalar, dot, mlp, scalar_first_order, dot_first_order, mlp_first_order, target_attention)}


def for_all(score: Score) -> Score:
    """Users with a batch axis [B, ...], one set of items [M, ...] for all of them: logits [B, M]."""
    return jax.vmap(score, in_axes=(None, 0, None))


def for_each(score: Score) -> Score:
    """Users with a batch axis [B, ...], items of their own [B, M, ...] for each: logits [B, M]."""
    return jax.vmap(score, in_axes=(None, 0, 0))
