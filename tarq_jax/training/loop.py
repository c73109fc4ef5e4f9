"""The training loop: data, state, steps, checkpoints, evaluation, in that order."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from rich.console import Console

from tarq_jax import data, metrics, quantization
from tarq_jax.cli import Interrupted, interruptible
from tarq_jax.reporting import MetricsWriter, progress_bar, write_rows
from tarq_jax.training import checkpoint, parallel, sharding
from tarq_jax.training.evaluate import Row, evaluate
from tarq_jax.training.meter import Meter
from tarq_jax.training.objectives import Objective, build
from tarq_jax.training.optimizers import make_optimizer
from tarq_jax.training.state import TrainState, trainable
from tarq_jax.training.step import codebook_updates, train_step
from tarq_jax.types import Batch


class Result(NamedTuple):
    """What a finished run leaves to its caller; the same is on disk in its workdir."""

    rows: list[Row]  # one a predictor, on the test split
    state: TrainState


def run(config: ml_collections.ConfigDict, workdir: Path) -> list[Row]:
    """Trains the baselines of the configuration, then its model, and makes one table of all.

    Args:
      config: validated.
      workdir: where the model's checkpoints, metrics and `results.json` go; baselines get
        `workdir/baselines/<name>`.

    Returns:
      Rows of the table, with `gap_recovered` where both ends of the gap were trained.
    """
    console = Console()
    dataset = load_data(config)
    describe_data(dataset, console)
    rows: list[Row] = []
    for name in config.baselines:
        rows += train(with_model(config, name), dataset, workdir / "baselines" / name, console).rows
    rows += train(config, dataset, workdir, console).rows
    rows = add_gap_recovered(rows)
    write_rows(rows, workdir / "results.json")
    return rows


def with_model(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """The same experiment with another model."""
    config = copy.deepcopy(config)
    config.model.name = name
    return config


def add_gap_recovered(rows: list[Row]) -> list[Row]:
    """Adds each row's share of the gap between two-tower and target attention, if both are there."""
    auc = {row["model"]: row["auc"] for row in rows}
    if not {"two_tower", "target_attention"} <= auc.keys():
        return rows
    ends = auc["two_tower"], auc["target_attention"]
    return [row | {"gap_recovered": metrics.gap_recovered(row["auc"], *ends)} for row in rows]


def load_data(config: ml_collections.ConfigDict) -> data.Dataset:
    """The data set of a configuration."""
    options = {key: value for key, value in config.data.items() if key not in ("name", "data_dir")}
    return data.load(config.data.name, data_dir=config.data.data_dir, **options)


def describe_data(dataset: data.Dataset, console: Console) -> None:
    """Says what was loaded: sizes, the Bayes AUC where it is known, rows that could not be read."""
    sizes = ", ".join(f"{len(requests):,} {split}" for split, requests in dataset.splits.items())
    console.print(f"data: {dataset.schema.num_items - 1:,} items; requests: {sizes}")
    for key, value in dataset.info.items():
        console.print(f"data: {key} = {value}")


