"""The training loop: data, state, steps, checkpoints, evaluation, in that order."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp
from rich.console import Console

from tarq_jax import data, metrics, quantization
from tarq_jax.cli import Interrupted
from tarq_jax.config import BEST, data_options
from tarq_jax.reporting import MetricsWriter, progress_bar, write_rows
from tarq_jax.training import checkpoint, distributed, parallel, sharding
from tarq_jax.training.evaluate import Row, evaluate
from tarq_jax.training.failure import Watch, batch_kept, paths_of
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


def run(config: ml_collections.ConfigDict, workdir: Path, *, resume: bool = True) -> list[Row]:
    """Trains the baselines of the configuration, then its model, and makes one table of all.

    Args:
      config: validated.
      workdir: where the model's checkpoints, metrics and `results.json` go; baselines get
        `workdir/baselines/<name>`.
      resume: go on from what is saved there; if not, a workdir that holds checkpoints is refused.

    Returns:
      Rows of the table, with `gap_recovered` where both ends of the gap were trained.
    """
    console = Console()
    dataset = load_data(config)
    describe_data(dataset, console)
    rows: list[Row] = []
    for name in config.baselines:
        folder = workdir / "baselines" / name
        rows += train(with_model(config, name), dataset, folder, console, resume=resume).rows
    rows += train(config, dataset, workdir, console, resume=resume).rows
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
    return data.load(config.data.name, data_dir=config.data.data_dir, **data_options(config))


def describe_data(dataset: data.Dataset, console: Console) -> None:
    """Says what was loaded: sizes, the Bayes AUC where it is known, rows that could not be read."""
    sizes = ", ".join(f"{len(requests):,} {split}" for split, requests in dataset.splits.items())
    console.print(f"data: {dataset.schema.num_items - 1:,} items; requests: {sizes}")
    for key, value in dataset.info.items():
        console.print(f"data: {key} = {value}")


def train(
    config: ml_collections.ConfigDict, dataset: data.Dataset, workdir: Path, console: Console, *,
    resume: bool = True,
) -> Result:
    """Trains one model from its newest checkpoint on, and evaluates it on the test split.

    The batch and the random numbers of a step depend on the seed and the step alone, so that a run
    that was interrupted ends in the same state as one that was not.

    Raises:
      FloatingPointError: a step is not finite, or its gradient exceeds the limit; names the step and the
        culprit. Its batch is kept, see `tarq_jax.training.failure`; no state is saved from then on.
      Interrupted: after SIGINT or SIGTERM, once the state is saved.
      ValueError: a setting does not fit the data or the checkpoint; or there is one, and `resume` is not set.
    """
    way, mesh, objective, optimizer, state = set_up(config, dataset)
    shapes = batch_shapes(dataset)
    watch = Watch(paths_of(trainable(state.params, state.codebook)), config.optimizer.max_gradient_norm)
    batches_from = functools.partial(
        data.train_batches, dataset, "train", batch_size=config.batch_size, seed=config.seed,
        buckets=config.data.buckets, shard=distributed.data_shard(), **shapes)

    with (
        batch_kept(workdir, config, lambda step: next(batches_from(start_step=step - 1))),
        checkpoint.manager(
            workdir, kept=config.checkpoints_kept, best_metric=config.best_metric) as checkpoints,
        MetricsWriter(workdir, enabled=distributed.is_first()) as writer,
        progress_bar(console) as progress,
        distributed.interruptible() as interruption,
    ):
        if not resume and checkpoints.latest_step() is not None:
            raise ValueError(f"{workdir} holds a checkpoint of step {checkpoints.latest_step()}, expected "
                             f"none with --noresume; use another --workdir")
        state, counted, damaged = checkpoint.restore_latest(checkpoints, state, config, dataset.schema)
        start = int(state.step)
        for sentence in damaged:
            console.print(f"{sentence} Going on from step {start}.")
        bar = progress.add_task(config.model.name, total=config.steps, completed=start, note="")
        batches = data.prefetch(
            batches_from(start_step=start, readers=config.data.readers), config.prefetch,
            functools.partial(_transfer, put=lambda batch: way.put(batch, mesh)))
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
            watch.add(done, step_metrics)
            if done % config.log_every == 0 or done == config.steps:
                scalars = watch.check() | meter.read()
                writer.write(done, scalars)
                progress.update(bar, completed=done, note=_note(scalars))
            stop, validated = interruption.due(done), None
            measured = _due(config.eval_every, done) and bool(config.best_metric or not stop)
            saved = stop or _due(config.checkpoint_every, done) or done == config.steps
            if measured or saved:
                meter.pause()
                watch.check()
            if measured:
                leave = _never if config.best_metric else interruption.now  # the best step must not be missed
                with contextlib.suppress(Interrupted):
                    rows = test(config, objective, state, dataset, "validation", mesh, leave)
                    writer.write(done, _flat_scalars(rows, "validation"))
                    validated = {name: rows[0][name] for name in BEST}
                stop = stop or interruption.now()
            if saved or stop or (measured and config.best_metric):
                checkpoint.save(checkpoints, state, config, dataset.schema, meter.counted, validated)
            if stop:
                raise Interrupted(f"interrupted; saved step {done} in {workdir}, call again to go on")
        batches.close()
        if config.best_metric:
            state = best_state(checkpoints, config.best_metric, state, console)
        rows = test(config, objective, state, dataset, "test", mesh, interruption.now)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(trainable(state.params, state.codebook)))
        rows = [row | {"parameters": parameters} | meter.total() for row in rows]
        writer.write(config.steps, _flat_scalars(rows, "test"))
    write_rows(rows, workdir / "results.json")
    if interruption.due(config.steps + 1):
        raise Interrupted(f"interrupted; {workdir} is complete, call again to go on with what follows")
    return Result(rows, state)


class Setup(NamedTuple):
    """What a run begins with."""

    way: parallel.Way
    mesh: jax.sharding.Mesh
    objective: Objective
    optimizer: optax.GradientTransformation
    state: TrainState  # fresh, on the mesh


def set_up(config: ml_collections.ConfigDict, dataset: data.Dataset) -> Setup:
    """The parts of a run, as its configuration describes them, over all devices.

    Raises:
      ValueError: the mesh does not fit the devices, or the batch or a table the mesh.
    """
    if config.parallel == "pmap" and jax.process_count() > 1:
        raise ValueError(f"config.parallel is 'pmap', expected 'mesh' with {jax.process_count()} processes")
    way = parallel.WAYS[config.parallel]
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
    sharding.check_batch_size(config.batch_size, mesh)
    tables = sharding.make_tables(config, mesh)
    objective = build(config.model, config.loss_weights, dataset.schema, tables, way.axis_name)
    optimizer = make_optimizer(config)
    return Setup(way, mesh, objective, optimizer, init_state(config, objective, optimizer, dataset, mesh))


def best_state(
    checkpoints: ocp.CheckpointManager, best_metric: str, state: TrainState, console: Console
) -> TrainState:
    """The state that was best on the validation split; the last one where none was evaluated."""
    checkpoints.wait_until_finished()
    step = checkpoint.best_step(checkpoints, best_metric)
    if step is None:
        return state
    console.print(f"testing step {step}, the best by {best_metric} of the validation split")
    return checkpoint.restore_step(checkpoints, step, state)


def batch_shapes(dataset: data.Dataset) -> data.Shapes:
    """N and G: the longest history and the most candidates of any split."""
    splits = dataset.splits.values()
    return {"history_length": max(1, *(split.longest_history for split in splits)),
            "num_candidates": max(1, *(split.most_candidates for split in splits))}


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
        codebook_start=settings.start, accumulate=config.accumulate,
        axis_name=parallel.WAYS[config.parallel].axis_name,
    )
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return parallel.WAYS[config.parallel].compile(step, mesh, shardings)


def initialise_codebook(
    config: ml_collections.ConfigDict, objective: Objective, state: TrainState, dataset: data.Dataset,
    shapes: data.Shapes, mesh: jax.sharding.Mesh,
) -> TrainState:
    """Fits the codebook to real latents of training candidates; a random one stays as it is."""
    if config.codebook.init == "random" or objective.latents is None:
        return state
    latents_of = jax.jit(objective.latents, out_shardings=sharding.replicated(mesh))
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
    ), out_shardings=sharding.replicated(mesh))
    codebook = fit(jax.random.fold_in(state.rng, config.steps), latents)
    return state.replace(codebook=codebook)


def _never() -> bool:
    return False


def test(
    config: ml_collections.ConfigDict, objective: Objective, state: TrainState, dataset: data.Dataset,
    split: str, mesh: jax.sharding.Mesh | None = None, leave: Callable[[], bool] = _never,
) -> list[Row]:
    """Evaluates the state on a split; its batches are split over the mesh that the state is on, if any.

    Raises:
      Interrupted: `leave` says so before a batch.
    """
    codewords = trainable(None, state.codebook)["codewords"]
    predict = jax.jit(objective.predict, out_shardings=state.step.sharding)  # a copy on every device
    batches = data.eval_batches(dataset, split, batch_size=config.eval_batch_size, **batch_shapes(dataset))
    return evaluate(
        lambda batch: predict(
            state.params, codewords, batch if mesh is None else sharding.split_evaluation(batch, mesh)),
        _until(leave, batches, split), codewords=codewords, recall_k=config.recall_k,
    )


def _until(leave: Callable[[], bool], batches: Iterator[Batch], split: str) -> Iterator[Batch]:
    for batch in batches:
        if leave():
            raise Interrupted(f"interrupted while evaluating the {split} split; call again to go on")
        yield batch


def _transfer(batch: Batch, put: Callable[[Batch], Batch]) -> tuple[Batch, int]:
    """A batch put on the devices, and how many real candidates it holds, as many on all hosts as here."""
    return put(batch), int(batch.candidate_mask.sum()) * jax.process_count()


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _note(scalars: dict[str, float]) -> str:
    return f"loss {scalars['loss']:.4f}  {scalars['examples_per_second']:,.0f} candidates/s"


def _flat_scalars(rows: list[Row], split: str) -> dict[str, float]:
    return {f"{split}/{row['model']}/{key}": value
            for row in rows for key, value in row.items() if key != "model"}
