"""Seeds as a batch axis: one compiled program, made by `over_seeds`, trains all seeds of an experiment.

Each seed gives the numbers of `tarq_jax.training.loop.train` up to rounding. It also leaves the same files, a
folder with checkpoints, metrics and `results.json`, from which `loop.train` could resume as well. Every seed
has its own initialisation, order of the data and k-means. The seeds are divided among the devices, which
exchange nothing.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from tarq_jax import data
from tarq_jax.cli import Interrupted
from tarq_jax.reporting import MetricsWriter, advance, progress_bar, write_rows
from tarq_jax.training import checkpoint, distributed, loop, parallel, provenance, setup, sharding
from tarq_jax.training.evaluate import Row
from tarq_jax.training.failure import LONGEST, StepFailed, Watch, paths_of
from tarq_jax.training.meter import Meter
from tarq_jax.training.objectives import Objective
from tarq_jax.training.state import TrainState
from tarq_jax.types import Batch

SEEDS = "seeds"  # the mesh axis


def layout(shared: Any, of_seeds: Any) -> Any:
    """A value per part of a state: `shared` for the step, which all seeds share, `of_seeds` for the rest."""
    return TrainState(shared, of_seeds, of_seeds, of_seeds, of_seeds)


SHARED, EACH = PartitionSpec(), PartitionSpec(SEEDS)  # a device holds all of an array, or its seeds
STACKED, SPECS = layout(None, 0), layout(SHARED, EACH)


class Member(NamedTuple):
    """One of the runs that are trained together, with its own seed."""

    config: ml_collections.ConfigDict  # with the seed of this run
    workdir: Path
    checkpoints: ocp.CheckpointManager
    writer: MetricsWriter
    watch: Watch


class Parts(NamedTuple):
    """The parts that all members share."""

    objective: Objective
    mesh: Mesh  # over `SEEDS`
    step: parallel.CompiledStep  # takes stacked states and batches


def train(config: ml_collections.ConfigDict, dataset: data.Dataset, workdirs: Mapping[int, Path],
          console: Console) -> dict[int, list[Row]]:
    """Trains one model with every seed, from the newest checkpoints, and evaluates it on the test split.

    Seeds whose newest checkpoints have the same step are trained together.

    Args:
      config: validated configuration; `config.mesh` is not used, and `config.seed` is replaced.
      dataset: data for all seeds.
      workdirs: seed -> directory of its run.
      console: console that shows progress.

    Returns:
      Seed -> rows as from `loop.train`; `train_seconds` is the total time divided by the number of seeds.

    Raises:
      FloatingPointError: as for `loop.train`, and names the seed; no batch is kept.
      Interrupted: after SIGINT or SIGTERM, when all states have been saved.
      ValueError: a setting does not fit the data or a checkpoint, or is not possible with several seeds.
    """
    _check(config)
    objective = setup.make_objective(config, dataset, sharding.make_tables(config))
    optimizer = setup.make_optimizer(config)
    fresh = unstack(jax.jit(jax.vmap(
        setup.initialiser(config, objective, optimizer), in_axes=(0, None), out_axes=STACKED))(
            jnp.stack([jax.random.key(seed) for seed in workdirs]), setup.example(dataset)))
    paths = paths_of(fresh[0].trainable)
    rows: dict[int, list[Row]] = {}
    with distributed.interruptible() as interruption, contextlib.ExitStack() as stack:
        groups: dict[int, list[tuple[Member, checkpoint.Restored]]] = {}
        for (seed, workdir), state in zip(workdirs.items(), fresh, strict=True):
            loop.check_saved(_with_seed(config, seed), dataset, workdir)
            member = _open(stack, _with_seed(config, seed), workdir, paths)
            restored = checkpoint.restore_latest(member.checkpoints, state, member.config, dataset.schema)
            provenance.record(workdir, member.config, dataset)
            for sentence in restored.damaged.values():
                console.print(f"seed {seed}: {sentence} Going on from step {int(restored.state.step)}.",
                              markup=False)
            groups.setdefault(int(restored.state.step), []).append((member, restored))
        for _, group in sorted(groups.items()):
            members, restored_states = zip(*group, strict=True)
            mesh = make_mesh(len(members))
            parts = Parts(objective, mesh, compile_step(config, objective, optimizer, mesh))
            found = _train(parts, members, restored_states, dataset, console, interruption)
            rows |= {member.config.seed: rows for member, rows in zip(members, found, strict=True)}
        if interruption.due(config.steps + 1):
            raise Interrupted(f"interrupted; {len(rows)} seeds are complete, run it again for what follows")
    return {seed: rows[seed] for seed in workdirs}


def _check(config: ml_collections.ConfigDict) -> None:
    for name, refused in (("best_metric", config.best_metric), ("mesh.rules", config.mesh.rules),
                          ("data.buckets", config.data.buckets)):
        if refused:
            raise ValueError(f"config.{name} is {refused!r}, expected it empty where seeds are trained "
                             f"together")
    if config.parallel != "mesh":
        raise ValueError(f"config.parallel is {config.parallel!r}, expected 'mesh' where seeds are trained "
                         f"together")
    if jax.process_count() > 1:
        raise ValueError(f"there are {jax.process_count()} processes, expected one where seeds are trained "
                         f"together")


def _with_seed(config: ml_collections.ConfigDict, seed: int) -> ml_collections.ConfigDict:
    config = copy.deepcopy(config)
    config.seed = seed
    return config


def _open(stack: contextlib.ExitStack, config: ml_collections.ConfigDict, workdir: Path,
          paths: Sequence[str]) -> Member:
    checkpoints = stack.enter_context(checkpoint.manager(workdir, kept=config.checkpoints_kept))
    writer = stack.enter_context(MetricsWriter(workdir))
    return Member(config, workdir, checkpoints, writer, Watch(paths, config.optimizer.max_gradient_norm))


def make_mesh(num_seeds: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the largest number of devices that divides the number of seeds."""
    devices = jax.devices() if devices is None else devices
    used = max(n for n in range(1, len(devices) + 1) if num_seeds % n == 0)
    return jax.make_mesh((used,), (SEEDS,), axis_types=(AxisType.Auto,), devices=devices[:used])


