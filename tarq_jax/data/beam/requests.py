"""Makes requests from the events of a user; a history ends strictly before its request."""

import bisect
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np

from tarq_jax.data.beam.vocabulary import stable_hash
from tarq_jax.data.records import SPLITS

ROUNDS = 8  # a request draws at most this many times its number of negatives; it may end with fewer


class Request(NamedTuple):
    """One request; users and items are rows of their tables."""

    split: str
    key: str  # unique; decides the block
    user: int
    context: tuple[int, ...]
    history: list[tuple[int, tuple[int, ...]]]  # (item, values), oldest first
    candidates: list[tuple[int, float]]  # (item, label)


class KeepLast(beam.CombineFn):
    """Keeps the last `num` elements, sorted, so that a user with very many events does not fill the memory.

    The result is (elements, how many were left out). Elements begin with their time. Elements of equal time
    are sorted by their other entries, so that the result does not depend on the runner.
    """

    def __init__(self, num: int):
        self.num = num

    def create_accumulator(self) -> tuple[list, int]:
        """An accumulator with nothing kept and nothing left out."""
        return [], 0

    def add_input(self, accumulator: tuple[list, int], element: Any) -> tuple[list, int]:
        """Adds an element; when twice `num` are kept, the earlier half is dropped."""
        kept, dropped = accumulator
        kept.append(element)
        return self._cut(kept, dropped) if len(kept) >= 2 * self.num else (kept, dropped)

    def merge_accumulators(self, accumulators: Iterable[tuple[list, int]]) -> tuple[list, int]:
        """The last elements of all accumulators."""
        kept: list[Any] = []
        dropped = 0
        for more, left_out in accumulators:
            kept, dropped = self._cut(kept + more, dropped + left_out)
        return kept, dropped

    def extract_output(self, accumulator: tuple[list, int]) -> tuple[list, int]:
        """The kept elements, sorted."""
        return self._cut(*accumulator)

    def _cut(self, elements: list, dropped: int) -> tuple[list, int]:
        elements = sorted(elements)
        return elements[-self.num:], dropped + max(len(elements) - self.num, 0)


class Rules(NamedTuple):
    """How requests are made; small, and can be pickled."""

    history_length: int
    validation_start: int  # seconds; requests from then on are not in training
    test_start: int
    min_history: int = 0  # requests with fewer events before them are left out
    num_negatives: int = 0
    seed: int = 0

    def split(self, time: int) -> str:
        """The split of a request."""
        return SPLITS[(time >= self.validation_start) + (time >= self.test_start)]


def make_requests(element: tuple[str, dict[str, Iterable]], pool: np.ndarray,
                  rules: Rules) -> Iterator[Request]:
    """The requests of one user.

    Args:
      element: the user's key and a dictionary: `user` has the user's row; `events` and `shown` have the
        result of `KeepLast` over (time, item, values) and (time, context, item, label).
      pool: [P] items that negatives are drawn from.
      rules: how requests are made.

    Yields:
      Requests in order of time. The history of a request has only events before its time.
    """
    key, found = element
    user = next(iter(found["user"]), 0)
    events, shown = (_kept(found[name]) for name in ("events", "shown"))
    times, seen = [time for time, _, _ in events], {item for _, item, _ in events}
    for (time, context), group in itertools.groupby(shown, key=lambda candidate: candidate[:2]):
        stop = bisect.bisect_left(times, time)
        if stop < rules.min_history:
            continue
        past = events[max(stop - rules.history_length, 0):stop]
        candidates = [(item, label) for _, _, item, label in group]
        name = f"{key}/{time}/{context}"
        if rules.num_negatives:
            candidates = _with_negatives(name, candidates, seen, pool, rules)
        yield Request(rules.split(time), name, user, context, [(item, values) for _, item, values in past],
                      candidates)


def _kept(found: Iterable[tuple[list, int]]) -> list:
    """The elements kept by `KeepLast`, if the user has any; a Beam counter counts those left out."""
    kept, dropped = next(iter(found), ([], 0))
    if dropped:
        beam.metrics.Metrics.counter("events", "left out of very long histories").inc(dropped)
    return kept


def _with_negatives(name: str, candidates: list[tuple[int, float]], seen: set[int], pool: np.ndarray,
                    rules: Rules) -> list[tuple[int, float]]:
    """Candidates and negatives, shuffled together; depends only on the request and the seed."""
    rng = random.Random(stable_hash(f"{rules.seed}/{name}"))
    taken = seen | {item for item, _ in candidates} | {0}
    negatives: list[tuple[int, float]] = []
    for _ in range(ROUNDS * rules.num_negatives if len(pool) else 0):
        if len(negatives) == rules.num_negatives:
            break
        item = int(pool[rng.randrange(len(pool))])
        if item not in taken:
            taken.add(item)
            negatives.append((item, 0.0))
    candidates = candidates + negatives
    rng.shuffle(candidates)
    return candidates
