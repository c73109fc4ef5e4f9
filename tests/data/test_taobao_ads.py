"""Taobao display ads through a real Beam runner: requests, features and profiles equal slow loops."""

import logs
import numpy as np
import pytest

from tarq_jax.data import load_prepared, prepare
from tarq_jax.data.rows import BadRow
from tarq_jax.data.taobao_ads import BEHAVIORS, PLACES, PROFILE, AdsOptions

beam = pytest.importorskip("apache_beam", reason="Apache Beam prepares this: pip install 'tarq_jax[beam]'")

OPTIONS = {"history_length": 5, "min_history": 0, "max_bad_fraction": 0.1}
BAD = {"shown": [("1", "1494000000", "1", "430548_1007", "1", "1")], "ads": [(99, 1, 1, 1, 1, "-3")],
       "profiles": [(14, 0, 0, 9, 0, 1, 1, 0, 1)], "behaviors": [(1, 1494000000, "pv", 3)]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The rows and the data set."""
    folder = tmp_path_factory.mktemp("ads")
    rows = logs.ads_rows()
    options = logs.write_ads(folder / "raw", {role: [*lines, *BAD[role]] for role, lines in rows.items()})
    return rows, load_prepared(prepare("taobao_ads", data_dir=folder / "data", **options, **OPTIONS))


def values_of(dataset, item):
    """The item table's values for an item, without its number."""
    return tuple(np.round(dataset.items[name][item], 5) for name in ("cate", "brand", "campaign", "customer",
                                                                     "price"))


def listed(dataset):
    """Requests by split as (profile, place, history of (cate, brand, behavior), {ad's values: label})."""
    found = {}
    for part, requests in dataset.splits.items():
        h, c = requests.history_offsets, requests.candidate_offsets
        found[part] = [
            (tuple(dataset.users[name][user] for name in PROFILE), requests.context["pid"][r],
             [(*values_of(dataset, item)[:2], kind) for item, kind in zip(
                 requests.history[h[r]:h[r + 1]], requests.event["behavior"][h[r]:h[r + 1]], strict=True)],
             sorted((values_of(dataset, item), label) for item, label in zip(
                 requests.candidates[c[r]:c[r + 1]], requests.labels[c[r]:c[r + 1]], strict=True)))
            for r, user in enumerate(requests.user)]
    return found


def ids(keys) -> dict[str, int]:
    """The row of each key of a vocabulary; 0 for "NULL"."""
    from tarq_jax.data.beam.vocabulary import SHARES, stable_hash

    order = sorted(set(keys), key=lambda key: (stable_hash(key) % SHARES, key))
    return {key: row for row, key in enumerate(order, start=1)} | {"NULL": 0}


def reference(rows):
    """The same as `listed`, by slow loops over the raw rows."""
    bounds = AdsOptions("x", **OPTIONS)
    shown_ads = {row[2] for row in rows["shown"]}
    ads = {row[0]: [str(value) for value in row[1:5]] for row in rows["ads"]}
    seen = {(str(category), str(brand)) for *_, category, brand in rows["behaviors"]}
    known = [ads[ad] for ad in shown_ads]
    cate = ids([values[0] for values in known] + [category for category, _ in seen])
    brand = ids({values[3] for values in known} - {"NULL"} | {brand for _, brand in seen})
    campaign, customer = (ids(values[place] for values in known) for place in (1, 2))
    price = {row[0]: np.float32((np.log1p(row[5]) - 5) / 2) for row in rows["ads"]}
    profiles = {row[0]: tuple(0 if value == "" else value + 1 for value in row[1:])
                for row in rows["profiles"]}
    found = {"train": [], "validation": [], "test": []}
    for user, time, place in sorted({(row[0], row[1], row[3]) for row in rows["shown"]}):
        past = sorted((t, cate[str(c)], brand[str(b)], BEHAVIORS[kind])
                      for u, t, kind, c, b in rows["behaviors"] if u == user and t < time)
        candidates = []
        for u, t, ad, p, _, clicked in rows["shown"]:
            if (u, t, p) == (user, time, place):
                values = ads[ad]
                candidates.append(((cate[values[0]], brand[values[3]], campaign[values[1]],
                                    customer[values[2]], np.round(price[ad], 5)), clicked))
        part = ("train" if time < bounds.validation_start else
                "validation" if time < bounds.test_start else "test")
        found[part].append((profiles.get(user, (0,) * len(PROFILE)), PLACES[place], past, sorted(candidates)))
    return found


def test_requests_are_those_of_the_definition(prepared):
    rows, dataset = prepared
    actual, expected = listed(dataset), reference(rows)
    for part, requests in expected.items():
        assert len(actual[part]) == len(requests) > 3
        left = list(actual[part])
        for profile, place, past, candidates in requests:
            # Events of the same second may come in any order among themselves: compare them by second.
            match = next(r for r in left if (r[0], r[1], r[3]) == (profile, place, candidates)
                         and len(r[2]) == min(len(past), OPTIONS["history_length"])
                         and sorted(r[2]) in _last(past, OPTIONS["history_length"]))
            left.remove(match)
        assert not left


def _last(past, num):
    """Every way to keep the last events, if the earliest of them share their second with others."""
    import itertools

    if len(past) <= num:
        return [sorted(event[1:] for event in past)]
    first = past[-num][0]
    sure = [event[1:] for event in past if event[0] > first]
    tied = [event[1:] for event in past if event[0] == first]
    return [sorted([*sure, *some]) for some in itertools.combinations(tied, num - len(sure))]


def test_schema_and_tables(prepared):
    rows, dataset = prepared
    sizes = {f.name: (f.side, f.size) for f in dataset.schema.fields}
    shown = {row[2] for row in rows["shown"]}
    pairs = {row[3:] for row in rows["behaviors"]}
    assert sizes["item_id"] == ("item", 1 + len(shown) + len(pairs))
    assert sizes["final_gender_code"] == ("user", 4) and sizes["pid"] == ("context", 3)
    np.testing.assert_array_equal(dataset.items["item_id"], np.arange(sizes["item_id"][1]))
    assert {id for id in dataset.item_ids if id.startswith("ad/")} == {f"ad/{ad}" for ad in shown}
    assert sum(id.startswith("pair/") for id in dataset.item_ids) == len(pairs)
    assert len(dataset.users["age_level"]) == 1 + len({row[0] for row in rows["shown"]})


def test_malformed_rows_of_all_files_are_reported(prepared):
    rows, dataset = prepared
    report = dataset.info["rows"]
    assert report["read"] == sum(map(len, rows.values())) + 4
    assert report["reasons"] == dict.fromkeys(
        ("neither clicked nor not clicked", "price out of range", "attribute out of range",
         "missing columns"), 1)
    assert {sample["file"] for sample in report["samples"]} == {"shown", "ads", "profiles", "behaviors"}


@pytest.mark.parametrize("level", ["nan", "inf", "-inf", "1e400", "1.5", "7", "x"])
def test_levels_that_are_none(level):
    from tarq_jax.data.beam.ads import parse_profile

    columns = {name: level if name == "age_level" else "0" for name in PROFILE}
    with pytest.raises(BadRow):
        parse_profile(",".join(["7", *columns.values()]))


def test_a_missing_file_is_named(tmp_path):
    options = logs.write_ads(tmp_path)
    (tmp_path / "user_profile.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*user_profile.csv: expected a folder with"):
        prepare("taobao_ads", data_dir=tmp_path / "data", **options)
