"""The item side of serving: logits of items from the state of a user, as pure functions of one request.

Each function of `SCORES` takes `(weights, user, items)` and returns logits [M]. The user side has computed
into `user` what depends only on the request; `items` holds what depends only on the item, computed when the
index was made (`tarq_jax.serving.method`); `weights` are those of the head. Nothing here has a batch axis:
`for_all` and `for_each` add it.

Look-ups are gathers that promise to be in bounds, and are summed as soon as they are read. XLA then fuses
them, and never forms the [M, E, D] Jacobians of order 1. On CPU that is twice as fast as matrix products over
blocks of items that share a codeword, and it works for any order and any subset of the items. Corrections are
passed as a list with one array per query dimension, matching the Jacobians' layout. The product is then a sum
of elementwise terms, which XLA vectorises on CPU; a reduction over an axis it does not.

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
    """Scores `SLOTS` items at a time, so that intermediate results stay in the CPU's cache."""
    @functools.wraps(score)
    def by_block(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
        blocks = {name: values.reshape(-1, SLOTS, *values.shape[1:]) for name, values in items.items()}
        return jax.lax.map(lambda block: score(weights, user, block), blocks).reshape(-1)

    return by_block


def in_blocks_on_cpu(score: Score) -> Score:
    """As `in_blocks` on a CPU, where it halves the time for many items or users; elsewhere without blocks."""
    @functools.wraps(score)
    def by_platform(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
        return jax.lax.platform_dependent(weights, user, items, cpu=in_blocks(score), default=score)

    return by_platform


def look_up(table: Sequence[Any], codes: jax.Array) -> jax.Array:
    """Sums over levels the entries that an item's codes select: L times [K, ...] and int [M, L] to [M, ...].

    Example:
      >>> look_up(jnp.array([[1.0, 2.0], [30.0, 40.0]]), jnp.array([[0, 1], [1, 1]])).tolist()
      [41.0, 42.0]
    """
    codes = codes.astype(jnp.int32)
    return functools.reduce(jnp.add, (rows(level, codes[:, index]) for index, level in enumerate(table)))


def change(jacobians: jax.Array, codes: jax.Array, corrections: Sequence[jax.Array]) -> jax.Array:
    """`J_c r` of every item, head by head: [K, E, H, E], int [...] and E times [..., H] to [..., H, E].

    `jacobians[k, f, h, e]` is the derivative of output e of head h by query dimension f, so that a column of
    a head's Jacobian is contiguous in memory.
    """
    terms = (rows(jacobians[:, f], codes) * column[..., None] for f, column in enumerate(corrections))
    return functools.reduce(jnp.add, terms)


def damping(corrections: Sequence[jax.Array], radius: jax.Array) -> jax.Array:
    """As `tarq_jax.corrections.damping`, for E times [M, H], with a radius [H] per head: [M, H, 1]."""
    squares = functools.reduce(jnp.add, map(jnp.square, corrections))
    return (1.0 / (1.0 + squares / jnp.square(radius)))[..., None]


def first_order(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """`m_c + J_c r` of every item, its heads side by side: [M, D].

    r is the `correction` that the item stores, or else the sum of its codewords of further levels. It is
    damped if the weights have a `radius`.
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
    """Attention output of every item over the whole history, its heads side by side: [M, D].

    Nothing is split into blocks (`block=0`): callers split items themselves, and a block size chosen for this
    device may not suit the others that programs are exported for.
    """
    heads, _, width = user["keys"].shape
    queries = jnp.swapaxes(read(items, "query").reshape(-1, heads, width), 0, 1)
    attended = attention_sums(queries, user["keys"], user["values"], user["mask"][None, None], block=0)
    return jnp.swapaxes(attended, 0, 1).reshape(-1, heads * width)


def two_tower(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """`<v_user, v_item> / sqrt(D) + bias`; the user's vector is already divided."""
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
    """The interaction head on `o`; the product of `o` with the head's first layer is looked up as well."""
    output, first = (look_up(user[name], items["codes"]) for name in ("table", "table_first"))
    return _interaction(weights, user, items, output, first)


@in_blocks_on_cpu
def scalar_first_order(weights: Arrays, user: Arrays, items: Arrays) -> jax.Array:
    """As `scalar` at level 1; for each further level an MLP scores the change of the output that it makes.

    The first layers of all levels are one matrix product: if the changes were read twice, XLA would not
    compute them in one vectorised loop.
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
    """As `dot`, but with the output's projection folded into a second vector of the item, its `key`."""
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

    This is a product with ones: XLA on CPU would fuse a plain sum into the loop of a look-up before it, and
    that loop would then not be vectorised, but fifty times slower.
    """
    return values @ jnp.ones(values.shape[-1])


def on_attended(weights: Arrays, user: Arrays, items: Arrays, attended: jax.Array) -> jax.Array:
    """The interaction head on `o = W attended + b`."""
    output = attended @ weights["output_kernel"] + weights["output_bias"]
    return _interaction(weights, user, items, output, output @ weights["first_output"])


def _interaction(
    weights: Arrays, user: Arrays, items: Arrays, output: jax.Array, first: jax.Array
) -> jax.Array:
    """Backbone plus an MLP of `[o, x_item, o * x_item, v_user * v_item]`, with its first layer in four parts.

    The part of `o` is given as `first`. The item stores the part of `x_item`. The part of `v_user * v_item`
    is a product of v_item with one matrix per user.
    """
    vectors = read(items, "vector")
    first += read(items, "first") + (output * read(items, "embedding")) @ weights["first_product"]
    first += vectors @ user["towers"]
    return vectors @ user["vector"] + weights["bias"] + after_first(weights["layers"], first)


def after_first(layers: Any, first: jax.Array) -> jax.Array:
    """The layers after the first of an MLP with one output: [M, F] to [M]."""
    for layer in layers:
        first = jax.nn.gelu(first) @ layer["kernel"] + layer["bias"]
    return first[:, 0]


SCORES: Mapping[str, Score] = {score.__name__: score for score in (
    two_tower, scalar, dot, mlp, scalar_first_order, dot_first_order, mlp_first_order, target_attention)}


def for_all(score: Score) -> Score:
    """Users with a batch axis [B, ...], one set of items [M, ...] for all of them: logits [B, M]."""
    return jax.vmap(score, in_axes=(None, 0, None))


def for_each(score: Score) -> Score:
    """Users with a batch axis [B, ...], a separate set of items [B, M, ...] for each: logits [B, M]."""
    return jax.vmap(score, in_axes=(None, 0, 0))
