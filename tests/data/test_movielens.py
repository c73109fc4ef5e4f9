"""MovieLens: every form gives the same requests, none looks ahead, malformed rows are reported."""

import json
import logging

import numpy as np
import pytest

from tarq_jax.data import load, movielens, movielens_files, rows
from tarq_jax.data.movielens import MovielensOptions
from tarq_jax.data.movielens_files import GENRES_100K
from tarq_jax.data.rows import BadRow

ITEMS = [(1, "Toy Story", 1995, ("Animation", "Comedy")), (3, "Heat, The", 1996, ("Action",)),
         (4, "Café Noir", 0, ()), (7, "Alien", 1979, ("Sci-Fi", "Horror")), (9, "Jaws", 1975, ("Horror",))]
USERS = [(1, 24, "M", "technician"), (2, 53, "F", "other"), (5, 23, "M", "writer")]


def random_ratings(seed=0, num=60, times=12):
    rng = np.random.default_rng(seed)
    return [(int(rng.choice([1, 2, 5], p=[0.6, 0.3, 0.1])), int(rng.choice([i[0] for i in ITEMS])),
             int(rng.integers(1, 6)), 1000 + int(rng.integers(times))) for _ in range(num)]


def write_100k(folder, ratings):
    (folder / "u.data").write_text("".join("\t".join(map(str, r)) + "\n" for r in ratings))
    items = [[i, f"{t} ({y})" if y else t, "01-Jan-1995", "", "http://x", *(int(n in g) for n in GENRES_100K)]
             for i, t, y, g in ITEMS]
    (folder / "u.item").write_text("".join("|".join(map(str, i)) + "\n" for i in items), encoding="latin-1")
    (folder / "u.user").write_text("".join("|".join(map(str, (*u, "12345"))) + "\n" for u in USERS))


def write_1m(folder, ratings):
    (folder / "ratings.dat").write_text("".join("::".join(map(str, r)) + "\n" for r in ratings))
    items = [f"{i}::{t}{f' ({y})' if y else ''}::{'|'.join(g)}\n" for i, t, y, g in ITEMS]
    (folder / "movies.dat").write_text("".join(items), encoding="latin-1")
    users = [f"{u}::{g}::{a}::{o}::12345\n" for u, a, g, o in USERS]
    (folder / "users.dat").write_text("".join(users))


def write_25m(folder, ratings):
    lines = [f"{u},{i},{float(r)},{t}\n" for u, i, r, t in ratings]
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "".join(lines))
    items = [f'{i},"{t}{f" ({y})" if y else ""}",{"|".join(g) or "(no genres listed)"}\n'
             for i, t, y, g in ITEMS]
    (folder / "movies.csv").write_text("movieId,title,genres\n" + "".join(items), encoding="utf-8")


def write_atomic(folder, ratings):
    def write(name, header, lines):
        text = ["\t".join(header), *("\t".join(map(str, line)) for line in lines)]
        (folder / name).write_text("\n".join(text) + "\n", encoding="utf-8")

    write("x.inter", ("user_id:token", "item_id:token", "rating:float", "timestamp:float"), ratings)
    write("x.item", ("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq"),
          [(i, t, y or "", " ".join(g)) for i, t, y, g in ITEMS])
    write("x.user", ("user_id:token", "age:token", "gender:token", "occupation:token", "zip_code:token"),
          [(*u, "12345") for u in USERS])


WRITERS = {"ml-100k": write_100k, "ml-1m": write_1m, "ml-25m": write_25m, "atomic": write_atomic}


def listed(requests):
    """Requests as (user, history, feedback, candidates, labels)."""
    h, c = requests.history_offsets, requests.candidate_offsets
    return [(int(u), requests.history[h[r]:h[r + 1]].tolist(),
             requests.event["feedback"][h[r]:h[r + 1]].tolist(),
             requests.candidates[c[r]:c[r + 1]].tolist(), requests.labels[c[r]:c[r + 1]].tolist())
            for r, u in enumerate(requests.user)]


def reference(ratings, options):
    """The definition of requests, as slow loops over raw rows (user, item, rating, time)."""
    splits = {"train": [], "validation": [], "test": []}
    for user in sorted({row[0] for row in ratings}):
        events = sorted((row for row in ratings if row[0] == user), key=lambda row: row[3])
        test = len(events) - int(len(events) * options.test_fraction + 1e-9)
        validation = test - int(len(events) * options.validation_fraction + 1e-9)
        parts = {"train": events[:validation], "validation": events[validation:test], "test": events[test:]}
        for name, part in parts.items():
            for first in range(0, len(part), options.num_candidates):
                shown = part[first:first + options.num_candidates]
                past = [e for e in events if e[3] < min(s[3] for s in shown)][-options.history_length:]
                splits[name].append((
                    user, [e[1] for e in past], [2 if e[2] >= 4 else 1 for e in past],
                    [e[1] for e in shown], [float(e[2] >= 4) for e in shown]))
    return splits


