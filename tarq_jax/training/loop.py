"""The training loop: data, state, steps, checkpoints and evaluation, in this order."""

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import orbax.checkpoint as ocp
from rich.console import Console

from tarq_jax import data, metrics
from tarq_jax.cli import Interrupted
from tarq_jax.config import BEST, data_options, shared_settings
from tarq_jax.data.pipeline import lengths_known, same_order
from tarq_jax.reporting import MetricsWriter, advance, progress_bar, write_rows
from tarq_jax.training import checkpoint, distributed, provenance, setup, sharding
from tarq_jax.training.evaluate import SCORES, Row, evaluate
from tarq_jax.training.failure import Watch, batch_kept, full_disk_named, paths_of
from tarq_jax.training.meter import Meter
from tarq_jax.training.objectives import Objective
from tarq_jax.training.state import TrainState
from tarq_jax.types import Batch


class Result(NamedTuple):
    """The result of a finished run, which is also on disk in its workdir."""

    rows: list[Row]  # one per predictor, on the test split
    state: TrainState


@distributed.terminable()
def run(config: ml_collections.ConfigDict, workdir: Path, *, resume: bool = True) -> list[Row]:
    """Trains the baselines of the configuration, then its model, and makes one table of all results.

    Args:
      config: validated configuration.
      workdir: directory for the model's checkpoints, metrics and `results.json`; each baseline uses
        `workdir/baselines/<name>`.
      resume: whether to resume from saved checkpoints; if False, a workdir that holds checkpoints is refused.

    Returns:
      Rows of the table, with `gap_recovered` if two-tower and target attention were both trained.
    """
    console = Console()
    dataset = load_data(config)
    describe_data(dataset, console)
    baselines = [name for name in config.baselines if name != config.model.name]
    runs = {name: workdir / "baselines" / name for name in baselines} | {config.model.name: workdir}
    configs = {name: with_model(config, name) for name in runs}
    for name, folder in runs.items():  # check all before training any, so that errors show early
        setup.make_objective(configs[name], dataset, sharding.make_tables(configs[name]))
        check_saved(configs[name], dataset, folder, resume=resume)
    rows: list[Row] = []
    for name, folder in runs.items():
        rows += named(name, train(configs[name], dataset, folder, console, resume=resume).rows)
    rows = add_gap_recovered(rows)
    write_rows(rows, workdir / "results.json")
    return rows


def check_saved(
    config: ml_collections.ConfigDict, dataset: data.Dataset, workdir: Path, *, resume: bool = True
) -> dict[str, Any] | None:
    """The configuration that `workdir` was saved with; None if it holds no checkpoint.

    Raises:
      ValueError: a run with this configuration and data cannot resume from what it holds.
    """
    saved = checkpoint.check(workdir, config, dataset.schema, resume=resume)
    if saved is not None:
        provenance.check_data(workdir, dataset)
        provenance.check_code(workdir, config)
    return saved


