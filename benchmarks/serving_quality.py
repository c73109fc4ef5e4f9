"""Ranking quality of served methods: recall@500 against full target attention over a complete index, and AUC.

    python -m benchmarks.serving_quality --attention=runs/compare/target_attention-0 \\
        --run=runs/compare/two_tower-0 --run=runs/compare/tarq-0 --json=FILE

Each request of the test split ranks all items with the functions that serving exports. The run of target
attention is the reference. It is also converted and served (`--codewords`, `--order`); other runs are served
unchanged. AUC is computed on the requests' own candidates and labels. Run the command again for more seeds.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track

from tarq_jax import cli, metrics, reporting
from tarq_jax.data import ITEM_ID, Dataset, eval_batches
from tarq_jax.experiments.study import tarq_name
from tarq_jax.serving.build import encode_items, method_of
from tarq_jax.serving.index import round_up
from tarq_jax.serving.item_side import for_all
from tarq_jax.serving.method import Method
from tarq_jax.training import setup
from tarq_jax.training.restore import Run, load_run
from tarq_jax.types import Batch

ATTENTION = flags.DEFINE_string("attention", None, "Run of target attention, the reference.", required=True)
RUNS = flags.DEFINE_multi_string("run", [], "Another run on the same data; repeat for more.")
CODEWORDS = flags.DEFINE_list("codewords", ["64", "256"], "Codewords (K) for converting the reference.")
ORDERS = flags.DEFINE_list("order", ["0", "1"], "Orders for converting the reference.")
TOP_K = flags.DEFINE_integer("top_k", 500, "Number k of best items in recall@k.", lower_bound=1)
REQUESTS = flags.DEFINE_integer("requests", 5000, "Most requests of the test split, the first ones.",
                                lower_bound=1)
JSON = cli.json_flag()

BATCH = 100  # requests at a time


def conversions() -> list[tuple[int, int]]:
    """(order, codewords) of all conversions that the flags ask for."""
    orders = [int(order) for order in cli.names(ORDERS, ("0", "1"))]
    return list(itertools.product(orders, cli.whole_numbers(
        CODEWORDS, "whole numbers of at least 2", least=2)))


def served(reference: Run, converted: Sequence[tuple[int, int]]) -> Iterator[tuple[str, Method]]:
    """(name, method) of everything to compare, the reference first, then its conversions."""
    yield "target attention", method_of(reference)
    for order, codewords in converted:
        yield f"converted, order {order}, K={codewords}", method_of(
            reference, codewords=codewords, order=order)
    for path in RUNS.value:
        run = load_run(Path(path))
        if run.dataset.schema != reference.dataset.schema:
            raise ValueError(f"{path} has another schema than {ATTENTION.value}, expected the same")
        yield name_of(run), method_of(run)


def name_of(run: Run) -> str:
    """The name of a run's model in the table."""
    model = run.config.model
    return tarq_name(model.order, model.head, model.num_codewords) if model.name == "tarq" else model.name


def scores_of(method: Method, dataset: Dataset) -> np.ndarray:
    """Logits [B, V - 1] of all items for each request of the test split."""
    items = encode_items(method, dataset)
    padded = {name: np.resize(values, (round_up(len(values)), *values.shape[1:]))
              for name, values in items.items()}

    @jax.jit
    def compute(user_weights, item_weights, batch: Batch):
        events = {field.name: batch.history[field.name] for field in dataset.schema.side("event")}
        rows = jnp.maximum(batch.history[ITEM_ID] - 1, 0)
        request = {"user": batch.user, "context": batch.context, "events": events,
                   "embedding": jnp.asarray(items["embedding"])[rows], "mask": batch.history_mask}
        return for_all(method.item_side)(item_weights, method.user_side(user_weights, request), padded)

    found = [np.asarray(compute(method.user_weights, method.item_weights, batch))[batch.candidate_mask.any(1)]
             for batch in batches_of(dataset)]
    return np.concatenate(found)[:, :len(items["embedding"])]


def batches_of(dataset: Dataset) -> Iterator[Batch]:
    """The test split in batches of `BATCH`, up to `--requests`."""
    batches = eval_batches(dataset, "test", batch_size=BATCH, **setup.batch_shapes(dataset))
    return itertools.islice(batches, -(-REQUESTS.value // BATCH))


def labelled(dataset: Dataset) -> Iterator[Batch]:
    """The requests of the test split, with their candidates."""
    for batch in batches_of(dataset):
        real = batch.candidate_mask.any(1)
        yield jax.tree.map(functools.partial(np.compress, real, axis=0), batch)


def quality(dataset: Dataset, scores: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Recall of the reference's best items, and AUC on the requests' own candidates."""
    batches = list(labelled(dataset))
    ids, labels, masks = (np.concatenate(columns) for columns in zip(*(
        (batch.candidates[ITEM_ID], batch.labels, batch.candidate_mask) for batch in batches), strict=True))
    own = np.take_along_axis(scores, np.maximum(ids - 1, 0), axis=1)
    everything = np.ones(scores.shape, bool)
    return {f"recall_at_{TOP_K.value}": metrics.recall_at_k(scores, reference, everything, TOP_K.value),
            "auc": metrics.auc(labels[masks], own[masks])}


def main() -> None:
    """Compares what the flags ask for and prints the table."""
    converted = conversions()
    run = load_run(Path(ATTENTION.value))
    data = Path(run.config.data.get("source", run.config.data.name)).stem
    rows: list[dict[str, Any]] = []
    reference = None
    for name, method in track(list(served(run, converted)), "ranking", console=Console(stderr=True)):
        scores = scores_of(method, run.dataset)
        reference = scores if reference is None else reference
        rows.append({"data": data, "model": name, "seed": run.config.seed,
                     **quality(run.dataset, scores, reference)})
    reporting.print_table(rows, f"all {scores.shape[1]:,} items, {len(scores):,} requests")
    if JSON.value:
        reporting.write_rows(rows, JSON.value)


if __name__ == "__main__":
    cli.run(main)
