"""The training step, with an objective so small that every number can be computed by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tarq_jax import losses, quantization, shards
from tarq_jax.training import setup
from tarq_jax.training import step as training_step
from tarq_jax.training.objectives import LossOutput, Objective, mean_of_batch
from tarq_jax.training.state import TrainState
from tarq_jax.training.step import codebook_updates, train_step
from tarq_jax.types import Batch, Codebook

REQUESTS, CANDIDATES, WIDTH, LEVELS, CODEWORDS = 6, 5, 3, 2, 4
DECAY, MIN_USAGE = 0.9, 0.5
DEAD = functools.partial(quantization.dead_by_count, min_usage=MIN_USAGE)


def make_batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    mask = np.arange(CANDIDATES) < np.array([5, 4, 0, 2, 5, 1])[:, None]
    nothing = np.zeros((REQUESTS, 1), bool)
    vectors = rng.normal(size=(REQUESTS, CANDIDATES, WIDTH)).astype(np.float32)
    vectors[~mask] = 100.0  # padding, which would show wherever it is not masked
    return Batch(
        user_id=np.arange(REQUESTS), user={}, context={}, history={}, history_mask=nothing,
        candidates={"vector": vectors}, candidate_mask=mask, labels=np.zeros(mask.shape, np.float32),
        weights=mask.astype(np.float32))


def latents(params, batch):
    return batch.candidates["vector"] @ params["kernel"]


def loss(params, codewords, batch, active, whole=None, axis_name=None):
    z = latents(params, batch)
    if codewords is None:
        value = mean_of_batch(jnp.sum(z**2, axis=-1), batch, whole, axis_name)
        return value, LossOutput({"loss": value}, None)
    quantizer = quantization.encode(codewords, z)
    each = losses.commitment(z, quantizer.quantized) + losses.codebook_loss(
        quantizer.chosen, quantizer.residuals)
    value = mean_of_batch(each, batch, whole, axis_name)
    return value, LossOutput({"loss": value}, quantizer)  # ignores `active`, so the step must gate it


OBJECTIVE = Objective(init=None, loss=loss, predict=None, latents=latents)
OPTIMIZER = optax.adam(0.1)


def make_state(step: int = 0, optimizer=OPTIMIZER, codebook: bool = True, counts=None) -> TrainState:
    rng = np.random.default_rng(7)
    params = {"kernel": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32)}
    shape = (LEVELS, CODEWORDS)
    book = Codebook(
        codewords=jnp.asarray(rng.normal(size=(*shape, WIDTH)), jnp.float32),
        counts=jnp.asarray(rng.uniform(1, 3, shape) if counts is None else counts, jnp.float32),
        sums=jnp.asarray(rng.normal(size=(*shape, WIDTH)), jnp.float32),
        ages=jnp.zeros(shape)) if codebook else None
    state = TrainState(step=jnp.asarray(step, jnp.int32), params=params, codebook=book, opt_state=None,
                       rng=jax.random.key(3))
    return state.replace(opt_state=optimizer.init(state.trainable))


def make_step(mode="gradient", revive_every=0, start=0, optimizer=OPTIMIZER, axis_name=None):
    update = codebook_updates(mode=mode, decay=DECAY, revive_every=revive_every, dead=DEAD)
    objective = OBJECTIVE._replace(loss=functools.partial(loss, axis_name=axis_name))
    return functools.partial(train_step, objective=objective, optimizer=optimizer, update_codebook=update,
                             codewords_by_gradient=mode == "gradient", codebook_start=start,
                             axis_name=axis_name)


def by_hand(state: TrainState, batch: Batch):
    """Variables by optax alone, running counts and sums by NumPy loops."""
    variables = state.trainable
    gradients = jax.grad(lambda v: loss(v["params"], v["codewords"], batch, True)[0])(variables)
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state, variables)
    counts, sums = np.zeros((LEVELS, CODEWORDS)), np.zeros((LEVELS, CODEWORDS, WIDTH))
    for residual in np.asarray(latents(state.params, batch))[batch.candidate_mask]:
        for level, codewords in enumerate(np.asarray(state.codebook.codewords)):
            code = np.argmin(((residual - codewords) ** 2).sum(-1))
            counts[level, code] += 1
            sums[level, code] += residual
            residual = residual - codewords[code]
    running = [DECAY * np.asarray(old) + (1 - DECAY) * new
               for old, new in ((state.codebook.counts, counts), (state.codebook.sums, sums))]
    return optax.apply_updates(variables, updates), opt_state, gradients, *running


def equal_bits(left, right) -> bool:
    left, right = jax.tree.leaves(left), jax.tree.leaves(right)
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def test_gradient_mode_is_optax_and_running_statistics():
    state, batch = make_state(), make_batch(0)
    variables, opt_state, gradients, counts, sums = by_hand(state, batch)
    new, metrics = make_step("gradient")(state, batch)
    assert int(new.step) == 1 and new.step.dtype == jnp.int32
    np.testing.assert_allclose(new.params["kernel"], variables["params"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(new.codebook.codewords, variables["codewords"], rtol=1e-6)
    assert not np.allclose(new.codebook.codewords, state.codebook.codewords)
    np.testing.assert_allclose(new.codebook.counts, counts, rtol=1e-5)
    np.testing.assert_allclose(new.codebook.sums, sums, rtol=1e-5, atol=1e-6)
    for found, expected in zip(jax.tree.leaves(new.opt_state), jax.tree.leaves(opt_state), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradients), rtol=1e-6)
    np.testing.assert_allclose(
        metrics["parameter_norm"], optax.tree.norm(new.trainable), rtol=1e-6)
    assert jnp.array_equal(jax.random.key_data(new.rng), jax.random.key_data(state.rng))


def test_ema_mode_sets_codewords_to_the_running_mean():
    state, batch = make_state(), make_batch(0)
    variables, _, _, counts, sums = by_hand(state, batch)
    new, _ = make_step("ema")(state, batch)
    total = counts.sum(-1, keepdims=True)
    smoothed = (counts + 1e-5) / (total + CODEWORDS * 1e-5) * total
    np.testing.assert_allclose(new.codebook.codewords, sums / smoothed[..., None], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new.params["kernel"], variables["params"]["kernel"], rtol=1e-6)


def test_ema_mode_needs_no_gradient_of_codewords():
    """The optimizer's update of codewords is overwritten, so without it the state is the same to the bit."""
    state, batch = make_state(), make_batch(0)
    new, metrics = make_step("ema")(state, batch)
    other, others = functools.partial(make_step("ema"), codewords_by_gradient=True)(state, batch)
    assert equal_bits((new.params, new.codebook), (other.params, other.codebook))
    of_codewords = jax.tree.leaves({"codewords": True, "params": jax.tree.map(lambda _: False, new.params)})
    assert metrics["gradient_norms"][np.array(of_codewords)].tolist() == [0.0]
    assert others["gradient_norms"][np.array(of_codewords)].item() > 0