def train(
    config: ml_collections.ConfigDict, dataset: data.Dataset, workdir: Path, console: Console
) -> Result:
    """Trains one model from its newest checkpoint on, and evaluates it on the test split.

    The batch and the random numbers of a step depend on the seed and the step alone, so that a run
    that was interrupted ends in the same state as one that was not.

    Raises:
      FloatingPointError: the loss is not finite; names the step. Nothing is saved from then on.
      Interrupted: after SIGINT or SIGTERM, once the state is saved.
      ValueError: a setting does not fit the data or the checkpoint.
    """
    way = parallel.WAYS[config.parallel]
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
    sharding.check_batch_size(config.batch_size, mesh)
    shapes = batch_shapes(dataset)
    tables = sharding.make_tables(config, mesh)
    objective = build(config.model, config.loss_weights, dataset.schema, tables, way.axis_name)
    optimizer = make_optimizer(config)
    state = init_state(config, objective, optimizer, dataset, mesh)

    with (
        checkpoint.manager(workdir) as checkpoints,
        MetricsWriter(workdir) as writer,
        progress_bar(console) as progress,
        interruptible() as interrupted,
    ):
        state, counted = checkpoint.restore_latest(checkpoints, state, config, dataset.schema)
        start = int(state.step)
        bar = progress.add_task(config.model.name, total=config.steps, completed=start, note="")
        batches = data.prefetch(
            data.train_batches(dataset, "train", batch_size=config.batch_size, seed=config.seed,
                               start_step=start, **shapes),
            config.prefetch, functools.partial(_transfer, put=lambda batch: way.put(batch, mesh)),
        )
        step_fn = compile_step(config, objective, optimizer, mesh, state)
        meter = Meter(counted)
        for step in range(start, config.steps):
            if step == config.codebook.start and state.codebook is not None:
                meter.pause()
                state = initialise_codebook(config, objective, state, dataset, shapes, mesh)
            with meter.waiting():
                batch, num_candidates = next(batches)
            state, step_metrics = step_fn(state, batch)
            meter.count(num_candidates, step_metrics)
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                scalars = check_finite(jax.device_get(step_metrics), done) | meter.read()
                writer.write(done, scalars)
                progress.update(bar, completed=done, note=_note(scalars))
            stop = interrupted()
            if stop or done % config.checkpoint_every == 0 or done == config.steps:
                meter.pause()
                check_finite(jax.device_get(step_metrics), done)
                checkpoint.save(checkpoints, state, config, dataset.schema, meter.counted)
            if stop:
                raise Interrupted(f"interrupted; saved step {done} in {workdir}, call again to go on")
            if config.eval_every and done % config.eval_every == 0 and done < config.steps:
                meter.pause()
                rows = test(config, objective, state, dataset, "validation")
                writer.write(done, _flat_scalars(rows, "validation"))
        batches.close()
        rows = test(config, objective, state, dataset, "test")
        parameters = sum(leaf.size for leaf in jax.tree.leaves(trainable(state.params, state.codebook)))
        rows = [row | {"parameters": parameters} | meter.total() for row in rows]
        writer.write(config.steps, _flat_scalars(rows, "test"))
    write_rows(rows, workdir / "results.json")
    if interrupted():
        raise Interrupted(f"interrupted; {workdir} is complete, call again to go on with what follows")
    return Result(rows, state)


def batch_shapes(dataset: data.Dataset) -> dict[str, int]:
    """N and G: the longest history and the most candidates of any split."""
    longest = {"history_length": "history_offsets", "num_candidates": "candidate_offsets"}
    return {
        name: max(int(np.diff(getattr(requests, offsets)).max(initial=1))
                  for requests in dataset.splits.values())
        for name, offsets in longest.items()
    }


def init_state(
    config: ml_collections.ConfigDict, objective: Objective, optimizer: optax.GradientTransformation,
    dataset: data.Dataset, mesh: jax.sharding.Mesh | None = None,
) -> TrainState:
    """A fresh state from the seed; its codebook is random until `initialise_codebook`.

    Over a mesh it is made in parts, each on the device where the rules of the configuration want it.
    """
    batch = next(data.train_batches(dataset, "train", batch_size=1, seed=0, **batch_shapes(dataset)))

    def init(rng: jax.Array, batch: Batch) -> TrainState:
        params_rng, codebook_rng, step_rng = jax.random.split(rng, 3)
        codebook = None
        if objective.latents is not None:
            codebook = quantization.random_codebook(
                codebook_rng, num_levels=config.model.num_levels, num_codewords=config.model.num_codewords,
                width=config.model.width,
            )
        params = objective.init(params_rng, batch, trainable(None, codebook)["codewords"])
        return TrainState(
            step=jnp.zeros((), jnp.int32), params=params, codebook=codebook,
            opt_state=optimizer.init(trainable(params, codebook)), rng=step_rng,
        )

    rng, shardings = jax.random.key(config.seed), None
    if mesh is not None:
        rules = sharding.parse_rules(config.mesh.rules)
        shardings = sharding.state_shardings(jax.eval_shape(init, rng, batch), mesh, rules)
    return jax.jit(init, out_shardings=shardings)(rng, batch)


