"""What long histories and several hosts cost the input pipeline: waits for batches, and padding.

    python -m benchmarks.long_histories --json=benchmarks/results/long_histories.json

Rows of kind `wait`: a process takes batches of 64 requests with histories of 2,000 to 5,000 events from disk,
and sleeps 20 ms after each one, as if it trained. `read_ahead` says whether the next window of 32 blocks is
read meanwhile, or when its first batch is requested. Each row is measured in its own process, without the
first window; its highest memory includes that.

Rows of kind `padding`: the share of padded positions of an epoch with the buckets 128, 512 and 2,048, if each
host reads its own blocks. Lengths are log-normal with median 200, at most 5,000; in `stored` order `random`,
or in `runs` of 64 requests of about one length, as of one user.
"""

import dataclasses
import itertools
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks.processes import in_own_process
from tarq_jax import cli, data, reporting
from tarq_jax.data.order import WINDOW, Order, Shard, draw, windows
from tarq_jax.data.records import BLOCK, make_requests
from tarq_jax.data.windows import TrainBatches

REQUESTS = flags.DEFINE_integer("requests", 32_768, "Requests on disk.", lower_bound=32_768,
                                allow_override=True)
JSON = cli.json_flag()

BATCH, SHORTEST, LONGEST, CANDIDATES, ITEMS = 64, 2_000, 5_000, 16, 100_000
STEP, STEPS = 0.02, 1_200  # seconds of a step; steps
BUCKETS = (128, 512, 2_048)
HOSTS = (1, 2, 4, 8)


def generate(_: Any) -> data.Dataset:
    """Random requests with long histories."""
    rng, num = np.random.default_rng(0), REQUESTS.value
    lengths, shown = rng.integers(SHORTEST, LONGEST + 1, num), num * CANDIDATES
    requests = make_requests(
        np.zeros(num, np.int32), rng.integers(1, ITEMS, lengths.sum(), np.int32), lengths,
        rng.integers(1, ITEMS, shown, np.int32), np.full(num, CANDIDATES), rng.integers(0, 2, shown))
    schema = data.Schema((data.Field(data.ITEM_ID, "item", "categorical", ITEMS),))
    return data.Dataset(schema, {data.ITEM_ID: np.arange(ITEMS, dtype=np.int32)}, {}, {"train": requests})


def prepare(folder: Path) -> Path:
    """A prepared directory."""
    from tarq_jax.data import builders, synthetic

    source = dataclasses.replace(synthetic.SOURCE, name="long_histories", generate=generate)
    return builders.prepare(source, folder, data.SyntheticOptions(train_requests=REQUESTS.value))


def batches_of(dataset: data.Dataset, readers: int, read_ahead: bool) -> Iterator[Any]:
    """Batches for training; without reading ahead as `train_batches` makes them, but for that."""
    if read_ahead:
        return data.train_batches(dataset, "train", batch_size=BATCH, history_length=LONGEST,
                                  num_candidates=CANDIDATES, seed=0, readers=readers)
    split = dataset.splits["train"]
    batches = TrainBatches(dataset, split, Order(split.sizes, BATCH, 0), (LONGEST,), CANDIDATES)
    return map(batches.__getitem__, itertools.count())


def measure(directory: Path, readers: int, read_ahead: bool) -> dict[str, Any]:
    """The numbers of a row of kind `wait`; to be called in a fresh process."""
    batches = batches_of(data.load_prepared(directory, stream=True), readers, read_ahead)
    next(batches)
    waits = []
    for _ in range(STEPS):
        time.sleep(STEP)
        since = time.perf_counter()
        next(batches)
        waits.append(1e3 * (time.perf_counter() - since))
    return {"median_wait_ms": float(np.median(waits)), "longest_wait_ms": max(waits),
            "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def lengths_of(stored: str) -> np.ndarray:
    """[blocks, BLOCK] lengths of histories."""
    run = 64 if stored == "runs" else 1
    blocks = HOSTS[-1] * 4 * WINDOW
    drawn = np.random.default_rng(0).lognormal(np.log(200), 1.5, blocks * BLOCK // run)
    return np.repeat(np.minimum(drawn, LONGEST).astype(np.int64), run).reshape(blocks, BLOCK)


def padding(lengths: np.ndarray, hosts: int) -> float:
    """The share of padded positions in an epoch, from the lengths of histories alone."""
    orders = [Order((BLOCK,) * len(lengths), BATCH, 0, Shard(index, hosts), hosts > 1, aligned=hosts > 1)
              for index in range(hosts)]
    real = padded = 0
    for window in range(len(windows(orders[0], 0))):
        longest = []
        for order in orders:
            there = lengths[np.sort(windows(order, 0)[window])].ravel()
            drawn = there[draw(order, 0, window, there, BUCKETS)]
            real += int(drawn.sum())
            longest.append(drawn.max(axis=1))
        bucket = np.searchsorted(BUCKETS, np.max(longest, axis=0))
        padded += BATCH * int(np.array([*BUCKETS, LONGEST])[bucket].sum())
    return 1 - real / padded


def main() -> None:
    """Measures all rows and prints the tables."""
    with tempfile.TemporaryDirectory() as folder:
        directory = prepare(Path(folder))
        waits = [{"kind": "wait", "readers": readers, "read_ahead": ahead,
                  **in_own_process(measure, directory, readers, ahead)}
                 for readers, ahead in ((0, False), (0, True), (2, True))]
    shares = [{"kind": "padding", "stored": stored, "hosts": hosts,
               "padding": padding(lengths_of(stored), hosts)}
              for stored in ("random", "runs") for hosts in HOSTS]
    reporting.print_table(waits, f"steps of {1e3 * STEP:.0f} ms, {os.cpu_count()} cores")
    reporting.print_table(shares, f"batches of {BATCH}, buckets {BUCKETS}")
    if JSON.value:
        reporting.write_rows([*waits, *shares], JSON.value)


if __name__ == "__main__":
    cli.run(main)
