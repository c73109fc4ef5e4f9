"""Serves an artefact over HTTP.

    python -m tarq_jax.serving.server --artefact=artefacts/1 --port=8000
    curl -d '{"history": {"item_id": [17, 4, 256]}, "top_k": 5}' localhost:8000/score

`POST /swap` with `{"artefact": "2"}` and the token makes the service switch to `artefacts/2`.
After SIGTERM, /readyz answers 503 for `--drain_seconds` while all requests are still answered, so that a load
balancer can send them elsewhere; then requests in flight are finished, and the exit code is 0. SIGINT does
the same without the wait, and a second signal ends the process immediately. One process computes one batch at
a time: start one per device.
"""

import socket
from pathlib import Path

from absl import flags

from tarq_jax import cli, memory
from tarq_jax.serving.http.options import Limits, Options

ARTEFACT = flags.DEFINE_string("artefact", None, "Artefact to serve; /swap names other folders beside it.",
                               required=True)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 for all.")
PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0 takes a free one, which is logged.",
                            lower_bound=0, upper_bound=65535)
TOKEN = cli.token_flag()
SWAP_TOKEN = cli.token_flag("swap_token_file", "File with the token that /swap requires; by default that of "
                            "--token_file.")
DELAY = flags.DEFINE_float("delay_ms", 1e3 * Options.delay, "How long a request waits for others to be "
                           "computed with it.", lower_bound=0.0)
BUDGET = flags.DEFINE_float(
    "budget_ms", None, "A request that is expected to take longer is refused with 503. By default twice the "
    "measured time of one without load, and the delay; after a quiet period up to six times that, so that "
    "short bursts are absorbed. At most --timeout_ms.", lower_bound=0.1)
TIMEOUT = flags.DEFINE_float("timeout_ms", 1e3 * Limits.seconds, "After that a request is answered with 504, "
                             "or 408 if its body has not arrived.", lower_bound=1.0)
QUEUE = flags.DEFINE_integer("queue", Options.queue, "Requests that may be in flight; more are answered with "
                             "503.", lower_bound=1)
BODY = flags.DEFINE_integer("max_body", Limits.body, "Bytes of a request; for more it is answered with 413.",
                            lower_bound=1)
HISTORY = flags.DEFINE_integer("max_history", Limits.history, "Events of a history; for more the request is "
                               "answered with 422.", lower_bound=1)
CANDIDATES = flags.DEFINE_integer("max_candidates", Limits.candidates, "Candidates of a request; for more it "
                                  "is answered with 422.", lower_bound=1)
TOP_K = flags.DEFINE_integer("max_top_k", Limits.top_k, "Largest top_k; a request for more is answered with "
                             "422.", lower_bound=1)
BATCHES = flags.DEFINE_list("batch_sizes", list(map(str, Options.batch_sizes)), "Numbers of requests that "
                            "are computed together.")
SIZES = flags.DEFINE_list("candidate_sizes", list(map(str, Options.candidate_sizes)), "Numbers that given "
                          "candidates are padded to.")
LOG = flags.DEFINE_bool("log_requests", True, "Log a line for each request that is not a probe.")
DRAIN = flags.DEFINE_float("drain_seconds", 5.0, "How long to keep answering after SIGTERM.", lower_bound=0.0)

BACKLOG = 2048  # connections that may wait to be accepted


def numbers(flag: flags.FlagHolder) -> tuple[int, ...]:
    """The positive numbers of a list flag in ascending order, each once; other values are a wrong call."""
    return tuple(sorted(set(cli.whole_numbers(flag, "positive numbers"))))


def options() -> Options:
    """The options of the service, by the flags; a budget above the time-out is a wrong call."""
    if BUDGET.value is not None and BUDGET.value > TIMEOUT.value:
        cli.wrong_call(f"--budget_ms is {BUDGET.value:g}, expected at most --timeout_ms, {TIMEOUT.value:g}")
    limits = Limits(body=BODY.value, history=HISTORY.value, candidates=CANDIDATES.value, top_k=TOP_K.value,
                    seconds=TIMEOUT.value / 1e3)
    return Options(
        limits=limits, token=cli.read_token(TOKEN), swap_token=cli.read_token(SWAP_TOKEN),
        delay=DELAY.value / 1e3, budget=None if BUDGET.value is None else BUDGET.value / 1e3,
        queue=QUEUE.value, batch_sizes=numbers(BATCHES), candidate_sizes=numbers(SIZES))


def listen() -> socket.socket:
    """A socket that listens already, before anything slow is done."""
    family = socket.AF_INET6 if ":" in HOST.value else socket.AF_INET
    return socket.create_server((HOST.value, PORT.value), family=family, backlog=BACKLOG)


def main() -> None:
    """Reads the flags and runs the service."""
    memory.few_heaps()  # before JAX starts its threads
    chosen, artefact = options(), Path(ARTEFACT.value)
    if not artefact.is_dir():
        raise ValueError(f"{artefact} is no folder, expected what `python -m tarq_jax.serving.export` wrote")
    with listen() as listener:
        try:
            from tarq_jax.serving.http import logs, running
        except ModuleNotFoundError as error:
            raise ValueError(f"{error.name} is missing, expected `pip install 'tarq_jax[serve]'`") from None

        logs.start()
        running.serve(artefact, chosen, listener, drain=DRAIN.value, log_requests=LOG.value)


if __name__ == "__main__":
    cli.run(main)
