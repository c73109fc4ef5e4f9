"""The stress test: its claims checked by hand, its page, and one whole run at a tiny size."""

import contextlib
import json
import math
import sys
import threading

import pytest

from benchmarks import stress, stress_report, stress_service
from benchmarks.stress_service import repeatedly, send_hostile
from tarq_jax.serving.client import Unavailable, Wrong

MODEL = "two-tower"


def stage(name, *, at=0.0, p99=10.0, errors=0, answered=100.0, **facts):
    return {"kind": "stage", "model": MODEL, "stage": name, "second": at, "seconds": 9.0, "errors": errors,
            "answered_per_second": answered, "latency_p50_ms": p99 / 2, "latency_p99_ms": p99, **facts}


def second(at):
    return {"kind": "second", "model": MODEL, "second": at, "answered": 5, "rejected": 1, "errors": 0,
            "latency_p50_ms": None if at == 1.0 else 3.0, "latency_p99_ms": None if at == 1.0 else 9.0}


def event(what, fine=True, seconds=1.0, outcome="y"):
    return {"kind": "event", "model": MODEL, "second": 2.0, "seconds": seconds, "what": what, "detail": "x",
            "outcome": outcome, "fine": fine}


def memory(at, value):
    return {"kind": "memory", "model": MODEL, "second": at, "memory_mb": value}


ROWS = [
    stage(stress_report.WARM, p99=40.0), stage(stress_report.ALONE, answered=300.0),
    stage(stress_report.SATURATED, at=-27.0, answered=190.0),
    stage(stress_report.RAMP, at=-18.0, share=1.0, answered=200.0),
    stage(stress_report.RAMP, at=-9.0, share=2.0, p99=22.0, answered=180.0, rate=380.0),
    stage(stress_report.HELD, p99=500.0, errors=1), stage(stress_report.KILLED, errors=7),
    stage(stress_report.AFTERWARDS, p99=11.0),
    second(-9.0), *[second(float(at)) for at in range(9)],
    *[memory(float(at), value) for at, value in enumerate((100, 102, 150, 0, 999, math.nan, 110, 111, 112))],
    memory(9.5, 500.0), memory(-18.0, 50.0), memory(-10.0, 900.0), memory(-1.0, 52.0),
    event("swap"), event("swap", fine=False), event("kill", seconds=4.5),
    *[event("hostile", outcome=outcome) for outcome in ("refused: id is 1.5", "status 503", "status 503")]]


def test_claims_by_hand():
    found = {row["what"]: (row["value"], row["verdict"]) for row in stress_report.claims(MODEL, ROWS)}
    assert found == {
        "p99 of answers under twice the load, ms": (22.0, "met"),
        "p99 of answers in its first second, ms": (9.0, None),
        "requests lost, but while killed": (1, "missed"),
        "swaps that did not end as they should": (1, "missed"),
        "bad requests that were not refused by name": (0, "met"),
        "bad requests read and refused by name": (1, None),
        "bad requests told 503 instead": (2, None),
        "growth of memory while load rises": (pytest.approx(52 / 50), "met"),
        "growth of memory by the first swaps": (pytest.approx(101 / 52), None),
        "growth of memory while held, between swaps": (pytest.approx(111 / 101), "missed"),
        "most memory in swaps, over that before": (pytest.approx(150 / 52), None),
        "seconds from the kill until ready": (4.5, None),
        "requests lost while killed": (7, None),
        "answers a second at best": (200.0, None),
        "twice the load over them": (pytest.approx(1.9), None),
        "share of them under twice the load": (0.9, None),
        "p50 one at a time, afterwards over before": (pytest.approx(1.1), None)}


def test_p99_is_held_to_twice_that_without_load_and_the_delay():
    slower = [row | {"latency_p99_ms": 22.1} if row.get("share") == 2.0 else row for row in ROWS]
    assert next(stress_report.claims(MODEL, slower))["verdict"] == "missed"


