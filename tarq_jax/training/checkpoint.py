"""Orbax checkpoints: the training state, with the configuration and schema that it belongs to.

Saving is atomic and runs in the background. A checkpoint holds parameters, optimizer state, codebooks with
their statistics, the random key and the step. The position in the data follows from the step.
"""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from tarq_jax.config import BEST, WITHOUT_EFFECT, default_config, flatten
from tarq_jax.models.embedding import TABLE
from tarq_jax.schema import Schema
from tarq_jax.training import distributed
from tarq_jax.training.meter import NOTHING_COUNTED
from tarq_jax.training.state import TrainState

# Settings that may differ between the run that saved a checkpoint and the run that resumes from it. They
# include the paths of the data: the fingerprint shows whether the data changed, see `provenance.check_data`.
FREE_TO_CHANGE = (*WITHOUT_EFFECT, "steps", "best_metric", "accumulate", "model.remat",
                  "model.attention_block", "optimizer.max_gradient_norm", "parallel", "mesh.data",
                  "mesh.model", "mesh.rules", "model.table_multiple")


class _Manager(ocp.CheckpointManager):
    """Never asks JAX whether to stop: only `distributed.interruptible` may, which counts its questions."""

    def reached_preemption(self, step: int) -> bool:
        """False."""
        return False


def manager(workdir: Path, *, kept: int = 2, best_metric: str = "") -> ocp.CheckpointManager:
    """Opens `workdir/checkpoints`; closing the manager waits for checkpoints that are being written.

    Args:
      workdir: directory of the run.
      kept: how many of the newest checkpoints are kept.
      best_metric: a key of `tarq_jax.config.BEST`; the best checkpoint by it is kept as well. If empty, only
        the newest are kept.

    Raises:
      ValueError: the path has a "[". Orbax takes it for a pattern and cannot read what it saves there.
    """
    if "[" in (path := str(Path(workdir).resolve())):
        raise ValueError(f"workdir is {path!r}, expected a path without '['")
    policies: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(kept)]
    if best_metric:
        policies.append(_Best(best_metric))
    options = ocp.CheckpointManagerOptions(
        create=True,  # without `best_fn` Orbax drops the metrics
        best_fn=functools.partial(_goodness, best_metric) if best_metric else None,
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies))
    return _Manager(Path(workdir).resolve() / "checkpoints", options=options)


class Restored(NamedTuple):
    """The result of restoring a checkpoint."""

    state: TrainState
    counted: Sequence[float]  # `Meter.counted` over the steps up to the checkpoint
    damaged: Mapping[int, str] = MappingProxyType({})  # newer steps that could not be read: a sentence each
    processes: int | None = None  # that saved it; None if nothing was saved, or by an older version


def save(checkpoints: ocp.CheckpointManager, state: TrainState, config: ml_collections.ConfigDict,
         schema: Schema, counted: Sequence[float], metrics: Mapping[str, float] | None = None) -> None:
    """Writes the state under its step, atomically and in the background; does nothing if the step is saved.

    Args:
      checkpoints: manager from `manager`.
      state: state to save.
      config: configuration of the run.
      schema: schema of the run's data.
      counted: `Meter.counted`.
      metrics: metrics on the validation split, by which the best checkpoint is found; None if the state was
        not evaluated.
    """
    step = int(state.step)
    if step in checkpoints.all_steps():
        return
    meta = {"config": config.to_dict(), "schema": schema.to_json(), "counted": list(counted),
            "checksums": _named_checksums(state), "processes": jax.process_count()}
    checkpoints.save(step, metrics=None if metrics is None else dict(metrics), args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)))


def restore_latest(checkpoints: ocp.CheckpointManager, state: TrainState, config: ml_collections.ConfigDict,
                   schema: Schema) -> Restored:
    """`read_latest` for a run that goes on: moves damaged checkpoints to `damaged/`, beside `checkpoints/`.

    Their steps can then be saved again.
    """
    restored = read_latest(checkpoints, state, config, schema)
    _move_away(checkpoints, restored.damaged)
    return restored


