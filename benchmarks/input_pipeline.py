"""How fast batches are made, from disk and from memory, in candidate examples per second.

    python -m benchmarks.input_pipeline --json=benchmarks/results/input_pipeline.json

The synthetic generator writes real files into a temporary folder: histories of 50, 16 candidates, 24 features
per item. Each row is measured in its own process. The process first makes the system drop the files from its
cache, as far as the system allows it, and then opens them. `first_batch_ms` is the time from opening the
files to the first batch; `cold_examples_per_second` includes it and covers one epoch. `examples_per_second`
is the median over parts of further epochs. With `buckets`, histories have mixed lengths. `padding` is the
share of padded positions.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track

from benchmarks.processes import in_own_process
from tarq_jax import cli, data, reporting
from tarq_jax.data.records import make_requests, ragged_index

REQUESTS = flags.DEFINE_integer("requests", 60_000, "Requests on disk.", lower_bound=20_000,
                                allow_override=True)
JSON = cli.json_flag()

BATCH, HISTORY, CANDIDATES = 64, 50, 16
PARTS = 9  # that are measured after the first epoch


class Setting(NamedTuple):
    """The settings of one row."""

    stream: bool
    readers: int
    buckets: tuple[int, ...] = ()
    lengths: str = "50"  # or "mixed"


SETTINGS = [
    *(Setting(stream, readers) for stream in (True, False) for readers in (0, 1, 2, 4)),
    *(Setting(True, 2, buckets, "mixed") for buckets in ((), (16,), (8, 16, 32))),
]


def shortened(directory: Path) -> data.Dataset:
    """The data set with histories cut to mixed lengths, half of them below 13 events."""
    dataset = data.load_prepared(directory)
    requests = dataset.splits["train"].read((0,))
    drawn = 1 + np.random.default_rng(0).exponential(17, len(requests)).astype(np.int64)
    lengths = np.minimum(drawn, HISTORY)
    kept = requests.history[ragged_index(requests.history_offsets[:-1], lengths)]
    mixed = make_requests(requests.user, kept, lengths, requests.candidates,
                          np.diff(requests.candidate_offsets), requests.labels)
    return data.Dataset(dataset.schema, dataset.items, dataset.users, {"train": mixed}, dataset.info)


def prepare(folder: Path) -> dict[str, Path]:
    """Prepared directories, by kind of history lengths."""
    full = data.prepare("synthetic", data_dir=folder, train_requests=REQUESTS.value, validation_requests=0,
                        test_requests=0, history_length=HISTORY, num_candidates=CANDIDATES)
    from tarq_jax.data import builders, synthetic

    source = dataclasses.replace(synthetic.SOURCE, name="mixed", generate=lambda _: shortened(full))
    options = data.SyntheticOptions(train_requests=REQUESTS.value, seed=1)
    return {"50": full, "mixed": builders.prepare(source, folder, options)}


def drop_from_cache(directory: Path) -> None:
    """Asks the system to drop the files from its cache, so that they are read from disk."""
    for path in directory.glob("*.array_record*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(directory: Path, setting: Setting) -> dict[str, Any]:
    """The numbers of a row; to be called in a fresh process."""
    from tarq_jax.data import builders  # imports are not part of the measured time

    if setting.readers:
        import grain  # noqa: F401
    drop_from_cache(directory)
    start = time.perf_counter()
    dataset = builders.read(directory, stream=setting.stream)
    batches = data.train_batches(
        dataset, "train", batch_size=BATCH, history_length=HISTORY, num_candidates=CANDIDATES, seed=0,
        readers=setting.readers, buckets=setting.buckets)
    next(batches)
    first = time.perf_counter() - start
    steps = len(dataset.splits["train"]) // BATCH
    real = padded = 0
    for batch in _take(batches, steps - 1):
        real, padded = real + int(batch.history_mask.sum()), padded + batch.history_mask.size
    cold = time.perf_counter() - start
    speeds = []
    for _ in range(PARTS):
        since = time.perf_counter()
        for _ in _take(batches, steps // 3):
            pass
        speeds.append(BATCH * CANDIDATES * (steps // 3) / (time.perf_counter() - since))
    lower, median, upper = np.quantile(speeds, [0.25, 0.5, 0.75])
    return {"examples_per_second": float(median), "spread": float(upper - lower),
            "cold_examples_per_second": BATCH * CANDIDATES * steps / cold, "first_batch_ms": 1e3 * first,
            "padding": 1 - real / padded}


def _take(batches: Iterator[Any], num: int) -> Iterator[Any]:
    return (next(batches) for _ in range(num))


def main() -> None:
    """Measures all settings and prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        directories = prepare(Path(folder))
        rows = [{"source": "disk" if setting.stream else "memory", "history_lengths": setting.lengths,
                 "buckets": ",".join(map(str, setting.buckets)) or "-", "readers": setting.readers,
                 **in_own_process(measure, directories[setting.lengths], setting)}
                for setting in track(SETTINGS, "measuring", console=Console(stderr=True))]
    reporting.print_table(rows, f"batches of {BATCH} x {CANDIDATES}, {os.cpu_count()} cores")
    if JSON.value:
        reporting.write_rows(rows, JSON.value)


if __name__ == "__main__":
    cli.run(main)
