"""Requests to a service over a real connection."""

import concurrent.futures
import dataclasses
import json
import socket
import threading
import time

import jax
import numpy as np
import pytest
import served
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="the extra [serve] is not installed")

import services

from tarq_jax.serving.client import Unavailable, Wrong
from tarq_jax.serving.http import protocol
from tarq_jax.serving.http.openapi import document
from tarq_jax.serving.http.options import Limits
from tarq_jax.serving.http.service import FAILURES

REQUESTS = served.world().requests
GOOD = REQUESTS[0]


def changed(**values):
    return GOOD | values


# Answers


def test_scores_are_those_of_the_scorer(service, scorer):
    """Scores of all items and of some, with full and with empty histories."""
    with service.client() as client:
        for request in REQUESTS:
            for candidates in (None, [3, 5, 7, 99, 3]):
                answer = client.score(request, candidates, top_k=4)
                expected = scorer().score(request, candidates, top_k=4)
                assert answer.ids == expected.ids.tolist()
                np.testing.assert_allclose(answer.scores, expected.scores, rtol=0, atol=1e-5)
                assert answer.unknown == expected.unknown.tolist() and answer.skipped == expected.skipped
                assert answer.version == service.service.versions.current.name


def test_requests_of_a_batch_keep_their_own(service, monkeypatch):
    """Requests in one batch with different candidates and top_k get their own answers."""
    batcher = service.service.versions.current.batcher
    monkeypatch.setattr(batcher, "largest", 3)  # whatever size the trials on a busy machine preferred
    asked = [(request, candidates, top_k) for request in REQUESTS for candidates, top_k in (
        (None, 2), ([4, 9], None), ([], 1), ([2, 1, 3], 20))]

    def ask(arguments):
        request, candidates, top_k = arguments
        with service.client() as client:
            return client.score(request, candidates, top_k=top_k)

    alone = list(map(ask, asked))
    before = service.metric("tarq_batch_size_bucket", le="2.0")
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        with service.busy():
            together = [pool.submit(ask, arguments) for arguments in asked]
            services.wait_for(lambda: service.metric("tarq_in_flight") == len(asked))
        for one, other in zip(alone, together, strict=True):
            assert one.ids == other.result().ids
            np.testing.assert_allclose(one.scores, other.result().scores, rtol=0, atol=1e-5)
    assert service.metric("tarq_batch_size_bucket", le="2.0") - before < 8  # most were of 3
    assert [len(one.ids) for one in alone[:4]] == [2, 2, 0, 3]


def test_top_k_is_100_or_the_limit_by_default(service):
    with service.client() as client:
        assert len(client.score(GOOD).ids) == 20


def test_probes_page_and_names(service, artefacts):
    assert service.ask("GET", "/healthz").json == {"alive": True}
    found = service.ask("GET", "/readyz")
    assert found.status == 200
    assert found.json["version"].startswith("1-") and found.json["method"] == "scalar"
    assert (found.json["items"], found.json["ids"], found.json["histories"]) == (22, [1, 22], [2, 6])
    page = service.ask("GET", "/")
    assert page.headers["content-type"].startswith("text/html") and b"<textarea" in page.body
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert b"http" not in page.body.replace(b"http-equiv", b"")  # nothing is loaded from elsewhere
    assert len({service.ask("GET", "/healthz").headers["x-request-id"] for _ in range(3)}) == 3


def test_metrics_move(service):
    def values():
        return [service.metric(name, **labels) for name, labels in (
            ("tarq_requests_total", {"path": "/score", "status": "200"}),
            ("tarq_requests_total", {"path": "/score", "status": "422"}),
            ("tarq_requests_total", {"path": "other", "status": "404"}),
            ("tarq_request_seconds_count", {}), ("tarq_batch_size_sum", {}), ("tarq_batch_seconds_count", {}),
            ("tarq_wait_seconds_count", {}), ("tarq_unknown_candidates_total", {}),
            ("tarq_skipped_events_total", {}))]

    before = values()
    asked = changed(candidates=[1, 98, 99], history={"item_id": [4, 77], "event_type": [1, 1]})
    assert service.ask("POST", "/score", asked).status == 200
    assert service.ask("POST", "/score", {}).status == 422
    assert service.ask("GET", "/nowhere/at/all").status == 404
    text = service.ask("GET", "/metrics").body.decode()  # the answer before it is counted by now
    moved = [after - first for first, after in zip(before, values(), strict=True)]
    assert moved == [1, 1, 1, 1, 1, 1, 1, 2, 1]
    assert f'tarq_version{{version="{service.service.versions.current.name}"}} 1.0' in text
    assert "tarq_requests_total" in text and "tarq_in_flight 0.0" in text


