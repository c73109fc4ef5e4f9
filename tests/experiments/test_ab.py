"""A/B analysis: known lifts are found, closed forms hold, and every fault of a file is reported."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarq_jax import statistics
from tarq_jax.experiments import ab, ab_rows

HEADER = "user,arm,impressions,clicks,orders,revenue"
GOOD = [f"u{i},{'treatment' if i % 2 else 'control'},{10 + i % 3},{2 + i % 4},{i % 2 + i % 3 // 2},{i % 5}.5"
        for i in range(40)]
LIFTS = {"ctr": 0.3, "cvr": 0.2, "revenue": 0.1}


def write(folder, rows, header=HEADER, name="rows.csv"):
    path = folder / name
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def plan(**changes):
    return ab.Plan()._replace(**changes)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulated") / "rows.parquet"
    ab_rows.simulate(path, 40_000, LIFTS, seed=3)
    return path


def test_known_lifts_are_found(simulated):
    table, report = ab_rows.read(simulated)
    assert report.read == 40_000 and report.bad == 0 and table.arms == ("control", "treatment")
    rows = {(row["metric"], row["method"]): row for row in ab.analyse(table, "control", plan())}
    assert set(rows) == {*((m, how) for m in ("ctr", "cvr", "gmv") for how in ("delta", "cuped")),
                         ("gmv", "bootstrap")}
    truth = {"ctr": 0.3, "cvr": 0.2, "gmv": 1.3 * 1.2 * 1.1 - 1}
    for (metric, _), row in rows.items():
        assert row["low"] < truth[metric] < row["high"] and row["p_value"] < 0.01
    assert all(("p_adjusted" in row) == (method == "cuped") for (_, method), row in rows.items())
    width = {key: row["high"] - row["low"] for key, row in rows.items()}
    assert width["ctr", "cuped"] < width["ctr", "delta"]
    assert width["gmv", "bootstrap"] == pytest.approx(width["gmv", "delta"], rel=0.15)


def test_rows_are_closed_forms(tmp_path):
    table, _ = ab_rows.read(write(tmp_path, GOOD))
    rows = ab.analyse(table, "control", plan(level=0.9))
    assert [(row["metric"], row["method"]) for row in rows] == [
        ("ctr", "delta"), ("cvr", "delta"), ("gmv", "delta"), ("gmv", "bootstrap")]
    numbers = np.array([line.split(",")[2:] for line in GOOD], float)
    own, others = numbers[1::2].sum(axis=0), numbers[::2].sum(axis=0)
    for row, (top, bottom) in zip(rows, ((1, 0), (2, 1)), strict=False):
        assert row["value"] == pytest.approx(own[top] / own[bottom])
        assert row["lift"] == pytest.approx(own[top] / own[bottom] / (others[top] / others[bottom]) - 1)
    assert rows[2]["value"] == pytest.approx(own[3] / 20)
    expected = statistics.adjust([row["p_value"] for row in rows[:3]])
    assert [row["p_adjusted"] for row in rows[:3]] == pytest.approx(expected)


def test_users_for_a_lift_make_it_detectable(simulated):
    """With `users_for_reported` users, the detectable lift would be the reported lift."""
    table, _ = ab_rows.read(simulated)
    for row in ab.analyse(table, "control", plan()):
        factor = (row["users_for_reported"] / len(table.arm)) ** 0.5
        assert row["detectable_lift"] / factor == pytest.approx(row["reported_lift"], rel=0.01)


def test_three_arms_are_each_compared_with_the_control(tmp_path):
    rows = [line.replace("treatment", "second" if i % 4 == 1 else "first") for i, line in enumerate(GOOD)]
    table, _ = ab_rows.read(write(tmp_path, rows))
    found = ab.analyse(table, "control", plan())
    assert {row["arm"] for row in found} == {"first", "second"}
    for row in found:  # the number of users present, split as they are, is what the detectable lift needs
        users = sum((table.arm == table.arms.index(arm)).sum() for arm in ("control", row["arm"]))
        needed = row["users_for_reported"] * (row["reported_lift"] / row["detectable_lift"]) ** 2
        assert needed == pytest.approx(users, rel=1e-3)
    assert ab.sample_ratio(table, [2, 1, 1])[1] == pytest.approx(1.0)
    assert ab.sample_ratio(table, [])[1] < 0.1


def test_the_lifts_of_the_paper():
    assert ab.REPORTED == {"ctr": 0.0057, "cvr": 0.0459, "gmv": 0.0757}


def test_buckets_count_their_users(tmp_path):
    """Rows of two users each, the same ones: with sums of the same users, and with half of each for two."""
    names = [*HEADER.split(","), *ab_rows.BEFORE]
    values = np.array([line.split(",")[2:] for line in GOOD], float)
    keys = [line.split(",")[:2] for line in GOOD]

    def rows_of(scale, users):
        lines = [",".join([*key, *map(str, scale * row), *map(str, scale * (row + 1))]) for key, row in
                 zip(keys, values, strict=True)]
        header = ",".join(names)
        if users:
            lines, header = [f"{line},{users}" for line in lines], f"{header},users"
        table, _ = ab_rows.read(write(tmp_path, lines, header))
        return ab.analyse(table, "control", plan(replicates=200)), ab.sample_ratio(table, [3, 2])

    (alone, (few, p_few)), (pairs, (many, p_many)) = rows_of(1, 0), rows_of(2, 2)
    assert few.tolist() == [20, 20] and many.tolist() == [40, 40] and p_many < p_few
    for one, two in zip(alone, pairs, strict=True):
        for name in ("control_value", "value", "lift", "low", "high", "p_value", "detectable_lift"):
            assert two[name] == pytest.approx(one[name]), (one["metric"], one["method"], name)
        assert two["users_for_reported"] == pytest.approx(2 * one["users_for_reported"], abs=1)
    third = {row["method"]: row for row in rows_of(2, 3)[0] if row["metric"] == "gmv"}
    assert set(third) == {"delta", "cuped", "bootstrap"}
    assert third["delta"]["value"] == pytest.approx(alone[-1]["value"] * 2 / 3)


def test_buckets_of_several_sizes_are_weighted(tmp_path):
    """GMV is revenue over users, though one bucket has a hundred times the users of another."""
    sizes = [100 if i % 5 == 0 else 1 for i in range(40)]
    lines = [f"b{i},{'treatment' if i % 2 else 'control'},9,3,1,{(2.0 + i % 3) * size},{size}"
             for i, size in enumerate(sizes)]
    table, _ = ab_rows.read(write(tmp_path, lines, f"{HEADER},users"))
    found = {row["method"]: row for row in ab.analyse(table, "control", plan()) if row["metric"] == "gmv"}
    for arm, name in ((0, "control_value"), (1, "value")):
        own = [(float(line.split(",")[5]), size) for i, (line, size) in enumerate(
            zip(lines, sizes, strict=True)) if i % 2 == arm]
        for method in ("delta", "bootstrap"):
            assert found[method][name] == pytest.approx(sum(r for r, _ in own) / sum(u for _, u in own))
    assert found["bootstrap"]["low"] < found["delta"]["lift"] < found["bootstrap"]["high"]


@pytest.mark.parametrize("users", ["0", "1.5", "-2", "inf", "", "1e300"])
def test_rows_that_count_no_users(users, tmp_path):
    reason = {"-2": "users is negative", "inf": "users is not a finite", "": "users is not a finite"}
    path = write(tmp_path, [*(f"{line},3" for line in GOOD), f"x,control,1,1,1,1,{users}"], f"{HEADER},users")
    with pytest.raises(ValueError, match=reason.get(users, "users is not a positive whole number")):
        ab_rows.read(path)


def test_parquet_and_csv_say_the_same(simulated, tmp_path):
    from pyarrow import csv

    path = tmp_path / "rows.csv"
    csv.write_csv(pq.read_table(simulated), path)
    for first, second in zip(*(ab_rows.read(p)[0].columns.values() for p in (simulated, path)), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("bad", "reason"), [
    ("x,control,-1,0,0,0", "impressions is negative"),
    ("x,control,1,nan,0,0", "clicks is not a finite number"),
    ("x,control,1,,0,0", "clicks is not a finite number"),
    ("x,control,1,1,one,0", "orders is not a finite number"),
    ("x,,1,1,1,0", "arm is empty"), (",control,1,1,1,0", "user is empty"),
    ("x,control,1,1,1,inf", "revenue is not a finite number"), ("x,control,1", ab_rows.TORN),
    ("x,control,1,1,1,1,1", ab_rows.TORN)])
def test_bad_rows_are_counted_and_sampled(bad, reason, tmp_path):
    path = write(tmp_path, [*GOOD, bad])
    with pytest.raises(ValueError, match=f"1 of 41 rows are malformed.*{reason}"):
        ab_rows.read(path)
    table, report = ab_rows.read(path, max_bad_fraction=0.1)
    assert len(table.arm) == 40 and report.reasons == {reason: 1}
    assert report.samples[0]["text"].strip("{}").count("control") == (0 if reason == "arm is empty" else 1)


@pytest.mark.parametrize(("rows", "header", "message"), [
    (GOOD, HEADER.replace("orders", "order"), "has no column 'orders', expected user, arm"),
    (GOOD, HEADER.replace("user", "id"), "has no column 'user'"),
    ([*GOOD, GOOD[3]], HEADER, "user 'u3' is in 2 rows, expected one row a user; 1 users are in several"),
    (GOOD[::2], HEADER, r"column 'arm' has \['control'\], expected at least two arms"),
    ([], HEADER, "has no rows, expected one a user"),
    ([f"{line},1" for line in GOOD], f"{HEADER},revenue", "more than one column 'revenue', expected one of"),
])
def test_wrong_files(rows, header, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ab_rows.read(write(tmp_path, rows, header))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("rows.csv", b"", "cannot be read as CSV"), ("rows.csv", b"\xff\xfe\x00bad", "cannot be read as CSV"),
    ("rows.parquet", b"PAR1 and then nothing", "cannot be read as Parquet"),
    ("rows.parquet", b"", "cannot be read as Parquet")])
def test_broken_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        ab_rows.read(tmp_path / name)
    assert name in str(caught.value)


def test_columns_of_a_parquet_file_that_are_there_twice(tmp_path):
    names = ["user", "arm", *ab_rows.COUNTS, "revenue"]
    pq.write_table(pa.table([pa.array([1, 2])] * len(names), names=names), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="more than one column 'revenue', expected one of each name"):
        ab_rows.read(tmp_path / "rows.parquet")


def test_columns_of_other_types(tmp_path):
    columns = {name: [1, 2] for name in ab_rows.COUNTS} | {"user": [1, 2], "arm": ["a", "b"]}
    columns["clicks"] = [[1], [2]]
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="clicks is not a finite number"):
        ab_rows.read(tmp_path / "rows.parquet")


@pytest.mark.parametrize("users", [pa.array([[1], [2]]), pa.array([b"\xff", b"b"])])
def test_users_of_other_types(users, tmp_path):
    columns = {name: [1, 2] for name in ab_rows.COUNTS} | {"user": users, "arm": ["a", "b"]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet: column 'user' is of type .*, expected text or wh"):
        ab_rows.read(tmp_path / "rows.parquet")


def test_arms_are_drawn_apart_in_the_bootstrap(tmp_path):
    """With two users in an arm, drawing both arms together would leave the arm empty in some replicates."""
    table, _ = ab_rows.read(write(tmp_path, [*GOOD[::2], GOOD[1], GOOD[3]]))
    row = ab.analyse(table, "control", plan(replicates=200))[-1]
    assert row["method"] == "bootstrap" and np.isfinite([row["low"], row["high"]]).all()


def test_a_bootstrap_of_an_arm_without_buyers_is_refused(tmp_path):
    """Replicates without the control's one buyer have no lift, which is not a lift of 0."""
    rows = [f"u{i},{arm},9,3,{int(i == 0)},{float(i == 0)}" for arm in ("control", "b") for i in range(40)]
    rows = [row if "control" in row else row.replace("u", "v").replace(",1,1.0", ",0,0.0") for row in rows]
    found = {(row["metric"], row["method"]): row for row in ab.analyse(
        ab_rows.read(write(tmp_path, rows))[0], "control", plan(replicates=200))}
    assert "has no bootstrap" in found["gmv", "bootstrap"]["note"]


