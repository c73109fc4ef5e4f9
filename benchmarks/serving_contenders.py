"""Every method whose serving is measured, of one size, with random weights: latency needs no training.

    two-tower; two-tower with a COLD-style MLP; full target attention, for all candidates at once as it
    trains by default, and for a block of candidates at a time, its fastest form here; TARQ of order 0
    and 1 with the heads scalar, dot and mlp, of order 1 also with a smaller codebook
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from benchmarks import approximations
from tarq_jax.data import Dataset
from tarq_jax.experiments.study import tarq_name
from tarq_jax.models import Cold, FirstOrderTarq, TargetAttention, Tarq, TwoTower
from tarq_jax.models.layers import Compute
from tarq_jax.models.tarq import Head
from tarq_jax.schema import Field, Schema
from tarq_jax.serving import Scorer, build, methods
from tarq_jax.serving.item_side import SCORES, Arrays
from tarq_jax.serving.method import SERVED, Method, bound, user_and_history
from tarq_jax.serving.tarq_methods import codebooks, expansions
from tarq_jax.types import Batch

SAMPLE = 4096  # items from which codewords are drawn
TWO_TOWER, COLD = "two-tower", "COLD-style MLP"
IN_BLOCKS, WHOLE = "target attention, in blocks", "target attention, whole"
HEADS: tuple[Head, ...] = ("scalar", "dot", "mlp")

Stage = Callable[[Any, Any], dict[str, jax.Array]]  # (user weights, outputs of the previous stage) -> outputs


class Sizes(NamedTuple):
    """The sizes that all methods share."""

    items: int = 100_000
    width: int = 64
    heads: int = 4
    hidden: tuple[int, ...] = (64,)
    levels: int = 3
    codewords: int = 256
    few_codewords: int = 64  # a second size for order 1, which needs fewer
    features: int = 24  # of an item, in addition to its id


class Contender(NamedTuple):
    """A method and the module from which it is made."""

    name: str
    method: Method
    module: nn.Module
    reference: Callable[[Batch], jax.Array]  # logits [B, G] by the training code


def make_dataset(sizes: Sizes) -> Dataset:
    """Items with random features; serving needs nothing else from a data set here."""
    rows = sizes.items + 1
    schema = Schema((Field("item_id", "item", "categorical", rows),
                     Field("features", "item", "vector", sizes.features)))
    features = np.random.default_rng(0).normal(size=(rows, sizes.features)).astype(np.float32)
    return Dataset(schema, {"item_id": np.arange(rows, dtype=np.int32), "features": features}, {}, {})


def make_contenders(sizes: Sizes, dataset: Dataset) -> Iterator[Contender]:
    """All methods, one after the other."""
    common = dataset.schema, sizes.width, sizes.heads, sizes.hidden
    two_tower, cold, attention = TwoTower(*common), Cold(*common), TargetAttention(*common)
    params = random_params(two_tower, dataset)
    yield Contender(TWO_TOWER, methods.from_module(two_tower, params), two_tower,
                    logits_of(two_tower, params))
    params = random_params(cold, dataset)
    yield Contender(COLD, approximations.cold_method(cold.clone(compute=SERVED), params), cold,
                    logits_of(cold, params))
    params = random_params(attention, dataset)
    served, reference = methods.from_module(attention, params), logits_of(attention, params)
    whole = served._replace(name="target_attention_whole", score=inspect.unwrap(SCORES["target_attention"]))
    yield Contender(IN_BLOCKS, served, attention, reference)
    yield Contender(WHOLE, whole, attention, reference)
    for order, codewords in ((0, sizes.codewords), (1, sizes.codewords), (1, sizes.few_codewords)):
        for head in HEADS:
            module = (FirstOrderTarq if order else Tarq)(*common, num_levels=sizes.levels, head=head)
            params = random_params(module, dataset, codewords)
            chosen = draw_codewords(item_latents(module, params, dataset), sizes.levels, codewords)
            yield Contender(tarq_name(order, head, codewords), methods.from_module(module, params, chosen),
                            module, logits_of(module, params, chosen))


def random_params(module: nn.Module, dataset: Dataset, codewords: int = 0) -> Any:
    """Random parameters, scaled so that activations have magnitudes around one."""
    rng = np.random.default_rng(0)
    batch = make_batch(dataset, np.ones(1, np.int32), np.ones(1, np.int32))
    further = ()
    if isinstance(module, Tarq):
        further = (np.zeros((module.num_levels, codewords, module.width), np.float32),)
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch, *further)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(module.width)), shapes)


def make_batch(dataset: Dataset, history: np.ndarray, candidates: np.ndarray) -> Batch:
    """One request for the training code, from the ids of its history [N] and of its candidates [G]."""
    looked_up = [{name: values[ids][None] for name, values in dataset.items.items()}
                 for ids in (history, candidates)]
    some, = np.ones((1, 1, len(candidates)), np.float32)
    return Batch(user_id=np.zeros(1, np.int32), user={}, context={}, history=looked_up[0],
                 history_mask=np.ones((1, len(history)), bool), candidates=looked_up[1],
                 candidate_mask=some > 0, labels=some, weights=some)


def item_latents(module: Tarq, params: Any, dataset: Dataset) -> np.ndarray:
    """The latents of some items, [M, D]."""
    features = {name: values[1:SAMPLE + 1] for name, values in dataset.items.items()}

    def latents(module):
        embedded = module.teacher.backbone.item_features(features, features["item_id"].shape)
        return module.item_latents(embedded[None])[0]

    compute: Callable[[Any], Any] = nn.apply(latents, module)
    return np.asarray(jax.jit(compute)(params))


def draw_codewords(latents: np.ndarray, levels: int, codewords: int) -> np.ndarray:
    """Codewords [L, K, D] of about even use: random latents [M, D]; for further levels their residuals."""
    rng, drawn = np.random.default_rng(0), []
    for _ in range(levels):
        level = latents[rng.choice(len(latents), codewords, replace=len(latents) < codewords)]
        distances = np.square(level).sum(axis=1) - 2 * latents @ level.T
        latents = latents - level[distances.argmin(axis=1)]
        drawn.append(level)
    return np.stack(drawn)


def logits_of(module: nn.Module, params: Any, *arguments: Any) -> Callable[[Batch], jax.Array]:
    """The training code, compiled: batch -> logits."""
    forward: Callable[..., Any] = jax.jit(module.apply)
    return lambda batch: forward(params, batch, *arguments).logits


def user_stages(module: nn.Module, compute: Compute) -> Mapping[str, Stage]:
    """The stages of the user side, in order: `towers`, the teacher's `encoder`, `codebooks`."""
    module = module.clone(compute=compute)
    stages: dict[str, Callable[..., Any]] = {"towers": _towers}
    if isinstance(module, TargetAttention | Tarq):
        stages["encoder"] = _encoder
    if isinstance(module, Tarq):
        stages["codebooks"] = expansions if isinstance(module, FirstOrderTarq) else codebooks
    return {name: bound(stage, module) for name, stage in stages.items()}


