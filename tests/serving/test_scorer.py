"""Scores and rankings of exported models, compared with those of the training code."""

import concurrent.futures
import copy
import dataclasses

import jax
import numpy as np
import pytest
import served

from tarq_jax import quantization
from tarq_jax.corrections import damping, damping_radius
from tarq_jax.serving import Scorer, add, build, change, grow, remove
from tarq_jax.serving.index import SLOTS
from tarq_jax.serving.model import ENCODE_BATCH, select
from tarq_jax.serving.scorer import SPARSE
from tarq_jax.serving.vectors import read

REQUESTS = served.world().requests
ITEMS = np.arange(1, served.ITEMS)


def by_id(ranking):
    """Scores in the order of the ids, which must be those of all items."""
    order = np.argsort(ranking.ids)
    np.testing.assert_array_equal(ranking.ids[order], ITEMS)
    return ranking.scores[order]


@pytest.fixture
def compilations(monkeypatch):
    """A list that gets one more entry for each compiled program."""
    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


# Scores


@pytest.mark.parametrize("name", served.METHODS)
def test_scores_are_those_of_training(scorer, name):
    """Histories from none to the longest, in full and in padded batches."""
    for expected, ranking in zip(served.expected(name), scorer(name).score(REQUESTS), strict=True):
        assert ranking.scores.dtype == np.float32
        np.testing.assert_allclose(by_id(ranking), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", served.METHODS)
def test_a_subset_scores_as_it_does_among_all(scorer, name):
    chosen = [3, 19, 7, 11]
    for row, request in enumerate(REQUESTS):
        ranking = scorer(name).score(request, chosen)
        assert sorted(ranking.ids) == sorted(chosen)
        np.testing.assert_allclose(
            ranking.scores, served.expected(name)[row][ranking.ids - 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["two_tower", "target_attention", "tarq_mlp", "order_1_scalar", "converted_levels"])
def test_scores_do_not_depend_on_the_slot(scorer, artefact, name):
    """All slots are scored, in blocks of 512; here all items are in the second block."""
    whole = Scorer.load(
        artefact(name), batch_sizes=(1,), candidate_sizes=(), top_k=5, like=scorer(name))
    index = whole.index
    moved = dataclasses.replace(
        index, ids=np.roll(index.ids, 600), served=np.roll(index.served, 600),
        arrays={array: np.roll(values, 600, axis=0) for array, values in index.arrays.items()})
    assert (moved.slots_of(ITEMS) >= SLOTS).all()
    for scores in map(by_id, (whole.score(REQUESTS[0]), whole.with_index(moved).score(REQUESTS[0]))):
        np.testing.assert_allclose(scores, served.expected(name)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "vectors", "bound"), [
    ("tarq_mlp", "bfloat16", 0.01), ("two_tower", "int8", 0.02), ("order_1_scalar", "int8", 0.02),
    ("converted_1", "int8", 0.02),
    pytest.param("order_1_dot", "int8", 0.02, marks=pytest.mark.slow),
    pytest.param("order_1_mlp", "bfloat16", 0.01, marks=pytest.mark.slow),
    pytest.param("converted_levels", "bfloat16", 0.01, marks=pytest.mark.slow)])
def test_smaller_vectors_cost_little(scorer, name, vectors, bound):
    """Error relative to the largest logit; codes are those of float32, and only vectors are rounded."""
    stored = scorer(name, vectors)
    found = np.stack([by_id(ranking) for ranking in stored.score(REQUESTS)])
    expected = served.expected(name)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < bound
    if "codes" in stored.index.arrays:
        np.testing.assert_array_equal(
            stored.index.arrays["codes"], scorer(name).index.arrays["codes"])
    index = scorer(name).index
    rounded = {array: values if array == "codes" else np.asarray(read(stored.index.arrays, array))
               for array, values in index.arrays.items()}
    exactly = scorer(name).with_index(dataclasses.replace(index, arrays=rounded)).score(REQUESTS)
    np.testing.assert_allclose(found, np.stack([by_id(ranking) for ranking in exactly]), rtol=0, atol=1e-5)


def test_the_user_side_alone(scorer):
    users = scorer().users(REQUESTS[:3])
    for ranking, whole in zip(scorer().rank(users, [None] * 3), scorer().score(REQUESTS[:3]), strict=True):
        np.testing.assert_array_equal(ranking.ids, whole.ids)
        np.testing.assert_array_equal(ranking.scores, whole.scores)


def test_users_and_candidates_are_of_one_version(scorer):
    users = scorer().users(REQUESTS[:1])
    other = scorer().with_index(remove(scorer().index, [4]))
    with pytest.raises(ValueError, match="users are those of a scorer with another index"):
        other.rank(users, [None])


# Rankings


@pytest.mark.parametrize("top_k", [1, 4, 5, 6, 22, 1000])
@pytest.mark.parametrize("candidates", [None, [4, 8, 15, 16, 21, 1, 2]], ids=["all", "some"])
def test_top_k(scorer, top_k, candidates):
    """Selected on the device up to 5, and sorted on the host beyond; never more than there are candidates."""
    chosen = ITEMS if candidates is None else np.array(candidates)
    scores = served.expected("tarq_scalar")[0][chosen - 1]
    ranking = scorer().score(REQUESTS[0], candidates, top_k=top_k)
    np.testing.assert_array_equal(ranking.ids, chosen[np.argsort(-scores)][:top_k])
    assert (np.diff(ranking.scores) <= 0).all() and len(ranking.scores) == min(top_k, len(chosen))


def test_numbers_of_numpy_are_numbers(scorer):
    assert len(scorer().score(REQUESTS[0], top_k=np.int64(3)).ids) == 3


def test_ties_keep_their_order(scorer):
    """That of their slots, however candidates are given, and whatever is scored in the same batch."""
    index = scorer().index
    row = index.slots_of(np.array([7]))
    equal = {name: np.repeat(values[row], 6, axis=0) for name, values in index.arrays.items()}
    tied = scorer().with_index(change(index, [3, 5, 7, 9, 11, 13], equal))
    by_slot = sorted((3, 5, 7, 9, 11, 13), key=lambda item: index.slots_of(np.array([item]))[0])
    for top_k in (3, 6):
        ranking = tied.score(REQUESTS[0], [9, 3, 13, 7, 11, 5], top_k=top_k)
        assert len(set(ranking.scores)) == 1
        beside, _ = tied.score(REQUESTS[:2], [[9, 3, 13, 7, 11, 5], None], top_k=top_k)
        assert ranking.ids.tolist() == beside.ids.tolist() == by_slot[:top_k]
    everything = tied.score(REQUESTS[0])
    found = [item for item in everything.ids if item in (3, 5, 7, 9, 11, 13)]
    assert found == by_slot


def test_padding_never_wins(scorer):
    """Neither empty slots nor missing candidates are returned, even if every real score is very low."""
    index = scorer("two_tower").index
    user = np.asarray(scorer("two_tower").users(REQUESTS[:1]).state["vector"][0])
    arrays = {name: values[index.slots_of(ITEMS)] for name, values in index.arrays.items()}
    arrays["vector"] = np.tile(-100.0 * user, (len(ITEMS), 1)).astype(np.float32)
    worst = scorer("two_tower").with_index(change(index, ITEMS, arrays))
    for candidates, top_k, count in ((None, 5, 5), (None, 99, 22), ([4, 3], 5, 2)):
        ranking = worst.score(REQUESTS[0], candidates, top_k=top_k)
        assert len(ranking.ids) == count and set(ranking.ids) <= set(candidates or ITEMS)
        assert (ranking.scores < -10).all()


def test_unknown_and_repeated_candidates(scorer):
    ranking = scorer().score(REQUESTS[0], [5, 99, 5, 3, 0, 5])
    assert sorted(ranking.ids) == [3, 5]
    assert ranking.unknown.tolist() == [99, 0]
    nothing = scorer().score(REQUESTS[0], [99])
    assert (len(nothing.ids), len(nothing.scores), nothing.unknown.tolist()) == (0, 0, [99])
    assert len(scorer().score(REQUESTS[0], []).ids) == 0
    assert SPARSE * 2 < scorer().index.capacity  # so few are sorted, not marked among all slots
    assert scorer().score(REQUESTS[0], [5, 5]).ids.tolist() == [5]
    assert sorted(scorer().score(REQUESTS[0], [7, 5]).ids) == [5, 7]


def test_batches_of_any_size(scorer):
    """Requests beyond the largest batch go to further batches; a batch may mix all items and some."""
    requests = [REQUESTS[row] for row in (0, 1, 2, 3, 0, 2, 1)]
    candidates = [None, [5, 4], None, [1], [9, 8, 7], None, [2]]
    together = scorer().score(requests, candidates, top_k=4)
    for request, chosen, ranking in zip(requests, candidates, together, strict=True):
        alone = scorer().score(request, chosen, top_k=4)
        np.testing.assert_array_equal(ranking.ids, alone.ids)
        np.testing.assert_allclose(ranking.scores, alone.scores, rtol=0, atol=1e-5)
    assert scorer().score([]) == []


def test_threads_share_a_scorer(scorer):
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        rankings = list(threads.map(lambda row: scorer().score(REQUESTS[row % 4], top_k=5), range(40)))
    for row, ranking in enumerate(rankings):
        np.testing.assert_array_equal(ranking.ids, scorer().score(REQUESTS[row % 4], top_k=5).ids)


# Histories


def with_history(items, types):
    return REQUESTS[0] | {"history": {"item_id": items, "event_type": types}}


def test_long_histories_keep_their_newest_events(scorer):
    items, types = [9, 8, 7, 6, 5, 4, 3, 2, 1], [1, 2, 3] * 3
    long, newest = scorer().score([with_history(items, types), with_history(items[-6:], types[-6:])])
    np.testing.assert_array_equal(long.scores, newest.scores)
    older = scorer().score(with_history(items[:6], types[:6]))
    assert np.abs(by_id(older) - by_id(long)).max() > 1e-3


def test_events_of_unknown_items_are_skipped(scorer):
    some, known = scorer().score([with_history([9, 77, 3, 0], [1, 2, 3, 1]), with_history([9, 3], [1, 3])])
    np.testing.assert_allclose(by_id(some), by_id(known), rtol=0, atol=1e-6)
    assert (some.skipped, known.skipped) == (2, 0)


def test_no_history_may_be_left_out(scorer):
    request = {side: REQUESTS[1][side] for side in ("user", "context")}
    np.testing.assert_array_equal(scorer().score(request).scores, scorer().score(REQUESTS[1]).scores)


# Another index


def test_encoded_items_are_those_of_the_index(scorer):
    """New items are encoded by the artefact's own program; for known items it gives what the index holds."""
    items = {name: values[1:] for name, values in served.world().dataset.items.items()}
    for name in ("tarq_mlp", "order_1_scalar", "order_1_mlp", "converted_0"):
        index = scorer(name).index
        slots = index.slots_of(ITEMS)
        for array, values in scorer(name).encode(items).items():
            assert values.dtype == index.arrays[array].dtype
            np.testing.assert_allclose(values, index.arrays[array][slots], rtol=1e-5, atol=1e-5)


def test_any_number_of_items_is_encoded(scorer):
    """Beyond a batch, each row is that of its item."""
    rows = 1 + np.arange(ENCODE_BATCH + 6) % len(ITEMS)
    items = served.world().dataset.items
    few, many = (scorer("tarq_mlp").encode({name: values[chosen] for name, values in items.items()})
                 for chosen in (ITEMS, rows))
    assert many.keys() == few.keys()
    for name, values in many.items():
        np.testing.assert_allclose(values, few[name][rows - 1], rtol=0, atol=1e-6)


def test_new_items_of_a_conversion(scorer):
    """The correction is the damped residual of the query; if the index has levels, they quantize it."""
    items = {name: values[1:] for name, values in served.world().dataset.items.items()}
    for name in ("converted_1", "converted_levels"):
        index, queries, found = served.item_index(name), served.item_queries()[1:], scorer(name).encode(items)
        centre, *further = index.chosen(np.arange(1, served.ITEMS))
        residuals = queries - centre
        corrections = residuals * damping(residuals, radius=damping_radius(sum(further)))
        corrections = np.asarray(corrections).reshape(len(queries), -1)
        np.testing.assert_array_equal(found["codes"][:, 0], index.codes[1:, 0])
        if name == "converted_1":
            np.testing.assert_allclose(found["correction"], corrections, rtol=1e-5, atol=1e-5)
        else:
            levels = [level.reshape(len(level), -1) for level in index.levels[1:]]
            np.testing.assert_array_equal(
                found["codes"][:, 1:], quantization.encode(levels, corrections).codes)


def test_an_item_of_order_1_is_its_codes(scorer):
    """Besides the vectors that its head reads; only an exact conversion stores a correction."""
    some = {field: values[:1] for field, values in served.world().dataset.items.items()}
    for name, length in (("order_1_scalar", 2), ("order_1_dot", 2), ("order_1_mlp", 2),
                         ("converted_levels", 1 + served.FURTHER), ("converted_1", 1)):
        arrays = scorer(name).index.arrays
        assert arrays["codes"].dtype == np.uint8 and arrays["codes"].shape[1] == length
        assert ("correction" in arrays) == (name == "converted_1")
        row = scorer(name).encode(some)
        assert add(scorer(name).index, [500], row).num_served == served.ITEMS


def test_items_that_another_model_encoded_are_refused(scorer):
    some = {field: values[1:2] for field, values in served.world().dataset.items.items()}
    row = scorer("tarq_mlp").encode(some)
    other = dataclasses.replace(scorer("tarq_mlp").index, fingerprint="trained anew")
    for put, item in ((add, 500), (change, ITEMS[0])):
        assert put(scorer("tarq_mlp").index, [item], row).num_served
        with pytest.raises(ValueError, match="fingerprint trained anew, the model "):
            put(other, [item], row)


def test_items_come_change_and_go_without_compiling(artefact, compilations):
    scorer = Scorer.load(artefact(), batch_sizes=(1,), candidate_sizes=(512,), top_k=5).warm_up()
    fields = served.world().dataset.items
    first, second = sorted(set(ITEMS) - set(REQUESTS[0]["history"]["item_id"]))[:2]
    row = scorer.encode({name: values[first:first + 1] for name, values in fields.items()})
    compilations.clear()
    added = scorer.with_index(add(scorer.index, [500], row))
    changed = added.with_index(change(added.index, [second], row))
    removed = changed.with_index(remove(changed.index, [first]))
    before, after = (dict(zip(found.ids.tolist(), found.scores, strict=True))
                     for found in (scorer.score(REQUESTS[0]), removed.score(REQUESTS[0])))
    assert before.keys() - after.keys() == {first} and after.keys() - before.keys() == {500}
    assert after[500] == after[second] == pytest.approx(before[first], abs=1e-6)
    assert all(after[item] == before[item] for item in after.keys() - {second, 500})
    assert removed.score(REQUESTS[0], [int(first), 500]).unknown.tolist() == [first]
    assert removed.score(with_history([first], [1])).skipped == 0  # histories still refer to it
    forgotten = removed.with_index(remove(removed.index, [first], forget=True))
    assert forgotten.score(with_history([first], [1])).skipped == 1
    assert forgotten.ready and compilations == []
    larger = forgotten.with_index(grow(forgotten.index, 1100))
    assert not larger.ready
    np.testing.assert_array_equal(larger.score(REQUESTS[0]).ids, forgotten.score(REQUESTS[0]).ids)


def test_ready_once_warm(artefact, compilations):
    scorer = Scorer.load(artefact("target_attention"), batch_sizes=(1, 3), candidate_sizes=(512,), top_k=5)
    assert not scorer.ready
    assert scorer.warm_up() is scorer and scorer.ready
    compilations.clear()
    scorer.score(REQUESTS, [None, [1], [2], None])
    scorer.score(REQUESTS[3], [1, 2], top_k=2)
    scorer.score(REQUESTS[:2], [[1], [4, 2]], top_k=9)
    assert compilations == []


# Refusals


def test_an_index_of_another_model_is_refused(artefact, scorer):
    with pytest.raises(ValueError) as error:
        Scorer.load(artefact("tarq_scalar"), index=artefact("tarq_dot") / "index")
    for name in ("tarq_scalar", "tarq_dot"):
        assert scorer(name).index.fingerprint in str(error.value)
    with pytest.raises(ValueError, match="made by another model"):
        scorer("tarq_scalar").with_index(scorer("tarq_dot").index)
    with pytest.raises(ValueError, match="made by another model"):  # the same model, other vectors
        Scorer.load(artefact("tarq_scalar"), index=artefact("tarq_scalar", "int8") / "index")
    with pytest.raises(ValueError, match="made by another model"):  # the same model, exact corrections
        Scorer.load(artefact("converted_levels"), index=artefact("converted_1") / "index")


@pytest.mark.parametrize(("change", "words"), [
    ({"top_k": 0}, "top_k is 0, expected an integer of at least 1"),
    ({"top_k": 2.5}, r"top_k is 2\.5, expected an integer of at least 1"),
    ({"requests": None}, "requests are of type NoneType, expected a request or a list"),
    ({"requests": [REQUESTS[0]] * 5, "candidates": [None] * 4 + ["x"]}, "candidates of request 4 is 'x'"),
    ({"candidates": ["a"]}, r"candidates of request 0 is \['a'\], expected a list of integers"),
    ({"candidates": [[1], [2]]}, "expected a list of integers"),
    ({"candidates": [2**63]}, f"is {2**63}, expected at most"),
    ({"requests": [REQUESTS[0]], "candidates": []}, "candidates are 0 lists, expected 1"),
    ({"requests": [REQUESTS[0], 7]}, "request 1 is 7, expected an object"),
])
def test_wrong_calls(scorer, change, words):
    arguments = {"requests": REQUESTS[0]} | copy.deepcopy(change)
    with pytest.raises(ValueError, match=words):
        scorer().score(**arguments)


def changed_arrays(index, **changes):
    arrays = {name: values for name, values in (dict(index.arrays) | changes).items() if values is not None}
    return dataclasses.replace(index, arrays=arrays)


@pytest.mark.parametrize(("changes", "words"), [
    (lambda arrays: {"codes": None}, r"the index has the arrays \['embedding', .*\], expected \['codes', "),
    (lambda arrays: {"codes": arrays["codes"].astype(np.int32)}, "has 'codes' as int32 .*, expected uint8"),
    (lambda arrays: {"codes": arrays["codes"][:, :1]}, r"has 'codes' as uint8 \[1024, 1\], expected uint8 "),
    (lambda arrays: {"codes": arrays["codes"][:9]}, "has 'codes' of 9 rows, expected 1024, one for each id"),
    (lambda arrays: {"codes": arrays["codes"] | 128}, "'codes' has integers from 128 to .*, expected codes "),
])
def test_an_index_that_does_not_fit(scorer, changes, words):
    index = scorer().index
    with pytest.raises(ValueError, match=words):
        scorer().with_index(changed_arrays(index, **changes(index.arrays)))


def test_codes_fit_their_own_level(scorer):
    """Of a converted model, whose levels differ in size."""
    converted = scorer("converted_levels")
    sizes, index = converted.facts["num_codewords"], converted.index
    assert len(sizes) == 1 + served.FURTHER == index.arrays["codes"].shape[1]
    codes = index.arrays["codes"].copy()
    codes[:, 0] = sizes[0]
    with pytest.raises(ValueError, match="expected codes from 0 to below num_codewords"):
        converted.with_index(changed_arrays(index, codes=codes))


@pytest.mark.parametrize("name", ["order_1_dot", "target_attention"])
def test_padding_reads_no_item(scorer, name):
    """Slot 0, where padding points to, may hold an item with values that overflow."""
    index = scorer(name).index
    embedding = index.arrays["embedding"].copy()
    embedding[0] = 1e30
    other = scorer(name).with_index(changed_arrays(index, embedding=embedding))
    item = int(index.ids[0])
    request = REQUESTS[3]
    assert item not in request["history"]["item_id"]
    others = [number for number in ITEMS if number != item]
    np.testing.assert_array_equal(
        other.score(request, others).scores, scorer(name).score(request, others).scores)


def test_candidate_sizes_come_back_with_slots(artefact):
    """Sizes that a small index does not need are those of a larger one."""
    scorer = Scorer.load(artefact(), batch_sizes=(1,), candidate_sizes=(512, 2048))
    assert scorer.candidate_sizes == [512]
    larger = scorer.with_index(grow(scorer.index, 5000))
    assert larger.candidate_sizes == [512, 2048]
    small = dataclasses.replace(larger.index, **{
        "ids": larger.index.ids[:512], "served": larger.index.served[:512],
        "arrays": {name: values[:512] for name, values in larger.index.arrays.items()}})
    assert larger.with_index(small).with_index(larger.index).candidate_sizes == [512, 2048]


def test_a_service_uses_the_ids_of_the_source(artefact, scorer, tmp_path):
    ids = 1000 - 7 * np.arange(served.ITEMS)
    dataset = dataclasses.replace(served.world().dataset, item_ids=ids)
    build.write(served.method_of("tarq_scalar"), dataset, tmp_path, histories=(2, 6), capacity=600)
    request = copy.deepcopy(REQUESTS[0])
    request["history"]["item_id"] = ids[request["history"]["item_id"]].tolist()
    found, = Scorer.load(tmp_path, batch_sizes=(1,), top_k=ITEMS.size).score([request])
    expected, = scorer().score(REQUESTS[:1], top_k=ITEMS.size)
    assert found.skipped == 0 and expected.skipped == 0
    np.testing.assert_array_equal(np.sort(found.ids), np.sort(ids[1:]))
    np.testing.assert_allclose(found.scores[np.argsort(-found.ids)], by_id(expected), rtol=1e-5)


def test_a_service_uses_rows_if_the_ids_of_the_source_are_text(tmp_path):
    ids = np.array([f"B{row}" for row in range(served.ITEMS)], np.dtypes.StringDType())
    dataset = dataclasses.replace(served.world().dataset, item_ids=ids)
    index = build.write(served.method_of("two_tower"), dataset, tmp_path, histories=(2,))
    np.testing.assert_array_equal(np.sort(index.ids[index.served]), np.arange(1, served.ITEMS))


def test_lengths_of_histories_may_come_in_any_order(tmp_path):
    method = served.method_of("two_tower")
    build.write(method, served.world().dataset, tmp_path, histories=(6, 2, 6))
    scorer = Scorer.load(tmp_path)
    assert scorer.facts["histories"] == [2, 6]
    np.testing.assert_allclose(
        by_id(scorer.score(REQUESTS[2])), served.expected("two_tower")[2], rtol=0, atol=1e-5)
    for histories in ((), (0, 2)):
        with pytest.raises(ValueError, match=r"histories are .*, expected lengths of at least 1"):
            build.write(method, served.world().dataset, tmp_path / "no", histories=histories)


def test_wrong_options(artefact, scorer):
    with pytest.raises(ValueError, match=r"batch_sizes are \(\), expected positive numbers"):
        Scorer.load(artefact(), batch_sizes=())
    with pytest.raises(ValueError, match="requests are 4, expected at most 3"):
        scorer().users(REQUESTS)
    with pytest.raises(ValueError, match=r"items have columns of .* values, expected the same"):
        scorer().encode({"item_id": [1, 2], "item_vector": [[0.0] * 3], "item_price": [1.0]})


def test_scores_that_are_not_finite_are_an_error(artefact):
    scorer = Scorer.load(artefact(), batch_sizes=(1, 2), candidate_sizes=(), top_k=4)
    good = served.world().requests[0]
    bad = good | {"user": good["user"] | {"user_age": 3e38}}
    with pytest.raises(ValueError, match="request 1: its scores are not finite"):
        scorer.score([good, bad])
    rankings = scorer.rank(scorer.users([good, bad]), [None, None])
    assert [ranking.finite for ranking in rankings] == [True, False]


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_seen_whatever_its_sign(bad):
    """If scores were sorted as numbers, a negative NaN or infinity would not be among the best."""
    scores = np.array([[1.0, bad, 3.0, 2.0], [bad, 4.0, 1.0, 2.0]], np.float32)
    allowed = np.array([[True] * 4, [False, True, True, True]])
    found = select(scores, allowed, top_k=2)
    assert found.best.tolist() == [[np.inf, 3.0], [4.0, 2.0]]
    assert found.positions.tolist() == [[1, 2], [1, 3]]
