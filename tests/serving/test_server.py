"""The commands: a service in its own process, the request and load commands, and how the service ends."""

import concurrent.futures
import functools
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import served

pytest.importorskip("starlette", reason="the extra [serve] is not installed")

import services

from tarq_jax.serving import server
from tarq_jax.serving.client import Client
from tarq_jax.serving.http.options import Limits, Options

SERVER, REQUEST, LOAD = (("-m", f"tarq_jax.serving.{name}") for name in (
    "server", "request", "load_generator"))
FLAGS = ("--batch_sizes=1,3", "--candidate_sizes=512", "--max_top_k=20", "--budget_ms=30000",
         "--timeout_ms=30000")
GOOD = served.world().requests[0]


@pytest.fixture
def started(artefact, start_command, tmp_path):
    """Starts a service; returns its process, and its URL as soon as it is ready."""

    def start(*flags, **settings):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process = start_command(*SERVER, f"--artefact={artefact()}", f"--port={port}", *FLAGS, *flags,
                                **settings)
        url = f"http://127.0.0.1:{port}"
        services.wait_for(lambda: process.poll() is not None or ready(url))
        return process, url

    return start


def ready(url):
    try:
        with Client(url) as client:
            return client.version()
    except OSError:
        return None


def test_commands_and_drain(started, command, tmp_path):
    """After SIGTERM, requests are still answered for a while and /readyz fails; then the exit code is 0."""
    (tmp_path / "token").write_text("secret\n")
    token = f"--token_file={tmp_path / 'token'}"
    process, url = started(token, "--drain_seconds=3")
    (tmp_path / "request.json").write_text(json.dumps(GOOD))
    asked = [*REQUEST, f"--url={url}", f"--request={tmp_path / 'request.json'}", "--top_k=3", "--wait=60"]
    done = command(*asked, token, f"--json={tmp_path / 'rows.json'}")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["rank"] for row in rows] == [1, 2, 3] and rows[0].keys() == {"rank", "id", "score"}
    with Client(url, token="secret") as client:
        assert client.score(GOOD, top_k=3).ids == [row["id"] for row in rows]
    (tmp_path / "two.json").write_text(json.dumps(GOOD | {"top_k": 2}))
    done = command(*REQUEST, f"--url={url}", f"--request={tmp_path / 'two.json'}", token,
                   f"--json={tmp_path / 'rows.json'}")
    assert [row["rank"] for row in json.loads((tmp_path / "rows.json").read_text())] == [1, 2], done.stderr
    done = command(*asked, "--candidates=4,5", token, f"--json={tmp_path / 'rows.json'}")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["id"] for row in rows} == {4, 5}, done.stderr
    done = command(*asked, "--history=1,2")
    assert done.returncode == 1 and "'authorization'" in done.stderr and len(done.stderr.splitlines()) == 1

    load = (*LOAD, f"--url={url}", "--rate=40", "--seconds=2", "--history_length=3", "--num_candidates=4",
            "--top_k=2", token, f"--json={tmp_path / 'load.json'}")
    done = command(*load)
    assert done.returncode == 0, done.stderr
    row, = json.loads((tmp_path / "load.json").read_text())
    assert row["sent"] == row["answered"] > 20 and row["errors"] == row["rejected"] == 0
    assert 0 < row["latency_p50_ms"] <= row["latency_p95_ms"] <= row["latency_p99_ms"]

    answers, stop = [], threading.Event()

    def ask():
        with Client(url, token="secret") as client:
            while not stop.is_set():
                answers.append(client.score(GOOD).version)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        services.wait_for(lambda: len(answers) > 3)
        process.send_signal(signal.SIGTERM)
        services.wait_for(lambda: not ready(url))
        seen = len(answers)
        services.wait_for(lambda: len(answers) > seen + 3)
        stop.set()
        asking.result()
    assert (process.wait(60), process.stderr.read()) == (0, "")


def test_flags_are_the_options(with_flags):
    given = {"max_body": 1, "max_history": 2, "max_candidates": 3, "max_top_k": 4, "timeout_ms": 7.0,
             "delay_ms": 6.0, "budget_ms": 5.0, "queue": 8, "batch_sizes": ["9", "3", "9"],
             "candidate_sizes": ["10"]}
    with with_flags(artefact="unused"):
        assert server.options() == Options()
    with with_flags(artefact="unused", **given):
        assert server.options() == Options(
            limits=Limits(1, 2, 3, 4, 0.007), delay=0.006, budget=0.005, queue=8, batch_sizes=(3, 9),
            candidate_sizes=(10,))
    with with_flags(artefact="unused", host="127.0.0.2", port=0), server.listen() as listener:
        assert listener.getsockname()[0] == "127.0.0.2"


