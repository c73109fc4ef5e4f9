"""The operations that may deserve a kernel, with all their implementations.

Benchmarks and tests share this table. `plain` is the textbook form of an operation; the numbers of the other
implementations are compared with it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import workloads
from benchmarks.workloads import Sizes
from tarq_jax import attention, expansion, losses, quantization
from tarq_jax.types import Expansion

Function = Callable[..., Any]


class Operation(NamedTuple):
    """One operation.

    Attributes:
      arguments: descriptions of the arguments by name, see `benchmarks.workloads`.
      differentiable: names of the arguments by which training differentiates; empty if there are none.
      implementations: functions of these arguments by name: always "plain" and "xla", "pallas" if there is a
        kernel, and others.
      prepared: for implementations that need their arguments in another form: a function from arguments to
        prepared arguments. It runs once on the host, as for an index.
    """

    arguments: Mapping[str, str]
    differentiable: Sequence[str]
    implementations: Mapping[str, Function]
    prepared: Mapping[str, Callable[..., tuple[Any, ...]]] = {}


def make_arguments(operation: Operation, sizes: Sizes, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """Random arguments, the same for the same sizes."""
    rng = np.random.default_rng(0)
    return tuple(workloads.make(axes, sizes, rng, dtype) for axes in operation.arguments.values())


def specs(operation: Operation, sizes: Sizes, dtype: Any = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and types of `make_arguments`."""
    return tuple(workloads.spec(axes, sizes, dtype) for axes in operation.arguments.values())


def gradient(operation: Operation, function: Function) -> Function:
    """The gradient of half the sum of squares of a function's outputs, by the differentiable arguments."""
    places = [list(operation.arguments).index(name) for name in operation.differentiable]

    def half_squares(*arguments):
        outputs = [leaf for leaf in jax.tree.leaves(function(*arguments))
                   if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum(0.5 * jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in outputs)

    return jax.grad(half_squares, argnums=places)


def _by_implementation(function: Function, plain: Function, **others: Function) -> dict[str, Function]:
    """All implementations: `plain`, `function` with each `implementation`, and the others."""
    def of(name):
        return lambda *arguments: function(*arguments, implementation=name)

    return {"plain": plain, "xla": of("xla"), "pallas": of("pallas"), **others}


def _blocks(function: Function, block: int) -> dict[str, Function]:
    """What `xla` chooses between by size and device: blocks, and everything together."""
    return {"xla_blocks": functools.partial(function, block=block, implementation="xla"),
            "xla_whole": functools.partial(function, block=0, implementation="xla")}


def _encode_plain(codewords, latents):
    residual, codes = latents, []
    for level in codewords:
        distances = (jnp.sum(residual**2, axis=-1, keepdims=True) - 2 * residual @ level.T
                     + jnp.sum(level**2, axis=-1))
        codes.append(jnp.argmin(distances, axis=-1))
        residual = residual - level[codes[-1]]
    return jnp.stack(codes, axis=-1), latents - residual


def _encode(codewords, latents, **options):
    output = quantization.encode(codewords, latents, **options)
    return output.codes, output.quantized


def _attend_plain(queries, keys, values, mask):
    mask = mask.reshape(len(mask), *(1,) * (keys.ndim - 2), -1)
    logits = queries @ jnp.swapaxes(keys, -1, -2) / jnp.sqrt(queries.shape[-1]).astype(queries.dtype)
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1), 0.0)
    return weights.astype(values.dtype) @ values


def _dot_product_attention(queries, keys, values, mask):
    queries, keys, values = (jnp.swapaxes(array, 1, 2) for array in (queries, keys, values))
    seen = jnp.any(mask, axis=-1)[:, None, None, None]
    found = jax.nn.dot_product_attention(queries, keys, values, mask=mask[:, None, None])
    return jnp.swapaxes(jnp.where(seen, found, 0), 1, 2)


def _expand_plain(queries, keys, values, mask):
    logits = jnp.einsum("hke,bhne->bhkn", queries, keys) / jnp.sqrt(queries.shape[-1])
    mask = mask[:, None, None]
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1), 0.0)
    means = jnp.einsum("bhkn,bhne->bhke", weights, values)
    second = jnp.einsum("bhkn,bhne,bhnf->bhkef", weights, values, keys)
    outer = jnp.einsum("bhke,bhkf->bhkef", means, jnp.einsum("bhkn,bhnf->bhkf", weights, keys))
    return Expansion(means, (second - outer) / jnp.sqrt(queries.shape[-1]))


def _look_up_plain(personalized, codes):
    entries = jnp.take_along_axis(personalized, jnp.swapaxes(codes, 1, 2)[..., None], axis=2)
    return jnp.sum(entries, axis=1)


