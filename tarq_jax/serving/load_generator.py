"""Sends requests to a service at random times that do not depend on its answers, and reports latencies.

    python -m tarq_jax.serving.load_generator --url=http://localhost:8000 --rate=200 --seconds=10

Arrivals are Poisson. Latency counts from when a request was due, not from when it was sent. If the service is
slow, requests pile up here as they would with real users, and the reported latency includes their wait.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from tarq_jax import cli, reporting
from tarq_jax.serving.client import Client, Unavailable, Wrong, answer_of

URL = cli.url_flag()
RATE = flags.DEFINE_float("rate", 100.0, "Requests per second.", lower_bound=0.001)
SECONDS = flags.DEFINE_float("seconds", 10.0, "How long to send requests.", lower_bound=0.001,
                             allow_override=True)
HISTORY = flags.DEFINE_integer("history_length", 50, "Events per history.", lower_bound=0)
CANDIDATES = flags.DEFINE_integer(
    "num_candidates", 0, "Candidates per request, drawn from all items; 0 ranks all items.", lower_bound=0)
TOP_K = flags.DEFINE_integer("top_k", 10, "How many of the best candidates to ask for.", lower_bound=1,
                             allow_override=True)
CONNECTIONS = flags.DEFINE_integer("connections", 64, "Most requests in flight at once.", lower_bound=1)
TIMEOUT = flags.DEFINE_float("timeout", 10.0, "Seconds without an answer after which a request has failed.",
                             lower_bound=0.001)
SEED = cli.seed_flag("Seed of arrivals and requests.")
TOKEN = cli.token_flag()
JSON = cli.json_flag()

DISTINCT = 64  # different requests, sent in turn
PERCENTILES = (50, 95, 99)


class Sent(NamedTuple):
    """The outcome of one request."""

    due: float  # seconds from the start
    late: float  # seconds from when it was due until a connection was free to send it
    seconds: float  # from when it was due until it ended
    outcome: str  # "answered", "rejected" (503) or what went wrong
    version: str = ""


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process within `seconds`, in ascending order."""
    rng, times, now = random.Random(seed), [], 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        times.append(now)
    return times


def make_requests(client: Client, *, history: int, candidates: int, top_k: int, seed: int) -> list[bytes]:
    """Request bodies that fit the service: its own example, with random histories and candidates.

    Raises:
      ValueError: the service serves no items, or fewer than `candidates`.
    """
    schema = client.get("/openapi.json")["components"]["schemas"]["Request"]
    ids, rng, bodies = served_ids(client, schema), np.random.default_rng(seed), []
    if len(ids) < max(candidates, 1):
        raise ValueError(f"--num_candidates is {candidates}, and {len(ids)} ids are known to be served, "
                         "expected at least as many, and one")
    for _ in range(DISTINCT):
        request = schema["example"] | {"top_k": top_k}
        events = request["history"].items()
        request["history"] = {name: (values[:1] or [0]) * history for name, values in events}
        request["history"]["item_id"] = rng.choice(ids, history).tolist()
        if candidates:
            request["candidates"] = rng.choice(ids, candidates, replace=False).tolist()
        bodies.append(json.dumps(request).encode())
    return bodies


def served_ids(client: Client, schema: Mapping[str, Any]) -> np.ndarray:
    """Ids of served items: all if they are consecutive numbers, else as many as one answer may hold."""
    version = client.version()
    if version["items"] == 0:
        return np.zeros(0, np.int64)
    smallest, largest = version["ids"]
    if version["items"] == largest - smallest + 1:
        return np.arange(smallest, largest + 1)
    most = schema["properties"]["top_k"]["maximum"]
    return np.array(client.post("/score", schema["example"] | {"top_k": most})["ids"])


def send(url: str, bodies: Sequence[bytes], times: Sequence[float], *, connections: int,
         token: str | None = None, timeout: float = 10.0) -> list[Sent]:
    """Sends one body at each of `times`, over `connections` connections; returns outcomes by due time."""
    found: list[Sent] = []
    pending, lock = iter(enumerate(times)), threading.Lock()
    start = time.perf_counter()

    def take() -> Iterator[tuple[int, float]]:
        while True:
            with lock:
                entry = next(pending, None)
            if entry is None:
                return
            yield entry

    def work() -> None:
        with Client(url, token=token, timeout=timeout) as client:
            for number, due in take():
                time.sleep(max(due - (time.perf_counter() - start), 0.0))
                late = time.perf_counter() - start - due
                outcome, version = attempt(client, bodies[number % len(bodies)])
                found.append(Sent(due, late, time.perf_counter() - start - due, outcome, version))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(connections, len(times)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(found)


def attempt(client: Client, body: bytes) -> tuple[str, str]:
    """The outcome of one request, and the version that answered."""
    try:
        return "answered", answer_of(client.post("/score", body)).version
    except Unavailable as error:
        return ("rejected" if error.status == 503 else f"status {error.status}"), ""
    except Wrong as error:
        return f"wrong: {error}", ""
    except OSError as error:
        return type(error).__name__, ""


def summary(sent: Sequence[Sent], seconds: float) -> dict[str, Any]:
    """The row of the table: counts of outcomes, throughput and percentiles of latency."""
    outcomes = Counter(one.outcome for one in sent)
    last = max((one.due + one.seconds for one in sent if one.outcome == "answered"), default=0.0)
    answered, rejected = outcomes["answered"], outcomes["rejected"]
    row: dict[str, Any] = {
        "sent": len(sent), "answered": answered, "rejected": rejected,
        "errors": len(sent) - answered - rejected, "answered_per_second": answered / max(seconds, last),
        "versions": len({one.version for one in sent if one.version})}
    for outcome in ("answered", "rejected"):
        prefix = "latency" if outcome == "answered" else outcome
        times = [1e3 * one.seconds for one in sent if one.outcome == outcome]
        row |= {f"{prefix}_p{p}_ms": float(np.percentile(times, p)) if times else None for p in PERCENTILES}
    return row | {"late_p99_ms": float(np.percentile([1e3 * one.late for one in sent], 99)) if sent else None}


def main() -> None:
    """Reads the flags and prints the table."""
    token, times = cli.read_token(TOKEN), arrivals(RATE.value, SECONDS.value, SEED.value)
    url = cli.url(URL)
    with Client(url, token=token) as client:
        bodies = make_requests(client, history=HISTORY.value, candidates=CANDIDATES.value, top_k=TOP_K.value,
                               seed=SEED.value)
    sent = send(url, bodies, times, connections=CONNECTIONS.value, token=token, timeout=TIMEOUT.value)
    row = {"rate": RATE.value, "seconds": SECONDS.value} | summary(sent, SECONDS.value)
    reporting.print_table([row], url)
    for outcome, count in Counter(one.outcome for one in sent).most_common():
        if outcome not in ("answered", "rejected"):
            print(f"{count} x {outcome}")
    if JSON.value:
        reporting.write_rows([row], JSON.value)


if __name__ == "__main__":
    cli.run(main)