def with_model(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """The same experiment with another model."""
    config = copy.deepcopy(config)
    config.model.name = name
    return config


def named(model: str, rows: list[Row]) -> list[Row]:
    """Rows of a model for a table of several; predictors of an own model are prefixed with its name."""
    return [row | {"model": f"{model}, {row['model']}"} if ":" in model and row["model"] != model else row
            for row in rows]


def add_gap_recovered(rows: list[Row]) -> list[Row]:
    """Adds `gap_recovered` to each row, if there are rows for two-tower and target attention."""
    auc = {row["model"]: row["auc"] for row in rows}
    if not {"two_tower", "target_attention"} <= auc.keys():
        return rows
    ends = auc["two_tower"], auc["target_attention"]
    return [row | {"gap_recovered": metrics.gap_recovered(row["auc"], *ends)} for row in rows]


def load_data(config: ml_collections.ConfigDict) -> data.Dataset:
    """Loads the data set of a configuration."""
    return data.load(config.data.name, data_dir=config.data.data_dir, **data_options(config))


def describe_data(dataset: data.Dataset, console: Console) -> None:
    """Prints what was loaded: sizes, and the data set's `info`, such as Bayes AUC and malformed rows."""
    sizes = ", ".join(f"{len(requests):,} {split}" for split, requests in dataset.splits.items())
    console.print(f"data: {dataset.schema.num_items - 1:,} items; requests: {sizes}")
    for key, value in dataset.info.items():
        console.print(f"data: {key} = {value}", markup=False)


def train(
    config: ml_collections.ConfigDict, dataset: data.Dataset, workdir: Path, console: Console, *,
    resume: bool = True,
) -> Result:
    """Trains one model, from its newest checkpoint if there is one, and evaluates it on the test split.

    The batch and the random numbers of a step depend only on the seed and the step, so an interrupted and
    resumed run ends in the same state as one without interruption. The batch depends on the number of
    processes as well where each reads its own blocks, see `tarq_jax.data.order`.

    Args:
      config: validated configuration.
      dataset: data to train and test on.
      workdir: directory for checkpoints and metrics.
      console: console that shows progress.
      resume: see `run`.

    Raises:
      FloatingPointError: a step is not finite, or its gradient exceeds the limit; names the step and the
        culprit. The batch is kept, see `tarq_jax.training.failure`; no further state is saved.
      Interrupted: after SIGINT or SIGTERM, when the state has been saved.
      ValueError: settings or data do not fit the checkpoint or each other, or differ between processes; or
        there is a checkpoint but `resume` is False.
    """
    distributed.check_same("the configuration", json.dumps(shared_settings(config), sort_keys=True))
    distributed.check_same("the data", json.dumps([  # all must know lengths or none, see `data.order`
        dataset.fingerprint, dataset.schema.to_json(), lengths_known(dataset.splits["train"])]))
    distributed.check_shared(workdir)
    before = check_saved(config, dataset, workdir, resume=resume)
    way, mesh, objective, optimizer, state = setup.set_up(config, dataset)
    shapes = setup.batch_shapes(dataset)
    watch = Watch(paths_of(state.trainable), config.optimizer.max_gradient_norm)
    batches_from = functools.partial(
        data.train_batches, dataset, "train", batch_size=config.batch_size, seed=config.seed,
        buckets=config.data.buckets, window=config.data.window, shard=distributed.data_shard(), **shapes)

    with (
        distributed.interruptible() as interruption,  # also while the last checkpoint is written
        full_disk_named(workdir),
        batch_kept(workdir, config, lambda step: next(batches_from(start_step=step - 1))),
        checkpoint.manager(
            workdir, kept=config.checkpoints_kept, best_metric=config.best_metric) as checkpoints,
        MetricsWriter(workdir, enabled=distributed.is_first()) as writer,
        progress_bar(console) as progress,
    ):
        state, counted, damaged, processes = checkpoint.restore_latest(
            checkpoints, state, config, dataset.schema)
        start = int(state.step)
        if distributed.is_first():
            provenance.record(workdir, config, dataset)
        for sentence in damaged.values():
            console.print(f"{sentence} Going on from step {start}.", markup=False)
        if before and (found := checkpoint.difference(before, config, lambda name: name == "steps")):
            console.print(f"{workdir}: {found}. The result differs from that of a run started with this "
                          "number: learning rates and the start of the codebook depend on it.", markup=False)
        if processes and not same_order(
                dataset, "train", (processes, jax.process_count()), buckets=config.data.buckets,
                history_length=shapes["history_length"]):
            console.print(f"{workdir}: saved by {processes} processes, this run has {jax.process_count()}. "
                          "That changes the order of the data: some requests come twice in this epoch, "
                          "others not at all.", markup=False)
        bar = progress.add_task(config.model.name, total=config.steps, completed=start, note="")
        advance(progress, bar, start, "compiling")
        batches = data.prefetch(
            batches_from(start_step=start, readers=config.data.readers), config.prefetch,
            functools.partial(transfer, put=lambda batch: way.put(batch, mesh)))
        step_fn = setup.compile_step(config, objective, optimizer, mesh, state)
        meter = Meter(counted)
        for step in range(start, config.steps):
            if step == config.codebook.start and state.codebook is not None:
                meter.pause()
                state = setup.initialise_codebook(config, objective, state, dataset, shapes, mesh)
            with meter.waiting():
                batch, num_candidates = next(batches)
            state, step_metrics = step_fn(state, batch)
            meter.count(num_candidates, step_metrics)
            done = step + 1
            watch.add(done, step_metrics)
            logged, measured, saved = duties(config, done)
            if logged:
                scalars = watch.check() | meter.read()
                writer.write(done, scalars)
                advance(progress, bar, done, _note(scalars))
            stop, validated = interruption.due(done), None
            measured, saved = measured and bool(config.best_metric or not stop), saved or stop
            if measured or saved:
                meter.pause()
                watch.check()
            if saved and not config.best_metric:  # first: a scheduler may not wait until evaluation has ended
                checkpoint.save(checkpoints, state, config, dataset.schema, meter.counted)
            if measured:
                leave = _never if config.best_metric else interruption.now  # the best step must not be missed
                with contextlib.suppress(Interrupted):
                    rows = evaluate_split(config, objective, state, dataset, "validation", mesh, leave)
                    writer.write(done, flat_scalars(rows, "validation"))
                    validated = {name: rows[0][name] for name in BEST}
                stop = stop or interruption.now()
            if stop or (config.best_metric and (saved or measured)):
                checkpoint.save(checkpoints, state, config, dataset.schema, meter.counted, validated)
            if stop:
                raise Interrupted(f"interrupted; saved step {done} in {workdir}, run it again to resume")
        batches.close()
        if config.best_metric:
            state = best_state(checkpoints, config.best_metric, state, console)
        rows = evaluate_split(config, objective, state, dataset, "test", mesh, interruption.now,
                    scores_file(config, workdir))
        rows = [row | {"parameters": setup.count_parameters(state)} | meter.total() for row in rows]
        writer.write(config.steps, flat_scalars(rows, "test"))
    write_rows(rows, workdir / "results.json")
    if interruption.due(config.steps + 1):
        raise Interrupted(f"interrupted; {workdir} is complete, run it again for what follows")
    return Result(rows, state)


def best_state(
    checkpoints: ocp.CheckpointManager, best_metric: str, state: TrainState, console: Console
) -> TrainState:
    """The state that was best on the validation split; `state`, the last one, if none was evaluated."""
    checkpoints.wait_until_finished()
    step = checkpoint.best_step(checkpoints, best_metric)
    if step is None:
        return state
    console.print(f"testing step {step}, the best by {best_metric} of the validation split")
    return checkpoint.restore_step(checkpoints, step, state)


def scores_file(config: ml_collections.ConfigDict, workdir: Path) -> Path | None:
    """Path for the scores of the test split; None if not configured, or in other processes than the first."""
    return workdir / SCORES if config.save_scores and distributed.is_first() else None


def _never() -> bool:
    return False


def evaluate_split(
    config: ml_collections.ConfigDict, objective: Objective, state: TrainState, dataset: data.Dataset,
    split: str, mesh: jax.sharding.Mesh | None = None, leave: Callable[[], bool] = _never,
    scores: Path | None = None,
) -> list[Row]:
    """Evaluates the state on a split; its batches are split over the mesh that the state is on, if any.

    If `scores` is given, the score of every candidate is written to that file.

    Raises:
      Interrupted: `leave`, which is called before every batch, returned True.
    """
    codewords = state.codewords
    predict = jax.jit(objective.predict, out_shardings=state.step.sharding)  # a copy on every device
    batches = data.eval_batches(
        dataset, split, batch_size=config.eval_batch_size, **setup.batch_shapes(dataset))
    return evaluate(
        lambda batch: predict(
            state.params, codewords, batch if mesh is None else sharding.split_evaluation(batch, mesh)),
        _until(leave, batches, split), codewords=codewords, recall_k=config.recall_k, scores=scores,
    )


def _until(leave: Callable[[], bool], batches: Iterator[Batch], split: str) -> Iterator[Batch]:
    for batch in batches:
        if leave():
            raise Interrupted(f"interrupted while evaluating the {split} split; run it again to resume")
        yield batch


def transfer(batch: Batch, put: Callable[[Batch], Batch]) -> tuple[Batch, int]:
    """The batch on the devices, and its number of real candidates, assuming equally many on all hosts."""
    return put(batch), int(batch.candidate_mask.sum()) * jax.process_count()


def duties(config: ml_collections.ConfigDict, done: int) -> tuple[bool, bool, bool]:
    """What is due after `done` steps: to log, to measure on the validation split, and to save."""
    def due(every: int) -> bool:
        return every > 0 and done % every == 0

    last = done == config.steps
    return due(config.log_every) or last, due(config.eval_every), due(config.checkpoint_every) or last


def _note(scalars: dict[str, float]) -> str:
    return f"loss {scalars['loss']:.4f}  {scalars['examples_per_second']:,.0f} candidates/s"


def flat_scalars(rows: list[Row], split: str) -> dict[str, float]:
    """All metrics of all predictors on a split as a flat dictionary."""
    return {f"{split}/{row['model']}/{key}": value
            for row in rows for key, value in row.items() if key != "model"}