def _look_up_one_hot(personalized, codes):
    one_hot = jax.nn.one_hot(codes, personalized.shape[2], dtype=personalized.dtype)
    return jnp.einsum("bglk,blkd->bgd", one_hot, personalized)


def _for_requests(means, codes, residuals):
    """Repeats the codes and residuals of an index's items for each request: all requests score them."""
    requests = len(means)
    return (jnp.broadcast_to(codes, (requests, *codes.shape)),
            jnp.broadcast_to(residuals, (requests, *residuals.shape)))


def _look_up_expansion_plain(means, jacobians, codes, residuals):
    changes = jnp.einsum("bhgef,hgf->bhge", jacobians[:, :, codes], residuals)
    return means[:, :, codes] + changes


def _look_up_expansion(means, jacobians, codes, residuals, **options):
    codes, residuals = _for_requests(means, codes, residuals)
    return expansion.look_up_expansion(Expansion(means, jacobians), codes, residuals, **options)


def _in_blocks(means, jacobians, codes, residuals):
    blocks = expansion.group_by_code(codes)
    return means, jacobians, blocks, residuals[:, blocks.items]


def _sorted_segments(means, jacobians, blocks, residuals):
    found = expansion.look_up_blocks(Expansion(means, jacobians), blocks, residuals)
    return jnp.take(found.reshape(*means.shape[:2], -1, means.shape[-1]), blocks.positions, axis=2)


def _align_plain(latents, outputs, codewords, personalized, chosen, attended):
    total = jnp.zeros(latents.shape[:2])
    outputs = jax.lax.stop_gradient(outputs)
    for level, words in enumerate(codewords):
        squares = jnp.sum(jnp.square(latents[:, :, None] - words), axis=-1)
        attended_squares = jnp.sum(jnp.square(outputs[:, :, None] - personalized[:, None, level]), axis=-1)
        p, q = jax.nn.softmax(-squares), jax.nn.softmax(-attended_squares)
        total += jnp.sum((p - q) * (jax.nn.log_softmax(-squares) - jax.nn.log_softmax(-attended_squares)),
                         axis=-1)
        latents, outputs = latents - chosen[:, :, level], outputs - attended[:, :, level]
    return total


SELECTED = 500  # candidates that top-k selects


def _top_k_plain(scores):
    order = jnp.argsort(scores, axis=-1, descending=True)[:, :SELECTED]
    return jnp.take_along_axis(scores, order, axis=-1), order


def _top_k(scores):
    return tuple(jax.lax.top_k(scores, min(SELECTED, scores.shape[-1])))


OPERATIONS: Mapping[str, Operation] = {
    "encode": Operation(
        {"codewords": "LKD", "latents": "BGD"}, ("codewords",),
        _by_implementation(_encode, _encode_plain, **_blocks(_encode, 2048))),
    "attend": Operation(
        {"queries": "BHGE", "keys": "BHNE", "values": "BHNE", "mask": "BN?"}, ("queries", "keys", "values"),
        _by_implementation(
            attention.multi_head_attention, _attend_plain, dot_product_attention=_dot_product_attention,
            **_blocks(attention.multi_head_attention, 512))),
    "personalize": Operation(
        {"queries": "LHKE", "keys": "BLHNE", "values": "BLHNE", "mask": "BN?"},
        ("queries", "keys", "values"),
        _by_implementation(
            attention.personalized_codebook, _attend_plain,
            **_blocks(attention.personalized_codebook, 512))),
    "expand": Operation(
        {"queries": "HKE", "keys": "BHNE", "values": "BHNE", "mask": "BN?"}, ("queries", "keys", "values"),
        _by_implementation(expansion.expand, _expand_plain, **_blocks(expansion.expand, 512))),
    "look_up": Operation(
        {"personalized": "BLKD", "codes": "BGL<K"}, ("personalized",),
        _by_implementation(attention.look_up, _look_up_plain, one_hot=_look_up_one_hot)),
    "look_up_expansion": Operation(
        {"means": "BHKE", "jacobians": "BHKEE", "codes": "G<K", "residuals": "HGE"},
        ("means", "jacobians", "residuals"),
        _by_implementation(
            _look_up_expansion, _look_up_expansion_plain, sorted_segments=_sorted_segments),
        prepared={"sorted_segments": _in_blocks}),
    "align": Operation(
        {"latents": "BGD", "outputs": "BGD", "codewords": "LKD", "personalized": "BLKD", "chosen": "BGLD",
         "attended": "BGLD"},
        ("latents", "codewords", "personalized"),
        _by_implementation(losses.codebook_alignment, _align_plain,
                           **_blocks(losses.codebook_alignment, 256))),
    # No kernel: XLA's top-k takes a hundredth of a request's time.
    "top_k": Operation({"scores": "BG"}, (), {"plain": _top_k_plain, "xla": _top_k}),
}
