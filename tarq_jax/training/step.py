"""One training step, as a pure function of state and batch. The caller compiles it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tarq_jax import quantization, shards
from tarq_jax.training import table_rows
from tarq_jax.training.accumulation import accumulate_gradients
from tarq_jax.training.health import codebook_metrics
from tarq_jax.training.objectives import Objective
from tarq_jax.training.state import TrainState
from tarq_jax.types import Batch, Codebook, Levels, QuantizerOutput

REVIVAL_LATENTS = 65536  # most latents that revival draws from: every device gathers them
# (rng, codebook, quantizer output, where [B, G], step) -> codebook
CodebookUpdate = Callable[[jax.Array, Codebook, QuantizerOutput, jax.Array, jax.Array], Codebook]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    update_codebook: CodebookUpdate,
    codewords_by_gradient: bool = True,
    codebook_start: int = 0,
    accumulate: int = 1,
    axis_name: shards.AxisName = None,
    row_wise: table_rows.Devices | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Gradient step on parameters and codewords, then the codebook's own update.

    The step works on a full batch and, under `pmap`, on a shard of it: sums go over all shards, and all
    inputs of the codebook's update are gathered first, so that every replica computes the same new state.

    Args:
      state: state before the step.
      batch: requests.
      objective: objective to minimise.
      optimizer: optimizer over `trainable`.
      update_codebook: update of statistics, EMA and revival, see `codebook_updates`.
      codewords_by_gradient: set False if `update_codebook` overwrites the codewords (EMA). Their gradient is
        then not computed, which saves a quarter of a step in order 1.
      codebook_start: first step in which the codebook is used.
      accumulate: number of micro-batches for the gradients; the result is the same up to rounding.
      axis_name: name of the axis of shards, see `tarq_jax.shards`; the objective must be built for the same.
      row_wise: the devices that the step runs on, if it shall pass over the looked-up rows of large tables
        only, see `tarq_jax.training.table_rows`. The optimizer must be `RowWise`; the result is the same up
        to rounding. If None, or if the objective has no `lookups`, the step passes over all rows.

    Returns:
      The state after the step, and metrics on device: scalars, and two vectors in the order of the leaves
      of `trainable`, the norm of each gradient and of each parameter after the step. Of a table whose rows
      the step does not all pass over, the latter is the norm of the rows that it looked up.
    """
    active = state.step >= codebook_start

    variables, rows = state.trainable, {}
    if row_wise is not None and objective.lookups is not None:
        lookups = functools.partial(objective.lookups, state.params, state.codewords)
        rows = table_rows.find(lookups, state.params, batch, accumulate, row_wise)

    def loss(variables, micro_batch):
        codewords = variables["codewords"]
        if not codewords_by_gradient:
            codewords = jax.lax.stop_gradient(codewords)
        params = table_rows.for_loss(variables["params"], rows)
        return objective.loss(params, codewords, micro_batch, active, batch)

    aux, gradients = accumulate_gradients(loss, table_rows.fetch(variables, rows), batch, accumulate)
    gradients, rows = table_rows.total(gradients, rows, axis_name)
    metrics = shards.total(aux.metrics, axis_name)
    small, opt_state = table_rows.take((variables, state.opt_state), rows)
    updates, opt_state = optimizer.update(gradients, opt_state, small)
    small = optax.apply_updates(small, updates)
    variables, opt_state = table_rows.put((variables, state.opt_state), rows, (small, opt_state))
    metrics = metrics | norms("gradient", gradients)

    codebook = state.codebook
    if codebook is not None and aux.quantizer is not None:
        codebook = codebook.replace(codewords=variables["codewords"])
        rng = jax.random.fold_in(state.rng, state.step)
        quantizer, real = shards.gather((aux.quantizer, batch.candidate_mask), axis_name)
        where = real & active
        updated = update_codebook(rng, codebook, quantizer, where, state.step)
        codebook = jax.tree.map(lambda new, old: jnp.where(active, new, old), updated, state.codebook)
        metrics |= codebook_metrics(codebook, quantizer, where)
    state = state.replace(
        step=state.step + 1, params=variables["params"], codebook=codebook, opt_state=opt_state
    )
    # These norms show at once that the state is not finite; the loss shows it only one step later.
    return state, metrics | norms("parameter", small | {"codewords": state.codewords})


def norms(name: str, tree: Any) -> dict[str, jax.Array]:
    """`<name>_norms` [P], the Euclidean norm of each leaf, and `<name>_norm` [], that of all together."""
    each = jnp.stack([jnp.sqrt(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(tree)])
    return {f"{name}_norm": jnp.linalg.norm(each), f"{name}_norms": each}


def codebook_updates(
    *, mode: str, decay: float, revive_every: int, dead: Callable[[Codebook], Levels]
) -> CodebookUpdate:
    """The codebook's update after a gradient step.

    Args:
      mode: `gradient` leaves the codewords to the optimizer and only tracks usage; `ema` sets them to the
        running mean of the residuals assigned to them.
      decay: decay of the running statistics.
      revive_every: steps between revivals of dead codewords; 0 never revives.
      dead: function that finds dead codewords, see `quantization.dead_by_count` and `dead_by_age`.

    Raises:
      ValueError: the mode is another one.
    """

    if mode not in ("gradient", "ema"):
        raise ValueError(f"mode is {mode!r}, expected 'gradient' or 'ema'")

    def revive(rng, codebook, residuals, where):
        requests = max(1, REVIVAL_LATENTS // where.shape[1])
        residuals, where = residuals[:requests], where[:requests]
        return quantization.revive(rng, codebook, residuals, dead(codebook), where=where)

    def update(rng, codebook, output, where, step):
        counts, sums = quantization.assignment_statistics(output, codebook.codewords, where)
        codebook = quantization.update_statistics(codebook, counts, sums, decay=decay)
        if mode == "ema":
            codebook = quantization.ema_codewords(codebook)
        if revive_every:
            due = (step + 1) % revive_every == 0
            codebook = jax.lax.cond(
                due, revive, lambda *args: args[1], rng, codebook, output.residuals, where
            )
        return codebook

    return update
