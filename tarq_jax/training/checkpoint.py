"""Checkpoints by Orbax: training state, with the configuration and schema that gave it a meaning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import orbax.checkpoint as ocp

from tarq_jax.config import default_config
from tarq_jax.data.schema import Schema
from tarq_jax.training.meter import NOTHING_COUNTED
from tarq_jax.training.state import TrainState

KEEP = 2  # checkpoints kept
# Settings that may differ between the run that saved a checkpoint and the one that goes on from it.
FREE_TO_CHANGE = ("steps", "baselines", "log_every", "eval_every", "eval_batch_size", "checkpoint_every",
                  "recall_k", "prefetch", "parallel", "mesh.data", "mesh.model", "mesh.rules")


def manager(workdir: Path) -> ocp.CheckpointManager:
    """Opens `workdir/checkpoints`; close it to wait for what is being written."""
    options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, create=True)
    return ocp.CheckpointManager(Path(workdir).resolve() / "checkpoints", options=options)


class Restored(NamedTuple):
    """What a checkpoint gives back."""

    state: TrainState
    counted: Sequence[float]  # of `Meter`, over the steps that led there


def save(checkpoints: ocp.CheckpointManager, state: TrainState, config: ml_collections.ConfigDict,
         schema: Schema, counted: Sequence[float]) -> None:
    """Writes the state under its step, in the background and atomically; a step saved before stays."""
    step = int(state.step)
    if step in checkpoints.all_steps():
        return
    meta = {"config": config.to_dict(), "schema": schema.to_json(), "counted": list(counted)}
    checkpoints.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state),
                                                   meta=ocp.args.JsonSave(meta)))


def restore_latest(checkpoints: ocp.CheckpointManager, state: TrainState, config: ml_collections.ConfigDict,
                   schema: Schema) -> Restored:
    """The newest saved state, or `state` itself where nothing was saved.

    Args:
      checkpoints: of `manager`.
      state: what a fresh run starts from; gives shapes, types and shardings.
      config: of this run.
      schema: of this run's data.

    Returns:
      A state like `state`, and what was counted on the way to it.

    Raises:
      ValueError: the checkpoint was made with another configuration or schema; names what differs.
    """
    step = checkpoints.latest_step()
    if step is None:
        return Restored(state, NOTHING_COUNTED)
    meta = checkpoints.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    _check_same(meta, config, schema, checkpoints.directory)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    restored = checkpoints.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
    return Restored(restored["state"], meta.get("counted", NOTHING_COUNTED))


def _check_same(meta: dict[str, Any], config: ml_collections.ConfigDict, schema: Schema, where: Path) -> None:
    if meta["schema"] != schema.to_json():
        raise ValueError(f"{where}: saved with schema {meta['schema']}, but the data has {schema.to_json()}; "
                         f"use another --workdir")
    defaults = _settings(default_config().to_dict() | {"data": {}})  # for settings newer than the checkpoint
    saved, current = defaults | _settings(meta["config"]), _settings(config.to_dict())
    for key in sorted(saved.keys() | current.keys()):
        if saved.get(key) != current.get(key):
            raise ValueError(f"{where}: saved with config.{key}={saved.get(key)!r}, this run has "
                             f"{current.get(key)!r}; use another --workdir or the saved setting")


def _settings(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flat settings that have to agree; lists and tuples are alike, as JSON knows only lists."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _settings(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" not in FREE_TO_CHANGE:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