def test_requests_are_logged_and_probes_are_not(service, caplog):
    with caplog.at_level("INFO", "tarq_jax.serving"):
        for path in ("/healthz", "/readyz", "/metrics", "/nowhere"):
            service.ask("GET", path)
        name = service.ask("POST", "/score", GOOD).headers["x-request-id"]
        services.wait_for(lambda: any(record.fields.get("request") == name for record in caplog.records))
    other, score = (record.fields for record in caplog.records if record.msg == "request")
    assert (other["path"], other["status"]) == ("other", 404)
    assert [score[key] for key in ("request", "method", "path", "status")] == [name, "POST", "/score", 200]
    assert score["ms"] > 0 and score["version"] == service.service.versions.current.name


# Refusals


@pytest.mark.parametrize(("body", "status", "words"), [
    (b"", 400, "expected a JSON object"),
    (b"{", 400, "body is '{'"),
    (b'{"top_k": NaN}', 400, "body is "),
    (b"\xff", 400, "expected a JSON object"),
    (b"[" * 5000, 400, "expected a JSON object"),
    (b'{"user":' + b"[" * 50 + b"]" * 50 + b"}", 422, "expected an object"),
    (b'{"user":' + b"[" * 1000 + b"]" * 1000 + b"}", 400, "body has 1001 opening brackets, expected a JSON "),
    ([1], 422, "body is [1], expected an object"),
    (changed(users={}), 422, "body has 'users', expected ['user', 'context', 'history', "),
    (changed(history=None), 422, "'history' is None, expected an object"),
    (changed(history=[]), 422, "'history' is [], expected an object"),
    (changed(user={}), 422, "'user' has no field 'user_group'"),
    (changed(user={"user_group": 9, "user_age": 1.0}), 422,
     "'user_group' is 9 in row 0, expected an id in [0, 9)"),
    (changed(user={"user_group": 1, "user_age": "old"}), 422,
     "field 'user_age' is ['old'], expected numbers"),
    (changed(user={"user_group": 1, "user_age": 3e38}), 422, "scores are not finite, expected"),
    (changed(history={"item_id": [1] * 9, "event_type": [1] * 9}), 422,
     "field 'item_id' has 9 values, expected at most 8"),
    (changed(history={"item_id": [1], "event_type": [1] * 9}), 422,
     "field 'event_type' has 9 values, expected at most 8"),
    (changed(history={"item_id": [1, 2], "event_type": [1]}), 422, "'event_type' has 1 values, expected 2"),
    (changed(candidates=[1] * 41), 422, "'candidates' has 41 values, expected at most 40"),
    (changed(candidates=["1"]), 422, "'candidates' is ['1'], expected a list of integers"),
    (changed(candidates=[1, True]), 422, "expected numbers and no booleans"),
    (changed(candidates={"1": 2}), 422, "'candidates' is {'1': 2}, expected a list"),
    (changed(top_k=0), 422, "'top_k' is 0, expected an integer in [1, 20]"),
    (changed(top_k="5"), 422, "'top_k' is '5', expected an integer in [1, 20]"),
    (changed(top_k=21), 422, "'top_k' is 21"),
    (changed(top_k=[1] * 30), 422, "'top_k' is [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, ...], exp"),
    (changed(top_k=True), 422, "'top_k' is True"),
    (changed(top_k=2.0), 422, "'top_k' is 2.0"),
], ids=str)
def test_what_is_wrong_is_named(service, body, status, words):
    found = service.ask("POST", "/score", body)
    assert (found.status, found.headers["content-type"]) == (status, "application/json")
    assert words in found.json["error"]


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/score", 405), ("PUT", "/score", 405), ("POST", "/readyz", 405), ("GET", "/score/1", 404),
    ("GET", "/%00", 404), ("POST", "/", 405)])
def test_wrong_paths_and_methods(service, method, path, status):
    found = service.ask(method, path)
    assert found.status == status and "error" in found.json


