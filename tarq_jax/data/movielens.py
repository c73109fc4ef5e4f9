"""MovieLens, in any of the forms it is distributed in, as requests that never look into the future.

A rating of 4 or more is a click. Each user's events, in order of time, are cut into train, validation and
test. Consecutive events of one split are the candidates of a request; its history is what the user rated
strictly before the first of them.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from tarq_jax.data.movielens_files import Form, find_form, read_items, read_ratings, read_users
from tarq_jax.data.records import SPLITS, Columns, Dataset, Requests, make_requests, ragged_index
from tarq_jax.data.rows import merge_reports
from tarq_jax.data.sources import Source, path_option, require, require_at_least, require_fraction
from tarq_jax.schema import ITEM_ID, Field, Schema

CLICK_RATING = 4.0
DISLIKED, CLICKED = 1, 2  # values of the event field `feedback`


@dataclasses.dataclass(frozen=True)
class MovielensOptions:
    """The path of the data, and how requests are made from it."""

    source: str = path_option()  # folder with the files of one form
    history_length: int = 50
    num_candidates: int = 16
    test_fraction: float = 0.2  # the last events of each user, rounded down
    validation_fraction: float = 0.1  # the events before those; users with few events only train
    max_bad_fraction: float = 0.01  # malformed rows allowed in a file, as a fraction

    def __post_init__(self):
        require_at_least(self, history_length=1, num_candidates=1)
        require_fraction(self, "test_fraction", "validation_fraction", "max_bad_fraction")
        require(self.test_fraction + self.validation_fraction < 1, "validation_fraction",
                self.validation_fraction, f"less than 1 - test_fraction ({1 - self.test_fraction:g})")


class Events(NamedTuple):
    """Ratings sorted by user and time; those of equal time keep the order of their file."""

    user: np.ndarray  # [E] int32 row in the user table
    item: np.ndarray  # [E] int32 item id
    time: np.ndarray  # [E] int64 seconds
    click: np.ndarray  # [E] bool


class Windows(NamedTuple):
    """Requests as windows of sorted events: candidates [start, stop), history [first, last)."""

    split: np.ndarray  # [R] index into `SPLITS`
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray
    last: np.ndarray


def request_windows(user: np.ndarray, time: np.ndarray, options: MovielensOptions) -> Windows:
    """Cuts sorted events into requests; see the module's docstring.

    Args:
      user: [E] sorted.
      time: [E] sorted within a user.
      options: lengths and fractions.

    Returns:
      `Windows`; the windows of candidates tile all events.
    """
    index = np.arange(len(user))
    new_user = np.diff(user, prepend=user[:1] - 1) != 0
    new_time = new_user | (np.diff(time, prepend=time[:1]) != 0)
    counts = np.diff(np.append(index[new_user], len(user)))
    user_start, count = np.repeat(index[new_user], counts), np.repeat(counts, counts)
    tie_start = np.maximum.accumulate(np.where(new_time, index, 0))  # first event of this user and time
    test = user_start + count - (count * options.test_fraction + 1e-9).astype(np.int64)
    validation = test - (count * options.validation_fraction + 1e-9).astype(np.int64)
    split = (index >= validation).astype(np.int8) + (index >= test)
    split_start = np.choose(split, (user_start, validation, test))
    start = np.flatnonzero((index - split_start) % options.num_candidates == 0)
    last = tie_start[start]
    return Windows(split[start], start, np.append(start[1:], len(user)),
                   np.maximum(user_start[start], last - options.history_length), last)


def _requests(events: Events, windows: Windows, split: int) -> Requests:
    """The requests of one split."""
    chosen = windows.split == split
    start, stop, first, last = (column[chosen] for column in windows[1:])
    past, shown = ragged_index(first, last - first), ragged_index(start, stop - start)
    feedback = np.where(events.click[past], CLICKED, DISLIKED).astype(np.int32)
    return make_requests(events.user[start], events.item[past], last - first, events.item[shown],
                         stop - start, events.click[shown], event={"feedback": feedback})


def _events(form: Form, item_ids: np.ndarray, profile_ids: np.ndarray, max_bad_fraction: float):
    """The sorted events, the original user ids (row r is at r - 1), and the report of malformed rows."""
    ratings, report = read_ratings(form, item_ids, max_bad_fraction)
    if not len(ratings.user):
        raise ValueError(f"{form.ratings}: {report.read} rows and no rating, expected at least one")
    user_ids = np.union1d(ratings.user, profile_ids)
    order = np.lexsort((ratings.time, ratings.user))
    user = 1 + np.searchsorted(user_ids, ratings.user[order])
    events = Events(user.astype(np.int32), ratings.item[order], ratings.time[order],
                    ratings.rating[order] >= CLICK_RATING)
    return events, user_ids, report


def _user_table(user_ids: np.ndarray, profile_ids: np.ndarray, profiles: Columns) -> Columns:
    """Rows for all users: row 0 is the unknown user; fields of users without a profile are zero."""
    table = {"user_id": np.arange(len(user_ids) + 1, dtype=np.int32)}
    rows = 1 + np.searchsorted(user_ids, profile_ids)
    for name, values in profiles.items():
        table[name] = np.zeros(len(user_ids) + 1, values.dtype)
        table[name][rows] = values
    return table


def _item_table(items: Columns) -> Columns:
    """Item columns, with the padding row 0 added in front."""
    table = {ITEM_ID: np.arange(len(items["year"]) + 1, dtype=np.int32)}
    return table | {name: np.concatenate([np.zeros_like(values[:1]), values])
                    for name, values in items.items()}


def _schema(items: Columns, users: Columns, sizes: dict[str, int]) -> Schema:
    """Fields of the tables and of history events."""
    fields = [Field(ITEM_ID, "item", "categorical", len(items[ITEM_ID]))]
    if "genres" in items:
        fields.append(Field("genres", "item", "vector", items["genres"].shape[1]))
    fields += [Field("year", "item", "numeric"),
               Field("user_id", "user", "categorical", len(users["user_id"]))]
    for name in users:
        if name == "age":
            fields.append(Field(name, "user", "numeric"))
        elif name != "user_id":
            fields.append(Field(name, "user", "categorical", sizes[name]))
    return Schema((*fields, Field("feedback", "event", "categorical", 3)))


def generate(options: MovielensOptions) -> Dataset:
    """Reads the folder and makes a data set of requests.

    Items are those of the item file; users are those of the ratings and the user file. Both are numbered from
    1 in the order of their original ids. The data set's `info` holds the form, the names of genres, the
    number of events, and `rows`, the report of malformed rows in all files (see `rows.RowReport`).
    """
    form = find_form(options.source)
    item_ids, items, genres, item_report = read_items(form, options.max_bad_fraction)
    profile_ids, profiles, sizes, user_report = read_users(form, options.max_bad_fraction)
    events, user_ids, rating_report = _events(form, item_ids, profile_ids, options.max_bad_fraction)
    windows = request_windows(events.user, events.time, options)
    item_table, user_table = _item_table(items), _user_table(user_ids, profile_ids, profiles)
    splits = {name: _requests(events, windows, split) for split, name in enumerate(SPLITS)}
    rows = merge_reports([rating_report, item_report, user_report]).to_json()
    info = {"form": form.name, "genres": list(genres), "rows": rows, "num_events": len(events.user)}
    return Dataset(_schema(item_table, user_table, sizes), item_table, user_table, splits, info,
                   item_ids=np.append(0, item_ids))


def _files(options: MovielensOptions):
    form = find_form(options.source)
    return {path.name: path for path in (form.ratings, form.items, form.users) if path}


SOURCE = Source("movielens", MovielensOptions, generate, _files,
                description="MovieLens ratings as requests in order of time; 4 or more is a click.")
