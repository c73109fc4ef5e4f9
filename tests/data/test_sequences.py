"""Sequences: the last item is held out, histories end before the target, negatives are new to the user."""

import json

import numpy as np
import pytest

from tarq_jax.data import load, sequences
from tarq_jax.data.attributes import svd_features
from tarq_jax.data.sequences import SequencesOptions


def random_lines(seed=0, users=40, items=60):
    rng = np.random.default_rng(seed)
    return [[u, *(5 * rng.integers(1, items, rng.integers(1, 15))).tolist()] for u in range(1, users + 1)]


def write(path, lines):
    path.write_text("".join(" ".join(map(str, line)) + "\n" for line in lines))
    return str(path)


def listed(requests):
    """Requests as (user, history, candidates, labels)."""
    h, c = requests.history_offsets, requests.candidate_offsets
    return [(int(u), requests.history[h[r]:h[r + 1]].tolist(), requests.candidates[c[r]:c[r + 1]].tolist(),
             requests.labels[c[r]:c[r + 1]].tolist()) for r, u in enumerate(requests.user)]


def reference(lines, history_length):
    """(user, history, target) of each request, by slow loops over raw lines."""
    splits = {"train": [], "validation": [], "test": []}
    ids = sorted({item for _, *items in lines for item in items})
    for user, (_, *items) in enumerate(lines, start=1):
        items = [ids.index(item) + 1 for item in items]
        if len(items) < 3:
            continue
        for position in range(1, len(items)):
            left = len(items) - 1 - position
            name = "test" if left == 0 else "validation" if left == 1 else "train"
            splits[name].append((user, items[:position][-history_length:], items[position], set(items)))
    return splits


def assert_is_reference(dataset, lines, history_length, num_negatives):
    for name, expected in reference(lines, history_length).items():
        actual = listed(dataset.splits[name])
        assert len(actual) == len(expected)
        for request, (true_user, past, target, own) in zip(actual, expected, strict=True):
            user, history, shown, labels = request
            assert (user, history) == (true_user, past)
            assert sum(labels) == 1 and shown[labels.index(1)] == target
            negatives = {item for item, label in zip(shown, labels, strict=True) if not label}
            assert len(negatives) == num_negatives == len(shown) - 1
            assert not negatives & own


@pytest.mark.parametrize("seed", range(4))
def test_requests_are_those_of_the_definition(tmp_path, seed):
    lines = random_lines(seed)
    options = SequencesOptions(write(tmp_path / "s.txt", lines), history_length=5, num_negatives=4, seed=seed)
    assert_is_reference(sequences.generate(options), lines, 5, 4)


def test_only_what_training_knows_is_drawn(tmp_path):
    lines = [[u, *range(1, 7), 100 + u, 200 + u] for u in range(1, 9)] + [[9, *range(20, 30), 30, 31]]
    dataset = sequences.generate(SequencesOptions(write(tmp_path / "s.txt", lines), num_negatives=5))
    original = np.array([0, *sorted({item for _, *items in lines for item in items})])
    for requests in dataset.splits.values():
        negatives = original[requests.candidates[requests.labels == 0]]
        assert set(negatives.tolist()) <= {*range(1, 7), *range(20, 30)}  # nobody's last two items


def test_short_users_give_no_request(tmp_path):
    lines = [[1, 10, 20, 30], [2, 10, 40], [3, 50], [4, 60, 30, 70, 80, 90]]
    dataset = sequences.generate(SequencesOptions(write(tmp_path / "s.txt", lines), num_negatives=1))
    assert {name: r.user.tolist() for name, r in dataset.splits.items()} == {
        "train": [4, 4], "validation": [1, 4], "test": [1, 4]}
    assert dataset.info["users_too_short"] == 2 and dataset.schema.num_items == 10


def test_real_data_obeys_the_definition(real_data, tmp_path):
    source = real_data / "LastFM.txt"
    lines = [[int(x) for x in line.split()] for line in source.read_text().splitlines()]
    dataset = load("sequences", data_dir=tmp_path, source=str(source),
                   attributes=str(real_data / "LastFM_item2attributes.json"))
    assert len(dataset.splits["test"]) == len(lines) == 1090
    assert_is_reference(dataset, lines, 50, 15)
    features = dataset.items["attributes"]
    assert features.shape == (3647, 24) and np.square(features[1:]).mean() == pytest.approx(1, rel=1e-4)


