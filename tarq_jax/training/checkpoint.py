"""Checkpoints by Orbax: training state, with the configuration and schema that gave it a meaning.

Saving happens in the background and atomically. A checkpoint holds parameters, optimizer, codebooks with
their statistics, the random key and the step, from which the position in the data follows.
"""

import functools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from tarq_jax.config import BEST, WHERE_DATA_LIE, default_config, flatten
from tarq_jax.schema import Schema
from tarq_jax.training import distributed
from tarq_jax.training.meter import NOTHING_COUNTED
from tarq_jax.training.state import TrainState

# Settings that may differ between the run that saved a checkpoint and the one that goes on from it. Where its
# data lie is one: whether they are still the same, their fingerprint tells, see `provenance.check_data`.
FREE_TO_CHANGE = ("steps", "baselines", "log_every", "eval_every", "eval_batch_size", "checkpoint_every",
                  "checkpoints_kept", "best_metric", "recall_k", "save_scores", "prefetch", "data.readers",
                  "accumulate", "model.remat", "model.attention_block", "optimizer.max_gradient_norm",
                  "parallel", "mesh.data", "mesh.model", "mesh.rules",
                  *(f"data.{key}" for key in WHERE_DATA_LIE))


def manager(workdir: Path, *, kept: int = 2, best_metric: str = "") -> ocp.CheckpointManager:
    """Opens `workdir/checkpoints`; close it to wait for what is being written.

    Args:
      workdir: of the run.
      kept: newest checkpoints that are kept.
      best_metric: a key of `tarq_jax.config.BEST`, by which the best checkpoint is kept besides; none
        if empty.

    Raises:
      ValueError: the path has a "[", which Orbax takes for a pattern: what it saves there cannot be read.
    """
    if "[" in (path := str(Path(workdir).resolve())):
        raise ValueError(f"workdir is {path!r}, expected a path without '['")
    goodness = functools.partial(_goodness, best_metric)
    policies = [preservation_policy.LatestN(kept)]
    if best_metric:
        policies.append(preservation_policy.BestN(
            n=1, get_metric_fn=goodness, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        create=True, best_fn=goodness if best_metric else None,  # without it Orbax drops the metrics
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies))
    return ocp.CheckpointManager(Path(workdir).resolve() / "checkpoints", options=options)


class Restored(NamedTuple):
    """What a checkpoint gives back."""

    state: TrainState
    counted: Sequence[float]  # of `Meter`, over the steps that led there
    damaged: Sequence[str] = ()  # newer checkpoints that could not be read, a sentence each


def save(checkpoints: ocp.CheckpointManager, state: TrainState, config: ml_collections.ConfigDict,
         schema: Schema, counted: Sequence[float], metrics: Mapping[str, float] | None = None) -> None:
    """Writes the state under its step, in the background and atomically; a step saved before stays.

    Args:
      checkpoints: of `manager`.
      state: to save.
      config: of the run.
      schema: of the run's data.
      counted: of `Meter`.
      metrics: of the validation split, where the state was evaluated; the best checkpoint is told by it.
    """
    step = int(state.step)
    if step in checkpoints.all_steps():
        return
    meta = {"config": config.to_dict(), "schema": schema.to_json(), "counted": list(counted)}
    checkpoints.save(step, metrics=None if metrics is None else dict(metrics), args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)))


def restore_latest(checkpoints: ocp.CheckpointManager, state: TrainState, config: ml_collections.ConfigDict,
                   schema: Schema) -> Restored:
    """The newest saved state that can be read, or `state` itself where nothing was saved.

    Checkpoints that are damaged are moved to `damaged/` beside `checkpoints/`, once an older one was read.

    Args:
      checkpoints: of `manager`.
      state: what a fresh run starts from; gives shapes, types and shardings, which may be of another
        mesh than those that were saved.
      config: of this run.
      schema: of this run's data.

    Returns:
      A state like `state`, what was counted on the way to it, and what was found damaged.

    Raises:
      ValueError: the checkpoint was made with another configuration or schema, and names what differs; it
        is of a later step than this run's last; or none of several can be read.
    """
    damaged: dict[int, str] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            meta = read_meta(checkpoints, step)
            if (difference := _difference(meta, config, schema)) is None:
                restored = Restored(restore_step(checkpoints, step, state), meta["counted"],
                                    list(damaged.values()))
        except Exception as error:  # whatever Orbax, JSON or the file system make of damaged files
            reason = " ".join(str(error).split())[:200]
            damaged[step] = f"Checkpoint {step} is damaged ({type(error).__name__}: {reason})."
            continue
        if difference is None and step > config.steps:
            difference = (f"step {step} is saved, this run has config.steps={config.steps}; use another "
                          f"--workdir")
        if difference is not None:
            raise ValueError(f"{checkpoints.directory}: {difference}")
        _move_away(checkpoints, damaged)
        return restored
    if damaged:
        raise ValueError(f"{checkpoints.directory}: none of {len(damaged)} checkpoints can be read, expected "
                         f"one at least. {' '.join(damaged.values())}")
    return Restored(state, NOTHING_COUNTED)


