"""Taobao UserBehavior through a real Beam runner: requests equal those of slow loops and never look ahead."""

import dataclasses

import logs
import numpy as np
import pytest

from tarq_jax.data import builders, load, load_prepared, prepare, taobao_userbehavior
from tarq_jax.data.taobao_userbehavior import BEHAVIORS, UserBehaviorOptions

beam = pytest.importorskip("apache_beam", reason="Apache Beam prepares this: pip install 'tarq_jax[beam]'")

OPTIONS = {"history_length": 6, "num_negatives": 4, "max_bad_fraction": 0.05, "max_user_events": 20}
FIRST = taobao_userbehavior.FIRST
BAD = ["", "1,3,2,pv", f"1,3,2,look,{FIRST}", f"x,3,2,pv,{FIRST}", "1,3,2,pv,1", f"0,3,2,pv,{FIRST}"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Options and prepared directory; the rows are in two files, with bad rows among them."""
    folder = tmp_path_factory.mktemp("userbehavior")
    rows = [",".join(map(str, row)) for row in logs.userbehavior_rows()]
    logs.write(folder / "part-0.csv", [*rows[:100], *BAD])
    logs.write(folder / "part-1.csv", rows[100:])
    options = {"source": str(folder / "part-*.csv"), **OPTIONS}
    directory = prepare("taobao_userbehavior", data_dir=folder / "data", **options)
    return options, directory


def reference(rows, options, item_rows):
    """(history, positives) of each request by split and user, by slow loops."""
    bounds = UserBehaviorOptions(**options)
    found = {"train": {}, "validation": {}, "test": {}}
    for user in sorted({row[0] for row in rows}):
        own = sorted((time, item_rows[item], BEHAVIORS[kind]) for u, item, _, kind, time in rows
                     if u == user)
        shown = sorted((time, item) for time, item, kind in own if kind == BEHAVIORS["pv"])
        own, shown = own[-options["max_user_events"]:], shown[-options["max_user_events"]:]
        for time in sorted({time for time, _ in shown}):
            past = [(item, kind) for t, item, kind in own if t < time][-options["history_length"]:]
            if past:
                part = ("train" if time < bounds.validation_start else
                        "validation" if time < bounds.test_start else "test")
                positives = sorted(item for t, item in shown if t == time)
                found[part].setdefault(user, []).append((past, positives))
    return found


def listed(requests):
    """(user, history, positives, negatives), with user and items as rows of their tables."""
    h, c = requests.history_offsets, requests.candidate_offsets
    for r, user in enumerate(requests.user):
        past = list(zip(requests.history[h[r]:h[r + 1]].tolist(),
                        requests.event["behavior"][h[r]:h[r + 1]].tolist(), strict=True))
        shown, labels = requests.candidates[c[r]:c[r + 1]], requests.labels[c[r]:c[r + 1]]
        yield int(user), past, shown[labels == 1].tolist(), shown[labels == 0].tolist()


def ranks(keys) -> dict[int, int]:
    """The row of each key, as `vocabulary.ranked` defines it."""
    from tarq_jax.data.beam.vocabulary import SHARES, stable_hash

    order = sorted({str(key) for key in keys}, key=lambda key: (stable_hash(key) % SHARES, key))
    return {int(key): row for row, key in enumerate(order, start=1)}


def test_requests_are_those_of_the_definition(prepared):
    options, directory = prepared
    rows, dataset = logs.userbehavior_rows(), load_prepared(directory)
    item_rows = ranks(item for _, item, *_ in rows)
    user_rows = ranks(user for user, _, _, kind, _ in rows if kind == "pv")
    assert dataset.schema.num_items == len(item_rows) + 1
    for part, users in reference(rows, options, item_rows).items():
        expected = sorted((user_rows[user], past, positives)
                          for user, requests in users.items() for past, positives in requests)
        actual = sorted((user, past, sorted(positives))
                        for user, past, positives, _ in listed(dataset.splits[part]))
        assert actual == expected and actual


def test_histories_are_in_order_of_time_and_end_before_the_request(prepared):
    """Looks each request up among the raw rows: no event is at or after the time of the candidates."""
    _, directory = prepared
    rows, dataset = logs.userbehavior_rows(), load_prepared(directory)
    item_rows = ranks(item for _, item, *_ in rows)
    user_rows = ranks(user for user, _, _, kind, _ in rows if kind == "pv")
    keys = {row: user for user, row in user_rows.items()}
    for requests in dataset.splits.values():
        for user, past, positives, _ in listed(requests):
            own = sorted((time, item_rows[item], BEHAVIORS[kind])
                         for u, item, _, kind, time in rows if u == keys[user])
            times = sorted({time for time, item, kind in own if kind == 1 and item in positives})
            before = [[event[1:] for event in own if event[0] < time] for time in times]
            assert past and past in [events[-len(past):] for events in before]


def test_negatives_are_known_items_that_the_user_never_had(prepared):
    options, directory = prepared
    rows, dataset = logs.userbehavior_rows(), load_prepared(directory)
    item_rows = ranks(item for _, item, *_ in rows)
    users = {row: user for user, row in ranks(u for u, _, _, kind, _ in rows if kind == "pv").items()}
    training = {item_rows[item] for _, item, _, kind, time in rows
                if kind == "pv" and time < UserBehaviorOptions(**options).validation_start}
    for requests in dataset.splits.values():
        for user, _, _, negatives in listed(requests):
            own = sorted(((time, item) for u, item, _, _, time in rows if u == users[user]))
            kept = {item_rows[item] for _, item in own[-options["max_user_events"]:]}
            assert len(set(negatives)) == len(negatives) == options["num_negatives"]
            assert not set(negatives) & kept and set(negatives) <= training


def test_categories_are_those_of_the_items(prepared):
    _, directory = prepared
    dataset, rows = load_prepared(directory), logs.userbehavior_rows()
    item_rows = ranks(item for _, item, *_ in rows)
    categories = ranks(category for _, _, category, *_ in rows)
    for _, item, category, *_ in rows:
        assert dataset.items["category"][item_rows[item]] == categories[category]
    assert dataset.items["category"][0] == 0
    assert {f.name: f.size for f in dataset.schema.fields} == {
        "item_id": len(item_rows) + 1, "category": len(categories) + 1, "behavior": 5}


def test_ids_are_those_of_the_file(prepared):
    _, directory = prepared
    dataset, rows = load_prepared(directory), logs.userbehavior_rows()
    item_rows = ranks(item for _, item, *_ in rows)
    assert dataset.item_ids.dtype == np.int64 and len(dataset.item_ids) == len(item_rows) + 1
    assert {int(item): row for row, item in enumerate(dataset.item_ids) if row} == item_rows


def test_malformed_rows_are_counted_and_sampled(prepared):
    _, directory = prepared
    report = load_prepared(directory).info["rows"]
    assert (report["read"], report["bad"]) == (500 + len(BAD), len(BAD))
    assert report["reasons"] == dict.fromkeys(
        ("empty row", "missing columns", "unknown behavior", "not a number", "timestamp out of range",
         "id out of range"), 1)
    assert len(report["samples"]) == 5
    assert {"file": "events", "line": 0, "reason": "missing columns", "text": "1,3,2,pv"} in report["samples"]


def test_it_is_streamed_and_read_without_beam(prepared, command):
    _, directory = prepared
    code = ("import sys; sys.modules['apache_beam'] = None\n"
            "from tarq_jax import data\n"
            f"dataset = data.load('taobao_userbehavior', data_dir='-', prepared={str(directory)!r},"
            " stream=True)\n"
            "batch = next(data.train_batches(dataset, 'train', batch_size=8, history_length=6,"
            " num_candidates=8, seed=0))\n"
            "print(batch.history_mask.shape)")
    done = command("-c", code)
    assert done.stdout == "(8, 6)\n", done.stderr


def test_preparing_again_gives_the_same_bytes_and_is_left_out_where_done(prepared, tmp_path, monkeypatch):
    options, directory = prepared
    again = prepare("taobao_userbehavior", data_dir=tmp_path, **options)
    for file in directory.glob("*array_record*"):
        assert (again / file.name).read_bytes() == file.read_bytes()
    monkeypatch.setattr(builders, "_generate", None)  # preparing again would fail
    load("taobao_userbehavior", data_dir=tmp_path, **options)


def test_too_many_malformed_rows_fail_and_leave_nothing(prepared, tmp_path):
    options, _ = prepared
    with pytest.raises(ValueError, match=r"6 of 506 rows are malformed .*events: .*at most 0.001"):
        prepare("taobao_userbehavior", data_dir=tmp_path, **options | {"max_bad_fraction": 0.001})
    assert not list(tmp_path.glob("tarq_taobao_userbehavior/*/1.0.0"))


@pytest.mark.parametrize("option, value", [
    ("targets", "pv,look"), ("last_time", 0), ("test_start", 0), ("num_negatives", -1),
    ("max_user_events", 0), ("max_bad_fraction", 1.0), ("item_buckets", -1)])
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=rf"config\.data\.{option} is {value!r}"):
        UserBehaviorOptions("x", **{option: value})


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing.csv: expected UserBehavior.csv; set"):
        prepare("taobao_userbehavior", data_dir=tmp_path, source=str(tmp_path / "nothing.csv"))


def test_a_changed_file_is_another_preparation(tmp_path):
    from tarq_jax.data.sources import fingerprint

    options = UserBehaviorOptions(logs.write_userbehavior(tmp_path)["source"])
    before = fingerprint(taobao_userbehavior.SOURCE, options)
    moved = logs.write_userbehavior(tmp_path / "elsewhere")
    assert fingerprint(taobao_userbehavior.SOURCE, dataclasses.replace(options, **moved)) == before
    path = tmp_path / "UserBehavior.csv"
    path.write_text(path.read_text().replace("pv", "pw", 1))
    assert fingerprint(taobao_userbehavior.SOURCE, options) != before
