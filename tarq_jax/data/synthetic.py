"""Synthetic requests whose click probability is known: it follows from softmax attention over the history.

The task (ours): items in clusters on a sphere, users with a few interests, and a click
logit `5.5 (sum_n a_n s_n - 0.62) + popularity`, where s_n is the cosine of candidate and n-th history
item and `a = softmax(sharpness * s)`. Models see an item only as its id and noisy random projections.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from tarq_jax.data.records import Dataset, Requests, make_requests
from tarq_jax.data.sources import Source, require, require_at_least
from tarq_jax.schema import ITEM_ID, Field, Schema

DIMENSIONS = 12  # dimensions of the hidden item vectors
PROJECTIONS = 24  # number of features shown to models
CHUNK_SCORES = 2_000_000  # candidate-history pairs scored at a time


@dataclasses.dataclass(frozen=True)
class SyntheticOptions:
    """Sizes of the task; the results in the README use the defaults."""

    num_items: int = 4000  # real items; ids are 1 to num_items
    num_clusters: int = 60
    history_length: int = 50
    num_candidates: int = 16
    min_interests: int = 3
    max_interests: int = 7
    sharpness: float = 8.0
    train_requests: int = 12_000
    validation_requests: int = 1_500
    test_requests: int = 2_500
    seed: int = 0

    def __post_init__(self):
        require_at_least(self, num_clusters=1, history_length=1, num_candidates=1, min_interests=1,
                         train_requests=0, validation_requests=0, test_requests=0, seed=0)
        require_at_least(self, num_items=self.num_clusters, max_interests=self.min_interests)
        require(self.max_interests <= self.num_clusters, "max_interests", self.max_interests,
                f"at most num_clusters ({self.num_clusters})")
        require(isinstance(self.sharpness, int | float) and 0 <= self.sharpness < np.inf, "sharpness",
                self.sharpness, "a finite number of at least 0")


class World(NamedTuple):
    """The hidden properties of items; row 0 of `vectors`, `popularity` and `features` is padding."""

    vectors: np.ndarray  # [V, 12] float32, unit length
    popularity: np.ndarray  # [V] float32
    features: np.ndarray  # [V, 24] float32
    by_cluster: np.ndarray  # [V - 1] item ids, sorted by cluster
    cluster_offsets: np.ndarray  # [clusters + 1]


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def make_world(options: SyntheticOptions) -> World:
    """Draws the items: centre + normal noise of 0.45*1.6/sqrt(12) per coordinate, renormalised."""
    rng = np.random.default_rng([options.seed, 0])
    num = options.num_items
    centres = _unit(rng.standard_normal((options.num_clusters, DIMENSIONS)))
    cluster = rng.permutation(np.arange(num) % options.num_clusters)
    noise = rng.standard_normal((num, DIMENSIONS)) * (0.45 * 1.6 / np.sqrt(DIMENSIONS))
    vectors = _unit(centres[cluster] + noise)
    projections = vectors @ rng.standard_normal((DIMENSIONS, PROJECTIONS))
    features = projections + 0.25 * rng.standard_normal((num, PROJECTIONS))
    popularity = 0.5 * rng.standard_normal(num)
    vectors, popularity, features = (np.concatenate([np.zeros_like(a[:1]), a]).astype(np.float32)
                                     for a in (vectors, popularity, features))
    counts = np.bincount(cluster, minlength=options.num_clusters)
    return World(vectors, popularity, features, 1 + np.argsort(cluster, kind="stable"),
                 np.concatenate([[0], np.cumsum(counts)]))


def click_logits(world: World, history: np.ndarray, candidates: np.ndarray, sharpness: float) -> np.ndarray:
    """True logits `5.5 (sum_n a_n s_n - 0.62) + popularity`.

    Args:
      world: the items.
      history: [R, N] item ids.
      candidates: [R, G] item ids.
      sharpness: factor of the cosine within the softmax.

    Returns:
      [R, G] float32 logits.
    """
    cosines = world.vectors[candidates] @ world.vectors[history].swapaxes(1, 2)  # [R, G, N]
    attention = np.exp(sharpness * (cosines - cosines.max(-1, keepdims=True)))
    attended = (attention * cosines).sum(-1) / attention.sum(-1)
    return 5.5 * (attended - 0.62) + world.popularity[candidates]


def _interests(rng: np.random.Generator, requests: int, options: SyntheticOptions):
    """Distinct clusters [R, max_interests] of each user, and their cumulative Dirichlet(1.5) weights."""
    clusters = rng.random((requests, options.num_clusters)).argsort(1)[:, :options.max_interests]
    count = rng.integers(options.min_interests, options.max_interests + 1, requests)
    shares = rng.gamma(1.5, size=clusters.shape) * (np.arange(options.max_interests) < count[:, None])
    return clusters, np.cumsum(shares / shares.sum(1, keepdims=True), axis=1)


def _items_of_interest(rng: np.random.Generator, world: World, clusters: np.ndarray, cumulative: np.ndarray,
                       per_request: int) -> np.ndarray:
    """Item ids [R, per_request]: draws a cluster by its weight, then any of its items."""
    draws = rng.random((len(clusters), per_request))
    which = (draws[:, :, None] >= cumulative[:, None, :-1]).sum(-1)
    chosen = np.take_along_axis(clusters, which, axis=1)
    start, size = world.cluster_offsets[chosen], np.diff(world.cluster_offsets)[chosen]
    return world.by_cluster[start + (rng.random(chosen.shape) * size).astype(np.int64)]


def _draw_chunk(rng: np.random.Generator, world: World, options: SyntheticOptions, requests: int):
    """Histories [R, N], candidates [R, G] (half from the user's clusters, half from all), true logits."""
    clusters, cumulative = _interests(rng, requests, options)
    history = _items_of_interest(rng, world, clusters, cumulative, options.history_length)
    own = _items_of_interest(rng, world, clusters, cumulative, options.num_candidates // 2)
    anything = rng.integers(1, options.num_items + 1, (requests, options.num_candidates - own.shape[1]))
    candidates = np.concatenate([own, anything], axis=1)
    return history, candidates, click_logits(world, history, candidates, options.sharpness)


def draw_requests(rng: np.random.Generator, world: World, options: SyntheticOptions, requests: int,
                  first_user: int = 1) -> tuple[Requests, np.ndarray]:
    """Draws requests, each of a new user.

    Args:
      rng: source of randomness.
      world: the items.
      options: sizes.
      requests: R, number of requests.
      first_user: id of the first user.

    Returns:
      The requests, and the true click probability of each candidate, [R * G] float64.
    """
    shapes = [(0, options.history_length), (0, options.num_candidates), (0, options.num_candidates)]
    chunk = max(1, CHUNK_SCORES // (options.history_length * options.num_candidates))
    drawn = [_draw_chunk(rng, world, options, min(chunk, requests - start))
             for start in range(0, requests, chunk)]
    history, candidates, logits = (
        np.concatenate(parts) for parts in zip(*(drawn or [[np.zeros(s) for s in shapes]]), strict=True))
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64).ravel()))
    labels = rng.random(probabilities.shape) < probabilities
    return make_requests(
        np.arange(first_user, first_user + requests), history.ravel(),
        np.full(requests, options.history_length), candidates.ravel(),
        np.full(requests, options.num_candidates), labels), probabilities