def read_latest(checkpoints: ocp.CheckpointManager, state: TrainState, config: ml_collections.ConfigDict,
                schema: Schema) -> Restored:
    """The newest saved state that can be read, or `state` itself if nothing was saved; changes no file.

    A checkpoint that one of several processes cannot read is damaged for all.

    Args:
      checkpoints: manager from `manager`.
      state: state of a fresh run. The restored state has its shapes, types and shardings; its mesh may differ
        from the mesh of the saved state.
      config: configuration of this run.
      schema: schema of this run's data.

    Returns:
      A state like `state`, what was counted on the way to it, and which checkpoints are damaged.

    Raises:
      ValueError: the checkpoint was made with another configuration or schema (names what differs), its step
        is later than the last step of this run, or checkpoints exist but none can be read.
    """
    damaged: dict[int, str] = {}
    for step in _saved_steps(checkpoints):
        try:
            meta = read_meta(checkpoints, step)
            if (found := _difference(meta, config, schema)) is None:
                restored = Restored(
                    _restore(checkpoints, step, state, meta), meta["counted"], damaged, meta.get("processes"))
        except Damaged as error:
            damaged[step] = f"{error}."
            continue
        if found is None and step > config.steps:
            found = (f"step {step} is saved, this run has config.steps={config.steps}; use another "
                     f"--workdir")
        if found is not None:
            raise ValueError(f"{checkpoints.directory}: {found}")
        return restored
    if damaged:
        raise ValueError(f"{checkpoints.directory}: none of {len(damaged)} checkpoints can be read, expected "
                         f"one at least. {' '.join(damaged.values())}")
    return Restored(state, NOTHING_COUNTED)


def restore_step(checkpoints: ocp.CheckpointManager, step: int, state: TrainState) -> TrainState:
    """The state saved at a step, in the shapes, types and shardings of `state`; raises Damaged."""
    return _restore(checkpoints, step, state, read_meta(checkpoints, step))


def _restore(checkpoints: ocp.CheckpointManager, step: int, state: TrainState, meta: Mapping[str, Any]
             ) -> TrainState:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    restored = _read(checkpoints, step, state=ocp.args.PyTreeRestore(
        abstract, restore_args=jax.tree_util.tree_map_with_path(_restore_args, abstract)))
    if saved := meta.get("checksums"):  # checkpoints of older versions have none
        found = _named_checksums(restored)
        wrong = next((name for name in found if found[name] != saved.get(name)), "")
        _agree(step, wrong and f"the checksum of {wrong} is not the saved one")
    return restored


def _restore_args(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    """How Orbax reads a leaf. A table may have fewer or more rows of zeros at its end: the mesh decides."""
    found = ocp.checkpoint_utils.construct_restore_args(leaf)
    if getattr(path[-1], "key", None) == TABLE:
        found.strict = False
    return found


@jax.jit
def checksums(tree: Any) -> list[jax.Array]:
    """The checksum of every leaf, [] uint32, whatever its sharding; it shows any change of one element.

    It is the sum of the leaf's bits, as whole numbers, times `2 i + 1` for each of their indices i, modulo
    2**32. The weights are odd, so no difference of an element vanishes.
    """
    return [_checksum(leaf) for leaf in jax.tree.leaves(tree)]


def _checksum(leaf: jax.Array) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    words = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")  # 64 bits are two words
    found = jax.lax.bitcast_convert_type(leaf, words).astype(jnp.uint32)
    for axis in range(found.ndim):
        found *= 2 * jax.lax.broadcasted_iota(jnp.uint32, found.shape, axis) + 1
    return found.sum(dtype=jnp.uint32)


def _named_checksums(state: TrainState) -> dict[str, int]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    found = jax.device_get(checksums(state))
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, found, strict=True)}


