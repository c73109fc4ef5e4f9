"""An exported model as functions that run on the device: its programs with their weights, and top-k."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from tarq_jax.schema import Schema
from tarq_jax.serving.artefact import check_digest, read_manifest, read_program, read_weights
from tarq_jax.serving.index import FREE
from tarq_jax.serving.vectors import read, rows

ENCODE_BATCH = 1024  # items encoded at a time
PLATFORMS = {"gpu": {"cuda", "rocm"}}  # platforms of jax.export, for backends with another name


class Scored(NamedTuple):
    """Scores of B requests: minus infinity where there is no candidate, infinity for scores not finite."""

    scores: jax.Array  # [B, M]
    best: jax.Array  # [B, k], the largest scores in descending order; equal ones by position
    positions: jax.Array  # [B, k] int32, their positions among the M


class Programs(NamedTuple):
    """Programs, shared by models that differ only in weights; compiled on the first call with each shape.

    Attributes:
      digests: name -> SHA-256 of the files that the programs were read from.
      user_side: (weights, embeddings of the index, slots [B, N] of the histories, request) -> state of users.
      score_all: (weights, state, arrays of the index, allowed [B, C] bool, top_k) -> Scored of C slots.
      score_each: (weights, state, arrays, slots [B, M] or FREE, top_k) -> Scored of M slots.
    """

    digests: Mapping[str, str]
    user_side: Callable[..., Mapping[str, jax.Array]]
    score_all: Callable[..., Scored]
    score_each: Callable[..., Scored]


class Model(NamedTuple):
    """An exported model; several scorers can share it.

    Attributes:
      fingerprint: fingerprint of the model.
      facts: facts of its manifest.
      files: name -> SHA-256 of every file that its manifest lists.
      schema: schema of requests and items.
      programs: its programs, which other models may share.
      user_weights: weights of `programs.user_side`, on the device.
      item_weights: weights of `programs.score_all` and `programs.score_each`, on the device.
      encode: from item fields, name -> [M, ...], to what an index stores, in float32; reads its weights on
        the first call.
    """

    fingerprint: str
    facts: Mapping[str, Any]
    files: Mapping[str, str]
    schema: Schema
    programs: Programs
    user_weights: Mapping[str, jax.Array]
    item_weights: Mapping[str, jax.Array]
    encode: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]

    def user_side(self, *arguments: Any) -> Mapping[str, jax.Array]:
        """State of users, see `Programs`."""
        return self.programs.user_side(self.user_weights, *arguments)

    def score_all(self, *arguments: Any, top_k: int) -> Scored:
        """Scores of all slots."""
        return self.programs.score_all(self.item_weights, *arguments, top_k=top_k)

    def score_each(self, *arguments: Any, top_k: int) -> Scored:
        """Scores of the given slots of each request."""
        return self.programs.score_each(self.item_weights, *arguments, top_k=top_k)


def read_model(folder: Path, like: Model | None = None) -> Model:
    """The model in a folder of an artefact.

    Args:
      folder: the folder `model` of the artefact.
      like: a model that was read before. If it is the same, the new model shares its weights and programs; if
        only its programs are the same, it shares these.

    Raises:
      ValueError: the model is damaged, of another version, or not for the platform that JAX runs on here.
    """
    manifest = read_manifest(folder, "model")
    fingerprint, facts, files = manifest.fingerprint, manifest.facts, manifest.digests
    if like is not None and (like.fingerprint, like.facts, like.files) == (fingerprint, facts, files):
        return like._replace(encode=_encoder(folder, files))  # that of `like` may be gone from the disk
    backend = jax.default_backend()
    if not PLATFORMS.get(backend, {backend}) & set(facts["platforms"]):
        raise ValueError(f"{folder} was exported for {facts['platforms']}, expected {backend!r} among them, "
                         "which JAX runs on here")
    digests = {name: files[f"{name}.jaxexport"] for name in facts["programs"] if name != "encode"}
    shared = like is not None and like.programs.digests == digests
    programs = like.programs if like is not None and shared else read_programs(folder, digests)
    user, items = (jax.device_put(read_weights(folder, part)) for part in ("user", "items"))
    manifest.check_unchanged()
    return Model(fingerprint, facts, files, Schema.from_json(facts["schema"]), programs, user, items,
                 _encoder(folder, files))


def read_programs(folder: Path, digests: Mapping[str, str]) -> Programs:
    """The programs in a folder `model`, not compiled yet."""
    programs = {name: read_program(folder, name) for name in digests}

    def user_side(weights, stored, slots, request):
        history = {name: rows(values, slots) for name, values in stored.items()}
        embedding = read(history, "embedding")  # of slot 0 on padding, whatever item is there
        request = request | {"embedding": jnp.where(request["mask"][..., None], embedding, 0.0)}
        return programs[f"user_{slots.shape[1]}"].call(weights, request)

    def program(kind: str, state: Mapping[str, jax.Array]) -> export.Exported:
        return programs[f"{kind}_{state['mask'].shape[1]}" if "mask" in state else kind]

    def score_all(weights, state, arrays, allowed, top_k):
        return select(program("score_all", state).call(weights, state, arrays), allowed, top_k)

    def score_each(weights, state, arrays, slots, top_k):
        items = {name: rows(values, slots) for name, values in arrays.items()}
        return select(program("score_each", state).call(weights, state, items), slots != FREE, top_k)

    return Programs(digests, jax.jit(user_side), jax.jit(score_all, static_argnames="top_k"),
                    jax.jit(score_each, static_argnames="top_k"))


def select(scores: jax.Array, allowed: jax.Array, top_k: int) -> Scored:
    """The best k of scores [B, M], among those that are allowed, [B, M] bool."""
    seen = jnp.where(jnp.isfinite(scores), scores, jnp.inf)  # so that they rank first: NaN may rank last
    scores = jnp.where(allowed, seen, -jnp.inf)
    return Scored(scores, *jax.lax.top_k(scores, top_k))


def _encoder(
    folder: Path, digests: Mapping[str, str]
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    @functools.cache
    def program() -> Callable[..., Mapping[str, jax.Array]]:
        """Read and checked only when items are encoded, as it has the embedding tables; files may change."""
        for name in ("encode.jaxexport", "encode.npz"):
            check_digest(folder / name, digests[name])
        call = jax.jit(read_program(folder, "encode").call)
        return functools.partial(call, jax.device_put(read_weights(folder, "encode")))

    def encode(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"items have columns of {lengths} values, expected the same of each")
        total = next(iter(lengths.values()))
        blocks = []
        for start in range(0, max(total, 1), ENCODE_BATCH):
            block = {name: values[start:start + ENCODE_BATCH] for name, values in columns.items()}
            found = program()({name: _padded(values, ENCODE_BATCH) for name, values in block.items()})
            blocks.append({name: np.asarray(values)[:total - start] for name, values in found.items()})
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    return encode


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([values, np.zeros((length - len(values), *values.shape[1:]), values.dtype)])
