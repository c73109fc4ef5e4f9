"""What a source gives to the pipeline, and the options that all of them share."""

from typing import Any, NamedTuple

from apache_beam.pvalue import PCollection


class Event(NamedTuple):
    """Something that a user did; becomes a history event of what the user is shown later."""

    user: str
    time: int  # seconds
    item: str
    values: tuple[int, ...] = ()  # of the event fields, in the schema's order


class Shown(NamedTuple):
    """A candidate; those of one user, time and context are a request."""

    user: str
    time: int
    item: str
    label: float
    context: tuple[int, ...] = ()  # values of the context fields, in the schema's order


class Parts(NamedTuple):
    """The elements of a source."""

    events: PCollection  # of Event
    shown: PCollection  # of Shown
    items: PCollection  # (item, (field, value)): text of a categorical field, the number of a numeric one
    users: PCollection  # (user, (field, value)), likewise, but that of a categorical field is its id
    reports: tuple[PCollection, ...]  # of malformed rows, as `text.read_rows` gives them


Value = tuple[str, Any]  # of a field