def test_a_bootstrap_of_the_same_constant_is_no_lift(tmp_path):
    """In arms of other sizes it rounds differently."""
    rows = [f"{arm}{i},{arm},9,3,1,0.1" for arm, size in (("control", 70), ("b", 110)) for i in range(size)]
    row = ab.analyse(ab_rows.read(write(tmp_path, rows))[0], "control", plan(replicates=200))[-1]
    assert (row["method"], row["lift"], row["low"], row["high"], row["p_value"]) == ("bootstrap", 0, 0, 0, 1)


def noted(table):
    """The notes on results that cannot be computed, by (metric, method), and the set of those that can."""
    rows = ab.analyse(table, "control", plan(replicates=200))
    notes = {(row["metric"], row["method"]): row["note"] for row in rows if "note" in row}
    return notes, {(row["metric"], row["method"]) for row in rows if np.isfinite(row.get("p_value", np.nan))}


def test_a_control_without_revenue_in_some_replicates_is_said(tmp_path):
    table, _ = ab_rows.read(write(tmp_path, [GOOD[1], GOOD[3], "x,control,9,3,1,0", "y,control,9,3,1,5"]))
    notes, had = noted(table)
    assert list(notes) == [("gmv", "bootstrap")]
    assert "gmv of so few users with revenue has no bootstrap: replicates" in notes["gmv", "bootstrap"]
    assert had == {("ctr", "delta"), ("cvr", "delta"), ("gmv", "delta")}


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    path = write(tmp_path, GOOD)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"rows.csv exists, expected a new file.*leave out --simulate"):
        ab_rows.simulate(path, 10, LIFTS)
    assert path.read_bytes() == before


