"""Elements of Taobao UserBehavior, see `tarq_jax.data.taobao_userbehavior`."""

import functools

import apache_beam as beam

from tarq_jax.data.beam.forms import Event, Parts, Shown
from tarq_jax.data.beam.text import read_rows
from tarq_jax.data.rows import BadRow, parse_number, split_row
from tarq_jax.data.taobao_userbehavior import BEHAVIORS, UserBehaviorOptions


def parse_id(text: str) -> str:
    """A positive integer, as text without leading zeros; `BadRow` for anything else."""
    number = parse_number(text, int)
    if not 0 < number < 1 << 62:
        raise BadRow("id out of range")
    return str(number)


def parse_row(text: str, first_time: int, last_time: int) -> tuple[Event, str]:
    """Parses a row: an event, and the category of its item."""
    user, item, category, behavior, time = split_row(text, ",", 5)
    if behavior not in BEHAVIORS:
        raise BadRow("unknown behavior")
    seconds = parse_number(time, int)
    if not first_time <= seconds < last_time:
        raise BadRow("timestamp out of range")
    event = Event(parse_id(user), seconds, parse_id(item), (BEHAVIORS[behavior],))
    return event, parse_id(category)


def parts(root: beam.Pipeline, options: UserBehaviorOptions) -> Parts:
    """The elements of the file: events, positives and categories."""
    parse = functools.partial(parse_row, first_time=options.first_time, last_time=options.last_time)
    rows, report = read_rows(root, options.source, parse, role="events")
    targets = frozenset(BEHAVIORS[kind] for kind in options.targets.split(","))
    events = rows | "Events" >> beam.Map(lambda row: row[0])
    shown = (events | "Targets" >> beam.Filter(lambda event: event.values[0] in targets)
             | "Positives" >> beam.Map(lambda event: Shown(event.user, event.time, event.item, 1.0)))
    items = rows | "Categories" >> beam.Map(lambda row: (row[0].item, ("category", row[1])))
    users = root | "No profiles" >> beam.Create([])
    return Parts(events, shown, items, users, (report,))
