"""The elements that a source gives to the pipeline."""

from typing import Any, NamedTuple

from apache_beam.pvalue import PCollection


class Event(NamedTuple):
    """Something that a user did; a history event of the requests of that user after it."""

    user: str
    time: int  # seconds
    item: str
    values: tuple[int, ...] = ()  # values of the event fields, in the schema's order


class Shown(NamedTuple):
    """A candidate; candidates with the same user, time and context form a request."""

    user: str
    time: int
    item: str
    label: float
    context: tuple[int, ...] = ()  # values of the context fields, in the schema's order


class Parts(NamedTuple):
    """The elements of a source."""

    events: PCollection  # elements are `Event`
    shown: PCollection  # elements are `Shown`
    items: PCollection  # (item, (field, value)); a value is text if categorical, else a number
    users: PCollection  # (user, (field, value)); the value of a categorical field is its id
    reports: tuple[PCollection, ...]  # about rows read and malformed, from `text.read_rows`


Value = tuple[str, Any]  # (name of a field, its value)