@pytest.mark.parametrize("mode", ["gradient", "ema"])
def test_the_codebook_rests_until_its_start(mode):
    step = make_step(mode, revive_every=1, start=2)
    state = make_state(counts=np.tile([5.0, 5.0, 5.0, 0.0], (LEVELS, 1)))
    for number in range(2):
        new, _ = step(state, make_batch(number))
        assert equal_bits(new.codebook, state.codebook)
        assert not equal_bits(new.params, state.params)
        state = new
    new, _ = step(state, make_batch(2))
    assert not np.allclose(new.codebook.codewords, state.codebook.codewords)
    assert not np.allclose(new.codebook.counts, state.codebook.counts)


def test_revival_at_multiples_and_of_dead_codewords_only():
    still = optax.sgd(0.0)  # only revival moves codewords
    step = make_step(revive_every=3, optimizer=still)
    alive = np.full((LEVELS, CODEWORDS), 50.0)
    alive[0, 2] = alive[1, 0] = alive[1, 3] = 0.0
    for number in range(7):
        state, batch = make_state(number, still, counts=alive), make_batch(number)
        new, _ = step(state, batch)
        moved = np.any(np.asarray(new.codebook.codewords != state.codebook.codewords), axis=-1)
        if number in (2, 5):
            np.testing.assert_array_equal(moved, alive == 0.0)
            residuals = quantization.encode(state.codebook.codewords, latents(state.params, batch)).residuals
            real = np.asarray(residuals)[batch.candidate_mask]  # [M, L, D]
            for level, code in np.argwhere(moved):
                away = np.abs(real[:, level] - np.asarray(new.codebook.codewords[level, code])).max(axis=-1)
                assert away.min() < 1e-5
        else:
            assert not moved.any()


def test_revival_draws_from_no_more_latents_than_every_device_can_hold(monkeypatch):
    monkeypatch.setattr(training_step, "REVIVAL_LATENTS", CANDIDATES)  # those of the first request
    still, dead = optax.sgd(0.0), np.tile([50.0, 50.0, 50.0, 0.0], (LEVELS, 1))
    state, batch = make_state(0, still, counts=dead), make_batch(0)
    new, _ = make_step(revive_every=1, optimizer=still)(state, batch)
    residuals = quantization.encode(state.codebook.codewords, latents(state.params, batch)).residuals
    for level in range(LEVELS):
        away = np.abs(np.asarray(residuals)[..., level, :] - new.codebook.codewords[level, 3]).max(axis=-1)
        assert away[0].min() < 1e-5 and away[1:].min() > 1e-3


def test_revival_differs_by_step_and_never_is_never():
    still, counts = optax.sgd(0.0), np.tile([50.0, 50.0, 50.0, 0.0], (LEVELS, 1))
    revived = [make_step(revive_every=1, optimizer=still)(make_state(number, still, counts=counts),
                                                          make_batch(0))[0].codebook.codewords
               for number in (0, 1)]
    assert not equal_bits(*revived)
    state = make_state(99, still, counts=counts)
    new, _ = make_step(revive_every=0, optimizer=still)(state, make_batch(0))
    assert equal_bits(new.codebook.codewords, state.codebook.codewords)


