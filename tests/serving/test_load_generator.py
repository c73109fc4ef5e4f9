"""The load generator: arrivals, latency from when a request was due, and its summary."""

import itertools
import json

import numpy as np
import pytest
from test_client import ANSWER, answering, reply

from tarq_jax.serving.client import Client
from tarq_jax.serving.load_generator import Sent, arrivals, make_requests, send, summary


def test_arrivals_are_poisson():
    times = arrivals(100.0, 200.0, seed=0)
    gaps = np.diff(times)
    assert times == sorted(times) and 0 <= times[0] and times[-1] < 200
    assert len(times) == pytest.approx(20_000, abs=5 * np.sqrt(20_000))
    assert gaps.mean() == pytest.approx(0.01, rel=0.05) and gaps.std() == pytest.approx(0.01, rel=0.05)
    assert times == arrivals(100.0, 200.0, seed=0) != arrivals(100.0, 200.0, seed=1)


def test_latency_counts_from_when_a_request_was_due():
    """Requests are due together with one connection: the wait of a later one is part of its latency."""
    with answering(reply(ANSWER)) as (url, _):
        sent = send(url, [b"{}"], [0.0, 0.0, 0.0], connections=1)
    assert [one.outcome for one in sent] == ["answered"] * 3 and {one.version for one in sent} == {"1"}
    assert all(one.seconds >= one.late for one in sent)
    by_late = sorted(sent, key=lambda one: one.late)
    assert all(after.late >= before.seconds for before, after in itertools.pairwise(by_late))


def test_outcomes():
    answers = [reply({"error": "busy"}, 503), reply({"error": "x"}, 500), reply({"error": "y"}, 422)]
    with answering(*answers, reply(ANSWER)) as (url, _):
        sent = send(url, [b"{}"], [0.0, 0.01, 0.02, 0.03], connections=1)
    assert [one.outcome for one in sent] == ["rejected", "status 500", "wrong: y", "answered"]
    sent = send("http://127.0.0.1:1", [b"{}"], [0.0], connections=1)
    assert sent[0].outcome == "ConnectionRefusedError"


def test_answers_of_another_server_are_errors():
    """All requests are counted, and none ends the thread that sent it."""
    with answering(reply(b"<html>")) as (url, _):
        sent = send(url, [b"{}"], [0.0, 0.01, 0.02], connections=1)
    assert [one.outcome for one in sent] == ["OSError"] * 3


def test_summary():
    sent = [Sent(0.0, 0.0, 0.001 * (1 + place), "answered", f"v{place % 2}") for place in range(100)]
    sent += [Sent(0.0, 0.002, 0.5, "rejected")] * 3 + [Sent(0.0, 0.0, 9.0, "TimeoutError")]
    row = summary(sent, 10.0)
    assert (row["sent"], row["answered"], row["rejected"], row["errors"]) == (104, 100, 3, 1)
    assert row["answered_per_second"] == 10.0 and row["versions"] == 2
    late = summary([*sent[:99], Sent(9.0, 0.0, 16.0, "answered", "v1")], 10.0)  # answered after the end
    assert late["answered_per_second"] == 4.0
    assert row["latency_p50_ms"] == pytest.approx(50.5) and row["latency_p99_ms"] == pytest.approx(99.01)
    assert row["rejected_p99_ms"] == pytest.approx(500.0)
    assert summary([], 1.0)["latency_p99_ms"] is None


def bodies_for(ids, items, candidates, answer=ANSWER):
    """Requests made for a service with this number of items, whose ids are in this range."""
    schema = {"example": {"history": {"item_id": [7]}}, "properties": {"top_k": {"maximum": 3}}}
    document = {"components": {"schemas": {"Request": schema}}}
    with answering(reply(document), reply({"ids": ids, "items": items}), reply(answer)) as (url, _), \
            Client(url) as client:
        bodies = make_requests(client, history=4, candidates=candidates, top_k=2, seed=0)
    return [json.loads(body) for body in bodies]


def test_requests_are_of_items_that_are_served_each_candidate_once():
    for request in bodies_for([3, 8], 6, candidates=6):
        assert sorted(request["candidates"]) == [3, 4, 5, 6, 7, 8] and request["top_k"] == 2
        assert set(request["history"]["item_id"]) <= {3, 4, 5, 6, 7, 8}
    with_gaps = ANSWER | {"ids": [10**12, 7, 50], "scores": [3.0, 2.0, 1.0]}
    for request in bodies_for([7, 10**12], 3, candidates=2, answer=with_gaps):
        assert set(request["candidates"] + request["history"]["item_id"]) <= {7, 50, 10**12}


@pytest.mark.parametrize(("ids", "items", "candidates", "words"), [
    ([], 0, 0, "--num_candidates is 0, and 0 ids are known to be served"),
    ([1, 4], 4, 5, "--num_candidates is 5, and 4 ids are known to be served"),
])
def test_requests_that_cannot_be_made(ids, items, candidates, words):
    with pytest.raises(ValueError, match=words):
        bodies_for(ids, items, candidates)
