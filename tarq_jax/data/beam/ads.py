"""Elements of the Taobao display ads data, see `tarq_jax.data.taobao_ads`."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import apache_beam as beam

from tarq_jax.data.beam.forms import Event, Parts, Shown, Value
from tarq_jax.data.beam.text import read_rows
from tarq_jax.data.beam.userbehavior import parse_id
from tarq_jax.data.rows import BadRow, parse_number, split_row
from tarq_jax.data.taobao_ads import BEHAVIORS, FILES, PLACES, PROFILE, AdsOptions

UNKNOWN = {"", "NULL"}


def _time(text: str, first: int, last: int) -> int:
    seconds = parse_number(text, int)
    if not first <= seconds < last:
        raise BadRow("timestamp out of range")
    return seconds


def parse_shown(text: str, first_time: int, last_time: int) -> Shown:
    """Parses a row of raw_sample.csv."""
    user, time, ad, place, not_clicked, clicked = split_row(text, ",", 6)
    if {not_clicked, clicked} != {"0", "1"}:
        raise BadRow("neither clicked nor not clicked")
    return Shown(parse_id(user), _time(time, first_time, last_time), f"ad/{parse_id(ad)}", float(clicked),
                 (PLACES.get(place, 0),))


def parse_ad(text: str) -> list[tuple[str, Value]]:
    """Parses a row of ad_feature.csv: one pair (item, value) per value."""
    ad, *columns, price = split_row(text, ",", 6)
    amount = parse_number(price, float)
    if not 0 <= amount < math.inf:
        raise BadRow("price out of range")
    values: list[Value] = [(name, parse_id(column)) for name, column in
                           zip(("cate", "campaign", "customer", "brand"), columns, strict=True)
                           if column not in UNKNOWN]
    item = f"ad/{parse_id(ad)}"
    return [(item, value) for value in (*values, ("price", (math.log1p(amount) - 5) / 2))]


def parse_profile(text: str) -> list[tuple[str, Value]]:
    """Parses a row of user_profile.csv: one pair (user, attribute) per attribute."""
    user, *columns = split_row(text, ",", 1 + len(PROFILE))
    key, values = parse_id(user), []
    for (name, size), column in zip(PROFILE.items(), columns, strict=True):
        if column.strip() in UNKNOWN:
            continue
        value = parse_number(column, float)
        if not 0 <= value < size or value != int(value):
            raise BadRow("attribute out of range")
        values.append((key, (name, int(value) + 1)))
    return values


def parse_behavior(text: str, first_time: int, last_time: int) -> tuple[Event, list[Value]]:
    """Parses a row of behavior_log.csv: the event, and the category and brand of its item (a pair)."""
    user, time, kind, category, brand = split_row(text, ",", 5)
    if kind not in BEHAVIORS:
        raise BadRow("unknown behavior")
    values = [(name, parse_id(column)) for name, column in (("cate", category), ("brand", brand))
              if column not in UNKNOWN]
    pair = "pair/" + "/".join(dict(values).get(name, "") for name in ("cate", "brand"))
    event = Event(parse_id(user), _time(time, first_time, last_time), pair, (BEHAVIORS[kind],))
    return event, values


def _values_of_pair(row: tuple[Event, list[Value]]) -> Iterator[tuple[str, Value]]:
    event, values = row
    return ((event.item, value) for value in values)


def parts(root: beam.Pipeline, options: AdsOptions) -> Parts:
    """The elements of all four files: ads shown, behaviors, the features of both, and profiles."""
    first, last = options.first_time, options.last_time
    parsers: dict[str, Callable[[str], Any]] = {
        "shown": functools.partial(parse_shown, first_time=first, last_time=last),
        "ads": parse_ad,
        "profiles": parse_profile,
        "behaviors": functools.partial(parse_behavior, first_time=first, last_time=last),
    }
    rows, reports = {}, []
    for role, parse in parsers.items():
        rows[role], report = read_rows(root, f"{options.source.rstrip('/')}/{FILES[role]}", parse, role=role,
                                       header=True)
        reports.append(report)
    events = rows["behaviors"] | "Events" >> beam.Map(lambda row: row[0])
    pairs = rows["behaviors"] | "Values of pairs" >> beam.FlatMap(_values_of_pair)
    ads = rows["ads"] | "Values of ads" >> beam.FlatMap(lambda values: values)
    users = rows["profiles"] | "Values of profiles" >> beam.FlatMap(lambda values: values)
    items = (ads, pairs) | "Ads and pairs" >> beam.Flatten()
    return Parts(events, rows["shown"], items, users, tuple(reports))