def assert_is_reference(dataset, ratings, options):
    users, items = sorted({r[0] for r in ratings} | {u[0] for u in USERS}), [i[0] for i in ITEMS]
    renamed = [(users.index(u) + 1, items.index(i) + 1, r, t) for u, i, r, t in ratings]
    for name, expected in reference(renamed, options).items():
        assert listed(dataset.splits[name]) == expected


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_gives_the_requests_of_the_definition(tmp_path, form):
    ratings = random_ratings()
    WRITERS[form](tmp_path, ratings)
    options = MovielensOptions(str(tmp_path), history_length=6, num_candidates=4)
    dataset = movielens.generate(options)
    assert dataset.info["form"] == form
    assert dataset.info["genres"] == ["Action", "Animation", "Comedy", "Horror", "Sci-Fi"]
    assert_is_reference(dataset, ratings, options)
    np.testing.assert_allclose(dataset.items["year"], [0, 0.5, 0.6, 0, -1.1, -1.5], rtol=1e-6)
    np.testing.assert_array_equal(dataset.items["genres"].sum(1), [0, 2, 1, 0, 2, 1])
    if form != "ml-25m":
        np.testing.assert_allclose(dataset.users["age"], [0, -11 / 15, 18 / 15, -12 / 15], rtol=1e-6)
        assert dataset.users["gender"].tolist() == [0, 2, 1, 2]
        assert dataset.users["occupation"].tolist() == [0, 2, 1, 3]
    else:
        assert list(dataset.users) == ["user_id"]


@pytest.mark.parametrize("seed", range(8))
def test_no_request_sees_its_candidates_or_anything_later(tmp_path, seed):
    rng = np.random.default_rng(seed)
    ratings = random_ratings(seed, num=int(rng.integers(1, 80)), times=int(rng.integers(1, 40)))
    write_atomic(tmp_path, ratings)
    options = MovielensOptions(str(tmp_path), history_length=int(rng.integers(1, 9)),
                               num_candidates=int(rng.integers(1, 6)), test_fraction=0.3,
                               validation_fraction=0.2)
    assert_is_reference(movielens.generate(options), ratings, options)


def test_real_data_obeys_the_definition(real_data, tmp_path):
    source = real_data / "ml-100k"
    with (source / "ml-100k.inter").open() as file:
        next(file)
        ratings = [tuple(int(float(x)) for x in line.split("\t")) for line in file]
    kept = [row for row in ratings if row[0] <= 120]
    options = MovielensOptions(str(source))
    dataset = load("movielens", data_dir=tmp_path, source=str(source))
    assert sum(len(r.candidates) for r in dataset.splits.values()) == len(ratings) == 100_000
    for name, expected in reference(kept, options).items():
        assert [r for r in listed(dataset.splits[name]) if r[0] <= 120] == expected
    assert dataset.schema.num_items == 1683 and len(dataset.users["age"]) == 944


def test_malformed_rows_are_counted_sampled_and_left_out(tmp_path, caplog):
    ratings = random_ratings(num=200)
    write_1m(tmp_path, ratings)
    bad = ["", "1::3::nine::1000", "1::3::5", "1::3::6::1000", "1::8888::5::1000", "1::3::5::1000::9"]
    lines = [f"{u}::{i}::{r}::{t}" for u, i, r, t in ratings]
    (tmp_path / "ratings.dat").write_text("\n".join([*lines[:50], *bad, *lines[50:]]) + "\n")
    options = MovielensOptions(str(tmp_path), max_bad_fraction=0.1)
    with caplog.at_level(logging.WARNING):
        dataset = movielens.generate(options)
    assert "6 of 206 rows are malformed" in caplog.text
    report = dataset.info["rows"]
    assert (report["read"], report["bad"]) == (206 + len(ITEMS) + len(USERS), 6)
    assert report["reasons"] == dict.fromkeys(
        ("empty row", "not a number", "missing columns", "too many columns", "rating outside the scale",
         "unknown item"), 1)
    assert [s["line"] for s in report["samples"]] == [51, 52, 53, 54, 55]
    assert report["samples"][1] == {"file": "ratings.dat", "line": 52, "reason": "not a number",
                                    "text": "1::3::nine::1000"}
    assert_is_reference(dataset, ratings, options)


def test_too_many_malformed_rows_fail_with_samples(tmp_path):
    ratings = random_ratings(num=50)
    write_25m(tmp_path, [*ratings, (1, 3, 9, 1000)])
    text = r"1 of 51 rows are malformed .*line 52: '1,3,9.0,1000' \(rating out.* at most 0.01 \(option max"
    with pytest.raises(ValueError, match=text):
        movielens.generate(MovielensOptions(str(tmp_path)))


