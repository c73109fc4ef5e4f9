"""Setting up a run: its parts, a fresh state, the compiled step, and the initialisation of its codebook."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from tarq_jax import data, quantization
from tarq_jax.config import check_codebook
from tarq_jax.models.embedding import Tables
from tarq_jax.shards import AxisName
from tarq_jax.training import distributed, parallel, sharding, table_rows
from tarq_jax.training.evaluate import COLUMNS
from tarq_jax.training.objectives import STUDENT, TEACHER, Objective, build, own_predictor
from tarq_jax.training.optimizers import RowWise, make_optimizer
from tarq_jax.training.state import TrainState
from tarq_jax.training.step import codebook_updates, train_step
from tarq_jax.types import Batch, Codebook

MOST_REQUESTS = 1024  # whose latents are computed together to fit a codebook; every device computes all


class Setup(NamedTuple):
    """The parts that a run starts with."""

    way: parallel.Way
    mesh: jax.sharding.Mesh
    objective: Objective
    optimizer: optax.GradientTransformation
    state: TrainState  # fresh, on the mesh


def set_up(config: ml_collections.ConfigDict, dataset: data.Dataset) -> Setup:
    """Makes the parts of a run from its configuration, over all devices.

    Args:
      config: configuration of the run.
      dataset: data to train on.

    Raises:
      ValueError: the mesh does not fit the devices, or the batch or a table does not fit the mesh.
    """
    if config.parallel == "pmap" and jax.process_count() > 1:
        raise ValueError(f"config.parallel is 'pmap', expected 'mesh' with {jax.process_count()} processes")
    way = parallel.WAYS[config.parallel]
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
    sharding.check_batch_size(config.batch_size, mesh)
    if config.parallel == "pmap" and config.batch_size % (mesh.size * config.accumulate):
        raise ValueError(f"config.batch_size is {config.batch_size}, expected a multiple of the {mesh.size} "
                         f"devices times config.accumulate, {config.accumulate}, with config.parallel='pmap'")
    tables = sharding.make_tables(config, mesh)
    objective, optimizer = make_objective(config, dataset, tables, way.axis_name), make_optimizer(config)
    return Setup(way, mesh, objective, optimizer, init_state(config, objective, optimizer, dataset, mesh))


def make_objective(
    config: ml_collections.ConfigDict, dataset: data.Dataset, tables: Tables, axis_name: AxisName = None
) -> Objective:
    """The objective to train; for MODULE:FUNCTION, also checks what `config.validate` cannot see.

    Raises:
      ValueError: as for `objectives.build`, or evaluation would fail later.
    """
    _check_splits(config, dataset)
    objective = build(config.model, config.loss_weights, dataset.schema, tables, axis_name)
    if ":" in config.model.name:
        if objective.latents is not None:
            check_codebook(config)
        _check_predictors(config, objective, dataset)
    return objective


def _check_splits(config: ml_collections.ConfigDict, dataset: data.Dataset) -> None:
    """Raises ValueError unless every split that the run uses has requests with candidates."""
    if config.eval_every and "validation" not in dataset.splits:
        raise ValueError(f"config.eval_every is {config.eval_every}, expected 0 with data that has no split "
                         f"'validation' but {sorted(dataset.splits)}")
    for name in ("train", "test", *(("validation",) if config.eval_every else ())):
        if not (len(dataset.splits[name]) and dataset.splits[name].most_candidates):
            raise ValueError(f"split {name!r} has {len(dataset.splits[name])} requests of at most "
                             f"{dataset.splits[name].most_candidates} candidates, expected one at least")


def _check_predictors(config: ml_collections.ConfigDict, objective: Objective, dataset: data.Dataset) -> None:
    name, batch = config.model.name, example(dataset)
    fresh = initialiser(config, objective, make_optimizer(config))
    state = jax.eval_shape(fresh, jax.random.key(0), batch)
    codewords = state.codewords
    found = jax.eval_shape(objective.predict, state.params, codewords, batch)
    predictors = sorted(found.logits)
    if found.diagnostics is not None and not {STUDENT, TEACHER}.issubset(predictors):
        raise ValueError(f"{name} has diagnostics and predicts {predictors}, expected {STUDENT!r} and "
                         f"{TEACHER!r}")
    own_predictor(predictors)
    if taken := COLUMNS.intersection(predictors):
        raise ValueError(f"{name} predicts {sorted(taken)}, expected other names: files of scores have these")


def batch_shapes(dataset: data.Dataset) -> data.Shapes:
    """N and G: the longest history and the largest number of candidates in any split."""
    splits = dataset.splits.values()
    return {"history_length": max(1, *(split.longest_history for split in splits)),
            "num_candidates": max(1, *(split.most_candidates for split in splits))}


def init_state(
    config: ml_collections.ConfigDict, objective: Objective, optimizer: optax.GradientTransformation,
    dataset: data.Dataset, mesh: jax.sharding.Mesh | None = None,
) -> TrainState:
    """A fresh state from the seed; its codebook is random until `initialise_codebook`.

    With a mesh, each part of the state is created on the device that the rules of the configuration assign.
    """
    batch, init = example(dataset), initialiser(config, objective, optimizer)
    rng, shardings = jax.random.key(config.seed), None
    if mesh is not None:
        rules = sharding.parse_rules(config.mesh.rules)
        shardings = sharding.state_shardings(jax.eval_shape(init, rng, batch), mesh, rules)
    return jax.jit(init, out_shardings=shardings)(rng, batch)


def example(dataset: data.Dataset) -> Batch:
    """A batch of one request, used for shapes."""
    return next(data.train_batches(dataset, "train", batch_size=1, seed=0, **batch_shapes(dataset)))


def initialiser(
    config: ml_collections.ConfigDict, objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[[jax.Array, Batch], TrainState]:
    """(key, batch) -> a fresh state, as a pure function."""

    def init(rng: jax.Array, batch: Batch) -> TrainState:
        params_rng, codebook_rng, step_rng = jax.random.split(rng, 3)
        codebook = None
        if objective.latents is not None:
            codebook = quantization.random_codebook(
                codebook_rng, num_levels=config.model.num_levels, num_codewords=config.model.num_codewords,
                width=config.model.width,
            )
        state = TrainState(
            step=jnp.zeros((), jnp.int32), params=None, codebook=codebook, opt_state=None, rng=step_rng)
        state = state.replace(params=objective.init(params_rng, batch, state.codewords))
        return state.replace(opt_state=optimizer.init(state.trainable))

    return init


def count_parameters(state: TrainState) -> int:
    """The number of trained values, including codewords."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.trainable))


