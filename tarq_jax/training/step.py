"""One training step, as a pure function of state and batch. The caller compiles it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from tarq_jax import quantization, shards
from tarq_jax.training.health import codebook_metrics
from tarq_jax.training.objectives import Objective
from tarq_jax.training.state import TrainState, trainable
from tarq_jax.types import Batch, Codebook, Levels, QuantizerOutput

REVIVAL_LATENTS = 65536  # at most that revival draws from: every device gathers them
# (rng, codebook, quantizer output, where [B, G], step) -> codebook
CodebookUpdate = Callable[[jax.Array, Codebook, QuantizerOutput, jax.Array, jax.Array], Codebook]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    update_codebook: CodebookUpdate,
    codebook_start: int = 0,
    axis_name: shards.AxisName = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Gradient step on parameters and codewords, then the codebook's own update.

    The same on a whole batch and, under `pmap`, on a shard of it: sums go over all shards, and all that
    changes the codebook is gathered first, so that every replica computes the same new state.

    Args:
      state: before the step.
      batch: requests.
      objective: what to minimise.
      optimizer: over `trainable`.
      update_codebook: statistics, EMA and revival, see `codebook_updates`.
      codebook_start: step from which on the codebook is in use.
      axis_name: of the shards, see `tarq_jax.shards`; the objective has to be built for the same.

    Returns:
      The state after the step, and metrics, scalars on device.
    """
    active = state.step >= codebook_start

    def loss(variables):
        return objective.loss(variables["params"], variables["codewords"], batch, active)

    variables = trainable(state.params, state.codebook)
    (_, aux), gradients = jax.value_and_grad(loss, has_aux=True)(variables)
    gradients, metrics = shards.total((gradients, aux.metrics), axis_name)
    updates, opt_state = optimizer.update(gradients, state.opt_state, variables)
    variables = optax.apply_updates(variables, updates)
    metrics = metrics | {"gradient_norm": optax.tree.norm(gradients)}

    codebook = state.codebook
    if codebook is not None:
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
    # Not finite as soon as the state is not, which the loss says only a step later.
    metrics["parameter_norm"] = optax.tree.norm(trainable(state.params, state.codebook))
    return state, metrics


def codebook_updates(
    *, mode: str, decay: float, revive_every: int, dead: Callable[[Codebook], Levels]
) -> CodebookUpdate:
    """The codebook's update after a gradient step.

    Args:
      mode: `gradient` leaves the codewords to the optimizer and tracks usage only; `ema` sets
        them to the running mean of what they quantize.
      decay: of the running statistics.
      revive_every: steps between revivals of dead codewords; 0 never revives.
      dead: which codewords to revive, see `quantization.dead_by_count` and `dead_by_age`.

    Raises:
      ValueError: for another mode.
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