def test_large_bodies_are_not_kept(service):
    """A body with or without a declared length is refused with 413, and the connection can be used again."""
    large = b" " * (1 << 22) + b"{}"
    assert service.ask("POST", "/score", large).status == 413
    chunked = service.ask("POST", "/score", iter([large[:2_000_000], large[2_000_000:]]))
    assert chunked.status == 413 and "expected at most" in chunked.json["error"]
    with service.client() as client:
        with pytest.raises(Wrong, match="body has more than 4194304 bytes"):
            client.post("/score", large)
        assert client.score(GOOD, top_k=1).ids


def test_the_most_candidates_and_events_fit_into_a_body():
    ids = [2**63 - 1]
    largest = {"candidates": ids * Limits.candidates, "history": {"item_id": ids * Limits.history}}
    assert len(json.dumps(largest)) < Limits.body


def test_what_is_no_http(service):
    host, port = service.url.removeprefix("http://").split(":")
    for sent in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n",
                 b"POST /score HTTP/1.1\r\ncontent-length: x\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(sent)
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
    assert service.ask("GET", "/healthz").status == 200


CHUNKED = b"POST /healthz HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"


@pytest.mark.parametrize("more", [b"x", b"x: y\r\n"], ids=["one", "many"])
@pytest.mark.parametrize("start", [b"POST /score HTTP/1.1\r\nhost: x\r\n", CHUNKED],
                         ids=["headers", "trailers"])
def test_headers_and_trailers_without_end(service, start, more):
    """The connection is closed; 16 MB would otherwise be taken."""
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(start)
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                connection.sendall(more * (protocol.HEAD_BYTES // len(more) // 4))
    large = {f"h{number}": "y" * 1000 for number in range(50)}
    assert [service.ask("GET", "/healthz", **large).status for _ in range(3)] == [200] * 3


ASKED = b"GET /healthz HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize(("sent", "more"), [
    (b"", b""), (ASKED, b""), (ASKED + b"\r\n", b"\r\n"), (ASKED + b"content-length: 10\r\n\r\n", b"x"),
], ids=["nothing", "half a head", "a line after the answer", "half a body after the answer"])
def test_connections_that_ask_nothing_are_closed(service, sent, more, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    if not sent:
        monkeypatch.setattr(service.server.config, "timeout_keep_alive", 0.2)
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(sent)
        if more:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            connection.sendall(more)
        while connection.recv(1000):  # the rest of the answer; raises TimeoutError unless it is closed
            pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.sampled_from(
        ["user", "context", "history", "item_id", "event_type", "user_age", "hour", "candidates", "top_k"]),
        inner, max_size=4), max_leaves=12)
HOSTILE = (st.binary(max_size=40) | JSON.map(json.dumps).map(str.encode) | st.builds(
    lambda key, value: json.dumps(GOOD | {key: value}).encode(),
    st.sampled_from(["user", "context", "history", "candidates", "top_k"]), JSON) | st.builds(
    lambda name, values: json.dumps(GOOD | {"history": GOOD["history"] | {name: values}}).encode(),
    st.sampled_from(["item_id", "event_type"]), JSON | st.lists(JSON, max_size=4)) | st.builds(
    lambda values: json.dumps(GOOD | {"candidates": values}).encode(), st.lists(st.integers(), max_size=45)))


def check_hostile(service, body):
    """The answer is correct, or a 4xx that says what is expected."""
    found = service.ask("POST", "/score", body)
    if found.status == 200:
        ids = found.json["ids"]
        assert len(set(ids)) == len(ids) == len(found.json["scores"]) <= 20
        assert all(np.isfinite(found.json["scores"]))
    else:
        assert found.status in (400, 422) and "expected" in found.json["error"]


@settings(deadline=None, max_examples=300)
@given(body=HOSTILE)
@example(body=json.dumps(GOOD | {"candidates": [5, 5]}).encode())
def test_hostile_bodies(service, body):
    check_hostile(service, body)


@pytest.mark.slow
@settings(deadline=None, max_examples=3000)
@given(body=HOSTILE)
def test_many_hostile_bodies(service, body):
    check_hostile(service, body)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/score", "/swap", "/readyz", "/healthz"])
