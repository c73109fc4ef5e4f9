"""Latency of complete requests at one point, for every method and baseline: one axis of the frontier.

    python -m benchmarks.frontier --json=benchmarks/results/frontier_latency.json

Requests are measured as in `benchmarks.serving`: in turns, with random weights, after comparing the scores
with those of the training code. The methods are those of `benchmarks.serving_contenders` and
`benchmarks.approximations`. `python -m tarq_jax.experiments.report --serving=FILE` plots quality against
latency.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from flax.linen import Module
from rich.console import Console
from rich.progress import track

from benchmarks import approximations, serving
from benchmarks.serving_contenders import (
    Contender,
    Sizes,
    load_scorer,
    logits_of,
    make_contenders,
    make_dataset,
    random_params,
)
from benchmarks.timing import in_turns
from tarq_jax import cli, reporting
from tarq_jax.data import Dataset
from tarq_jax.models import TwoTower
from tarq_jax.serving import methods
from tarq_jax.serving.method import Method

SECONDS = flags.DEFINE_float("seconds", 2.0, "Seconds to measure each method.", lower_bound=0,
                             allow_override=True)
COUNT = flags.DEFINE_integer("count", 10_000, "Candidates per request.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 1_000, "Length of the history.", lower_bound=1)
TOP_K = flags.DEFINE_integer("top_k", 500, "Best candidates to return.", lower_bound=1, allow_override=True)
JSON = cli.json_flag()

CHECKED = 1_000  # candidates whose scores are compared
LARGE = "two-tower of TARQ's size"


def contenders(sizes: Sizes, dataset: Dataset) -> Iterator[Contender]:
    """Every method, with random weights."""
    yield from make_contenders(sizes, dataset)
    few = sizes._replace(codewords=sizes.few_codewords)  # `make_contenders` has these sizes only for order 1
    yield from (made for made in make_contenders(few, dataset) if made.name.startswith("TARQ order 0"))
    common: dict[str, Any] = {"schema": dataset.schema, "width": sizes.width, "num_heads": sizes.heads,
                              "hidden": sizes.hidden}
    large = TwoTower(**common | {"hidden": tuple(4 * size for size in sizes.hidden)}, num_encoders=2)
    others: list[tuple[str, Module, Callable[[Any], Method]]] = [
        (LARGE, large, functools.partial(methods.from_module, large)), *approximations.modules(**common)]
    for name, module, method_of in others:
        params = random_params(module, dataset)
        yield Contender(name, method_of(params), module, logits_of(module, params))


def measure(sizes: Sizes, count: int, length: int, top_k: int, seconds: float, console: Console
            ) -> list[dict[str, Any]]:
    """A row per method.

    Raises:
      ValueError: scores differ from those of the training code.
    """
    dataset = make_dataset(sizes)
    rng = np.random.default_rng(1)
    history = rng.integers(1, sizes.items + 1, length)
    ids = rng.permutation(sizes.items)[:count] + 1
    request = {"history": {"item_id": history}}
    calls, differences = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, made in enumerate(track(list(contenders(sizes, dataset)), "loading", console=console)):
            (out := Path(folder) / str(number)).mkdir()
            checked = ids[:CHECKED]
            scorer = load_scorer(made, dataset, out, histories=(length,), candidates=(len(checked), count),
                                 top_k=top_k)
            differences[made.name] = serving.difference_of(
                made.name, made.reference, scorer, dataset, history, checked)
            calls[made.name] = functools.partial(scorer.score, request, ids, top_k=top_k)
        times = in_turns(calls, seconds=seconds, least=serving.Plan().least)
    return [{"kind": "request", "model": name, "candidates": count, "history": length}
            | serving.latency(found) | {"difference": differences[name]} for name, found in times.items()]


def main() -> None:
    """Measures what the flags ask for and prints the table."""
    sizes = Sizes()
    if COUNT.value > sizes.items:
        cli.wrong_call(f"--count is {COUNT.value}, expected at most {sizes.items}, the number of items")
    rows = measure(sizes, COUNT.value, LENGTH.value, TOP_K.value, SECONDS.value, Console(stderr=True))
    reporting.print_table(rows, "whole requests")
    if JSON.value:
        reporting.write_rows(rows, JSON.value)


if __name__ == "__main__":
    cli.run(main)