def test_the_most_answers_are_searched_until_they_no_longer_rise():
    sent = []

    class Trial:
        def under(self, name, rate, seconds):
            sent.append(rate)
            return {"answered_per_second": min(rate, 1_000 - rate / 4)}  # refusing costs some answers too

    assert stress.most_answers(Trial(), 200.0, 8.0) == 1_000 - 1_012.5 / 4
    assert sent == [200.0, 300.0, 450.0, 675.0, 1_012.5, 1_518.75]


def test_the_page(tmp_path):
    stress_report.write([*ROWS, *stress_report.claims(MODEL, ROWS)], tmp_path)
    page = (tmp_path / "stress.html").read_text()
    assert MODEL in page and "missed" in page
    assert (tmp_path / stress_report.FILE).read_bytes().startswith(b"\x89PNG")


def test_repeatedly():
    """Calls the action in a thread until the context ends or the maximal number of calls is reached."""
    numbers, third = [], threading.Event()

    def action(number):
        numbers.append(number)
        if number == 2:
            third.set()

    with repeatedly(action, 0.001):
        assert third.wait(10)
    after = len(numbers)
    assert numbers == list(range(after))
    with repeatedly(action, 0.001, most=1):
        while len(numbers) == after:
            third.wait(0.001)
    assert numbers[after:] == [0]


@pytest.mark.parametrize("error, outcome, fine", [
    (Wrong("id is 1.5"), f"{stress_report.REFUSED}: id is 1.5", True),
    (Unavailable(503, "busy", None), stress_report.BUSY, True),
    (Unavailable(500, "bug", None), "status 500", False)])
def test_a_bad_request_is_refused_or_comes_at_a_busy_time(error, outcome, fine):
    class Refusing:
        @contextlib.contextmanager
        def client(self):
            yield self

        def post(self, path, body):
            raise error

    assert send_hostile(Refusing(), 0)[1:] == (outcome, fine)


def test_a_service_that_dies_prints_as_much_as_it_likes(tmp_path, monkeypatch):
    """More than a pipe holds, which nobody reads while the service runs."""
    server = tmp_path / "server"
    server.write_text("#!/bin/sh\nhead -c 300000 /dev/zero >&2\necho its last words >&2\n")
    server.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(server))
    monkeypatch.setattr(stress_service, "READY", 5.0)
    with pytest.raises(OSError, match=r"the service did not get ready: .*its last words"):
        stress_service.Service(tmp_path)


def test_arrivals_do_not_depend_on_samples_of_memory(monkeypatch, silent):
    class Idle:
        url = ""

        def memory_mb(self):
            return 1.0

        @contextlib.contextmanager
        def client(self):
            yield self

    def times_of_stages(samples):
        sent = []

        def send(url, bodies, times, **options):
            sent.append(times)
            return []

        monkeypatch.setattr(stress.load_generator, "send", send)
        trial = stress.Trial(MODEL, stress.TINY, Idle(), silent)
        for _ in range(2):
            trial.under("ramp", 10.0, 2.0)
            for _ in range(samples):
                trial.sample_memory()
        return sent

    monkeypatch.setattr(stress.load_generator, "make_requests", lambda *_, **options: [b""])
    first, second = times_of_stages(0)
    assert [first, second] == times_of_stages(3) and first != second


@pytest.mark.slow
def test_the_command(command, tmp_path):
    pytest.importorskip("starlette", reason="the extra [serve] is not installed")
    done = command("-m", "benchmarks.stress", "--quick", f"--json={tmp_path}/rows.json",
                   f"--report={tmp_path}")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["kind"] for row in rows} == {"machine", "stage", "second", "event", "memory", "claim"}
    exact = [row for row in rows if row["kind"] == "claim" and row["most"] == 0]
    assert len(exact) == 9 and all(row["value"] == 0 for row in exact)
    assert {row["what"] for row in rows if row["kind"] == "event"} == {"swap", "hostile", "kill"}