def restore_step(checkpoints: ocp.CheckpointManager, step: int, state: TrainState) -> TrainState:
    """The state saved at a step, in the shapes, types and shardings of `state`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    return checkpoints.restore(step, args=arguments)["state"]


def read_meta(checkpoints: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What was saved beside the state of a step: `config`, `schema`, `counted`."""
    return checkpoints.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def newest_meta(checkpoints: ocp.CheckpointManager) -> dict[str, Any] | None:
    """`read_meta` of the newest checkpoint where it can be read; None where there is none."""
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            return read_meta(checkpoints, step)
        except Exception:  # damaged, see `restore_latest`
            continue
    return None


def check(workdir: Path, config: ml_collections.ConfigDict, schema: Schema, *, resume: bool = True) -> bool:
    """Whether there is something to go on from.

    Raises:
      ValueError: there is, but `resume` is not set; or it was saved with another configuration or schema,
        and names what differs.
    """
    newest, meta = _newest(workdir)
    if newest is not None and not resume:
        raise ValueError(f"{workdir} holds a checkpoint of step {newest}, expected none with --noresume; "
                         f"use another --workdir")
    if meta is not None and (difference := _difference(meta, config, schema)) is not None:
        raise ValueError(f"{workdir / 'checkpoints'}: {difference}")
    return meta is not None


def check_steps(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Raises ValueError if what is saved there is of a run of another length.

    It could be gone on with, but that ends elsewhere than a run of this length: the learning rate's schedule
    and the data that codewords start from depend on it.
    """
    check_settings(workdir, config, lambda name: name == "steps")


def check_settings(workdir: Path, config: ml_collections.ConfigDict, held: Callable[[str], bool]) -> None:
    """Raises ValueError if what is saved there was trained with another value of a setting that is `held`."""
    _, meta = _newest(workdir)
    if meta is not None and (difference := _first_difference(meta["config"], config, held)):
        raise ValueError(f"{workdir}: {difference}")


def _newest(workdir: Path) -> tuple[int | None, dict[str, Any] | None]:
    """The newest step that is saved, and `newest_meta`; nothing is made where there is nothing."""
    if not (workdir / "checkpoints").is_dir():
        return None, None
    with manager(workdir) as checkpoints:
        return checkpoints.latest_step(), newest_meta(checkpoints)


def best_step(checkpoints: ocp.CheckpointManager, best_metric: str) -> int | None:
    """The step whose validation metrics were best, the earliest of equals; None where none were saved."""
    measured = {step: checkpoints.metrics(step) for step in sorted(checkpoints.all_steps())}
    found = {step: _goodness(best_metric, metrics) for step, metrics in measured.items() if metrics}
    found = {step: good for step, good in found.items() if good > -math.inf}
    return max(found, key=lambda step: found[step], default=None)


def _goodness(best_metric: str, metrics: Mapping[str, float]) -> float:
    """What is largest where the metric is best; minus infinity where it is NaN."""
    good = BEST[best_metric] * metrics[best_metric]
    return -math.inf if math.isnan(good) else good


def _move_away(checkpoints: ocp.CheckpointManager, damaged: Mapping[int, str]) -> None:
    """Makes room for the steps to be saved again, and keeps what is left of them."""
    folder = checkpoints.directory.parent / "damaged"
    for step in damaged if distributed.is_first() else ():
        target = folder / str(step)
        shutil.rmtree(target, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        shutil.move(checkpoints.directory / str(step), target)
    if damaged:
        distributed.wait_for_all("damaged checkpoints moved away")
        checkpoints.reload()


def _difference(meta: dict[str, Any], config: ml_collections.ConfigDict, schema: Schema) -> str | None:
    """How a checkpoint's run differs from this one, in words; None where it does not."""
    if meta["schema"] != schema.to_json():
        return (f"saved with schema {meta['schema']}, but the data has {schema.to_json()}; use another "
                f"--workdir")
    return _first_difference(meta["config"], config, lambda name: name not in FREE_TO_CHANGE)


def _first_difference(
    saved: Mapping[str, Any], config: ml_collections.ConfigDict, held: Callable[[str], bool]
) -> str | None:
    """The first setting that is `held` and has another value, in words.

    A setting that the saved run did not have yet counts as its default. Lists and tuples are alike, as in
    JSON.
    """
    before, now = (
        {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        for settings in (flatten(default_config().to_dict()) | flatten(saved), flatten(config.to_dict())))
    for name in sorted(filter(held, before.keys() | now.keys())):
        if before.get(name) != now.get(name):
            return (f"saved with config.{name}={before.get(name)!r}, this run has {now.get(name)!r}; use "
                    f"another --workdir or the saved setting")
    return None
