"""Versions of what is served: loaded, warmed up and tried before they take over, one at a time.

A version is an artefact (possibly with another index for it) and its own queue. A request is thus checked,
queued and answered by one version alone, and a swap only changes to which one new requests go. Requests that
wait at the old version are still answered by it. All versions share the one thread that computes.
"""

import asyncio
import contextlib
import dataclasses
import gc
import re
import statistics
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax

from tarq_jax import memory
from tarq_jax.schema import Schema
from tarq_jax.serving.artefact import version_name
from tarq_jax.serving.http.batching import Batcher, Load, ServiceTimes, fits, least_budget, useful_sizes
from tarq_jax.serving.http.metrics import Metrics
from tarq_jax.serving.http.openapi import document
from tarq_jax.serving.http.options import Options
from tarq_jax.serving.http.queries import Query, answer, check_query, example
from tarq_jax.serving.request_checks import check_accepts
from tarq_jax.serving.scorer import Ranking, Scorer

TRIALS = 7  # per batch size
WHOLE = 3  # trials of requests that rank all items
PATIENCE = 0.5  # seconds that requests may take beyond their budget while a version is loaded
SETTLED = 3.0  # seconds after a swap; by then nothing of the old version is in use any more
NAME = re.compile(r"\w[\w.+-]*")  # of a folder beside the one that is served


class Busy(Exception):
    """Another version is being loaded."""


@dataclasses.dataclass(frozen=True)
class Version:
    """A scorer that answers requests, with its queue."""

    name: str  # the folder's name, and a digest of what is in it
    scorer: Scorer
    seconds: Mapping[int, float]  # batch size -> time that such a batch takes
    batcher: Batcher[Query, Ranking]
    trial: Query  # that it has answered: the longest history, to rank all items
    options: Options

    @cached_property
    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document of a service that serves this version."""
        return document(self.scorer, self.options)

    @cached_property
    def description(self) -> dict[str, Any]:
        """What clients may want to know about it."""
        index, facts = self.scorer.index, self.scorer.facts
        served = index.ids[index.served]
        return {"version": self.name, "method": facts["method"], "items": index.num_served,
                "ids": [int(served.min()), int(served.max())],
                "histories": facts["histories"]}


@contextlib.contextmanager
def running_on_device(artefact: Path) -> Iterator[None]:
    """Context in which errors of the device are a ValueError that names the artefact."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:  # perhaps out of memory, beside the version that is served
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{artefact} does not run on the device: {reason}") from error


def load(artefact: Path, index: Path, options: Options, like: Scorer | None = None,
         schema: Schema | None = None) -> Scorer:
    """A warm scorer. If `like` has the same programs, it shares those, which are compiled already.

    Raises:
      ValueError: artefact or index is damaged, of another version or platform, or they do not fit each other
        or on the device; or it does not accept every request of `schema`.
    """
    with running_on_device(artefact):
        scorer = Scorer.load(artefact, index=index, batch_sizes=options.batch_sizes,
                             top_k=options.limits.top_k, candidate_sizes=options.candidate_sizes, like=like)
        if schema is not None:
            check_accepts(scorer.schema, schema, str(artefact))
        return scorer if scorer.ready else scorer.warm_up()


def clean_up() -> None:
    """Returns the memory of versions that are no longer served to the system."""
    gc.collect()  # versions are full of cycles, which would keep their arrays
    memory.give_back()