@pytest.mark.parametrize("row, reason", [
    ("nan,3,4,1000", "not a number"), ("inf,3,4,1000", "not a number"), ("1.5,3,4,1000", "user id not a"),
    ("0,3,4,1000", "user id not a"), ("1,3,4.2,1000", "rating outside"), ("1,3,0,1000", "rating outside"),
    ("1,3,4,1e300", "timestamp out of range"), ("1,2.5,4,1000", "unknown item"),
])
@pytest.mark.filterwarnings("error")
def test_rows_that_parse_but_make_no_sense(tmp_path, row, reason):
    ratings = random_ratings()
    write_25m(tmp_path, ratings)
    with (tmp_path / "ratings.csv").open("a") as file:
        file.write(row + "\n")
    options = MovielensOptions(str(tmp_path), max_bad_fraction=0.5)
    dataset = movielens.generate(options)
    (name, count), = dataset.info["rows"]["reasons"].items()
    assert name.startswith(reason) and count == 1
    assert_is_reference(dataset, ratings, options)


@pytest.mark.parametrize(("row", "reason"), [
    ("9|nan|M|writer|1", "age out of range"), ("9|1e300|M|writer|1", "age out of range"),
    ("99999999999999999999|30|M|writer|1", "id out of range"), ("1_0|30|M|writer|1", "not a number"),
    ("\u0661|30|M|writer|1", "not a number"),
])
def test_users_that_make_no_sense(row, reason):
    with pytest.raises(BadRow, match=reason):
        movielens_files._user_100k(row)


def test_a_title_that_is_not_csv(tmp_path):
    """A row contains a line end outside quotes."""
    ratings = random_ratings()
    write_25m(tmp_path, ratings)
    with (tmp_path / "movies.csv").open("a", newline="") as file:
        file.write("11,Torn\rFilm,Drama\n")
    options = MovielensOptions(str(tmp_path), max_bad_fraction=0.5)
    dataset = movielens.generate(options)
    assert dataset.info["rows"]["reasons"] == {"not CSV": 1}
    assert_is_reference(dataset, ratings, options)


def test_windows_line_ends_and_no_last_one(tmp_path):
    ratings = random_ratings()
    write_25m(tmp_path, ratings)
    for name in ("ratings.csv", "movies.csv"):
        text = (tmp_path / name).read_bytes().removesuffix(b"\n").replace(b"\n", b"\r\n")
        (tmp_path / name).write_bytes(text)
    options = MovielensOptions(str(tmp_path))
    dataset = movielens.generate(options)
    assert dataset.info["rows"]["bad"] == 0
    assert_is_reference(dataset, ratings, options)


def test_chunks_do_not_change_what_is_read(tmp_path, monkeypatch):
    ratings = random_ratings(num=100)
    write_100k(tmp_path, [*ratings[:30], (1, 8888, 5, 1), *ratings[30:]])
    options = MovielensOptions(str(tmp_path), max_bad_fraction=0.1)
    whole = movielens.generate(options)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 40)
    parts = movielens.generate(options)
    assert whole.info == parts.info and whole.info["rows"]["samples"][0]["line"] == 31
    assert all(listed(whole.splits[s]) == listed(parts.splits[s]) for s in whole.splits)


def test_missing_folder_or_file_says_what_is_expected(tmp_path):
    text = r"is not a folder.*u\.data.*ratings\.dat.*--config\.data\.source=DIR"
    with pytest.raises(FileNotFoundError, match=text):
        load("movielens", data_dir=tmp_path, source=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="has no MovieLens data"):
        movielens.generate(MovielensOptions(str(tmp_path)))
    write_1m(tmp_path, random_ratings())
    (tmp_path / "users.dat").unlink()
    with pytest.raises(FileNotFoundError, match=r"has ratings.dat but not \['users.dat'\]"):
        movielens.generate(MovielensOptions(str(tmp_path)))


def test_changed_files_are_prepared_anew(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    write_100k(folder, random_ratings(num=30))
    before = load("movielens", data_dir=tmp_path, source=str(folder))
    write_100k(folder, random_ratings(num=40))
    after = load("movielens", data_dir=tmp_path, source=str(folder))
    assert (before.info["num_events"], after.info["num_events"]) == (30, 40)
    ids = [0, *sorted(item for item, *_ in ITEMS)]
    np.testing.assert_array_equal(after.item_ids, ids)
    for path in tmp_path.glob("tarq_movielens/*/*/metadata.json"):  # as data prepared before ids were kept
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items()
                                    if key != "item_ids"}))
    again = load("movielens", data_dir=tmp_path, source=str(folder))
    np.testing.assert_array_equal(again.item_ids, ids)
    assert again.fingerprint == after.fingerprint


@pytest.mark.parametrize("option, value", [("test_fraction", 1.0), ("validation_fraction", 0.8),
                                           ("num_candidates", 0), ("max_bad_fraction", -0.1)])
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=rf"config\.data\.{option} is {value}"):
        MovielensOptions("x", **{option: value})