def binary_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """P(a positive scores above a negative), for scores [M] without ties; NaN unless both labels occur."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
    positives = int((labels > 0.5).sum())
    pairs = positives * (len(labels) - positives)
    return float((ranks[labels > 0.5].sum() - positives * (positives + 1) / 2) / pairs) if pairs else np.nan


def generate(options: SyntheticOptions) -> Dataset:
    """Makes the data set; deterministic in the options.

    Its `info` holds `bayes_auc` (test) and `bayes_auc_validation`, the AUC of the true probability, which a
    model can exceed only by luck; None if a split lacks one of the labels.
    """
    world = make_world(options)
    sizes = {"train": options.train_requests, "validation": options.validation_requests,
             "test": options.test_requests}
    splits, bayes, user = {}, {}, 1
    for stream, (split, size) in enumerate(sizes.items(), start=1):
        rng = np.random.default_rng([options.seed, stream])
        splits[split], probabilities = draw_requests(rng, world, options, size, first_user=user)
        auc = binary_auc(probabilities, splits[split].labels)
        bayes[split] = None if np.isnan(auc) else auc
        user += size
    schema = Schema((Field(ITEM_ID, "item", "categorical", options.num_items + 1),
                     Field("features", "item", "vector", PROJECTIONS)))
    items = {ITEM_ID: np.arange(options.num_items + 1, dtype=np.int32), "features": world.features}
    info = {"bayes_auc": bayes["test"], "bayes_auc_validation": bayes["validation"]}
    return Dataset(schema, items, {}, splits, info)


SOURCE = Source("synthetic", SyntheticOptions, generate, files=lambda options: {},
                description="Requests whose click probability is a softmax attention over the history.")
