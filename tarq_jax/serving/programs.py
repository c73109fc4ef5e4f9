"""Methods as serialized programs, which run wherever JAX does, without the code that they were made from.

`user_<N>` takes histories of N events. `score_all` scores one set of items for every user of a batch,
`score_each` scores a separate set for each user. `encode` computes what an index stores for new items. If the
state of a user grows with the history, as in full target attention, there is one program of each `score` per
history length. Batch and items are symbolic dimensions: one program serves every size. Weights are named
arguments, so that a model that is trained anew has exactly the same programs, bit by bit.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from tarq_jax.schema import Field, Schema
from tarq_jax.serving.index import SLOTS
from tarq_jax.serving.item_side import for_all, for_each
from tarq_jax.serving.method import Method
from tarq_jax.serving.vectors import Storage, store

Named = dict[str, np.ndarray]


class Exported(NamedTuple):
    """A method in its serialized form."""

    programs: Mapping[str, bytes]
    weights: Mapping[str, Named]  # "user", "items", "encode" -> the weights of those programs, by name
    fingerprint: str


def export_method(
    method: Method, *, histories: Sequence[int], vectors: Storage, platforms: Sequence[str]
) -> Exported:
    """Exports all programs of a method.

    Args:
      method: the method to export.
      histories: lengths that histories are padded to; each has its own program.
      vectors: number format of the index's vectors.
      platforms: some of "cpu", "cuda", "tpu" and "rocm"; this machine need not have them.
    """
    batch, items, new = export.symbolic_shape(f"b, {SLOTS}*c, m")
    features = item_specs(method.schema, new)
    user_sides = {length: request_specs(method, length, batch) for length in histories}
    encode, encode_weights = pruned(method.encode, method.encode_weights, item_specs(method.schema, 1))
    user, user_weights = pruned(
        method.user_side, method.user_weights, request_specs(method, histories[0], 1))
    score, item_weights = named(method.item_side, method.item_weights)
    weights = {"user": user_weights, "items": item_weights, "encode": encode_weights}
    fingerprint = fingerprint_of(weights, vectors)

    def serialize(name: str, function: Callable[..., Any], *arguments: Any) -> tuple[str, bytes]:
        function.__name__ = name
        return name, bytes(export.export(jax.jit(function), platforms=platforms)(*arguments).serialize())

    def programs() -> Iterator[tuple[str, bytes]]:
        yield serialize("encode", encode, specs_of(encode_weights), features)
        states = {}
        for length, request in user_sides.items():
            yield serialize(f"user_{length}", user, specs_of(user_weights), request)
            suffix = f"_{length}" if method.keeps_history else ""
            states[suffix] = jax.eval_shape(user, specs_of(user_weights), request)
        for suffix, state in states.items():
            for kind, batched, leading in (("all", for_all, (items,)), ("each", for_each, (batch, items))):
                stored = stored_specs(method, encode, encode_weights, vectors, leading)
                yield serialize(
                    f"score_{kind}{suffix}", batched(score), specs_of(item_weights), state, stored)

    with _without_locations():
        return Exported(dict(programs()), weights, fingerprint)


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Keeps source locations out of programs, so that these do not depend on the machine's paths."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def fingerprint_of(weights: Mapping[str, Named], vectors: Storage) -> str:
    """A digest of the codebook, of all other weights, and of the number format of vectors.

    An index fits programs with the same fingerprint. The code that encodes items is not part of it.
    """
    digest = hashlib.sha256(vectors.encode())
    for part, arrays in sorted(weights.items()):
        for name, values in sorted(arrays.items()):
            digest.update(f"{part}/{name} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def named(function: Callable[..., Any], weights: Any) -> tuple[Callable[..., Any], Named]:
    """The function with its weights in a flat dictionary, path -> array; missing weights read as zeros."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(weights)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}

    def call(given: Mapping[str, jax.Array], *arguments: Any) -> Any:
        found = [given[name] if name in given else jnp.zeros(leaf.shape, leaf.dtype)
                 for name, leaf in flat.items()]
        return function(jax.tree.unflatten(tree, found), *arguments)

    return call, flat


def pruned(function: Callable[..., Any], weights: Any, arguments: Any) -> tuple[Callable[..., Any], Named]:
    """As `named`, but with only those weights that the exported function uses; shapes must be concrete."""
    call, flat = named(function, weights)
    kept = export.export(jax.jit(call))(specs_of(flat), arguments).module_kept_var_idx
    return call, {name: flat[name] for index, name in enumerate(sorted(flat)) if index in kept}


def specs_of(arrays: Mapping[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of arrays."""
    return {name: jax.ShapeDtypeStruct(values.shape, values.dtype) for name, values in arrays.items()}


def _columns(fields: Sequence[Field], *leading: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {field.name: jax.ShapeDtypeStruct((*leading, *field.shape), field.dtype) for field in fields}


def item_specs(schema: Schema, items: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of what `encode` takes: the item fields, [M, ...] each."""
    return _columns(schema.side("item"), items)


def request_specs(method: Method, length: int, batch: Any) -> dict[str, Any]:
    """Shapes and types of what the user side takes, see `tarq_jax.serving.method`."""
    items = jax.eval_shape(method.encode, method.encode_weights, item_specs(method.schema, 1))
    width = items["embedding"].shape[-1]
    sides = {side: _columns(method.schema.side(side), batch) for side in ("user", "context")}
    return sides | {
        "events": _columns(method.schema.side("event"), batch, length),
        "embedding": jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        "mask": jax.ShapeDtypeStruct((batch, length), bool),
    }


def stored_specs(
    method: Method, encode: Callable[..., Any], weights: Named, vectors: Storage, leading: tuple[Any, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of what the item side takes: the arrays of an index, with axes `leading` in front."""
    encoded = jax.eval_shape(encode, specs_of(weights), item_specs(method.schema, 1))
    zeros = {name: np.zeros(spec.shape, spec.dtype) for name, spec in encoded.items()}
    like = store(zeros, vectors, method.num_codewords)
    return {name: jax.ShapeDtypeStruct((*leading, *x.shape[1:]), x.dtype) for name, x in like.items()}
