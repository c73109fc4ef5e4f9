"""Sequences of items as leave-last-out requests: which item came next, among negatives drawn by popularity.

In a sequence of T items, the last item is the test target, the one before it is the validation target, and
items 2 to T - 2 are training targets. The history is what strictly precedes the target. Users with fewer than
3 items give no requests; their items only count in the item vocabulary.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from tarq_jax.data.attributes import attribute_features
from tarq_jax.data.records import SPLITS, Dataset, Requests, make_requests, offsets_of, ragged_index
from tarq_jax.data.rows import BadRow, RowReport, parse_number, read_rows
from tarq_jax.data.sources import (
    Source,
    path_option,
    require,
    require_at_least,
    require_file,
    require_fraction,
)
from tarq_jax.schema import ITEM_ID, Field, Schema

MIN_ITEMS = 3  # fewest items of a user for whom requests are made
ROUNDS = 32  # attempts to redraw rejected negatives; rows that still have some are then drawn exactly


@dataclasses.dataclass(frozen=True)
class SequencesOptions:
    """Paths of the data, and how requests are made from it."""

    source: str = path_option()  # file with one line per user: `user item item ...` in order of time
    attributes: str = path_option(default="")  # JSON object, item id -> list of attribute ids; "" for none
    history_length: int = 50
    num_negatives: int = 15
    attribute_dims: int = 24
    seed: int = 0
    max_bad_fraction: float = 0.01  # malformed rows allowed in the file, as a fraction

    def __post_init__(self):
        require_at_least(self, history_length=1, num_negatives=1, attribute_dims=1, seed=0)
        require_fraction(self, "max_bad_fraction")
        require(isinstance(self.attributes, str), "attributes", self.attributes, "a path or ''")


class Sequences(NamedTuple):
    """Sequences of all users, in the order of the file; user u owns items[offsets[u]:offsets[u + 1]]."""

    items: np.ndarray  # [E] int64 item ids from 1, in the order of the original ids
    offsets: np.ndarray  # [U + 1] int64
    original_ids: np.ndarray  # [V - 1] int64; item i is at position i - 1


class Targets(NamedTuple):
    """Positions of the events that are targets."""

    event: np.ndarray  # [R] index into `Sequences.items`
    user: np.ndarray  # [R] index of the user, from 0
    position: np.ndarray  # [R] number of events of the user before the target
    split: np.ndarray  # [R] index into `SPLITS`


def read_sequences(source: str, max_bad_fraction: float) -> tuple[Sequences, RowReport]:
    """Reads the file; a row is malformed if it has no items, has a bad id, or repeats a user."""
    path = require_file(source, "source", "text with a line `user item item ...` a user")
    users = set()

    def parse(text: str) -> np.ndarray:
        user, *items = (parse_number(part, int) for part in text.split())
        if not items:
            raise BadRow("missing columns")
        if min(items) < 0 or max(items) >= 1 << 62:
            raise BadRow("id out of range")
        if user in users:
            raise BadRow("repeated user")
        users.add(user)
        return np.array(items, np.int64)

    rows, report = read_rows(path, parse, max_bad_fraction=max_bad_fraction)
    values = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    original, items = np.unique(values, return_inverse=True)
    return Sequences(items + 1, offsets_of(np.array([len(row) for row in rows], np.int64)), original), report


def find_targets(offsets: np.ndarray) -> tuple[Targets, np.ndarray]:
    """All targets; and [E] bool, the events known in training: all but the last two of each user."""
    lengths = np.diff(offsets)
    user = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(user)) - offsets[user]
    left = lengths[user] - 1 - position  # number of later events of the user
    valid = lengths[user] >= MIN_ITEMS
    event = np.flatnonzero(valid & (position >= 1))
    split = 2 - np.minimum(left[event], 2)
    return Targets(event, user[event], position[event], split), valid & (left >= 2)


def _rejected(drawn: np.ndarray, keys: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """[R, n] bool: negatives that the user has seen (their key is in the sorted `seen`) or drawn twice."""
    order = np.argsort(drawn, axis=1, kind="stable")
    ordered = np.take_along_axis(drawn, order, axis=1)
    twice = np.zeros(drawn.shape, bool)
    np.put_along_axis(twice, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    place = np.minimum(np.searchsorted(seen, keys), len(seen) - 1)
    return twice | (seen[place] == keys)


def _draw_exactly(rng: np.random.Generator, popularity: np.ndarray, seen_items: np.ndarray,
                  num: int) -> np.ndarray:
    """`num` distinct unseen items, drawn by popularity without replacement (Gumbel top-k)."""
    weights = popularity.astype(np.float64)
    weights[seen_items] = 0
    allowed = np.flatnonzero(weights)
    if len(allowed) < num:
        raise ValueError(f"config.data.num_negatives is {num}, expected at most {len(allowed)}: a user "
                         "has seen all other items that occur in training")
    keys = np.log(weights[allowed]) + rng.gumbel(size=len(allowed))
    return allowed[np.argsort(-keys)[:num]]


def sample_negatives(rng: np.random.Generator, popularity: np.ndarray, users: np.ndarray, seen: np.ndarray,
                     num_negatives: int) -> np.ndarray:
    """Draws distinct negatives by popularity, none from the user's own sequence.

    Args:
      rng: source of randomness.
      popularity: [V] training counts; items of count 0 are never drawn.
      users: [R] user of each request.
      seen: sorted keys `user * V + item` of all events of all users.
      num_negatives: n.

    Returns:
      [R, n] int64 item ids.

    Raises:
      ValueError: for some user, fewer than n items can be drawn.
    """
    cumulative, num_items = np.cumsum(popularity), len(popularity)
    drawn = np.zeros((len(users), num_negatives), np.int64)
    rows, pending = np.arange(len(users)), np.ones(drawn.shape, bool)
    for _ in range(ROUNDS):
        if not len(rows):
            return drawn
        block = drawn[rows]
        draws = rng.random(int(pending.sum())) * cumulative[-1]
        block[pending] = np.searchsorted(cumulative, draws, side="right")
        drawn[rows] = block
        pending = _rejected(block, users[rows, None] * num_items + block, seen)
        rows, pending = rows[pending.any(1)], pending[pending.any(1)]
    for row in rows:
        first, last = np.searchsorted(seen, (users[row] * num_items, (users[row] + 1) * num_items))
        drawn[row] = _draw_exactly(rng, popularity, seen[first:last] % num_items, num_negatives)
    return drawn


def _seen(sequences: Sequences, num_items: int) -> np.ndarray:
    """Sorted keys `user * num_items + item` of all events."""
    owner = np.repeat(np.arange(len(sequences.offsets) - 1), np.diff(sequences.offsets))
    return np.unique(owner * num_items + sequences.items)


def _requests(rng: np.random.Generator, sequences: Sequences, targets: Targets, popularity: np.ndarray,
              seen: np.ndarray, options: SequencesOptions) -> Requests:
    """Requests for the given targets, each target at a random position among its negatives."""
    num = len(targets.event)
    negatives = sample_negatives(rng, popularity, targets.user, seen, options.num_negatives)
    candidates = np.concatenate([sequences.items[targets.event, None], negatives], axis=1)
    rows, place = np.arange(num), rng.integers(0, candidates.shape[1], num)
    candidates[rows, place], candidates[:, 0] = candidates[:, 0].copy(), candidates[rows, place]
    labels = place[:, None] == np.arange(candidates.shape[1])
    lengths = np.minimum(targets.position, options.history_length)
    history = sequences.items[ragged_index(targets.event - lengths, lengths)]
    return make_requests(targets.user + 1, history, lengths, candidates.ravel(),
                         np.full(num, candidates.shape[1]), labels.ravel())


def generate(options: SequencesOptions) -> Dataset:
    """Reads the files and makes a data set of requests; deterministic in options and files.

    Users and items are numbered from 1: users in the order of the file, items in the order of their original
    ids. The data set's `info` holds `rows`, the report of malformed rows (see `rows.RowReport`), and counts.
    """
    sequences, report = read_sequences(options.source, options.max_bad_fraction)
    targets, known = find_targets(sequences.offsets)
    if not len(targets.event):
        raise ValueError(f"{options.source}: no user has {MIN_ITEMS} items, expected at least one who has")
    num_items = len(sequences.original_ids) + 1
    popularity = np.bincount(sequences.items[known], minlength=num_items)
    seen, splits = _seen(sequences, num_items), {}
    for split, name in enumerate(SPLITS):
        chosen = Targets(*(column[targets.split == split] for column in targets))
        rng = np.random.default_rng([options.seed, split])
        splits[name] = _requests(rng, sequences, chosen, popularity, seen, options)
    items = {ITEM_ID: np.arange(num_items, dtype=np.int32)}
    fields = [Field(ITEM_ID, "item", "categorical", num_items)]
    if options.attributes:
        path = require_file(options.attributes, "attributes", "JSON, item id -> list of attribute ids")
        items["attributes"] = attribute_features(path, sequences.original_ids, options.attribute_dims)
        fields.append(Field("attributes", "item", "vector", options.attribute_dims))
    lengths = np.diff(sequences.offsets)
    info = {"rows": report.to_json(), "num_events": int(lengths.sum()), "num_users": len(lengths),
            "users_too_short": int((lengths < MIN_ITEMS).sum())}
    return Dataset(Schema(tuple(fields)), items, {}, splits, info,
                   item_ids=np.append(0, sequences.original_ids))


def _files(options: SequencesOptions):
    files = {"source": require_file(options.source, "source", "text with a line `user item item ...` a user")}
    if options.attributes:
        files["attributes"] = require_file(options.attributes, "attributes",
                                           "JSON, item id -> list of attribute ids")
    return files


SOURCE = Source("sequences", SequencesOptions, generate, _files,
                description="The next item of a sequence among negatives drawn by popularity.")