def read_meta(checkpoints: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The data saved beside the state of a step: `config`, `schema`, `counted`; raises Damaged."""
    meta = _read(checkpoints, step, meta=ocp.args.JsonRestore())
    if missing := {"config", "schema", "counted"} - set(meta):
        raise Damaged(f"Checkpoint {step} is damaged (its meta data lack {sorted(missing)})")
    return meta


class Damaged(ValueError):
    """A checkpoint that cannot be read, by at least one of the processes; all of them raise it."""


def _read(checkpoints: ocp.CheckpointManager, step: int, **item: ocp.args.CheckpointArgs) -> Any:
    """One item of a step. All processes have to call it; each reads alone, then they agree on the outcome.

    Orbax would let those that can read wait for those that cannot.
    """
    own, (name,) = jax.process_index(), item
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    value, reason = None, ""
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as reader:
            value = reader.restore(checkpoints.directory / str(step), args=ocp.args.Composite(**item))[name]
    except Exception as error:  # anything that Orbax, JSON or the file system raise for damaged files
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    _agree(step, reason)
    return value


def _agree(step: int, reason: str) -> None:
    """Raises Damaged, on all processes, if any of them has a reason; all have to call it."""
    if reasons := [each for each in distributed.gather_text(reason) if each]:
        raise Damaged(f"Checkpoint {step} is damaged ({reasons[0]})")


def _saved_steps(checkpoints: ocp.CheckpointManager) -> list[int]:
    """All steps that any process sees, the newest first: a file system may show them to some later."""
    seen = distributed.gather_text(json.dumps(list(checkpoints.all_steps())))
    return sorted({step for steps in seen for step in json.loads(steps)}, reverse=True)


def newest_meta(checkpoints: ocp.CheckpointManager) -> dict[str, Any] | None:
    """`read_meta` of the newest checkpoint for which it can be read; None if there is none."""
    for step in _saved_steps(checkpoints):
        with contextlib.suppress(Damaged):
            return read_meta(checkpoints, step)
    return None


def check(workdir: Path, config: ml_collections.ConfigDict, schema: Schema, *, resume: bool = True
          ) -> dict[str, Any] | None:
    """The configuration of the checkpoint to resume from; None without one.

    Raises:
      ValueError: there is one but `resume` is False, or it was saved with another configuration or schema
        (names what differs).
    """
    newest, meta = _newest(workdir)
    if newest is not None and not resume:
        raise ValueError(f"{workdir} holds a checkpoint of step {newest}, expected none with --noresume; "
                         f"use another --workdir")
    if meta is not None and (difference := _difference(meta, config, schema)) is not None:
        raise ValueError(f"{workdir / 'checkpoints'}: {difference}")
    return None if meta is None else meta["config"]


def check_steps(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Raises ValueError if the checkpoint in `workdir` is from a run of another length.

    Resuming would work but give a different result than a run started with this length: the learning-rate
    schedule and the initialisation of the codebook depend on `config.steps`.
    """
    check_settings(workdir, config, lambda name: name == "steps")


def check_settings(workdir: Path, config: ml_collections.ConfigDict, held: Callable[[str], bool]) -> None:
    """Raises ValueError if a setting with `held(name)` was saved there with another value than this run's."""
    saved = saved_settings(workdir)
    if saved is not None and (found := difference(saved, config, held)):
        raise ValueError(f"{workdir}: {found}; use another --workdir or the saved setting")


def saved_settings(workdir: Path) -> dict[str, Any] | None:
    """The configuration of the newest checkpoint there; None without one."""
    _, meta = _newest(workdir)
    return None if meta is None else meta["config"]


def _newest(workdir: Path) -> tuple[int | None, dict[str, Any] | None]:
    """The newest saved step and `newest_meta`; None if there is none, without making a directory."""
    if not any(distributed.gather_text("seen" if (workdir / "checkpoints").is_dir() else "")):
        return None, None
    with manager(workdir) as checkpoints:
        return checkpoints.latest_step(), newest_meta(checkpoints)


def best_step(checkpoints: ocp.CheckpointManager, best_metric: str) -> int | None:
    """The step with the best validation metric, the earliest of equals; None if none was evaluated."""
    return _best({step: checkpoints.metrics(step) for step in checkpoints.all_steps()}, best_metric)


@dataclasses.dataclass
class _Best(preservation_policy.PreservationPolicy):
    """Keeps the checkpoint that `best_step` finds; of equals, Orbax's `BestN` would keep the latest."""

    best_metric: str

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether each of the checkpoints is kept."""
        best = _best({info.step: info.metrics for info in checkpoints}, self.best_metric)
        return [info.step == best for info in checkpoints]


def _best(measured: Mapping[int, Mapping[str, float] | None], best_metric: str) -> int | None:
    found = {step: _goodness(best_metric, metrics) for step, metrics in sorted(measured.items()) if metrics}
    found = {step: good for step, good in found.items() if good > -math.inf}
    return max(found, key=lambda step: found[step], default=None)


def _goodness(best_metric: str, metrics: Mapping[str, float]) -> float:
    """The metric with its sign, so that larger is better; minus infinity for NaN."""
    good = BEST[best_metric] * metrics[best_metric]
    return -math.inf if math.isnan(good) else good


def _move_away(checkpoints: ocp.CheckpointManager, damaged: Mapping[int, str]) -> None:
    """Moves damaged checkpoints to `damaged/`."""
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
    """How the run of a checkpoint differs from this run, in words; None if it does not."""
    if meta["schema"] != schema.to_json():
        return (f"saved with schema {meta['schema']}, but the data has {schema.to_json()}; use another "
                f"--workdir")
    found = difference(meta["config"], config, lambda name: name not in FREE_TO_CHANGE)
    return found and f"{found}; use another --workdir or the saved setting"


def difference(
    saved: Mapping[str, Any], config: ml_collections.ConfigDict, held: Callable[[str], bool]
) -> str | None:
    """The first setting with `held(name)` that has another value, in words; None if none has.

    A setting that is newer than the saved run counts as its default. Lists and tuples are equal, because JSON
    has only lists.
    """
    before, now = (
        {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        for settings in (flatten(default_config().to_dict()) | flatten(saved), flatten(config.to_dict())))
    for name in sorted(filter(held, before.keys() | now.keys())):
        if before.get(name) != now.get(name):
            return f"saved with config.{name}={before.get(name)!r}, this run has {now.get(name)!r}"
    return None
