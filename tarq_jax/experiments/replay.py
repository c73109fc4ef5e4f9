"""Repeats the step at which a run failed, from its last checkpoint and with the batch that it saved.

    python -m tarq_jax.experiments.replay --run=runs/synthetic

Steps between checkpoint and failure are repeated, too; on the same devices they are bit-identical. The table
has every loss, the norm of every gradient, and the norm of every parameter after the step; values that are
not finite come first.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from tarq_jax import cli, data, reporting
from tarq_jax.training import checkpoint, failure, loop, restore, setup
from tarq_jax.training.state import TrainState

RUN = cli.run_flag()
STEP = flags.DEFINE_integer("step", None, "Failed step to replay; the last one by default.")
JSON = cli.json_flag()


def failed_step(workdir: Path, step: int | None = None) -> failure.FailedStep:
    """What the run in `workdir` saved at its failure at `step`, or at its last failure if None.

    Raises:
      FileNotFoundError: it has not failed there, or the file of a process is missing.
      ValueError: a file is damaged.
    """
    found = [(int(match[1]), int(match[3] or 1), int(match[2] or 0), path)  # step, processes, process
             for path in workdir.glob("failed_step_*.npz")
             if (match := re.fullmatch(r"failed_step_(\d+)(?:_(\d+)of(\d+))?", path.stem))]
    steps = sorted({failed for failed, *_ in found})
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(f"{workdir}: failed steps are {steps}, expected "
                                f"{'at least one' if step is None else step}")
    there = [each for each in found if each[0] == (steps[-1] if step is None else step)]
    _, count, *_ = max(there, key=lambda each: each[-1].stat().st_mtime)  # of the newest failure
    files = [path for _, processes, _, path in sorted(there) if processes == count]
    if len(files) < count:
        raise FileNotFoundError(f"{workdir}: {count} processes failed, expected a file of each, found "
                                f"{[path.name for path in files]}")
    return failure.load_batch(files)


def replay(workdir: Path, failed: failure.FailedStep) -> list[dict[str, Any]]:
    """One row per loss, gradient and parameter of the failed step: `kind`, `name` and `value`.

    Raises:
      ValueError: the checkpoint is not from before the step, or the data do not fit it.
    """
    config = restore.config_of(failed.settings)
    dataset = loop.load_data(config)
    way, mesh, objective, optimizer, state = setup.set_up(config, dataset)
    with checkpoint.manager(workdir) as checkpoints:
        state = restore.read_state(checkpoints, state, config, dataset.schema)
    start, shapes = int(state.step), setup.batch_shapes(dataset)
    if start >= failed.step:
        raise ValueError(f"{workdir}: its checkpoint is of step {start}, expected one before {failed.step}")
    parts = [data.train_batches(
        dataset, "train", batch_size=config.batch_size, seed=config.seed, start_step=start,
        buckets=config.data.buckets, window=config.data.window,
        shard=data.Shard(index, failed.processes), **shapes)
        for index in range(failed.processes)]
    take_step = setup.compile_step(config, objective, optimizer, mesh, state)
    metrics: dict[str, jax.Array] = {}
    for step in range(start, failed.step):
        if step == config.codebook.start and state.codebook is not None:
            state = setup.initialise_codebook(config, objective, state, dataset, shapes, mesh)
        last = step == failed.step - 1
        batch = failed.batch if last else failure.join([next(part) for part in parts])
        state, metrics = take_step(state, way.put(batch, mesh))
    return sorted(_rows(jax.device_get(metrics), state), key=lambda row: bool(np.isfinite(row["value"])))


def _rows(metrics: dict[str, np.ndarray], state: TrainState) -> Iterator[dict[str, Any]]:
    paths = failure.paths_of(state.trainable)
    for name in sorted(name for name in metrics if name.startswith("loss")):
        yield {"kind": "loss", "name": name, "value": float(metrics[name])}
    for kind in ("gradient", "parameter"):
        for path, norm in zip(paths, metrics[f"{kind}_norms"], strict=True):
            yield {"kind": kind, "name": path, "value": float(norm)}


def main() -> None:
    """Reads the flags, replays the step and prints the table."""
    workdir = Path(str(RUN.value))
    failed = failed_step(workdir, STEP.value)
    rows = replay(workdir, failed)
    reporting.print_table(rows, f"step {failed.step}, {workdir}")
    if JSON.value:
        reporting.write_rows(rows, JSON.value)


if __name__ == "__main__":
    cli.run(main)