def compile_step(config: ml_collections.ConfigDict, objective: Objective,
                 optimizer: optax.GradientTransformation, mesh: Mesh) -> parallel.CompiledStep:
    """`train_step` for states and batches with a leading axis of seeds; metrics have this axis too.

    All seeds share one step number, so that periodic work, such as revival, stays a branch of the program.
    """
    step = over_seeds(setup.make_step(config, objective, optimizer),
                      in_turn=mesh.devices.flat[0].platform == "cpu")
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(SPECS, EACH), out_specs=(SPECS, EACH),
                                 check_vma=False), donate_argnums=0)


def over_seeds(step: parallel.Step, in_turn: bool) -> parallel.Step:
    """Turns a step for one state and batch into one for several, with a leading axis of seeds.

    Args:
      step: step for one seed.
      in_turn: whether to loop over the seeds, so that the caches of a CPU core hold the data of one seed.
        Otherwise `vmap` is used, whose larger products fill an accelerator.
    """
    if not in_turn:
        return jax.vmap(step, in_axes=(STACKED, 0), out_axes=(STACKED, 0))

    def looped(states, batches):
        def of_seed(own):
            state, metrics = step(own[0].replace(step=states.step), own[1])
            return state.replace(step=None), (state.step, metrics)

        found, (steps, metrics) = jax.lax.map(of_seed, (states.replace(step=None), batches))
        return found.replace(step=steps[0]), metrics

    return looped


