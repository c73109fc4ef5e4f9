"""Stops a run at the first step that is not finite or whose gradient explodes, and keeps its batch.

`Watch` keeps the metrics of every step on device and checks them when something is logged or saved, so no
step waits for the host and every step is checked. A batch is a pure function of seed and step, so it can be
made again to be saved. `python -m tarq_jax.experiments.replay --run=DIR` repeats the step.
"""

import errno
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from tarq_jax.reporting import replacing
from tarq_jax.types import Batch

LONGEST = 256  # steps whose metrics may wait on device
REPLAY = "python -m tarq_jax.experiments.replay --run"


class StepFailed(FloatingPointError):
    """A step after which the run must not continue; `step` counts from 1."""

    def __init__(self, step: int, culprit: str):
        """The message names the step and what is wrong with it."""
        super().__init__(f"step {step}: {culprit}")
        self.step = step


def paths_of(tree: Any) -> list[str]:
    """The path of every leaf, like `params/teacher/head/Dense_0/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def culprit(metrics: Mapping[str, np.ndarray], paths: Sequence[str], limit: float = 0.0) -> str | None:
    """What is wrong with a step: its losses, its gradient or its new parameters.

    Args:
      metrics: metrics of `train_step`, on the host.
      paths: paths of the leaves that its norms belong to.
      limit: limit for the norm of the gradient; 0 for none.

    Returns:
      One line, or None if the step is good.
    """
    bad = {name: float(value) for name, value in sorted(metrics.items())
           if np.ndim(value) == 0 and not np.isfinite(value)}
    found = [f"{bad} not finite"] if bad else []
    for kind in ("gradient", "parameter"):
        wrong = ~np.isfinite(metrics[f"{kind}_norms"])
        if wrong.any():
            found.append(f"{kind} of {paths[int(np.argmax(wrong))]!r} not finite, the first of {wrong.sum()}")
    norm = float(metrics["gradient_norm"])
    if not found and 0 < limit < norm:
        largest = int(np.argmax(metrics["gradient_norms"]))
        found.append(f"gradient of norm {norm:.4g} exceeds config.optimizer.max_gradient_norm, {limit:g}; "
                     f"longest, {metrics['gradient_norms'][largest]:.4g}, at {paths[largest]!r}")
    return "; ".join(found) or None


class Watch:
    """Checks the metrics of every step, but fetches them only from time to time."""

    def __init__(self, paths: Sequence[str], limit: float):
        """Arguments are those of `culprit`: paths of the leaves, and the limit for the gradient's norm."""
        self._paths, self._limit = paths, limit
        self._pending: list[tuple[int, Mapping[str, jax.Array]]] = []
        self._scalars: dict[str, float] = {}

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Remembers the metrics that `train_step` returned for a step."""
        self._pending.append((step, metrics))
        if len(self._pending) >= LONGEST:
            self.check()

    def check(self) -> dict[str, float]:
        """Checks all steps since the last call, and returns the scalars of the last step.

        Raises:
          StepFailed: for the first of these steps that failed.
        """
        pending, self._pending = jax.device_get(self._pending), []
        for step, metrics in pending:
            if (wrong := culprit(metrics, self._paths, self._limit)) is not None:
                raise StepFailed(step, wrong)
            self._scalars = {name: float(value) for name, value in metrics.items() if not np.ndim(value)}
        return self._scalars


@contextmanager
def batch_kept(
    workdir: Path, config: ml_collections.ConfigDict, batch_of: Callable[[int], Batch]
) -> Iterator[None]:
    """Context that saves the batch of a failed step; the error says where it is and how to replay it.

    Args:
      workdir: directory of the run; the batch is saved there as `failed_step_<step>.npz`.
      config: configuration of the run.
      batch_of: step, counted from 1 -> its batch with NumPy leaves.
    """
    try:
        yield
    except StepFailed as failed:
        batch = batch_of(failed.step)
        poisoned = [name for name, values in _columns(batch).items() if not np.isfinite(values).all()]
        holds = f"; not finite in the batch: {poisoned}" if poisoned else ""
        try:
            path = save_batch(workdir, failed.step, batch, config)
            kept = f"the batch is in {path}, replay it with {REPLAY}={workdir}"
        except OSError as error:  # must not hide the failure of the step
            kept = f"the batch could not be saved in {workdir} ({error})"
        failed.args = (f"{failed}{holds}. Nothing was saved from here on; {kept}. Lower "
                       "config.optimizer.learning_rate, or set config.optimizer.clip_norm",)
        raise


@contextmanager
def full_disk_named(workdir: Path) -> Iterator[None]:
    """Context in which the error for a full disk names the run and says that earlier saves are kept."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(error.errno, f"no space left for {workdir}; what was saved before is kept, run "
                      "it again when there is space") from error


class FailedStep(NamedTuple):
    """The data saved for a failed step."""

    step: int  # counted from 1
    batch: Batch  # with NumPy leaves; the rows of all processes
    settings: dict[str, Any]  # the configuration
    processes: int = 1  # how many processes read the batch


def save_batch(workdir: Path, step: int, batch: Batch, config: ml_collections.ConfigDict) -> Path:
    """Writes `failed_step_<step>.npz`; with several processes, the name goes on like `_0of2`."""
    several = jax.process_count() > 1
    process = f"_{jax.process_index()}of{jax.process_count()}" if several else ""
    path = Path(workdir) / f"failed_step_{step}{process}.npz"
    arrays: dict[str, Any] = {f"batch/{name}": values for name, values in _columns(batch).items()}
    with replacing(path) as written, written.open("wb") as file:
        np.savez(file, step=step, settings=json.dumps(config.to_dict()), **arrays)
    return path


def load_batch(paths: Sequence[Path]) -> FailedStep:
    """Reads the files of a step that the processes wrote by `save_batch`, in the order of the processes.

    Raises:
      ValueError: a file is damaged, or another.
    """
    parts = [_load_part(path) for path in paths]
    return parts[0]._replace(batch=join([part.batch for part in parts]), processes=len(parts))


def join(batches: Sequence[Batch]) -> Batch:
    """The batch whose parts the processes have, in their order, with NumPy leaves."""
    return jax.tree.map(lambda *rows: np.concatenate(rows), *batches)


def _load_part(path: Path) -> FailedStep:
    fields: dict[str, Any] = {name: {} for name in ("user", "context", "history", "candidates")}
    try:
        with np.load(path) as file:
            for name in file.files:
                first, _, rest = name.removeprefix("batch/").partition("/")
                if rest and name.startswith("batch/"):
                    fields[first][rest] = file[name]
                elif name.startswith("batch/"):
                    fields[first] = file[name]
            return FailedStep(int(file["step"]), Batch(**fields), json.loads(str(file["settings"])))
    except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a failed step: {error}") from error


def _columns(batch: Batch) -> dict[str, np.ndarray]:
    """The arrays of a batch by path, like `candidates/item_id`."""
    return dict(zip(paths_of(batch), map(np.asarray, jax.tree.leaves(batch)), strict=True))