def test_limits_queue_and_delay_of_the_flags(started, tmp_path):
    """Batches of three only, so that a request that is alone waits for others, and longer than by default."""
    with (tmp_path / "log").open("w") as log:
        process, url = started("--max_body=2000", "--max_history=4", "--max_candidates=2", "--max_top_k=2",
                               "--queue=1", "--delay_ms=3000", "--batch_sizes=3", stdout=log)
    ask = functools.partial(services.Running(url, None).ask, "POST", "/score")
    longer = {side: values * 2 for side, values in GOOD["history"].items()}
    for body, expected in ((b" " * 2001, (413, "body has more than 2000 bytes")),
                           (GOOD | {"history": longer}, (422, "has 8 values, expected at most 4")),
                           (GOOD | {"candidates": [4, 5, 6]}, (422, "has 3 values, expected at most 2")),
                           (GOOD | {"top_k": 3}, (422, "'top_k' is 3, expected an integer in [1, 2]"))):
        found = ask(body)
        assert found.status == expected[0] and expected[1] in found.json["error"]

    def in_flight():
        return b"tarq_in_flight 1.0" in services.Running(url, None).ask("GET", "/metrics").body

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        first = pool.submit(ask, GOOD | {"candidates": [4, 5]})
        services.wait_for(in_flight)
        second = ask(GOOD)
        assert second.status == 503 and "too busy (full)" in second.json["error"]
        assert first.result().status == 200 and set(first.result().json["ids"]) == {4, 5}
        assert time.monotonic() - start > 2.5
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0  # a request is logged after its answer
    assert logged(tmp_path / "log") == [413, 422, 422, 422, 503, 200]


def logged(file):
    """The statuses of the requests in a service's log."""
    lines = map(json.loads, file.read_text().splitlines())
    return [line["status"] for line in lines if line["event"] == "request"]


def test_an_interrupt_ends_at_once(started, tmp_path):
    with (tmp_path / "log").open("w") as log:
        process, url = started("--drain_seconds=600", "--nolog_requests", stdout=log)
    assert ready(url)
    assert services.Running(url, None).ask("POST", "/score", {"user": {}}).status == 422
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert "drains" in (tmp_path / "log").read_text() and not logged(tmp_path / "log")


def test_a_second_signal_does_not_wait(started):
    process, url = started("--drain_seconds=600")
    process.send_signal(signal.SIGTERM)
    services.wait_for(lambda: not ready(url))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


LOADS_FOR_EVER = """
import socket, sys, time
from pathlib import Path
from tarq_jax.serving.http import logs, running, versions
from tarq_jax.serving.http.options import Options

versions.load = lambda *_: time.sleep(600)
logs.start()
running.serve(Path(sys.argv[1]), Options(), socket.create_server(("127.0.0.1", 0)), drain=0.0,
              log_requests=False)
"""


def test_a_signal_while_a_version_is_loaded(artefact):
    """As in the minutes that programs may take to compile."""
    process = subprocess.Popen([sys.executable, "-c", LOADS_FOR_EVER, artefact()], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    try:
        assert "listens" in process.stdout.readline()
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.stdout.read()
    finally:
        process.kill()


def test_what_cannot_be_served(command, artefact, tmp_path):
    def fails(*flags):
        done = command(*SERVER, *flags)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    assert "is no folder" in fails(f"--artefact={tmp_path / 'none'}")
    assert "manifest.json is missing" in fails(f"--artefact={tmp_path}", "--port=0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in fails(f"--artefact={artefact()}", f"--port={taken.getsockname()[1]}")
        nobody = f"--url=http://127.0.0.1:{taken.getsockname()[1]}"
    for asked in (REQUEST, LOAD):
        done = command(*asked, nobody)
        assert done.returncode == 1 and "refused" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("text", "words"), [
    (b"{bad", "cannot be read: Expecting property name"), (b"\xff", "cannot be read: 'utf-8' codec"),
    (b"[1]", "has [1], expected a JSON object"),
    (b'{"history": [1]}', "'history' is [1], expected an object")])
def test_request_files_that_are_none(command, tmp_path, text, words):
    (tmp_path / "request.json").write_bytes(text)
    done = command(*REQUEST, f"--request={tmp_path / 'request.json'}", "--history=1,2")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{tmp_path / 'request.json'}" in done.stderr and words in done.stderr


@pytest.mark.parametrize(("flags", "words"), [
    ([*SERVER], "artefact"),
    ([*SERVER, "--artefact=x", "--batch_sizes=0"], "--batch_sizes is '0', expected positive numbers"),
    ([*SERVER, "--artefact=x", "--candidate_sizes="], "--candidate_sizes is ''"),
    ([*SERVER, "--artefact=x", "--port=70000"], "port"),
    ([*SERVER, "--artefact=x", "--budget_ms=20", "--timeout_ms=10"],
     "--budget_ms is 20, expected at most --timeout_ms, 10"),
    ([*SERVER, "--artefact=x", "--token_file=/dev/null"], "has 0 characters"),
    ([*SERVER, "--artefact=x", "--token_file=/nowhere"], "--token_file cannot be read"),
    ([*SERVER, "--artefact=x", "--swap_token_file=/nowhere"], "--swap_token_file cannot be read"),
    ([*REQUEST, "--history=a"], "--history is 'a', expected integers"),
    ([*REQUEST, "--top_k=0"], "top_k"),
    ([*REQUEST, "--url=localhost:8000"], "--url is 'localhost:8000', expected http://HOST:PORT"),
    ([*REQUEST, "--url=http://x:99999"], "--url is 'http://x:99999', expected http://HOST:PORT"),
    ([*REQUEST, "--url=http://[::1"], "--url is 'http://[::1', expected http://HOST:PORT"),
    ([*LOAD, "--rate=0"], "rate"),
    ([*LOAD, "--url=ftp://x"], "--url is 'ftp://x'"),
])
def test_wrong_calls(wrong_call, flags, words):
    assert words in wrong_call(*flags)
