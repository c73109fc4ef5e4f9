"""Restores a finished run from its working directory alone, for use after training."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import orbax.checkpoint as ocp

from tarq_jax import data
from tarq_jax.config import default_config, validate
from tarq_jax.schema import Schema
from tarq_jax.training import checkpoint, loop, provenance, setup, sharding
from tarq_jax.training.objectives import Objective, build
from tarq_jax.training.state import TrainState


class Run(NamedTuple):
    """A trained run, ready to be used."""

    config: ml_collections.ConfigDict
    dataset: data.Dataset
    objective: Objective
    state: TrainState  # of the best checkpoint if the run kept it, else of the newest
    steps: int  # done by the newest checkpoint; fewer than `config.steps` if the run is not finished


def load_run(workdir: Path) -> Run:
    """Loads the run in `workdir`, with its data prepared as for training; changes no file of the run.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the saved settings are invalid in this version, or the data or own code has changed since.
    """
    folder = Path(workdir) / "checkpoints"
    if not folder.is_dir():
        raise FileNotFoundError(f"{workdir}: no checkpoints in it, expected the --workdir of a training run")
    with checkpoint.manager(workdir) as checkpoints:
        try:
            config = saved_config(checkpoints)
        except ValueError as error:
            raise ValueError(f"{workdir}: its settings do not hold: {error}") from error
        dataset = loop.load_data(config)
        provenance.check_data(Path(workdir), dataset)
        provenance.check_code(Path(workdir), config)
        tables = sharding.make_tables(config)
        objective = build(config.model, config.loss_weights, dataset.schema, tables)
        fresh = setup.init_state(config, objective, setup.make_optimizer(config), dataset)
        state = read_state(checkpoints, fresh, config, dataset.schema)
        steps = int(state.step)
        if config.best_metric and (best := checkpoint.best_step(checkpoints, config.best_metric)) is not None:
            state = checkpoint.restore_step(checkpoints, best, state)
    return Run(config, dataset, objective, state, steps)


def read_state(checkpoints: ocp.CheckpointManager, state: TrainState, config: ml_collections.ConfigDict,
               schema: Schema) -> TrainState:
    """The state of `checkpoint.read_latest`, with a warning for each newer checkpoint that is damaged."""
    found = checkpoint.read_latest(checkpoints, state, config, schema)
    for sentence in found.damaged.values():
        logging.getLogger(__name__).warning(
            "%s: %s Step %d is read instead.", checkpoints.directory, sentence, int(found.state.step))
    return found.state


def saved_config(checkpoints: ocp.CheckpointManager) -> ml_collections.ConfigDict:
    """The configuration of the newest checkpoint; settings that it lacks have their defaults."""
    saved = checkpoint.newest_meta(checkpoints)
    if saved is None:
        raise FileNotFoundError(f"{checkpoints.directory} is empty, expected a checkpoint of a training run")
    return config_of(saved["config"])


def config_of(settings: dict[str, Any]) -> ml_collections.ConfigDict:
    """The configuration with saved settings; settings that they lack have their defaults."""
    config = default_config()
    with config.unlocked():
        config.data = ml_collections.ConfigDict(config.data.to_dict() | settings["data"])
        config.update({key: value for key, value in settings.items() if key != "data"})
    validate(config)
    return config