@pytest.mark.parametrize("mode", ["gradient", "ema"])
def test_jit_equals_eager(mode):
    step, state, batch = make_step(mode, revive_every=1), make_state(), make_batch(0)
    (eager, eager_metrics), (jitted, jitted_metrics) = step(state, batch), jax.jit(step)(state, batch)
    assert eager_metrics.keys() == jitted_metrics.keys()
    pairs = zip(jax.tree.leaves((eager.replace(rng=0), eager_metrics)),
                jax.tree.leaves((jitted.replace(rng=0), jitted_metrics)), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_shards", [2, 6])
@pytest.mark.parametrize("mode", ["gradient", "ema"])
def test_pmap_equals_jit_and_replicas_hold_the_same_bits(mode, num_shards):
    """Requests have 5, 4, 0, 2, 5 and 1 candidates, so a mean of the shards' means would differ."""
    arguments = {"mode": mode, "revive_every": 2, "start": 1}
    whole = jax.jit(make_step(**arguments))
    split = jax.pmap(make_step(**arguments, axis_name="shards"), axis_name="shards", in_axes=(None, 0),
                     out_axes=None, devices=jax.devices()[:num_shards])
    one = other = make_state(counts=np.tile([5.0, 5.0, 5.0, 0.0], (LEVELS, 1)))
    for number in range(4):
        one, metrics = whole(one, make_batch(number))
        other, found = split(other, shards.deal(make_batch(number), num_shards))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
                     (other.replace(rng=0), found), (one.replace(rng=0), metrics))
        for leaf in jax.tree.leaves((other.replace(rng=0), found)):
            if isinstance(leaf, jax.Array):
                copies = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
                assert len(leaf.addressable_shards) == num_shards and len(copies) == 1
    assert (np.asarray(one.codebook.counts) > 0.5).all()  # codeword 3 is alive again


@pytest.mark.parametrize("mode", ["gradient", "ema"])
def test_the_configuration_reaches_the_step(mode, tiny_config):
    settings = tiny_config.codebook
    settings.learning = mode
    settings.decay, settings.min_usage, settings.revive_every, settings.start = DECAY, MIN_USAGE, 2, 1
    configured = setup.compile_step(tiny_config, OBJECTIVE, OPTIMIZER)
    by_hand = make_step(mode, revive_every=2, start=1)
    states = [make_state(counts=np.tile([5.0, 5.0, 5.0, 0.0], (LEVELS, 1))) for _ in range(2)]
    for number in range(3):
        states = [step(state, make_batch(number))[0]
                  for step, state in zip((configured, by_hand), states, strict=True)]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
                     *(state.replace(rng=0) for state in states))


def test_the_configured_age_reaches_the_step(tiny_config):
    """All latents choose codeword 0, so the others are a step older when revival looks for dead ones."""
    settings, still = tiny_config.codebook, optax.sgd(0.0)  # only revival moves codewords
    settings.learning, settings.decay, settings.revive_every, settings.start = "gradient", DECAY, 1, 0
    settings.dead, settings.max_age = "age", 2
    state = make_state(optimizer=still, counts=np.tile([5.0, 5.0, 5.0, 0.0], (LEVELS, 1)))  # by count: 3
    away = 1e3 * np.array([[0.0], [1.0], [1.0], [1.0]], np.float32)
    codebook = state.codebook.replace(codewords=state.codebook.codewords + away,
                                      ages=jnp.tile(jnp.array([0.0, 2.0, 3.0, 1.0]), (LEVELS, 1)))
    before = np.asarray(codebook.codewords)
    new, _ = setup.compile_step(tiny_config, OBJECTIVE, still)(
        state.replace(codebook=codebook), make_batch(0))
    moved = np.any(np.asarray(new.codebook.codewords) != before, axis=-1)
    np.testing.assert_array_equal(moved, np.tile([False, True, True, False], (LEVELS, 1)))


@pytest.mark.parametrize("mode", ["sgd", "", None, dict().update])
def test_unknown_modes(mode):
    with pytest.raises(ValueError, match=r"mode is .*, expected 'gradient' or 'ema'"):
        codebook_updates(mode=mode, decay=0.9, revive_every=0, dead=DEAD)


def test_a_model_without_codebook():
    state = make_state(codebook=False)
    new, metrics = make_step()(state, make_batch(0))
    assert new.codebook is None and int(new.step) == 1
    assert set(metrics) == {"loss", "gradient_norm", "gradient_norms", "parameter_norm", "parameter_norms"}
    assert not equal_bits(new.params, state.params)


def test_metrics_tell_of_a_broken_state_at_once():
    broken = optax.sgd(np.inf)
    new, metrics = make_step(optimizer=broken)(make_state(optimizer=broken), make_batch(0))
    assert not np.isfinite(new.params["kernel"]).all()
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["parameter_norm"])
