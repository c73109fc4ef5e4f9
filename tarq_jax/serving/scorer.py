"""Ranks candidates by an exported model: the user side once per request, look-ups and top-k on the device.

    scorer = Scorer.load("artefacts/1")
    scorer.warm_up()
    best = scorer.score({"history": {"item_id": [17, 4, 256]}}, top_k=500)

A scorer does not change after `warm_up`, and threads may share it. To serve changed items, make another
scorer with `with_index`; it shares the compiled programs. This module needs neither Flax nor training code.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import jax
import numpy as np

from tarq_jax.serving.artefact import read_index
from tarq_jax.serving.index import FREE, Encoded, Index, check_fingerprints, grow, round_up
from tarq_jax.serving.model import Model, Scored, read_model, read_programs
from tarq_jax.serving.request_checks import check_columns, check_ids, check_request, pad
from tarq_jax.serving.vectors import SCALE, check_codes, parts, store

BATCH_SIZES = (1, 8)
CANDIDATE_SIZES = (1024, 4096, 16384)
TOP_K = 1000
SPARSE = 400  # slots per candidate from which on sorting candidates is faster than looking through all slots
NO_IDS = np.zeros(0, np.int64)
NOT_FINITE = ("its scores are not finite, expected values of ordinary size in 'user', 'context' and "
              "'history', and in the items that it names")


class Ranking(NamedTuple):
    """The best candidates of a request, best first; equal ones in the order of the index."""

    ids: np.ndarray  # [k] int64; fewer than asked for if there are fewer candidates
    scores: np.ndarray  # [k] float32 logits
    unknown: np.ndarray  # [U] int64, given candidates that are not served
    skipped: int  # number of history events whose items are not in the index
    finite: bool = True  # whether all scores are finite; the ranking leaves out those that are not


class Users(NamedTuple):
    """The state of a batch of users, on the device: all that ranking needs to know about their requests."""

    state: Mapping[str, jax.Array]  # [B, ...] each
    skipped: Sequence[int]  # one number per real request, none for padding
    batch: int  # B, with padding
    items: Index  # the index in which the items of their histories were looked up
    first: int = 0  # number of the first request, for error messages


class Scorer:
    """Ranks candidates, see the module; made by `load` and `with_index`.

    Attributes:
      schema: schema of requests and items.
      facts: facts of the model's manifest: `method`, `histories`, `vectors`, `platforms`, ...
      index: index of the items, on the host.
      batch_sizes, candidate_sizes, top_k: sizes that programs are compiled for, see `load`.
      ready: whether all programs are compiled, by `warm_up` or for a scorer that shares them.
    """

    def __init__(self, model: Model, index: Index, batch_sizes: Sequence[int],
                 candidate_sizes: Sequence[int], top_k: int):
        """Puts the index on the device; ValueError if another model made it, or its arrays do not fit."""
        check_fingerprints(index.fingerprint, model.fingerprint)
        _check_arrays(index, model.facts)
        self.schema, self.facts, self.index, self.ready = model.schema, model.facts, index, False
        self._model, self.top_k = model, top_k
        self.batch_sizes = sorted(batch_sizes)
        self._sizes = sorted({round_up(size) for size in candidate_sizes})
        self.candidate_sizes = [size for size in self._sizes if size < index.capacity]
        self._arrays = jax.device_put(dict(index.arrays))

    @classmethod
    def load(cls, path: str | Path, *, index: str | Path | None = None,
             batch_sizes: Sequence[int] = BATCH_SIZES, candidate_sizes: Sequence[int] = CANDIDATE_SIZES,
             top_k: int = TOP_K, like: "Scorer | None" = None) -> "Scorer":
        """Reads and checks what `python -m tarq_jax.serving.export` wrote.

        Args:
          path: folder of the artefact.
          index: folder of another index for its model; `path/index` if None.
          batch_sizes: numbers of requests that are scored together. A batch is padded to the next of them;
            more requests than the largest are scored in several batches.
          candidate_sizes: numbers of candidates that given ones are padded to, rounded up to a multiple
            of 512. If a request of a batch has more than the largest, the whole index is scored for the
            entire batch, and items that were not given are left out.
          top_k: how many candidates the device selects; a larger k is sorted on the host.
          like: a scorer whose compiled programs are shared if those of the artefact are the same, as after
            the model was trained anew, and its index has no more slots. The index then gets as many slots as
            that of `like`, so that nothing has to be compiled.

        Raises:
          ValueError: the artefact is damaged, of another version or platform, or index and model differ.
        """
        for name, values in (("batch_sizes", batch_sizes), ("candidate_sizes", (*candidate_sizes, top_k))):
            if not values or min(values) < 1:
                raise ValueError(f"{name} are {tuple(values)}, expected positive numbers")
        folder = Path(path).resolve()  # once: a symbolic link may be moved to another version meanwhile
        model = read_model(folder / "model", None if like is None else like._model)
        items = read_index(folder / "index" if index is None else Path(index))
        if like is not None and model.programs is like._model.programs:
            if items.capacity <= like.index.capacity:
                items = grow(items, like.index.capacity)
            else:  # what is compiled for fewer slots can go with `like`
                model = model._replace(programs=read_programs(folder / "model", model.programs.digests))
        scorer = cls(model, items, batch_sizes, candidate_sizes, top_k)
        scorer.ready = like is not None and like.ready and scorer._shapes == like._shapes
        return scorer

    def with_index(self, index: Index) -> "Scorer":
        """A scorer of the same model for another index; ready immediately if its capacity is the same."""
        scorer = Scorer(self._model, index, self.batch_sizes, self._sizes, self.top_k)
        scorer.ready = self.ready and scorer._shapes == self._shapes
        return scorer

    @property
    def _shapes(self) -> tuple[Any, ...]:
        """What has to be the same for two scorers to use the same compiled programs."""
        sizes = self.batch_sizes, self.candidate_sizes, self.top_k, self.index.capacity
        return id(self._model.programs), *sizes

    def encode(self, items: Mapping[str, Any]) -> Encoded:
        """Encodes items, given by their fields [M, ...], for `tarq_jax.serving.index.add` and `change`.

        Give a new item the field `item_id` 0, unless it was in the vocabulary that was trained.
        """
        encoded = self._model.encode(check_columns(self.schema.side("item"), items, "items"))
        return Encoded(store(encoded, self.facts["vectors"], self.facts["num_codewords"]),
                       self._model.fingerprint)

    def warm_up(self) -> "Scorer":
        """Compiles every program for every shape; afterwards the scorer is `ready`."""
        for batch in self.batch_sizes:
            for length in self.facts["histories"]:
                users = self._users([], batch, [length])
                self._score_all(users, np.zeros((batch, self.index.capacity), bool))
                for size in self.candidate_sizes:
                    self._score_each(users, np.full((batch, size), FREE, np.int32))
        self.ready = True
        return self

    @overload
    def score(self, requests: Mapping[str, Any], candidates: Any = None, *, top_k: int | None = None
              ) -> Ranking: ...

    @overload
    def score(self, requests: Sequence[Mapping[str, Any]], candidates: Any = None, *,
              top_k: int | None = None) -> list[Ranking]: ...

    def score(self, requests: Any, candidates: Any = None, *, top_k: int | None = None) -> Any:
        """The best candidates of each request.

        Args:
          requests: one request, in the form of `tarq_jax.serving.request_checks`, or a list of them.
          candidates: ids to rank, or None for all that the index serves; for a list of requests None, or
            a list with ids or None for each request. An id that is not served is reported as unknown; one
            that is given twice is ranked once.
          top_k: how many to return; all if None.

        Returns:
          A `Ranking`, or a list of them.

        Raises:
          ValueError: a request is invalid; names it, the field, its value and what was expected.
        """
        if not isinstance(requests, Mapping | Sequence) or isinstance(requests, str | bytes):
            raise ValueError(f"requests are of type {type(requests).__name__}, expected a request or a list")
        if isinstance(requests, Mapping):
            return _finite(self.rank(self.users([requests]), [candidates], top_k=top_k))[0]
        chosen = [None] * len(requests) if candidates is None else candidates
        if len(chosen) != len(requests):
            raise ValueError(f"candidates are {len(chosen)} lists, expected {len(requests)}, one a request")
        rankings: list[Ranking] = []
        for start in range(0, len(requests), self.batch_sizes[-1]):
            part = slice(start, start + self.batch_sizes[-1])
            rankings += self.rank(self.users(requests[part], first=start), chosen[part], top_k=top_k)
        return _finite(rankings)

    def users(self, requests: Sequence[Any], *, first: int = 0) -> Users:
        """The user side alone, which can run while candidates are still being retrieved.

        Args:
          requests: at most as many as the largest of `batch_sizes`.
          first: number of the first request, for error messages.
        """
        if len(requests) > self.batch_sizes[-1]:
            raise ValueError(f"requests are {len(requests)}, expected at most {self.batch_sizes[-1]}, the "
                             "largest of batch_sizes")
        checked = [check_request(self.schema, request, f"request {first + place}")
                   for place, request in enumerate(requests)]
        batch = next(size for size in self.batch_sizes if size >= len(requests))
        return self._users(checked, batch, self.facts["histories"], first)

    def _users(self, requests: Sequence[Any], batch: int, lengths: Sequence[int], first: int = 0) -> Users:
        padded = pad(self.schema, self.index, requests, batch=batch, lengths=lengths)
        state = self._model.user_side(parts(self._arrays, "embedding"), padded.slots, padded.request)
        return Users(state, padded.skipped, batch, self.index, first)

    def rank(self, users: Users, candidates: Sequence[Any], *, top_k: int | None = None) -> list[Ranking]:
        """The item side alone: as `score`, for `users` of this scorer and ids or None for each of them."""
        if users.items is not self.index:
            raise ValueError("users are those of a scorer with another index, expected this one's: an answer "
                             "comes from one version alone")
        if top_k is not None and (
                isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or top_k < 1):
            raise ValueError(f"top_k is {top_k!r}, expected an integer of at least 1, or None")
        if len(candidates) != len(users.skipped):
            raise ValueError(f"candidates are {len(candidates)} lists, expected {len(users.skipped)}, one a "
                             "request")
        chosen = [self._all if ids is None else self._choose(ids, f"candidates of request {number}")
                  for number, ids in enumerate(candidates, users.first)]
        most = max((len(found.slots) for found in chosen), default=0)
        size = next((size for size in self.candidate_sizes if size >= most), None)
        scores = self._whole(users, chosen) if size is None else self._chosen(users, chosen, size)
        selected, rankings = _best(scores, top_k), []
        for found, skipped, best, positions in zip(chosen, users.skipped, *selected, strict=False):
            real, finite = np.isfinite(best), bool((best < np.inf).all())
            slots = positions[real] if size is None else found.slots[positions[real]]
            rankings.append(Ranking(self.index.ids[slots], best[real], found.unknown, skipped, finite))
        return rankings

    @cached_property
    def _all(self) -> "_Chosen":
        return _Chosen(np.flatnonzero(self.index.served), NO_IDS)

    def _choose(self, candidates: Any, where: str) -> "_Chosen":
        ids = check_ids(candidates, where)
        slots = self.index.slots_of(ids)
        served = (slots != FREE) & self.index.served[slots]
        return _Chosen(_ascending(slots[served], self.index.capacity), ids[~served])

    def _whole(self, users: Users, chosen: Sequence["_Chosen"]) -> Scored:
        """Scores the whole index, and leaves out the items that were not chosen."""
        allowed = np.zeros((users.batch, self.index.capacity), bool)
        for row, found in enumerate(chosen):
            if found is self._all:  # copying the mask is far faster than writing every slot
                allowed[row] = self.index.served
            else:
                allowed[row, found.slots] = True
        return self._score_all(users, allowed)

    def _chosen(self, users: Users, chosen: Sequence["_Chosen"], size: int) -> Scored:
        """Scores only the chosen candidates."""
        slots = np.full((users.batch, size), FREE, np.int32)
        for row, found in enumerate(chosen):
            slots[row, :len(found.slots)] = found.slots
        return self._score_each(users, slots)

    def _score_all(self, users: Users, allowed: np.ndarray) -> Scored:
        return self._model.score_all(
            users.state, self._arrays, allowed, top_k=min(self.top_k, allowed.shape[1]))

    def _score_each(self, users: Users, slots: np.ndarray) -> Scored:
        return self._model.score_each(
            users.state, self._arrays, slots, top_k=min(self.top_k, slots.shape[1]))


class _Chosen(NamedTuple):
    """Given candidates that are served, each once, and those that are not.

    Slots ascend, so that equal scores rank in the same order however many candidates are scored together.
    """

    slots: np.ndarray  # [G] integers
    unknown: np.ndarray  # [U] int64, ids of those that are not served


def _ascending(slots: np.ndarray, capacity: int) -> np.ndarray:
    """The slots in ascending order, each once; marked in an array, as sorting is faster only for few."""
    if SPARSE * len(slots) < capacity:
        return np.unique(slots)
    marked = np.zeros(capacity, bool)
    marked[slots] = True
    return np.flatnonzero(marked)


def _finite(rankings: list[Ranking]) -> list[Ranking]:
    for row, ranking in enumerate(rankings):
        if not ranking.finite:
            raise ValueError(f"request {row}: {NOT_FINITE}")
    return rankings


def _check_arrays(index: Index, facts: Mapping[str, Any]) -> None:
    """Raises ValueError unless the index has the arrays that the model's programs take."""
    expected, arrays = facts["arrays"], index.arrays
    if arrays.keys() != expected.keys():
        raise ValueError(f"the index has the arrays {sorted(arrays)}, expected {sorted(expected)}")
    for name, values in arrays.items():
        dtype, row = expected[name]["dtype"], expected[name]["row"]
        if (str(values.dtype), list(values.shape[1:])) != (dtype, row):
            raise ValueError(f"the index has {name!r} as {values.dtype} {list(values.shape)}, expected "
                             f"{dtype} [C, *{row}]")
        if len(values) != index.capacity:
            raise ValueError(f"the index has {name!r} of {len(values)} rows, expected {index.capacity}, one "
                             f"for each id")
        if values.dtype.kind in "iu" and name + SCALE not in arrays:
            check_codes(name, values, facts["num_codewords"])


def _best(found: Scored, top_k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The best k scores of each request and their positions, [B, k] each.

    They come from the device if it selected at least k, else all scores are sorted on the host.
    """
    if top_k is not None and top_k <= found.best.shape[1]:
        best, positions = jax.device_get((found.best, found.positions))
    else:
        scores = np.asarray(found.scores)
        positions = np.argsort(-scores, axis=-1, kind="stable")
        best = np.take_along_axis(scores, positions, axis=-1)
    return best[:, :top_k], positions[:, :top_k]
