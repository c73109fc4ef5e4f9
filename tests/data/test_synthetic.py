"""The synthetic task: the true probabilities that labels are drawn from, and determinism."""

import dataclasses

import numpy as np
import pytest

from tarq_jax.data import synthetic
from tarq_jax.data.synthetic import SyntheticOptions

OPTIONS = SyntheticOptions(train_requests=100, validation_requests=50, test_requests=2500)


@pytest.fixture(scope="module")
def dataset():
    return synthetic.generate(OPTIONS)


def test_deterministic_in_the_options(dataset):
    again = synthetic.generate(OPTIONS)
    other = synthetic.generate(dataclasses.replace(OPTIONS, seed=1))
    for split, requests in dataset.splits.items():
        for name in ("user", "history", "candidates", "labels"):
            np.testing.assert_array_equal(getattr(requests, name), getattr(again.splits[split], name))
        assert (requests.history != other.splits[split].history).any()
    np.testing.assert_array_equal(dataset.items["features"], again.items["features"])


def test_a_split_does_not_depend_on_the_size_of_another(dataset):
    shorter = synthetic.generate(dataclasses.replace(OPTIONS, train_requests=10))
    np.testing.assert_array_equal(shorter.splits["test"].labels, dataset.splits["test"].labels)


def test_shapes_ids_and_scale(dataset):
    assert {split: len(r) for split, r in dataset.splits.items()} == {
        "train": 100, "validation": 50, "test": 2500}
    users = np.concatenate([r.user for r in dataset.splits.values()])
    assert len(np.unique(users)) == len(users) and users.min() == 1
    for requests in dataset.splits.values():
        assert (np.diff(requests.history_offsets) == 50).all()
        assert (np.diff(requests.candidate_offsets) == 16).all()
        for ids in (requests.history, requests.candidates):
            assert ids.min() >= 1 and ids.max() <= 4000
    assert not dataset.items["features"][0].any()
    assert 0.8 < dataset.items["features"][1:].std() < 1.3


def test_bayes_auc_is_that_of_the_design(dataset):
    assert dataset.info["bayes_auc"] == pytest.approx(0.795, abs=0.012)


def test_labels_agree_with_the_probabilities():
    world = synthetic.make_world(OPTIONS)
    requests, probabilities = synthetic.draw_requests(np.random.default_rng(0), world, OPTIONS, 2000)
    for low in np.arange(0, 1, 0.1):
        chosen = (probabilities >= low) & (probabilities < low + 0.1)
        error = 4 * np.sqrt(0.25 / max(chosen.sum(), 1))
        assert abs(requests.labels[chosen].mean() - probabilities[chosen].mean()) < error


def test_logits_are_the_formula():
    world = synthetic.make_world(OPTIONS)
    rng = np.random.default_rng(0)
    history, candidates = rng.integers(1, 4001, (2, 7)), rng.integers(1, 4001, (2, 3))
    logits = synthetic.click_logits(world, history, candidates, 8.0)
    for r in range(2):
        for g in range(3):
            vector = world.vectors[candidates[r, g]].astype(np.float64)
            cosines = np.array([vector @ world.vectors[item] for item in history[r]])
            attention = np.exp(8 * cosines) / np.exp(8 * cosines).sum()
            expected = 5.5 * (attention @ cosines - 0.62) + world.popularity[candidates[r, g]]
            assert logits[r, g] == pytest.approx(expected, abs=1e-4)


def test_histories_stay_within_the_interests_and_half_of_the_candidates_does():
    options = dataclasses.replace(OPTIONS, min_interests=2, max_interests=2)
    world = synthetic.make_world(options)
    cluster = np.zeros(options.num_items + 1, int)
    for index, (a, b) in enumerate(zip(world.cluster_offsets[:-1], world.cluster_offsets[1:], strict=True)):
        cluster[world.by_cluster[a:b]] = index
    requests, _ = synthetic.draw_requests(np.random.default_rng(0), world, options, 300)
    histories, candidates = cluster[requests.history].reshape(300, -1), cluster[requests.candidates]
    assert max(len(np.unique(row)) for row in histories) == 2
    inside = [np.isin(c, h).mean(0) for c, h in zip(candidates.reshape(300, 16), histories, strict=True)]
    assert 0.45 < np.mean(inside) < 0.56


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=60), rng.integers(0, 2, 60)
    pairs = scores[labels == 1][:, None] > scores[labels == 0]
    assert synthetic.binary_auc(scores, labels) == pytest.approx(pairs.mean())
    assert np.isnan(synthetic.binary_auc(scores, np.ones(60)))


@pytest.mark.parametrize("option, value, text", [
    ("num_items", 10, r"config\.data\.num_items is 10, expected an integer of at least 60"),
    ("max_interests", 2, r"config\.data\.max_interests is 2, expected an integer of at least 3"),
    ("max_interests", 61, r"config\.data\.max_interests is 61, expected at most num_clusters"),
    ("history_length", 0, r"config\.data\.history_length is 0"),
    ("sharpness", float("nan"), r"config\.data\.sharpness is nan"),
    ("train_requests", -1, r"config\.data\.train_requests is -1"),
    ("num_candidates", 2.5, r"config\.data\.num_candidates is 2.5, expected an integer"),
])
def test_options_out_of_range(option, value, text):
    with pytest.raises(ValueError, match=text):
        SyntheticOptions(**{option: value})