def test_negatives_follow_popularity():
    popularity = np.array([0, 100, 50, 25, 0, 25])
    users, seen = np.zeros(4000, np.int64), np.array([5])  # user 0 has seen item 5
    drawn = sequences.sample_negatives(np.random.default_rng(0), popularity, users, seen, 1)
    counts = np.bincount(drawn[:, 0], minlength=6) / 4000
    np.testing.assert_allclose(counts, [0, 4 / 7, 2 / 7, 1 / 7, 0, 0], atol=0.03)


def test_rare_negatives_are_found_and_too_few_are_an_error():
    popularity = np.array([0, 10**9, 1, 1, 1])
    users, seen = np.zeros(3, np.int64), np.array([1])
    drawn = sequences.sample_negatives(np.random.default_rng(0), popularity, users, seen, 3)
    assert np.sort(drawn, axis=1).tolist() == [[2, 3, 4]] * 3
    with pytest.raises(ValueError, match=r"config\.data\.num_negatives is 4, expected at most 3"):
        sequences.sample_negatives(np.random.default_rng(0), popularity, users, seen, 4)


def test_deterministic_in_the_seed(tmp_path):
    source = write(tmp_path / "s.txt", random_lines())
    first, again, other = (sequences.generate(SequencesOptions(source, num_negatives=4, seed=seed))
                           for seed in (0, 0, 1))
    assert listed(first.splits["train"]) == listed(again.splits["train"]) != listed(other.splits["train"])


def test_the_target_is_at_any_place(tmp_path):
    source = write(tmp_path / "s.txt", random_lines(users=200))
    dataset = sequences.generate(SequencesOptions(source, num_negatives=4))
    share = dataset.splits["train"].labels.reshape(-1, 5).mean(0)
    np.testing.assert_allclose(share, 0.2, atol=0.05)


def test_svd_features_keep_the_geometry_of_the_counts():
    from scipy import sparse

    counts = np.random.default_rng(0).poisson(0.3, (40, 12)).astype(float)
    full = svd_features(sparse.csr_matrix(counts), 15)  # more features than the rank
    scale = np.sqrt(np.square(counts).sum() / full.size)
    np.testing.assert_allclose(full @ full.T * scale**2, counts @ counts.T, atol=1e-4)
    assert not full[:, 12:].any()
    few = svd_features(sparse.csr_matrix(counts), 4)  # the sparse implementation agrees with the dense one
    ratio = np.sqrt(np.square(full[:, :4]).mean())
    np.testing.assert_allclose(few * ratio, full[:, :4], atol=1e-4)
    np.testing.assert_array_equal(few, svd_features(sparse.csr_matrix(counts), 4))


def test_attributes_join_by_original_id(tmp_path):
    source = write(tmp_path / "s.txt", [[1, 10, 20, 30, 40], [2, 50, 60, 70, 40]])
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"10": [1, 1], "50": [2], "99": [3]}))
    dataset = sequences.generate(SequencesOptions(source, str(path), num_negatives=1, attribute_dims=3))
    features = dataset.items["attributes"]
    assert features.shape == (8, 3)
    assert np.flatnonzero(features.any(1)).tolist() == [1, 5]  # items 10 and 50
    assert dataset.item_ids.tolist() == [0, 10, 20, 30, 40, 50, 60, 70]
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        sequences.generate(SequencesOptions(source, str(path), num_negatives=1))


def test_malformed_rows(tmp_path):
    lines = random_lines()
    bad = [["x", 1, 2], [7], [], [1, 5, 10], [8, -5]]
    source = write(tmp_path / "s.txt", lines + bad)
    dataset = sequences.generate(SequencesOptions(source, num_negatives=4, max_bad_fraction=0.2))
    assert dataset.info["rows"]["reasons"] == {"not a number": 1, "missing columns": 1, "empty row": 1,
                                               "repeated user": 1, "id out of range": 1}
    assert_is_reference(dataset, lines, 50, 4)
    with pytest.raises(ValueError, match=r"5 of 45 rows are malformed .*line 41: 'x 1 2' \(not a number\)"):
        sequences.generate(SequencesOptions(source, num_negatives=4))


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing.txt.*--config.data.source=FILE"):
        load("sequences", data_dir=tmp_path, source=str(tmp_path / "nothing.txt"))
    source = write(tmp_path / "s.txt", random_lines())
    with pytest.raises(FileNotFoundError, match=r"no file .*a.json.*--config.data.attributes=FILE"):
        load("sequences", data_dir=tmp_path, source=source, attributes=str(tmp_path / "a.json"))
    with pytest.raises(ValueError, match="no user has 3 items"):
        sequences.generate(SequencesOptions(write(tmp_path / "t.txt", [[1, 2, 3]])))