def test_what_cannot_be_had_leaves_the_others(tmp_path):
    before = ",".join(ab_rows.BEFORE)
    notes, had = noted(ab_rows.read(
        write(tmp_path, [f"{line},0,0,0,0" for line in GOOD], f"{HEADER},{before}"))[0])
    assert ("ctr", "delta") in had and ("gmv", "bootstrap") in had
    assert notes["ctr", "cuped"].startswith("pre_ctr of arm 'treatment' cannot be computed: denominator")
    notes, had = noted(ab_rows.read(write(tmp_path, [*GOOD, "x,control,1,1,1,1e300"]))[0])
    assert "gmv of arm 'control' cannot be computed: numerator: expected values" in notes["gmv", "delta"]
    assert had == {("ctr", "delta"), ("cvr", "delta")}
    notes, had = noted(ab_rows.read(
        write(tmp_path, [line.rsplit(",", 2)[0] + ",0,0" for line in GOOD]))[0])
    assert notes["cvr", "delta"] == "cvr of arm 'control' is 0, expected more for a lift"
    assert had == {("ctr", "delta")}


def test_nothing_that_can_be_had(tmp_path):
    table, _ = ab_rows.read(write(tmp_path, [",".join([*line.split(",")[:2], *"0000"]) for line in GOOD]))
    with pytest.raises(ValueError, match="ctr of arm 'treatment' cannot be computed: denominator: expect"):
        ab.analyse(table, "control", plan())


