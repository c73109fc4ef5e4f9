"""Optimizers: AdamW for the network; embedding tables can have an optimizer that suits them better.

A step looks up only a few rows of a large table. Row-wise Adagrad keeps one number per row. Lazy Adam
changes moments and parameters only in rows that the step touched. A row counts as touched if its gradient
is not zero.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

TABLE, NETWORK = "table", "network"  # labels of parameters


class RowWise(optax.GradientTransformation):
    """An optimizer that changes only those rows of tables whose gradient is not zero, one by one.

    Its update may therefore get some rows of tables, of their gradients and of its own state in place of all,
    if no other row has a gradient: see `tarq_jax.training.table_rows`.
    """


class RowAdagradState(NamedTuple):
    """State of `scale_by_row_adagrad`."""

    squares: Any  # [V] per table, sum over steps of the mean squared gradient of a row


class LazyAdamState(NamedTuple):
    """State of `scale_by_lazy_adam`."""

    touched: Any  # [V] int32 per table, number of steps that touched a row
    mu: Any  # [V, D] per table, first moments
    nu: Any  # [V, D] per table, second moments


def scale_by_row_adagrad(eps: float = 1e-8) -> optax.GradientTransformation:
    """Adagrad with one accumulator per row: `s += mean_d g_d^2`, update `g / (sqrt(s) + eps)`.

    From Duchi et al. 2011; row-wise as in DLRM, arXiv 1906.00091. All parameters must be tables [V, D].

    Args:
      eps: constant added to the root.
    """

    def init(params):
        return RowAdagradState(jax.tree.map(lambda table: jnp.zeros(len(table), table.dtype), params))

    def update(gradients, state, params=None):
        del params
        squares = jax.tree.map(lambda s, g: s + jnp.mean(g**2, axis=-1), state.squares, gradients)
        scaled = jax.tree.map(lambda s, g: g / (jnp.sqrt(s) + eps)[:, None], squares, gradients)
        return scaled, RowAdagradState(squares)

    return optax.GradientTransformation(init, update)


def scale_by_lazy_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015) on touched rows only; other rows keep their moments, and their update is 0.

    The bias correction of a row uses the number of steps that touched the row, so its first update has the
    same length however late it comes. All parameters must be tables [V, D].

    Args:
      b1: decay of the first moments.
      b2: decay of the second moments.
      eps: constant added to the root.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        counts = jax.tree.map(lambda table: jnp.zeros(len(table), jnp.int32), params)
        return LazyAdamState(counts, zeros, zeros)

    def update_table(gradient, count, mu, nu):
        touched = is_touched(gradient)
        count = count + touched
        rows = touched[:, None]
        mu = jnp.where(rows, b1 * mu + (1 - b1) * gradient, mu)
        nu = jnp.where(rows, b2 * nu + (1 - b2) * gradient**2, nu)
        steps = jnp.maximum(count, 1)[:, None].astype(gradient.dtype)
        step = (mu / (1 - b1**steps)) / (jnp.sqrt(nu / (1 - b2**steps)) + eps)
        return jnp.where(rows, step, 0.0), count, mu, nu

    def update(gradients, state, params=None):
        del params
        found = jax.tree.map(update_table, gradients, state.touched, state.mu, state.nu)
        inner = jax.tree.structure((0,) * 4)
        updates, *kept = jax.tree.transpose(jax.tree.structure(gradients), inner, found)
        return updates, LazyAdamState(*kept)

    return optax.GradientTransformation(init, update)


def decay_touched(weight_decay: float) -> optax.GradientTransformation:
    """Adds `weight_decay` times the parameters to the updates, only in rows whose update is not zero."""

    def update(updates, state, params):
        decayed = jax.tree.map(
            lambda u, p: u + jnp.where(is_touched(u)[:, None], weight_decay * p, 0.0), updates, params)
        return decayed, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def is_touched(rows: jax.Array) -> jax.Array:
    """[V, D] to [V] bool: rows that have a value other than zero."""
    return jnp.any(rows != 0, axis=-1)


OF_TABLES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "rowwise_adagrad": scale_by_row_adagrad,
    "lazy_adam": scale_by_lazy_adam,
}


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW with a cosine schedule and linear warm-up; gradients are clipped by norm if configured.

    Tables use the optimizer that `config.optimizer.table` names, with the same schedule. All of these are
    `RowWise` except AdamW, which moves every row in every step.
    """
    settings = config.optimizer
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if settings.warmup_steps else settings.learning_rate,
        peak_value=settings.learning_rate, warmup_steps=settings.warmup_steps,
        decay_steps=max(config.steps, settings.warmup_steps + 1),
    )
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    decayed = {"params": True, "codewords": False}  # keys of `trainable`
    network = optax.adamw(schedule, weight_decay=settings.weight_decay, mask=decayed)
    if settings.table == "adamw":
        return optax.chain(clip, network)
    table = optax.chain(
        OF_TABLES[settings.table](), decay_touched(settings.weight_decay),
        optax.scale_by_learning_rate(schedule))
    return RowWise(*optax.chain(clip, optax.partition({NETWORK: network, TABLE: table}, labels)))


def labels(variables: Any) -> Any:
    """`TABLE` for every embedding table in `trainable`, `NETWORK` for all other parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: TABLE if getattr(path[-1], "key", None) == "embedding" else NETWORK, variables)
