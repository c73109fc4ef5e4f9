"""Your own log: impressions in a CSV file (generated here) as a `Dataset` for the usual training loop.

    python -m examples.dataset

Adds `read` of type (lines, such as an open file) -> Dataset. A request has the items that a user was shown at
one time, its history those that the user clicked before. The last fifth of the times is the test split.
"""

import csv
import itertools

import numpy as np

from examples import small
from tarq_jax.data import Dataset, Field, Schema, records


def made_up_log(users=60, times=20, items=50):
    """Lines of a log: users mostly click on items whose price is near the price that they want."""
    rng = np.random.default_rng(0)
    prices, wanted = rng.random(items), rng.random(users)
    yield "time,user,item,price,clicked"
    for time, user in itertools.product(range(times), range(users)):
        for item in rng.choice(items, 4, replace=False):
            clicked = rng.random() < (0.9 if abs(prices[item] - wanted[user]) < 0.2 else 0.1)
            yield f"{time},{user},item {item},{prices[item]},{int(clicked)}"


def read(lines):
    """The data set of a log whose lines are sorted by time and user."""
    rows = list(csv.DictReader(lines))
    prices = {row["item"]: float(row["price"]) for row in rows}
    ids = {item: number for number, item in enumerate(prices, start=1)}  # 0 is padding
    clicked, last = {row["user"]: list[int]() for row in rows}, int(rows[-1]["time"])
    requests = {split: list[tuple]() for split in ("train", "test")}
    for (time, user), group in itertools.groupby(rows, lambda row: (int(row["time"]), row["user"])):
        shown = [(ids[row["item"]], int(row["clicked"])) for row in group]
        requests["test" if time > 0.8 * last else "train"].append((1 + int(user), clicked[user][-20:], shown))
        clicked[user] += [item for item, click in shown if click]
    fields = Field("item_id", "item", "categorical", 1 + len(ids)), Field("price", "item", "numeric")
    items: dict = {"item_id": np.arange(1 + len(ids), dtype=np.int32),
                   "price": np.array([0.0, *prices.values()], np.float32)}
    return Dataset(Schema(fields), items, {}, {name: to_requests(found) for name, found in requests.items()})


def to_requests(found):
    """`Requests` from tuples (user, item ids of the history, pairs of a candidate's id and click)."""
    users, histories, shown = zip(*found, strict=True)
    candidates, clicks = zip(*itertools.chain(*shown), strict=True)
    events, lengths = list(itertools.chain(*histories)), [list(map(len, each)) for each in (histories, shown)]
    return records.make_requests(*map(np.array, (users, events, lengths[0], candidates, lengths[1], clicks)))


def compare(config, dataset):
    """A row per model."""
    return small.table(config, dataset, ("two_tower", "target_attention"))


if __name__ == "__main__":
    small.run(compare, load=lambda config: read(made_up_log()))