def test_spaces_do_not_make_another_arm_or_user(tmp_path):
    table, _ = ab_rows.read(write(tmp_path, [*GOOD, "new, control ,3,1,1,2.0"]))
    assert list(table.arms) == ["control", "treatment"]
    user = GOOD[0].split(",")[0]
    with pytest.raises(ValueError, match=f"user '{user}' is in 2 rows"):
        ab_rows.read(write(tmp_path, [*GOOD, f" {user},control,3,1,1,2.0"]))


def test_a_quote_without_an_end_counts_every_line_that_it_takes(tmp_path):
    rows = [*GOOD[:10], 'x,"control,3,1,1,2.0', *GOOD[10:]]
    with pytest.raises(ValueError, match="31 of 41 rows are malformed"):
        ab_rows.read(write(tmp_path, rows), max_bad_fraction=0.1)
    _, report = ab_rows.read(write(tmp_path, rows), max_bad_fraction=0.9)
    assert report.read == 41 and len(report.samples[0]["text"]) <= 200


def test_the_command(command, tmp_path):
    path, rows = tmp_path / "new" / "rows.csv", tmp_path / "rows.json"
    done = command("-m", "tarq_jax.experiments.ab", f"--data={path}", "--simulate=5000", f"--json={rows}",
                   "--replicates=200")
    assert done.returncode == 0, done.stderr
    assert "rows: 5,000 read, 0 left out" in done.stdout and "as planned" in done.stdout
    assert len(json.loads(rows.read_text())) == 7
    done = command("-m", "tarq_jax.experiments.ab", f"--data={path}", "--ratio=3,1", "--replicates=200")
    assert done.returncode == 0 and "SAMPLE RATIO MISMATCH" in done.stdout


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["--data=nowhere.csv"], 1, "no file nowhere.csv: expected rows of an A/B test"),
    (["--level=1.5"], 2, "level"),
    (["--ratio=1,x"], 2, "--ratio is '1,x', expected positive numbers"),
])
def test_wrong_commands(arguments, code, message, command, tmp_path):
    path = write(tmp_path, GOOD)
    done = command("-m", "tarq_jax.experiments.ab", f"--data={path}", *arguments)
    line, = done.stderr.splitlines()
    assert (done.returncode, line.startswith("error: "), message in line) == (code, True, True), line


@pytest.mark.parametrize(("flags", "message"), [
    ({"ratio": ["-1", "1"]}, "--ratio is '-1,1', expected positive numbers"),
    ({"ratio": ["nan", "1"]}, "--ratio is 'nan,1', expected positive numbers"),
    ({"simulate": 99}, "--simulate is 99, expected 0 or at least 100 users"),
])
def test_wrong_calls(flags, message, with_flags, capsys, tmp_path):
    with with_flags(data=str(write(tmp_path, GOOD)), **flags), pytest.raises(SystemExit) as ended:
        ab.main()
    line, = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and message in line


@pytest.mark.parametrize(("flags", "message"), [
    ({"control": "old"}, r"--control is 'old', expected one of the arms \['control', 'treatment'\]"),
    ({"simulate": 100}, "exists, expected a new file to make up rows in"),
    ({"ratio": ["1", "1", "1"]}, r"--ratio is '1\.0,1\.0,1\.0', expected 2 positive numbers"),
])
def test_calls_that_do_not_fit_the_rows(flags, message, with_flags, tmp_path):
    path = write(tmp_path, GOOD)
    before = path.read_bytes()
    with with_flags(data=str(path), **flags), pytest.raises((ValueError, OSError), match=message):
        ab.main()
    assert path.read_bytes() == before