def test_schemathesis(guarded, path):
    """At least 1,000 requests generated from the OpenAPI document get answers that conform to it."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    expected = [not_a_server_error, checks.status_code_conformance, checks.response_schema_conformance,
                checks.content_type_conformance]
    schema = schemathesis.openapi.from_url(f"{guarded.url}/openapi.json")
    operation = next(found.ok() for found in schema.get_all_operations() if found.ok().path == path)

    def check(mode, further):
        @settings(deadline=None, max_examples=850 if path == "/score" else 50)
        @given(case=operation.as_strategy(generation_mode=mode))
        def test(case):
            case.call_and_validate(
                checks=[*expected, *further], headers={"Authorization": f"Bearer {services.TOKEN}"})

        test()

    def answers(status):
        return guarded.metric("tarq_requests_total", path=path, status=status)

    before = answers("200"), answers("422")
    check(schemathesis.GenerationMode.POSITIVE, [])
    if path in ("/score", "/swap"):
        check(schemathesis.GenerationMode.NEGATIVE, [checks.negative_data_rejection])
    if path == "/score":
        right, wrong = answers("200") - before[0], answers("422") - before[1]
        assert right + wrong > 1000 and min(right, wrong) > 20, (right, wrong)


# Load


def test_a_full_service_tells_503(service):
    """Requests that fit in the queue are answered later; requests beyond it are refused immediately."""
    options = dataclasses.replace(services.PATIENT, queue=4)
    with services.running(service.service.root / "1", options) as small, \
            concurrent.futures.ThreadPoolExecutor(4) as pool:
        with small.busy():
            waiting = [pool.submit(small.ask, "POST", "/score", GOOD) for _ in range(4)]
            services.wait_for(lambda: small.metric("tarq_in_flight") == 4)
            for _ in range(5):
                found = small.ask("POST", "/score", GOOD)
                assert found.status == 503 and int(found.headers["retry-after"]) >= 1
            assert small.ask("GET", "/healthz").status == 200  # the event loop is not blocked
            assert small.metric("tarq_refused_total", reason="full") == 5
        assert [found.result().status for found in waiting] == [200] * 4


def test_what_takes_too_long_is_told_503_and_504(artefacts):
    limits = dataclasses.replace(services.PATIENT.limits, seconds=0.5)
    options = dataclasses.replace(services.PATIENT, limits=limits, budget=0.25)
    with services.running(artefacts / "1", options) as hurried, hurried.busy(), hurried.client() as client, \
            concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(hurried.ask, "POST", "/score", GOOD)  # accepted, as nothing else runs
        services.wait_for(lambda: hurried.metric("tarq_in_flight") == 1)
        services.wait_for(lambda: _refused(client))  # the batch is late, so would be a next one
        assert first.result().status == 504
        assert hurried.metric("tarq_refused_total", reason="slow") >= 1


def _refused(client):
    try:
        client.score(GOOD)
    except Unavailable as error:
        return error.status == 503 and error.retry_after >= 1
    return False


def test_a_slow_body_is_told_408(artefacts):
    limits = dataclasses.replace(services.PATIENT.limits, seconds=0.2)
    with services.running(artefacts / "1", dataclasses.replace(services.PATIENT, limits=limits)) as hurried:
        host, port = hurried.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        services.wait_for(lambda: hurried.metric("tarq_in_flight") == 0)


def test_who_sends_slowly_is_not_late(artefacts):
    """A request's time counts from when its whole body has arrived."""
    with services.running(artefacts / "1", dataclasses.replace(services.PATIENT, budget=0.05)) as hurried:
        body, (host, port) = json.dumps(GOOD).encode(), hurried.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
            services.wait_for(lambda: hurried.metric("tarq_in_flight") == 1)
            time.sleep(0.2)
            connection.sendall(body)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")


# Failures


