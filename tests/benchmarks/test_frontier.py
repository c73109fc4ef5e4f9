"""The frontier's latencies at a tiny size; every method gives the scores of the training code."""

import jax
import numpy as np
import pytest
from draws import normal

from benchmarks import approximations, frontier, serving
from benchmarks.serving_contenders import COLD, IN_BLOCKS, TWO_TOWER, Contender
from tarq_jax import approximate_attention
from tarq_jax.experiments import study


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_baselines_are_served_as_they_train(silent, monkeypatch):
    """The serving benchmark's test covers the other contenders, so only a few of them are measured here."""
    make = frontier.make_contenders
    monkeypatch.setattr(frontier, "make_contenders", lambda sizes, dataset: (
        made for made in make(sizes, dataset) if made.name in (TWO_TOWER, COLD, IN_BLOCKS)))
    rows = frontier.measure(serving.TINY.sizes, 300, 21, 20, 0.0, silent)
    assert [row["model"] for row in rows] == [
        TWO_TOWER, COLD, IN_BLOCKS, frontier.LARGE, "linear attention", "SDIM", "ETA", "DIN", "IntTower"]
    assert {row["model"] for row in rows} == set(study.METHODS.values())
    for row in rows:
        assert row["difference"] < 1e-5 and 0 < row["latency_p50_ms"] <= row["latency_p99_ms"]
        assert (row["kind"], row["candidates"], row["history"]) == ("request", 300, 21)


def test_other_scores_are_refused(silent, monkeypatch):
    make = frontier.make_contenders

    def swapped(sizes, dataset):
        first, second = (next(made for made in make(sizes, dataset) if made.name == name)
                         for name in (TWO_TOWER, COLD))
        yield Contender("swapped", first.method, first.module, second.reference)

    monkeypatch.setattr(frontier, "make_contenders", swapped)
    with pytest.raises(ValueError, match="swapped: scores differ from the training code's by"):
        frontier.measure(serving.TINY.sizes, 300, 21, 20, 0.0, silent)


def test_eta_attends_to_what_is_selected_and_sorts_nothing(monkeypatch):
    """On CPU, XLA has a top-k for floats that takes a tenth of the time of its sort of integers."""
    monkeypatch.setattr(approximations, "on_attended", lambda weights, user, items, attended: attended)
    planes = approximations.ROUNDS * approximations.BITS
    rng = np.random.default_rng(0)
    signs = rng.integers(0, 2, (5, planes)).astype(np.int32), np.float32(rng.choice([-1, 1], (40, planes)))
    keys, values, queries = normal(1, 40, 2, 3), normal(2, 40, 2, 3), normal(3, 5, 6)
    user = {"keys": keys, "values": values, "signs": signs[1], "mask": rng.random(40) < 0.8}
    arguments = {}, user, {"query": queries, "signs": signs[0]}
    compiled = jax.jit(approximations.eta.__wrapped__).lower(*arguments).compile()
    assert "TopK" in compiled.as_text()
    similarity = (2 * signs[0] - 1 == signs[1][:, None]).sum(axis=-1).T
    selected = approximate_attention.select(similarity[None], user["mask"][None], approximations.SELECTED)
    heads = (np.swapaxes(part, 0, 1)[None] for part in (queries.reshape(5, 2, 3), keys, values))
    expected = approximate_attention.searched_attention(*heads, selected)[0]
    np.testing.assert_allclose(
        compiled(*arguments), np.swapaxes(expected, 0, 1).reshape(5, 6), rtol=1e-5, atol=1e-6)
    many = {name: jax.ShapeDtypeStruct((2**18, *part.shape[1:]), part.dtype) for name, part in user.items()}
    with pytest.raises(ValueError, match="262144 positions are of 25427968 ranks, expected at most 16777216"):
        jax.eval_shape(approximations.eta.__wrapped__, {}, many, arguments[2])