DEAD = {
    "count": lambda settings: functools.partial(quantization.dead_by_count, min_usage=settings.min_usage),
    "age": lambda settings: functools.partial(quantization.dead_by_age, max_age=settings.max_age),
}


def compile_step(
    config: ml_collections.ConfigDict, objective: Objective, optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | None = None, state: TrainState | None = None,
) -> parallel.CompiledStep:
    """`train_step`, compiled as `config.parallel` says; the memory of the state is reused.

    Args:
      config: configuration of the run.
      objective: objective, built for the axis name of that `parallel.Way`.
      optimizer: optimizer over `trainable`.
      mesh: mesh to run on; the default device if None.
      state: a state on that mesh; new states are placed on devices like it.
    """
    step = make_step(config, objective, optimizer, mesh)
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return parallel.WAYS[config.parallel].compile(step, mesh, shardings)


def make_step(
    config: ml_collections.ConfigDict, objective: Objective, optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | None = None,
) -> parallel.Step:
    """`train_step` with all its settings from the configuration; `mesh` as for `compile_step`."""
    settings, axis_name, row_wise = config.codebook, parallel.WAYS[config.parallel].axis_name, None
    if isinstance(optimizer, RowWise):
        row_wise = table_rows.Devices(
            mesh if axis_name is None else None, sharding.parse_rules(config.mesh.rules), axis_name)
    update_codebook = codebook_updates(
        mode=settings.learning, decay=settings.decay, revive_every=settings.revive_every,
        dead=DEAD[settings.dead](settings),
    )
    return functools.partial(
        train_step, objective=objective, optimizer=optimizer, update_codebook=update_codebook,
        codewords_by_gradient=settings.learning == "gradient", codebook_start=settings.start,
        accumulate=config.accumulate, axis_name=axis_name, row_wise=row_wise,
    )


def initialise_codebook(
    config: ml_collections.ConfigDict, objective: Objective, state: TrainState, dataset: data.Dataset,
    shapes: data.Shapes, mesh: jax.sharding.Mesh,
) -> TrainState:
    """Fits the codebook to latents of real training candidates; with `init` "random" it stays as it is.

    All devices get the result of the first one: sums of k-means differ between GPUs, which add in any order.
    """
    if config.codebook.init == "random" or objective.latents is None:
        return state
    everywhere = sharding.replicated(mesh)
    latents_of = jax.jit(objective.latents, out_shardings=everywhere)
    latents = draw_latents(config, functools.partial(latents_of, state.params), dataset, shapes)
    fit = jax.jit(codebook_fit(config, objective), out_shardings=everywhere)
    codebook = distributed.of_first(fit(state.rng, latents))
    return state.replace(codebook=jax.device_put(codebook, everywhere))


def draw_latents(
    config: ml_collections.ConfigDict, latents_of: Callable[[Batch], jax.Array], dataset: data.Dataset,
    shapes: data.Shapes,
) -> np.ndarray:
    """[M, D]: M = `config.codebook.init_latents` latents of real candidates; the seed decides which."""
    found: list[np.ndarray] = []
    batches = data.train_batches(
        dataset, "train", batch_size=min(config.batch_size, MOST_REQUESTS), seed=config.seed + 1,
        window=config.data.window, **shapes)
    while sum(map(len, found)) < config.codebook.init_latents:
        batch = next(batches)
        found.append(np.asarray(latents_of(batch))[batch.candidate_mask])
    return np.concatenate(found)[: config.codebook.init_latents]


def codebook_fit(
    config: ml_collections.ConfigDict, objective: Objective
) -> Callable[[jax.Array, jax.Array], Codebook]:
    """(key of a state, latents [M, D]) -> the codebook fitted by the objective, as a pure function."""
    fit = objective.fit or functools.partial(
        quantization.kmeans_codebook, num_levels=config.model.num_levels,
        num_codewords=config.model.num_codewords)
    return lambda rng, latents: fit(jax.random.fold_in(rng, config.steps), latents)