DEAD = {
    "count": lambda settings: functools.partial(quantization.dead_by_count, min_usage=settings.min_usage),
    "age": lambda settings: functools.partial(quantization.dead_by_age, max_age=settings.max_age),
}


def compile_step(
    config: ml_collections.ConfigDict, objective: Objective, optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | None = None, state: TrainState | None = None,
) -> parallel.CompiledStep:
    """`train_step`, compiled the way that `config.parallel` says; the state's memory is reused.

    Args:
      config: of the run.
      objective: built for the axis of that way.
      optimizer: over `trainable`.
      mesh: to run on; the default device if None.
      state: on that mesh; a new state lies as it does.
    """
    settings = config.codebook
    update_codebook = codebook_updates(
        mode=settings.learning, decay=settings.decay, revive_every=settings.revive_every,
        dead=DEAD[settings.dead](settings),
    )
    step = functools.partial(
        train_step, objective=objective, optimizer=optimizer, update_codebook=update_codebook,
        codebook_start=settings.start, axis_name=parallel.WAYS[config.parallel].axis_name,
    )
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return parallel.WAYS[config.parallel].compile(step, mesh, shardings)


def initialise_codebook(
    config: ml_collections.ConfigDict, objective: Objective, state: TrainState, dataset: data.Dataset,
    shapes: dict[str, int], mesh: jax.sharding.Mesh,
) -> TrainState:
    """Fits the codebook to real latents of training candidates; a random one stays as it is."""
    if config.codebook.init == "random" or objective.latents is None:
        return state
    latents_of = jax.jit(objective.latents)
    found: list[np.ndarray] = []
    batches = data.train_batches(
        dataset, "train", batch_size=config.batch_size, seed=config.seed + 1, **shapes
    )
    while sum(map(len, found)) < config.codebook.init_latents:
        batch = next(batches)
        found.append(np.asarray(latents_of(state.params, batch))[batch.candidate_mask])
    latents = np.concatenate(found)[: config.codebook.init_latents]
    fit = jax.jit(functools.partial(
        quantization.kmeans_codebook, num_levels=config.model.num_levels,
        num_codewords=config.model.num_codewords,
    ))
    codebook = fit(jax.random.fold_in(state.rng, config.steps), latents)
    return state.replace(codebook=sharding.replicate(codebook, mesh))


def test(
    config: ml_collections.ConfigDict, objective: Objective, state: TrainState, dataset: data.Dataset,
    split: str,
) -> list[Row]:
    """Evaluates the state on a split."""
    codewords = trainable(None, state.codebook)["codewords"]
    predict = jax.jit(objective.predict)
    batches = data.eval_batches(dataset, split, batch_size=config.eval_batch_size, **batch_shapes(dataset))
    return evaluate(
        lambda batch: predict(state.params, codewords, batch), batches,
        codewords=codewords, recall_k=config.recall_k,
    )


def check_finite(scalars: dict[str, np.ndarray], step: int) -> dict[str, float]:
    """The scalars as floats; FloatingPointError names those that are not finite."""
    bad = {name: float(value) for name, value in scalars.items() if not np.isfinite(value)}
    if bad:
        raise FloatingPointError(
            f"step {step}: {bad} not finite; nothing was saved from here on. Lower "
            f"config.optimizer.learning_rate, or set config.optimizer.clip_norm"
        )
    return {name: float(value) for name, value in scalars.items()}


def _transfer(batch: Batch, put: Callable[[Batch], Batch]) -> tuple[Batch, int]:
    """A batch put on the devices, and how many real candidates it holds."""
    return put(batch), int(batch.candidate_mask.sum())


def _note(scalars: dict[str, float]) -> str:
    return f"loss {scalars['loss']:.4f}  {scalars['examples_per_second']:,.0f} candidates/s"


def _flat_scalars(rows: list[Row], split: str) -> dict[str, float]:
    return {f"{split}/{row['model']}/{key}": value
            for row in rows for key, value in row.items() if key != "model"}
