"""Queries to the service: from JSON to queries within limits, and from queries to rankings."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson

from tarq_jax.schema import ITEM_ID, Schema
from tarq_jax.serving.http.options import Limits
from tarq_jax.serving.index import FREE
from tarq_jax.serving.request_checks import SIDES, check_ids, check_request, shown
from tarq_jax.serving.scorer import NOT_FINITE, Ranking, Scorer

KEYS = (*SIDES, "candidates", "top_k")
TOP_K = 100  # if a query has none
SHOWN = 3  # events in an example


class NotJson(ValueError):
    """The body cannot be parsed at all, or not in reasonable time."""


class Query(NamedTuple):
    """A query that has passed all checks."""

    request: dict[str, dict[str, Any]]  # its sides, as arrays
    candidates: np.ndarray | None  # [G] int64, or None for all that the index serves
    top_k: int


def read_query(body: bytes, schema: Schema, limits: Limits) -> Query:
    """The query in a body.

    Raises:
      NotJson: the body is not JSON.
      ValueError: the query is invalid; names the field, its value and what was expected.
    """
    nested = body.count(b"[") + body.count(b"{")
    if nested > (most := _most_nested(schema, limits)):
        raise NotJson(f"body has {nested} opening brackets, expected a JSON object with at most {most}")
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        shown = body[:40].decode(errors="replace")
        raise NotJson(f"body is {shown!r}: {error}, expected a JSON object with {list(KEYS)}") from None
    try:
        return check_query(found, schema, limits)
    except RecursionError:
        raise ValueError(f"body is nested too deeply, expected an object with {list(KEYS)}") from None


def _most_nested(schema: Schema, limits: Limits) -> int:
    """How many lists and objects a query may have: parsing a million of them would take a second.

    A list for each event of each vector, and one for each field; the rest is for queries that are wrong.
    """
    vectors = sum(bool(field.shape) for field in schema.side("event"))
    return vectors * limits.history + len(schema.fields) + 100


def check_query(found: Any, schema: Schema, limits: Limits) -> Query:
    """The query in parsed JSON; raises ValueError as `read_query` does."""
    if not isinstance(found, dict):
        raise ValueError(f"body is {shown(found)}, expected an object with {list(KEYS)}")
    sides = {key: value for key, value in found.items() if key not in ("candidates", "top_k")}
    unknown = [key for key in sides if key not in SIDES]
    if unknown:
        raise ValueError(f"body has {shown(unknown[0])}, expected {list(KEYS)}")
    _check_history(sides.get("history"), limits.history)
    checked = check_request(schema, sides)
    request = {"user": checked.user, "context": checked.context,
               "history": {ITEM_ID: checked.items} | checked.events}
    candidates = _candidates(found.get("candidates"), limits.candidates)
    return Query(request, candidates, _top_k(found.get("top_k"), limits.top_k))


def _check_history(history: Any, most: int) -> None:
    for name, values in history.items() if isinstance(history, dict) else ():
        if isinstance(values, list) and len(values) > most:
            raise ValueError(f"request: 'history': field {shown(name)} has {len(values)} values, expected at "
                             f"most {most}")


def _candidates(candidates: Any, most: int) -> np.ndarray | None:
    if candidates is None:
        return None
    if isinstance(candidates, list) and len(candidates) > most:
        raise ValueError(f"'candidates' has {len(candidates)} values, expected at most {most}")
    return check_ids(candidates, "'candidates'")


def _top_k(top_k: Any, most: int) -> int:
    if top_k is None:
        return min(TOP_K, most)
    if type(top_k) is not int or not 1 <= top_k <= most:
        raise ValueError(f"'top_k' is {shown(top_k)}, expected an integer in [1, {most}]")
    return top_k


def answer(scorer: Scorer, queries: Sequence[Query]) -> list[Ranking | Exception]:
    """The ranking of each query, or a ValueError if its scores are not finite."""
    users = scorer.users([query.request for query in queries])
    top_k = max(query.top_k for query in queries)
    rankings = scorer.rank(users, [query.candidates for query in queries], top_k=top_k)
    return [_own(ranking, query.top_k) for ranking, query in zip(rankings, queries, strict=True)]


def described(version: str, ranking: Ranking) -> dict[str, Any]:
    """The answer to a query, as an object."""
    return {"version": version, "ids": ranking.ids, "scores": ranking.scores, "unknown": ranking.unknown,
            "skipped": ranking.skipped}


def _own(ranking: Ranking, top_k: int) -> Ranking | Exception:
    """The part of a ranking that its query asked for."""
    if not ranking.finite:
        return ValueError(f"request: {NOT_FINITE}")
    return ranking._replace(ids=ranking.ids[:top_k], scores=ranking.scores[:top_k])


def example(scorer: Scorer, length: int) -> dict[str, Any]:
    """A request that the scorer accepts: all zeros, with `length` items of the index as history."""
    schema, known = scorer.schema, scorer.index.ids[scorer.index.ids != FREE]
    items = np.resize(known, length if len(known) else 0).tolist()

    def zeros(side: Any, *leading: int) -> dict[str, Any]:
        return {field.name: np.zeros((*leading, *field.shape), field.dtype).tolist()
                for field in schema.side(side)}

    return {"user": zeros("user"), "context": zeros("context"),
            "history": {ITEM_ID: items} | zeros("event", len(items))}