def _towers(module: nn.Module, weights: Any, request: Arrays) -> dict[str, Any]:
    """v_user [B, D] and the history X [B, N, D]."""
    teacher = module.teacher if isinstance(module, Tarq) else module
    backbone = teacher if isinstance(teacher, TwoTower) else teacher.backbone
    user, history = user_and_history(backbone, request)
    return {"user": user, "history": history, "mask": request["mask"]}


def _encoder(module: nn.Module, weights: Any, encoded: Arrays) -> dict[str, Any]:
    """The teacher's encoded history in order 0; in all other models its keys and values."""
    teacher = module.teacher if isinstance(module, Tarq) else module
    history = teacher.history_encoder(encoded["history"], encoded["mask"])
    kept = {"user": encoded["user"], "mask": encoded["mask"]}
    if isinstance(module, Tarq) and not isinstance(module, FirstOrderTarq):
        return kept | {"history": history}
    keys, values = teacher.attention.keys_values(history)
    return kept | {"keys": keys, "values": values}


def personalize(module: nn.Module, compute: Compute) -> Stage:
    """The personalised codebooks of order 0 alone, [B, L, K, D], before any head."""
    def stage(module, weights, encoded):
        return module.personalize(weights["codewords"], encoded["history"], encoded["mask"])

    return bound(stage, module.clone(compute=compute))


def load_scorer(contender: Contender, dataset: Dataset, folder: Path, *, histories: Sequence[int],
                candidates: Sequence[int], top_k: int) -> Scorer:
    """Exports the contender to an empty folder, and loads it for one request at a time."""
    build.write(contender.method, dataset, folder, histories=histories, capacity=dataset.schema.num_items - 1)
    return Scorer.load(folder, batch_sizes=(1,), candidate_sizes=candidates, top_k=top_k)
