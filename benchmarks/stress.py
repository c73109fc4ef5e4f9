"""Overloads services, and reports what happens to requests, latency and memory.

    pip install -e '.[serve]'
    python -m benchmarks.stress --json=benchmarks/results/stress.json --report=DIR

TARQ, two-tower and target attention, of one size with random weights, are tested one after the other. Each is
served by its own process on loopback, with the default settings of `tarq_jax.serving.server`, and has to rank
all its items and return the best 500. After a warm-up, one request at a time is sent, then more and more
until answers per second no longer rise. From then on arrivals are Poisson and do not wait for answers, and
latency counts from the time at which a request was due. Load rises in stages to twice what the service can
sustain, and stays there for a minute. After one swap of each kind without load, the same load is sent for
longer, together with bad requests and further swaps, one of them to a damaged artefact, which is refused.
Then the process is killed and restarted under half the load, and at the end one request at a time is sent
again. Load generator and service share the machine. `--quick` runs everything with numbers that mean nothing.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from rich.console import Console

from benchmarks import stress_report
from benchmarks.serving_contenders import (
    IN_BLOCKS,
    TWO_TOWER,
    Sizes,
    make_contenders,
    make_dataset,
    tarq_name,
)
from benchmarks.serving_report import of_kind
from benchmarks.stress_report import AFTERWARDS, ALONE, HELD, KILLED, RAMP, SAMPLED, SATURATED, WARM
from benchmarks.stress_service import (
    SWAPS,
    TOKEN,
    Outcome,
    Service,
    kill,
    repeatedly,
    send_hostile,
    swap,
    write_artefacts,
)
from tarq_jax import cli, reporting
from tarq_jax.serving import load_generator

REPORT = flags.DEFINE_string("report", None, "Folder for a page with figures.",
                             allow_override=True)
QUICK = flags.DEFINE_bool("quick", False, "Tiny sizes and short stages, to check that everything runs.",
                          allow_override=True)
HELD_SECONDS = flags.DEFINE_float("held_seconds", 90.0, "Seconds of twice the load.", lower_bound=1.0)
JSON = cli.json_flag()

GROWTH = 1.5  # of the rate, from stage to stage, while the most answers per second is searched
RISING = 1.05  # times the most so far; fewer answers per second end the search


class Plan(NamedTuple):
    """What the services must withstand."""

    sizes: Sizes = Sizes(items=10_000)
    history: int = 250
    top_k: int = 500
    stage: float = 8.0  # seconds of a stage
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of the most answers per second
    last: float = 60.0  # seconds of the last of these stages
    held: float = 90.0  # seconds of the same load afterwards, with swaps and bad requests
    swap_every: float = 8.0  # seconds
    hostile_every: float = 0.5
    killed: float = 20.0  # seconds of half the load, with a kill after a quarter of them
    connections: int = 128


TINY = Plan(
    Sizes(items=600, width=8, heads=2, hidden=(4,), levels=2, codewords=8, few_codewords=4, features=3),
    history=6, top_k=20, stage=1.0, shares=(0.5, 2.0), last=2.0, held=4.0, swap_every=0.7, hostile_every=0.1,
    killed=8.0, connections=16)


class Trial:
    """A service under test: everything that is sent to it or done to it, on one clock.

    Attributes:
      rows: `kind` is stage, second, event or memory.
    """

    def __init__(self, name: str, plan: Plan, service: Service, console: Console):
        """Prepares the requests; sends nothing yet."""
        self.rows: list[dict[str, Any]] = []
        self._name, self._plan, self._service, self._console = name, plan, service, console
        self._start, self._stages = time.perf_counter(), 0
        with service.client() as client:
            self._bodies = load_generator.make_requests(
                client, history=plan.history, candidates=0, top_k=plan.top_k, seed=0)

    def _keep(self, kind: str, **facts: Any) -> None:
        self.rows.append({"kind": kind, "model": self._name, **facts})

    def _clock(self) -> float:
        return time.perf_counter() - self._start

    def _stage(self, name: str, sent: list[load_generator.Sent], began: float, seconds: float, **facts: Any
               ) -> dict[str, Any]:
        found = load_generator.summary(sent, seconds)
        self._stages += 1
        self._keep("stage", stage=name, second=began, seconds=seconds, **facts, **found)
        for second in range(int(seconds)):
            part = [one._replace(due=one.due - second) for one in sent if second <= one.due < second + 1]
            self._keep("second", second=began + second, **load_generator.summary(part, 1.0))
        return found

    def one_at_a_time(self, name: str) -> dict[str, Any]:
        """Measures latency without load."""
        began, sent = self._clock(), list[load_generator.Sent]()
        with self._service.client() as client:
            while (due := self._clock() - began) < self._plan.stage:
                outcome, version = load_generator.attempt(client, self._bodies[len(sent) % len(self._bodies)])
                sent.append(load_generator.Sent(due, 0.0, self._clock() - began - due, outcome, version))
        return self._stage(name, sent, began, self._plan.stage)

    def under(self, name: str, rate: float, seconds: float, **facts: Any) -> dict[str, Any]:
        """Sends `rate` requests per second, whether they are answered or not."""
        self._console.print(f"{self._name}: {name}, {rate:,.0f} requests a second for {seconds:.0f} s")
        began, times = self._clock(), load_generator.arrivals(rate, seconds, self._stages)
        sent = load_generator.send(self._service.url, self._bodies, times, connections=self._plan.connections,
                                   token=TOKEN)
        return self._stage(name, sent, began, seconds, rate=rate, **facts)

    def act(self, what: str, action: Callable[[Service, int], Outcome]) -> Callable[[int], None]:
        """The action in the form that `repeatedly` calls; its outcome is recorded."""
        def call(number: int) -> None:
            began = self._clock()
            outcome = action(self._service, number)
            self._keep("event", what=what, second=began, seconds=self._clock() - began, **outcome._asdict())

        return call

    def sample_memory(self, _: int = 0) -> None:
        """Records the current memory of the process."""
        self._keep("memory", second=self._clock(), memory_mb=self._service.memory_mb())


def undergo(trial: Trial, plan: Plan) -> None:
    """Runs all stages on a service, one after the other."""
    trial.one_at_a_time(WARM)
    alone = trial.one_at_a_time(ALONE)
    most = most_answers(trial, 1e3 / alone["latency_p50_ms"], plan.stage)
    *ramp, twice = plan.shares
    for share in ramp:
        trial.under(RAMP, share * most, plan.stage, share=share)
    trial.under(RAMP, twice * most, plan.last, share=twice)
    swap_to = trial.act("swap", swap)
    for number in range(-1, len(SWAPS) - 1):  # first to other programs, then back to those of before
        swap_to(number)
    with repeatedly(swap_to, plan.swap_every), \
            repeatedly(trial.act("hostile", send_hostile), plan.hostile_every):
        trial.under(HELD, twice * most, plan.held, share=twice)
    with repeatedly(trial.act("kill", kill), plan.killed / 4, most=1):
        trial.under(KILLED, 0.5 * most, plan.killed, share=0.5)
    trial.one_at_a_time(AFTERWARDS)


def most_answers(trial: Trial, rate: float, seconds: float) -> float:
    """Answers per second when more than that is sent: the rate grows until they no longer rise."""
    most = 0.0
    while (found := trial.under(SATURATED, rate, seconds)["answered_per_second"]) > RISING * most:
        most, rate = found, GROWTH * rate
    return max(most, found)


def run(plan: Plan, console: Console) -> Iterator[dict[str, Any]]:
    """All rows, from `Trial` and from `stress_report.claims`; `kind` distinguishes them."""
    dataset = make_dataset(plan.sizes)
    names = (tarq_name(1, "mlp", plan.sizes.few_codewords), TWO_TOWER, IN_BLOCKS)
    yield {"kind": "machine", "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    for contender in make_contenders(plan.sizes, dataset):
        if contender.name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_artefacts(contender, dataset, Path(folder), plan.history)
            with Service(Path(folder)) as service:
                trial = Trial(contender.name, plan, service, console)
                with repeatedly(trial.sample_memory, SAMPLED):
                    undergo(trial, plan)
        yield from trial.rows
        yield from stress_report.claims(contender.name, trial.rows)


def main() -> None:
    """Tests the services, prints the tables and writes the page."""
    plan = TINY if QUICK.value else Plan(held=HELD_SECONDS.value)
    rows = list(run(plan, Console(stderr=True)))
    for kind, title in (("stage", "stages"), ("claim", "what has to hold")):
        reporting.print_table(of_kind(rows, kind), title)
    if JSON.value:
        reporting.write_rows(rows, JSON.value)
    if REPORT.value:
        stress_report.write(rows, Path(REPORT.value))


if __name__ == "__main__":
    cli.run(main)
