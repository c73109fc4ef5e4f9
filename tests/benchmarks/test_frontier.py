"""The frontier's latencies at a tiny size: every method scores as the training code does."""

import pytest

from benchmarks import frontier, serving
from benchmarks.serving_contenders import COLD, IN_BLOCKS, TWO_TOWER, Contender
from tarq_jax.experiments import study


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_baselines_are_served_as_they_train(silent, monkeypatch):
    """The others are tested with the serving benchmark: here one of them is enough."""
    make = frontier.make_contenders
    monkeypatch.setattr(frontier, "make_contenders", lambda sizes, dataset: (
        made for made in make(sizes, dataset) if made.name in (TWO_TOWER, COLD, IN_BLOCKS)))
    rows = frontier.measure(serving.TINY.sizes, 300, 21, 20, 0.0, silent)
    assert [row["model"] for row in rows] == [
        TWO_TOWER, COLD, IN_BLOCKS, "linear attention", "SDIM", "ETA", "DIN", "IntTower"]
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
