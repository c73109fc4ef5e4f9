"""The client, against servers with fixed answers."""

import contextlib
import http.server
import json
import threading

import pytest

from tarq_jax.serving import request
from tarq_jax.serving.client import Client, Unavailable, Wrong

ANSWER = {"version": "1", "ids": [3], "scores": [0.5], "unknown": [], "skipped": 0}


@contextlib.contextmanager
def answering(*answers, close=False):
    """An HTTP/1.1 server that gives these answers, the last one repeatedly; and the requests it got."""
    asked, left = [], list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            asked.append((self.path, dict(self.headers), json.loads(body or "null")))
            status, content, headers = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            for name, value in ({"content-length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = close  # without notice, as a service closes an idle connection

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reply(content, status=200, **headers):
    return status, content if isinstance(content, bytes) else json.dumps(content).encode(), headers


def test_what_is_sent():
    with answering(reply(ANSWER)) as (url, asked), Client(url + "/prefix/", token="secret") as client:
        assert client.score({"user": {"age": 1.0}}, [3, 4], top_k=1) == ("1", [3], [0.5], [], 0)
        client.score({"user": {}})
    path, headers, body = asked[0]
    assert path == "/prefix/score" and headers["authorization"] == "Bearer secret"
    assert body == {"user": {"age": 1.0}, "candidates": [3, 4], "top_k": 1}
    assert asked[1][2] == {"user": {}}
    assert int(headers["Content-Length"]) == len(json.dumps(body, separators=(",", ":")))


def test_a_connection_that_was_closed_while_idle():
    with answering(reply(ANSWER), close=True) as (url, asked), Client(url) as client:
        assert [client.score({}).ids for _ in range(3)] == [[3]] * 3
    assert len(asked) == 3


def test_errors():
    answers = [reply({"error": "'top_k' is 0"}, 422), reply({"error": "busy"}, 503, **{"retry-after": "7"}),
               reply(b"<html>", 502), reply({"error": "late"}, 504)]
    with answering(*answers) as (url, _), Client(url) as client:
        with pytest.raises(Wrong, match="'top_k' is 0"):
            client.score({})
        with pytest.raises(Unavailable, match="busy") as busy:
            client.score({})
        assert (busy.value.status, busy.value.retry_after) == (503, 7.0)
        with pytest.raises(Unavailable, match="status 502: <html>") as broken:
            client.score({})
        assert (broken.value.status, broken.value.retry_after) == (502, None)
        with pytest.raises(Unavailable, match="status 504: late"):
            client.score({})


@pytest.mark.parametrize(("content", "words"), [
    (b"<html>", "answered b'<html>', expected a JSON object"), ([1], "expected a JSON object"),
    ({"status": "ok"}, r"answered an object with \['status'\], expected \['version', 'ids', ")])
def test_another_server_is_no_service(content, words):
    with answering(reply(content)) as (url, _), Client(url) as client:
        with pytest.raises(OSError, match=words):
            client.score({})


def test_retries_where_it_is_busy(with_flags):
    busy = reply({"error": "busy"}, 503)
    with answering(busy, busy, reply(ANSWER)) as (url, asked), Client(url, retries=2) as client:
        assert client.score({}).ids == [3]
        assert len(asked) == 3
    with answering(busy) as (url, asked), Client(url, retries=1) as client:
        with pytest.raises(Unavailable):
            client.score({})
        assert len(asked) == 2
    with answering(busy) as (url, asked), with_flags(url=url, retries=2, history=["1"]):
        with pytest.raises(Unavailable):
            request.main()
        assert len(asked) == 3
    with answering(reply({"error": "wrong"}, 422)) as (url, asked), Client(url, retries=5) as client:
        with pytest.raises(Wrong):
            client.score({})
        assert len(asked) == 1


def test_waits_for_a_service_that_is_not_ready():
    loading = reply({"error": "loading"}, 503)
    with answering(loading, loading, reply({"version": "1"})) as (url, asked), Client(url) as client:
        assert client.wait(60) == {"version": "1"}
        assert [path for path, *_ in asked] == ["/readyz"] * 3
    with answering(loading) as (url, asked), Client(url) as client:
        with pytest.raises(Unavailable, match="loading"):
            client.wait(0.15)
        assert len(asked) > 1
    with answering(reply({"error": "who asks?"}, 403)) as (url, asked), Client(url) as client:
        with pytest.raises(Wrong, match="who asks"):
            client.wait(60)
    with pytest.raises(ConnectionRefusedError), Client("http://127.0.0.1:1") as client:
        client.wait(0.01)


@pytest.mark.parametrize("url", ["localhost", "ftp://localhost", "http://", "http:///x", ""])
def test_wrong_urls(url):
    with pytest.raises(ValueError, match="expected http://HOST:PORT"):
        Client(url)


def test_nobody_there():
    with pytest.raises(ConnectionRefusedError, match=r"^http://127\.0\.0\.1:1: .*refused"), \
            Client("http://127.0.0.1:1") as client:
        client.score({})
