"""Swaps: under load, to damaged artefacts, and to a changed index."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest
import served

pytest.importorskip("starlette", reason="the extra [serve] is not installed")

import services

from tarq_jax.serving import Scorer, build
from tarq_jax.serving.artefact import version_name
from tarq_jax.serving.client import Client, Wrong
from tarq_jax.serving.http import versions
from tarq_jax.serving.http.versions import load

GOOD = served.world().requests[0]


@pytest.fixture
def swapped(artefacts):
    """A service for one test, with a token."""
    options = dataclasses.replace(services.PATIENT, token=services.TOKEN)
    with services.running(artefacts / "1", options) as running:
        yield running


@pytest.fixture
def client(swapped):
    with swapped.client(token=services.TOKEN, timeout=120.0) as client:
        yield client


@pytest.fixture
def change_options(monkeypatch):
    """Changes what the next versions of a service are loaded with, and tried for."""
    def change(running, **changes):
        options = dataclasses.replace(running.service.versions._options, **changes)
        monkeypatch.setattr(running.service.versions, "_options", options)

    return change


def test_a_swap(swapped, client):
    before, old = client.score(GOOD), swapped.service.versions.current
    found = client.swap("2")
    after, new = client.score(GOOD), swapped.service.versions.current
    assert new is not old and new.batcher.load is old.batcher.load  # both versions know of an overload
    assert found["version"] == after.version == client.version()["version"] != before.version
    assert found["method"] == "two_tower" and after.scores != before.scores
    assert swapped.metric("tarq_version", version=after.version) == 1
    assert swapped.metric("tarq_version", version=before.version) == 0
    client.swap("1")
    again = client.score(GOOD)
    assert again == before
    assert swapped.metric("tarq_swaps_total", result="taken") == 3


def test_memory_is_given_back_after_a_swap_and_once_more_when_it_has_settled(client, monkeypatch):
    calls = threading.Semaphore(0)
    monkeypatch.setattr(versions, "SETTLED", 0.01)
    monkeypatch.setattr(versions, "clean_up", calls.release)
    client.swap("2")
    assert calls.acquire(timeout=60) and calls.acquire(timeout=60)
    assert not calls.acquire(timeout=0.1)


def test_a_changed_index(client):
    """Nothing is compiled for it, and the two versions have different names."""
    before = client.score(GOOD, top_k=20)
    found = client.swap("1", "index-1")
    after = client.score(GOOD, top_k=20)
    assert found["items"] == 21 and found["version"] == after.version != before.version
    assert 1 not in client.score(GOOD, [1, 2]).ids
    assert client.score(GOOD, [1, 2]).unknown == [1]


def test_back_to_the_first_version_from_one_that_takes_more(artefacts):
    options = dataclasses.replace(services.PATIENT, token=services.TOKEN)
    with (services.running(artefacts / "narrow", options) as running,
          running.client(token=services.TOKEN, timeout=120.0) as client):
        for name in ("1", "narrow"):
            assert client.swap(name)["version"].startswith(f"{name}-")


def test_another_index_shares_what_is_compiled(artefacts):
    options = services.PATIENT
    first = load(artefacts / "1", artefacts / "1" / "index", options)
    same = load(artefacts / "1", artefacts / "index-1", options, first)
    assert same.ready and same.index.num_served == 21
    assert same._model.programs is first._model.programs
    assert same._model.item_weights is first._model.item_weights
    other = load(artefacts / "2", artefacts / "2" / "index", options, first)
    assert other.ready and other._model.programs is not first._model.programs


def test_other_programs_for_the_same_weights_are_another_model(artefacts, tmp_path):
    """As after a fix of the score function: nothing of the earlier version is reused."""
    method = served.method_of("tarq_scalar")
    raised = method._replace(score=lambda *arguments: method.item_side(*arguments) + 1.0)
    build.write(raised, served.world().dataset, tmp_path, histories=(2, 6), capacity=600)
    sizes = {"batch_sizes": (1,), "candidate_sizes": (), "top_k": 5}
    before = Scorer.load(artefacts / "1", **sizes)
    after = Scorer.load(tmp_path, **sizes, like=before)
    np.testing.assert_allclose(after.score(GOOD).scores, before.score(GOOD).scores + 1.0, rtol=1e-5)


def test_a_model_trained_anew_shares_what_is_compiled(artefacts):
    """Its programs are equal to the bit, and its index gets as many slots."""
    sizes = {"batch_sizes": (1, 3), "candidate_sizes": (512,), "top_k": 20}
    first = Scorer.load(artefacts / "1", **sizes).warm_up()
    anew = Scorer.load(artefacts / "anew", **sizes, like=first)
    alone = Scorer.load(artefacts / "anew", **sizes)
    assert anew.ready and not alone.ready and alone.index.capacity < anew.index.capacity
    compiled = [program._cache_size() for program in first._model.programs[1:]]
    found, candidates = anew.score(GOOD), anew.score(GOOD, [3, 1])
    assert [program._cache_size() for program in first._model.programs[1:]] == compiled
    np.testing.assert_array_equal(found.ids, alone.score(GOOD).ids)
    np.testing.assert_allclose(found.scores, alone.score(GOOD).scores, rtol=1e-5)
    np.testing.assert_allclose(candidates.scores, alone.score(GOOD, [3, 1]).scores, rtol=1e-5)
    assert np.abs(found.scores - first.score(GOOD).scores).max() > 0.01
    assert not Scorer.load(artefacts / "anew", **sizes | {"top_k": 5}, like=first).ready


def test_more_slots_do_not_keep_what_was_compiled_for_fewer(artefacts):
    sizes = {"batch_sizes": (1,), "candidate_sizes": (512,), "top_k": 20}
    first = Scorer.load(artefacts / "1", **sizes).warm_up()
    more = Scorer.load(artefacts / "1", index=artefacts / "index-more", **sizes, like=first)
    assert more.index.capacity == 2 * first.index.capacity and not more.ready
    more.warm_up()
    for before, after in zip(first._model.programs[1:], more._model.programs[1:], strict=True):
        assert before is not after
    assert more._model.programs.score_all._cache_size() == 1
    np.testing.assert_array_equal(more.score(GOOD).ids, first.score(GOOD).ids)


def test_another_model_keeps_its_own_number_of_slots(artefacts):
    other = Scorer.load(artefacts / "anew", like=Scorer.load(artefacts / "2"))
    assert other.index.capacity == Scorer.load(artefacts / "anew").index.capacity


@pytest.mark.parametrize(("body", "status", "words"), [
    ({"artefact": "damaged"}, 422, "ids.npy has"),
    ({"artefact": "missing"}, 422, "manifest.json is missing"),
    ({"artefact": "2", "index": "index-1"}, 422, "made by another model"),
    ({"artefact": "narrow"}, 422, "event field 'event_type' as categorical of size 3, expected categorical"),
    ({"artefact": "1", "index": "index-none"}, 422, "index-none serves 0 items, expected at least one"),
    ({"artefact": "../1"}, 422, "'artefact' is '../1', expected the name of a folder"),
    ({"artefact": "/etc"}, 422, "expected the name of a folder"),
    ({"artefact": ".."}, 422, "expected the name of a folder"),
    ({"artefact": ""}, 422, "expected the name of a folder"),
    ({"artefact": 1}, 422, "'artefact' is of type int"),
    ({"artefact": "1", "index": None}, 422, "'index' is of type NoneType"),
    ({"index": "1"}, 422, "has the keys ['index'], expected 'artefact' and perhaps 'index'"),
    ({"artefact": "1", "force": True}, 422, "has the keys ['artefact', 'force']"),
    (b"[" * 1000 + b"]" * 1000, 422, "of type list, expected an object"),
    (b'{"artefact": ' + b"[" * 900 + b"]" * 900 + b"}", 422, "'artefact' is of type list"),
    (b"{", 400, "expected a JSON object"),
])
def test_a_bad_one_is_refused_and_the_old_one_goes_on(guarded, body, status, words):
    version = guarded.service.versions.current
    found = guarded.ask("POST", "/swap", body, authorization=f"Bearer {services.TOKEN}")
    assert found.status == status and words in found.json["error"]
    assert guarded.service.versions.current is version
    assert version.batcher.patience == 0
    with guarded.client(token=services.TOKEN) as client:
        assert client.score(GOOD).version == version.name


@pytest.mark.parametrize(("index", "changes", "words"), [
    ("index-1", {"limits": dataclasses.replace(services.PATIENT.limits, seconds=1e-6)},
     "for a batch of 1, expected less than the time-out, 1e-06"),
    ("index-infinite", {"candidate_sizes": (1,)}, "a trial failed: request: its scores are not finite"),
], ids=["slow", "infinite"])
def test_what_the_trials_refuse(guarded, change_options, index, changes, words):
    """Requests for all items are tried too, whatever the numbers of given candidates are."""
    version = guarded.service.versions.current
    change_options(guarded, **changes)
    with guarded.client(token=services.TOKEN, timeout=120.0) as client:
        with pytest.raises(Wrong, match=words):
            client.swap("1", index)
        assert client.score(GOOD).version == version.name


def test_all_items_have_to_be_ranked_in_time(guarded, change_options, monkeypatch):
    async def slow(self, scorer, query, size, trials=versions.TRIALS):
        return 1e-3 if query.candidates is not None else 60.0

    monkeypatch.setattr(versions.Versions, "_time", slow)
    with guarded.client(token=services.TOKEN, timeout=120.0) as client, pytest.raises(
            Wrong, match=r"takes 60 seconds for a batch of 1 that ranks all \d+ items, expected less than"):
        client.swap("1", "index-1")


def test_batches_that_are_too_slow_to_be_used_are_not_tried(swapped, client, change_options):
    assert swapped.service.versions.current.seconds.keys() == {1, 3}
    change_options(swapped, budget=1e-6)
    client.swap("1", "index-1")
    assert swapped.service.versions.current.seconds.keys() == {1}


def test_a_device_that_fails_in_a_trial(guarded, monkeypatch):
    """It is refused as well as one that fails while it is loaded, and counted."""
    def fails(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")

    monkeypatch.setattr(versions, "answer", fails)
    before = guarded.metric("tarq_swaps_total", result="refused")
    found = guarded.ask("POST", "/swap", {"artefact": "1"}, authorization=f"Bearer {services.TOKEN}")
    assert found.status == 422 and "does not run on the device: RESOURCE_EXHAUSTED" in found.json["error"]
    assert guarded.metric("tarq_swaps_total", result="refused") == before + 1


def test_one_swap_at_a_time(swapped, client):
    done = []
    with swapped.busy():  # the trials of the swap wait
        thread = threading.Thread(target=lambda: done.append(client.swap("2")))
        thread.start()
        services.wait_for(lambda: swapped.service.versions._loading.locked())
        with swapped.client(token=services.TOKEN, timeout=120.0) as other:
            with pytest.raises(Wrong, match="another version is being loaded"):
                other.swap("2")
            assert other.version()["method"] == "scalar"
    thread.join(120)
    assert done[0]["method"] == "two_tower"


def test_what_waits_is_answered_by_the_version_that_took_it(swapped, client, monkeypatch):
    """Requests that wait while another version takes over are neither lost nor mixed; the swap waits, too."""
    answers = []

    def ask():
        with swapped.client(token=services.TOKEN, timeout=120.0) as other:
            answers.append(other.score(GOOD))

    async def untried(self, scorer, query, *size):
        return 1e-3 if size else {1: 1e-3}

    for trial in ("_time", "_try"):  # they would wait for the thread that computes
        monkeypatch.setattr(versions.Versions, trial, untried)
    old = client.version()["version"]
    threads = [threading.Thread(target=ask) for _ in range(5)]
    with swapped.busy():
        for thread in threads:
            thread.start()
        services.wait_for(lambda: swapped.metric("tarq_in_flight") == 5)
        swapping = threading.Thread(target=client.swap, args=("2",))
        swapping.start()
        services.wait_for(lambda: swapped.service.versions.current.name != old)
        time.sleep(0.1)
        assert swapping.is_alive() and not answers
        with swapped.client() as other:
            new = other.version()["version"]
    for thread in [*threads, swapping]:
        thread.join(120)
    assert [answer.version for answer in answers] == [old] * 5
    assert client.score(GOOD).version == new != old


def check_swaps_under_load(running, artefacts, swaps):
    """No request fails, and each answer comes entirely from the version that it names."""
    expected = {}
    for name in ("1", "2"):
        ranking = Scorer.load(artefacts / name, batch_sizes=(1,), candidate_sizes=(512,), top_k=20).score(
            GOOD, top_k=5)
        expected[version_name(artefacts / name, artefacts / name / "index")] = ranking.ids.tolist()
    found, failures, stop = set(), [], threading.Event()
    counts = [0, 0]

    def ask(place):
        with Client(running.url, token=services.TOKEN, timeout=120.0) as client:
            while not stop.is_set():
                try:
                    answer = client.score(GOOD, top_k=5)
                except Exception as error:
                    failures.append(error)
                    return
                counts[place] += 1
                found.add(answer.version)
                if answer.ids != expected[answer.version]:
                    failures.append(answer)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(counts))]
    for thread in threads:
        thread.start()
    with running.client(token=services.TOKEN, timeout=300.0) as client:
        for swap in range(swaps):
            client.swap("2" if swap % 2 == 0 else "1")
            enough = sum(counts) + 4
            services.wait_for(lambda enough=enough: sum(counts) >= enough or failures)
    stop.set()
    for thread in threads:
        thread.join(120)
    assert failures == [] and found == set(expected)


@pytest.mark.slow
def test_swaps_under_load(swapped, artefacts):
    check_swaps_under_load(swapped, artefacts, swaps=4)


@pytest.mark.slow
def test_a_hundred_swaps_under_load(swapped, artefacts):
    check_swaps_under_load(swapped, artefacts, swaps=100)