@pytest.mark.parametrize("recovery", [("POST", "/score", GOOD), ("GET", "/readyz")], ids=["score", "readyz"])
def test_a_device_that_fails_is_not_ready(service, monkeypatch, recovery):
    """Until a batch succeeds, be it that of a request or of a probe; errors of requests are none of it."""
    def fails(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: device lost")

    def ready():
        return service.ask("GET", "/readyz").status == 200

    with monkeypatch.context() as broken:
        broken.setattr(service.service.versions.current.scorer, "rank", fails)
        for _ in range(FAILURES):
            assert ready()
            assert service.ask("POST", "/score", GOOD).status == 500
        found = service.ask("GET", "/readyz")
        assert found.status == 503 and "3 batches in a row failed" in found.json["error"]
        assert service.ask("GET", "/healthz").status == 200
        assert service.ask("POST", "/score", GOOD).status == 500 and not ready()
    assert service.ask(*recovery).status == 200 and ready()
    infinite = changed(user={"user_group": 1, "user_age": 3e38})
    assert [service.ask("POST", "/score", infinite).status for _ in range(FAILURES)] == [422] * FAILURES
    assert ready()


def test_a_device_that_hangs_is_not_ready_and_after_a_while_not_alive(service, monkeypatch):
    """Batches that never end are no batches that fail."""
    batcher = service.service.versions.current.batcher
    with service.busy():
        asking = threading.Thread(target=service.ask, args=("POST", "/score", GOOD))
        asking.start()
        services.wait_for(lambda: batcher.running > 0.1)
        assert service.ask("GET", "/readyz").status == service.ask("GET", "/healthz").status == 200
        limits = dataclasses.replace(services.PATIENT.limits, seconds=0.05)
        with monkeypatch.context() as hurried:
            hurried.setattr(service.service, "_options", dataclasses.replace(services.PATIENT, limits=limits))
            found = service.ask("GET", "/readyz")
            assert found.status == 503 and "a batch has run for " in found.json["error"]
            services.wait_for(lambda: service.ask("GET", "/healthz").status == 503)
    asking.join(60)
    assert batcher.running == 0
    assert service.ask("GET", "/readyz").status == service.ask("GET", "/healthz").status == 200


# Tokens


def test_a_token_is_asked_for(guarded):
    for headers in ({}, {"authorization": services.TOKEN}, {"authorization": "Bearer wrong"},
                    {"authorization": "Bearer \xff"}):
        for path in ("/score", "/swap"):
            found = guarded.ask("POST", path, GOOD, **headers)
            assert found.status == 401 and found.headers["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz", "/metrics", "/", "/openapi.json"):
        assert guarded.ask("GET", path).status == 200
    with guarded.client(token=services.TOKEN) as client:
        assert client.score(GOOD, top_k=3).ids
    with guarded.client(token="other") as client, pytest.raises(Wrong, match="'authorization'"):
        client.score(GOOD)


def test_a_token_for_swaps_alone(service, guarded, monkeypatch):
    for running, scoring in ((service, {}), (guarded, {"authorization": f"Bearer {services.TOKEN}"})):
        options = dataclasses.replace(running.service._options, swap_token="other")
        monkeypatch.setattr(running.service, "_options", options)
        assert running.ask("POST", "/score", GOOD, **scoring).status == 200
        assert running.ask("POST", "/swap", {"artefact": "2"}, **scoring).status == 401
        found = running.ask("POST", "/swap", {"artefact": ".."}, authorization="Bearer other")
        assert found.status == 422 and "'artefact' is '..'" in found.json["error"]
        operations = document(running.service.versions.current.scorer, options)["paths"]
        assert operations["/swap"]["post"]["security"] == [{"token": []}]
        assert ("security" in operations["/score"]["post"]) == bool(scoring)
        assert ("401" in operations["/score"]["post"]["responses"]) == bool(scoring)


def test_no_swap_without_a_token(service):
    found = service.ask("POST", "/swap", {"artefact": "2"})
    assert found.status == 403 and "--token_file" in found.json["error"]


def test_the_document_names_the_fields(service, guarded):
    document = service.ask("GET", "/openapi.json").json
    request = document["components"]["schemas"]["Request"]
    assert request["required"] == ["user", "context"]
    assert request["properties"]["user"]["properties"]["user_group"] == {
        "type": "integer", "minimum": 0, "maximum": 8}
    assert request["properties"]["history"]["required"] == ["item_id", "event_type"]
    assert request["properties"]["top_k"]["maximum"] == 20
    assert service.ask("POST", "/score", request["example"]).status == 200
    assert "security" not in document["paths"]["/score"]["post"]
    assert guarded.ask("GET", "/openapi.json").json["paths"]["/score"]["post"]["security"] == [{"token": []}]


def test_the_schema_of_a_vector():
    from tarq_jax.schema import Field
    from tarq_jax.serving.http.openapi import value_schema

    found = value_schema(Field("place", "user", "vector", 3))
    assert (found["minItems"], found["maxItems"], found["items"]["type"]) == (3, 3, "number")


@pytest.mark.parametrize(("name", "seconds", "words"), [
    ("damaged", 30.0, "ids.npy"), ("1", 1e-6, "expected less than the time-out, 1e-06")])
def test_a_first_artefact_that_is_refused(artefacts, name, seconds, words):
    limits = dataclasses.replace(services.PATIENT.limits, seconds=seconds)
    with services.running(artefacts / name, dataclasses.replace(services.PATIENT, limits=limits)) as running:
        assert words in str(running.server.failure)
    assert isinstance(running.server.failure, ValueError)