class Versions:
    """Which version is served, and how another one takes over; within a running event loop.

    Attributes:
      current: the version that new requests go to; None until the first one is warm.
    """

    def __init__(self, options: Options, metrics: Metrics, executor: Executor):
        """Loads nothing; `executor` has the one thread that computes."""
        self._options, self._metrics, self._executor = options, metrics, executor
        self._loading, self._load = asyncio.Lock(), Load(time.monotonic())
        self._loader = ThreadPoolExecutor(1, "loader")  # its own: asyncio would wait for it at the end
        self.current: Version | None = None
        self._schema: Schema | None = None  # of the first version, as later ones may go back to it
        gc.collect()
        gc.freeze()  # all modules, which would make the collection after each swap take ten times as long

    async def swap(self, artefact: Path, index: Path | None = None) -> Version:
        """Loads, warms and tries an artefact, then lets it take over; returns when the old one is done.

        Meanwhile loading shares the machine with the old version, so requests may wait longer than usual
        before they are refused.

        Raises:
          ValueError: the artefact is refused, and the old version stays in service.
          Busy: another version is being loaded.
        """
        if self._loading.locked():
            raise Busy
        async with self._loading:
            try:
                if self.current is not None:
                    self.current.batcher.patience = PATIENCE
                new = await self._prepare(artefact, artefact / "index" if index is None else index)
                await self._take_over(new)
            finally:
                clean_up()
                asyncio.get_running_loop().call_later(SETTLED, clean_up)
                if self.current is not None:
                    self.current.batcher.patience = 0.0
        return new

    def close(self) -> None:
        """Lets the thread that loads end, without waiting."""
        self._loader.shutdown(wait=False)

    async def _take_over(self, new: Version) -> None:
        old, self.current = self.current, new
        self._schema = self._schema or new.scorer.schema
        new.batcher.patience = PATIENCE
        self._metrics.serves(new.name, old.name if old else None)
        if old is not None:
            await old.batcher.drained()

    async def _prepare(self, artefact: Path, index: Path) -> Version:
        options, limits, name = self._options, self._options.limits, version_name(artefact, index)
        like = self.current.scorer if self.current else None
        scorer = await asyncio.get_running_loop().run_in_executor(
            self._loader, load, artefact, index, options, like, self._schema)
        if version_name(artefact, index) != name:
            raise ValueError(f"{artefact} changed while it was read, expected a folder that stays as it is")
        if not scorer.index.num_served:
            raise ValueError(f"{artefact} with {index} serves 0 items, expected at least one")
        longest = min(scorer.facts["histories"][-1], limits.history)
        trial = check_query(example(scorer, longest), scorer.schema, limits)._replace(top_k=limits.top_k)
        size = min(options.batch_sizes)
        with running_on_device(artefact):
            whole = await self._time(scorer, trial, size, WHOLE)  # also finds scores that are not finite
            seconds = await self._try(scorer, trial)
        everything = f" that ranks all {scorer.index.num_served} items"
        for taken, what in ((seconds[size], ""), (whole, everything)):
            if taken >= limits.seconds:
                raise ValueError(f"{artefact} takes {taken:.3g} seconds for a batch of {size}{what}, "
                                 f"expected less than the time-out, {limits.seconds:g}")
        batcher = Batcher(
            partial(answer, scorer), self._executor, ServiceTimes(seconds), self._load,
            largest=useful_sizes(seconds, self._budget(seconds[size]))[-1], delay=options.delay,
            budget=options.budget, timeout=limits.seconds, limit=options.queue, on_batch=self._metrics.batch)
        return Version(name, scorer, seconds, batcher, trial, options)

    def _budget(self, seconds: float) -> float:
        """The budget that batches are chosen for, if the smallest takes `seconds`."""
        options = self._options
        return least_budget(
            seconds, delay=options.delay, budget=options.budget, timeout=options.limits.seconds)

    async def _try(self, scorer: Scorer, query: Query) -> dict[int, float]:
        """Seconds that batches with many candidates take, by size, as far as they may fit the budget."""
        ids = scorer.index.ids[scorer.index.served][:max(self._options.candidate_sizes)]
        some = query._replace(candidates=ids)
        smallest, *larger = sorted(self._options.batch_sizes)
        seconds = {smallest: await self._time(scorer, some, smallest)}
        budget = self._budget(seconds[smallest])
        for size in larger:
            if fits(seconds[max(seconds)], budget):
                seconds[size] = await self._time(scorer, some, size)
        return seconds

    async def _time(self, scorer: Scorer, query: Query, size: int, trials: int = TRIALS) -> float:
        """Median seconds of a batch of `size` such queries."""
        return statistics.median([await self._run(scorer, query, size) for _ in range(trials)])

    async def _run(self, scorer: Scorer, query: Query, size: int) -> float:
        """Seconds of a batch of `size` such queries.

        It runs in the thread that computes, so that batches of the old version run before and after it, not
        at the same time.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, _timed, scorer, [query] * size)


def _timed(scorer: Scorer, queries: list[Query]) -> float:
    start = time.perf_counter()
    for found in answer(scorer, queries):
        if isinstance(found, Exception):
            raise ValueError(f"a trial failed: {found}")
    return time.perf_counter() - start