def stack_states(states: Sequence[TrainState], mesh: Mesh) -> TrainState:
    """Stacks states of the same step into one; each device holds its share of the seeds."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(s.replace(step=None) for s in states))
    state = stacked.replace(step=states[0].step)
    return jax.device_put(state, layout(NamedSharding(mesh, SHARED), NamedSharding(mesh, EACH)))


def unstack(state: TrainState) -> list[TrainState]:
    """Splits a stacked state into the states of the seeds, on the first device."""
    def of_seed(seed: int) -> TrainState:
        own = jax.tree.map(lambda leaf: leaf[seed], state.replace(step=None))
        return jax.device_put(own.replace(step=state.step), jax.devices()[0])

    return [of_seed(seed) for seed in range(len(state.rng))]


def _train(
    parts: Parts, members: Sequence[Member], restored: Sequence[checkpoint.Restored], dataset: data.Dataset,
    console: Console, interruption: distributed.Interruption,
) -> list[list[Row]]:
    """Trains members whose states have the same step, and returns the rows of each."""
    config, shapes = members[0].config, setup.batch_shapes(dataset)
    state = stack_states([found.state for found in restored], parts.mesh)
    meter = Meter([sum(counts) for counts in zip(*(found.counted for found in restored), strict=True)])
    start = int(state.step)
    pending: list[tuple[int, Mapping[str, jax.Array]]] = []
    put = functools.partial(jax.device_put, device=NamedSharding(parts.mesh, EACH))
    batches = data.prefetch(_batches(members, dataset, shapes, start), config.prefetch,
                            functools.partial(loop.transfer, put=put))
    with progress_bar(console) as progress:
        bar = progress.add_task(
            f"{config.model.name} x {len(members)}", total=config.steps, completed=start, note="")
        advance(progress, bar, start, "compiling")
        for step in range(start, config.steps):
            if step == config.codebook.start and state.codebook is not None:
                meter.pause()
                state = initialise_codebooks(parts, members, state, dataset, shapes)
            with meter.waiting():
                batch, num_candidates = next(batches)
            state, metrics = parts.step(state, batch)
            meter.count(num_candidates, metrics)
            done = step + 1
            pending.append((done, metrics))
            logged, measured, saved = loop.duties(config, done)
            if logged or len(pending) == LONGEST:
                scalars, pending = _look(members, pending), []
            if logged:
                rates = meter.read()
                for member, values in zip(members, scalars, strict=True):
                    member.writer.write(done, values | rates)
                advance(progress, bar, done, f"{rates['examples_per_second']:,.0f} candidates/s")
            stop = interruption.due(done)
            measured, saved = measured and not stop, saved or stop
            if measured or saved:
                meter.pause()
                _look(members, pending)
                pending, states = [], unstack(state)
            if saved:  # first: a scheduler may not wait until evaluation has ended
                _save(members, states, dataset, meter)
            if measured:
                with contextlib.suppress(Interrupted):
                    tested = _test(parts, members, states, dataset, "validation", interruption.now)
                    for member, rows in zip(members, tested, strict=True):
                        member.writer.write(done, loop.flat_scalars(rows, "validation"))
                stop = interruption.now()
            if stop:
                _save(members, states, dataset, meter)
                raise Interrupted(f"interrupted; saved step {done} of {len(members)} seeds, run it again to "
                                  f"resume")
        batches.close()
    return _finish(parts, members, unstack(state), dataset, meter, interruption.now)


def _batches(members: Sequence[Member], dataset: data.Dataset, shapes: data.Shapes, start: int
             ) -> Iterator[Batch]:
    """Batches with a leading axis of seeds, each seed in its own order; all histories are padded to N."""
    each = [data.train_batches(dataset, "train", batch_size=member.config.batch_size, seed=member.config.seed,
                               start_step=start, readers=member.config.data.readers,
                               window=member.config.data.window, **shapes)
            for member in members]
    return (jax.tree.map(lambda *leaves: np.stack(leaves), *batches) for batches in zip(*each, strict=True))


def _look(members: Sequence[Member], pending: Sequence[tuple[int, Mapping[str, jax.Array]]]
          ) -> list[dict[str, float]]:
    """The scalars of each seed's last step; FloatingPointError if a step failed, see `Watch`."""
    fetched = jax.device_get(pending)
    scalars = []
    for i, member in enumerate(members):
        try:
            for step, metrics in fetched:
                member.watch.add(step, {name: values[i] for name, values in metrics.items()})
            scalars.append(member.watch.check())
        except StepFailed as failed:
            raise FloatingPointError(f"seed {member.config.seed}, {failed}; checkpoints before it stay in "
                                     f"{member.workdir}") from failed
    return scalars


def initialise_codebooks(parts: Parts, members: Sequence[Member], state: TrainState, dataset: data.Dataset,
                         shapes: data.Shapes) -> TrainState:
    """`setup.initialise_codebook` for every seed, each on its own latents."""
    config, objective = members[0].config, parts.objective
    if config.codebook.init == "random" or objective.latents is None:
        return state
    latents_of = jax.jit(objective.latents)
    latents = np.stack([
        setup.draw_latents(member.config, functools.partial(latents_of, own.params), dataset, shapes)
        for member, own in zip(members, unstack(state), strict=True)])
    fit = jax.jit(jax.shard_map(jax.vmap(setup.codebook_fit(config, objective)), mesh=parts.mesh,
                                in_specs=(EACH, EACH), out_specs=EACH, check_vma=False))
    return state.replace(codebook=fit(state.rng, latents))


def _save(members: Sequence[Member], states: Sequence[TrainState], dataset: data.Dataset, meter: Meter
          ) -> None:
    share = [count / len(members) for count in meter.counted]
    for member, own in zip(members, states, strict=True):
        checkpoint.save(member.checkpoints, own, member.config, dataset.schema, share)


def _test(parts: Parts, members: Sequence[Member], states: Sequence[TrainState], dataset: data.Dataset,
          split: str, leave: Callable[[], bool]) -> list[list[Row]]:
    return [
        loop.evaluate_split(member.config, parts.objective, own, dataset, split, leave=leave,
                  scores=loop.scores_file(member.config, member.workdir) if split == "test" else None)
        for member, own in zip(members, states, strict=True)]


def _finish(parts: Parts, members: Sequence[Member], states: Sequence[TrainState], dataset: data.Dataset,
            meter: Meter, leave: Callable[[], bool]) -> list[list[Row]]:
    totals = {"parameters": setup.count_parameters(states[0])} | meter.total()
    totals["train_seconds"] /= len(members)
    found = []
    for member, rows in zip(members, _test(parts, members, states, dataset, "test", leave),
                            strict=True):
        rows = [row | totals for row in rows]
        member.writer.write(member.config.steps, loop.flat_scalars(rows, "test"))
        write_rows(rows, member.workdir / "results.json")
        found.append(rows)
    return found
