"""Made-up studies on disk, whose truth is known: from the analysis to the page."""

import json
import shutil

import numpy as np
import pytest
from scipy import stats

from tarq_jax import metrics, statistics
from tarq_jax.experiments import plots, report, run_table, study
from tarq_jax.training.evaluate import SCORES, write_scores

USERS, EACH, SEEDS = 150, 4, (0, 1, 2, 3)
SIGNAL = {"two_tower": 0.3, "tarq": 1.0, "tarq_twin": 1.0, "target_attention": 1.1}
SERVING = [{"kind": "request", "model": name, "candidates": 10, "history": 5, "latency_p50_ms": ms}
           for name, ms in (("two-tower", 1.0), ("TARQ order 1 mlp, K=8", 2.0),
                            ("target attention, in blocks", 9.0))]


def settings(model, num_levels=3):
    return {"model": {"name": "tarq" if model == "tarq_twin" else model, "order": 1, "head": "mlp",
                      "num_codewords": 8, "num_levels": num_levels}}


def write_study(root, signal=None, seeds=SEEDS):
    """Writes runs whose scores are the label plus noise that all share and a little of their own."""
    rng = np.random.default_rng(0)
    labels = rng.random(USERS * EACH) < 0.4
    shared = rng.normal(size=USERS * EACH)
    rows = []
    for variant, strength in (signal or SIGNAL).items():
        for seed in seeds:
            model = "tarq" if "tarq" in variant else variant
            scores = strength * labels + shared + 0.2 * rng.normal(size=len(labels))
            folder = root / f"{variant}-{seed}"
            write_scores(folder / SCORES, {
                "labels": labels.astype(np.float32), "weights": np.ones(len(labels)),
                "users": np.repeat(np.arange(USERS), EACH), model: scores})
            (folder / "metrics.jsonl").write_text("".join(
                json.dumps({"step": step, f"validation/{model}/auc": 0.5 + step / 100 + seed / 1000}) + "\n"
                for step in (5, 10)))
            run = {"model": model, "auc": metrics.auc(labels, scores), "parameters": 9, "train_seconds": 2.0,
                   **({"utilisation": 0.9, "perplexity_1": 7.0 + seed, "perplexity_2": 5.0 + seed,
                       "dead_1": 1.0, "dead_2": 0.0} if model == "tarq" else {})}
            rows.append(study.row_of_run([run], settings(variant), folder) | {
                "variant": variant, "seed": seed, "settings": variant, "data": "d", "revision": "r",
                "device": "cpu", "version_jax": "1"})
    run_table.write(root / run_table.FILE, rows)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def variants(folder):
    return study.load(folder)


def test_runs_are_as_the_table_has_them(variants):
    assert list(variants) == list(SIGNAL)
    for variant in variants.values():
        assert variant.seeds == SEEDS and variant.influence.shape == (len(SEEDS), USERS)
        np.testing.assert_allclose(variant.auc, [row["auc"] for row in variant.rows], rtol=1e-12)


def test_a_difference_is_that_of_the_statistics(variants):
    own, other = variants["two_tower"], variants["tarq"]
    found = study.difference(own, other)
    assert found == statistics.over_seeds_and_data(own.auc - other.auc, own.influence - other.influence)
    assert found.estimate.high < 0
    few = study.difference(own.at((2, 0)), other)
    assert few.estimate.value == pytest.approx(np.mean((own.auc - other.auc)[[0, 2]]))
    assert study.difference(own.at((1,)), other.at((2,))) is None


def test_gap_recovered_is_a_ratio_of_means(variants):
    low, own, high = (variants[name].auc.mean() for name in ("two_tower", "tarq", "target_attention"))
    found = study.gap_recovered(variants["tarq"], variants)
    assert found.value == pytest.approx((own - low) / (high - low))
    assert found.low < found.value < found.high
    for name, value in (("two_tower", 0.0), ("target_attention", 1.0)):
        end = study.gap_recovered(variants[name], variants)
        assert (end.value, end.low, end.high) == pytest.approx((value, value, value), abs=1e-9)
    assert study.gap_recovered(own, {"tarq": variants["tarq"]}) is None


def test_the_interval_of_the_gap_is_fiellers():
    """One seed, so that users are the only source: the closed form over a normal distribution."""
    rng = np.random.default_rng(3)
    common = rng.normal(size=2000)
    scores = np.stack([rng.normal(size=2000), 0.4 + common, 0.5 + common + 0.3 * rng.normal(size=2000)])
    one = made_up(scores[:, None])
    found = study.gap_recovered(one["tarq"], one)
    gained, whole = scores[1] - scores[0], scores[2] - scores[0]
    covariance = np.cov(gained, whole) / 2000
    square = stats.t.ppf(0.975, 1999) ** 2
    a = whole.mean() ** 2 - square * covariance[1, 1]
    b = gained.mean() * whole.mean() - square * covariance[0, 1]
    c = gained.mean() ** 2 - square * covariance[0, 0]
    ends = (b - np.sqrt(b * b - a * c)) / a, (b + np.sqrt(b * b - a * c)) / a
    assert (found.low, found.high) == pytest.approx(ends, rel=1e-5)


def test_without_a_gap_no_share_is_given():
    """Its interval reaches 0: any share might be recovered."""
    rng = np.random.default_rng(4)
    none = made_up(rng.normal(size=(3, 5, 40)) + np.array([0, 0.1, 0.1])[:, None, None])
    assert study.gap_recovered(none["tarq"], none) is None
    gap, rows = study.gap(none), study.summary(none, "tarq")
    assert gap.low < 0 < gap.high and not any("gap_recovered" in row for row in rows)
    assert "may be 0, so that no share of it is given" in report.verdicts(rows, "tarq", 0.95, gap)[-1]


    negative = statistics.Estimate(-0.004, 0.001, -0.006, -0.002, 1e-4)
    assert "is negative, so that no share of it is given" in report.verdicts(rows, "tarq", 0.95, negative)[-1]


def test_shares_are_given_of_one_gap(monkeypatch):
    """A variant of one seed alone does not have a share of a gap that may be 0 over all seeds."""
    rng = np.random.default_rng(7)
    users = 0.01 * rng.normal(size=400)
    users -= users.mean()
    gaps = np.array([0.3, -0.3, 0.2, -0.15])[:, None]
    ends = {name: variant_of(name, range(4), base + users) for name, base in (
        ("two_tower", np.full((4, 1), 0.5)), ("target_attention", 0.5 + gaps), ("tarq", 0.5 + 0.9 * gaps))}
    ends["new"] = variant_of("new", [0], 0.5 + 0.9 * gaps[:1] + 0.5 * users)
    assert study.gap_recovered(ends["new"], ends) is not None
    assert not any("gap_recovered" in row for row in study.summary(ends, "tarq"))


def made_up(scores):
    """Variants of scores [3, S, U], whose mean over users is taken for an AUC."""
    names = ("two_tower", "tarq", "target_attention")
    return {name: variant_of(name, range(len(own)), own) for name, own in zip(names, scores, strict=True)}


def variant_of(name, seeds, scores):
    """Scores [S, U]."""
    auc = scores.mean(axis=1)
    return study.Variant(name, tuple(seeds), [{}] * len(auc), auc, (scores - auc[:, None]) / scores.shape[1])


def test_variants_of_other_seeds_are_compared_on_shared_ones():
    """Seeds differ in difficulty: the mean over its own would have the worse variant on top."""
    difficulty = np.linspace(0.0, 1.4, 8)[:, None]
    users = 0.1 * np.random.default_rng(5).normal(size=50)
    users -= users.mean()

    def variant(name, seeds, level):
        return variant_of(name, seeds, level + difficulty[list(seeds)] + users)

    rows = study.summary({"tarq": variant("tarq", range(4), 0.5), "x": variant("x", range(1, 8), 0.4),
                          "y": variant("y", (6, 7), 0.9)}, "tarq")
    assert [row["variant"] for row in rows] == ["tarq", "x", "y"]
    assert rows[1]["auc"] > rows[0]["auc"] and rows[1]["difference"] == pytest.approx(-0.1)
    own = rows[0]["auc"]
    assert study.comparable(rows, "tarq") == pytest.approx({"tarq": own, "x": own - 0.1})
    words = report.verdicts(rows, "tarq", 0.95, None)
    assert words[-2].startswith("Without a seed of tarq") and words[-2].endswith("y.")
    assert words[-1].startswith("Compared only on the seeds") and words[-1].endswith(": x.")
    latencies = {"tarq": 3.0, "x": 4.0, "y": 1.0}
    rows = [row | {"latency_ms": latencies[row["variant"]]} for row in rows]
    assert "On the frontier: tarq (3.0 ms" in report.frontier_sentence(rows, "tarq")


def test_the_interval_of_the_gap_is_the_jackknife_over_users(variants, folder):
    """With one seed, users are the only source of variance: leave out each in turn."""
    one = {name: variant.at((0,)) for name, variant in variants.items()}
    found = study.gap_recovered(one["tarq"], one)
    points = []
    for user in range(USERS):
        areas = {}
        for name in ("two_tower", "tarq", "target_attention"):
            with np.load(folder / f"{name}-0" / SCORES) as scores:
                kept = scores["users"] != user
                model = one[name].rows[0]["model"]
                areas[name] = metrics.auc(scores["labels"][kept], scores[model][kept])
        ends = areas["two_tower"], areas["target_attention"]
        points.append(metrics.gap_recovered(areas["tarq"], *ends))
    jackknife = np.sqrt((USERS - 1) / USERS * np.square(points - np.mean(points)).sum())
    assert found.standard_error == pytest.approx(jackknife, rel=0.05)


def test_summary(variants):
    rows = {row["variant"]: row for row in study.summary(variants, "tarq")}
    areas = [row["auc"] for row in rows.values()]
    assert areas == sorted(areas, reverse=True)
    assert "p_value" not in rows["tarq"] and rows["tarq"]["utilisation"] == 0.9
    assert (rows["tarq"]["perplexity"], rows["tarq"]["dead"]) == (6.5, 1.0)
    assert "dead" not in rows["two_tower"]
    tested = [row for row in rows.values() if "p_value" in row]
    assert [row["p_adjusted"] for row in tested] == pytest.approx(
        statistics.adjust([row["p_value"] for row in tested]))
    assert rows["two_tower"]["p_adjusted"] < 0.001 < 0.05 < rows["tarq_twin"]["p_adjusted"]
    with pytest.raises(ValueError, match="--reference is 'nothing', expected one of"):
        study.summary(variants, "nothing")


def test_verdicts_say_what_differs(variants):
    words = report.verdicts(study.summary(variants, "tarq"), "tarq", 0.95, study.gap(variants))
    assert words[0].startswith("Below tarq (adjusted by Holm, 95%): two_tower -0.")
    assert "target_attention +0." in words[1] and "two_tower" not in words[1]
    assert words[2].startswith("Not significantly different from tarq") and words[2].endswith(": tarq_twin.")


def test_variants_of_other_code_or_packages_are_named(variants):
    def changed(name, **what):
        rows = [row | what if row["seed"] == 3 else row for row in variants[name].rows]
        return variants | {name: variants[name]._replace(rows=rows)}

    assert study.of_other_origin(variants, "tarq") == []
    assert study.of_other_origin(changed("two_tower", version_jax="2"), "tarq") == ["two_tower"]
    assert study.of_other_origin(
        changed("two_tower", device="gpu") | {"tarq": variants["tarq"].at((0, 1))}, "tarq") == []
    other = changed("tarq", revision="s")
    words = report.sections(other, study.summary(other, "tarq"), "tarq", 0.95, "")["summary"].sentences
    assert words[-1].startswith("Of another revision, other packages or another device than tarq")
    assert words[-1].endswith(": two_tower, tarq_twin, target_attention.")


def test_reference_and_ends_have_learning_curves(variants, monkeypatch):
    drawn, lines = [], plots.lines
    monkeypatch.setattr(report, "CURVES", 3)
    monkeypatch.setattr(plots, "lines", lambda curves, *labels: drawn.append(list(curves)) or lines(
        curves, *labels))
    report.sections(variants, study.summary(variants, "tarq_twin"), "tarq_twin", 0.95, "")
    assert drawn == [["tarq_twin", "two_tower", "target_attention"]]


def test_the_page_says_what_made_the_runs(variants):
    rows = [row | {"command": "python -m x"} for row in variants["tarq"].rows]
    said = report.provenance(variants | {"tarq": variants["tarq"]._replace(rows=rows)})
    assert said[:2] == ["python -m x", "data: unknown"] and "revision: r" in said


def test_learning_curves_are_means_over_seeds(variants):
    steps, values = study.learning_curve(variants["tarq"])
    assert steps == [5, 10] and values == pytest.approx([0.5515, 0.6015])


def test_a_table_is_all_that_is_needed(folder, variants, tmp_path):
    shutil.copy(folder / run_table.FILE, tmp_path)
    moved = study.load(tmp_path)
    assert study.summary(moved, "tarq") == study.summary(variants, "tarq")
    assert study.settings(moved["tarq"]) == settings("tarq")


def test_influences_are_those_of_the_scores(folder, variants):
    with np.load(folder / "tarq-2" / SCORES) as scores:
        found = statistics.auc_influence(scores["labels"], scores["tarq"], scores["users"])
    assert variants["tarq"].auc[2] == pytest.approx(found.auc)
    np.testing.assert_allclose(variants["tarq"].influence[2], found.influence, rtol=1e-6, atol=1e-9)


def test_latencies_are_of_the_same_method(variants):
    rows = study.summary(variants, "tarq")
    report.add_latencies(rows, {name: study.served_as(study.settings(v)) for name, v in variants.items()},
                         study.latencies(SERVING, 10, 5))
    assert {row["variant"]: row.get("latency_ms") for row in rows} == {
        "two_tower": 1.0, "tarq": 2.0, "tarq_twin": 2.0, "target_attention": 9.0}
    assert study.latencies(SERVING, 10, 6) == {}
    assert study.served_as(settings("sim")) is None
    assert study.served_as(settings("tarq", num_levels=4)) is None  # its latency was not measured


@pytest.mark.parametrize(("points", "expected"), [
    ({}, []), ({"a": (1.0, 0.5)}, ["a"]),
    ({"slow": (3.0, 0.9), "fast": (1.0, 0.7), "worse": (2.0, 0.6), "equal": (3.0, 0.8)}, ["fast", "slow"]),
    ({"a": (1.0, 0.5), "same": (1.0, 0.5)}, ["a"]),
])
def test_frontier(points, expected):
    assert study.on_frontier(points) == expected


@pytest.mark.slow
def test_the_command(folder, command, tmp_path):
    (tmp_path / "serving.json").write_text(json.dumps(SERVING))
    done = command("-m", "tarq_jax.experiments.report", f"--study={folder}", f"--out={tmp_path / 'page'}",
                   f"--serving={tmp_path / 'serving.json'}", "--point=10,5",
                   f"--json={tmp_path / 'rows.json'}")
    assert done.returncode == 0, done.stderr
    assert "Below tarq" in done.stdout
    page, text = ((tmp_path / "page" / name).read_text() for name in ("index.html", "README.md"))
    for part in ("Differences", "Quality against latency", "Learning curves", "Codebooks", "fingerprint: d"):
        assert part in page and part in text
    assert page.count("data:image/png;base64,") == 3 and "http" not in page
    images = {path.name for path in (tmp_path / "page").glob("*.png")}
    assert images == {"forest.png", "frontier.png", "learning.png"}
    assert all(f"]({name})" in text for name in images)
    assert json.loads((tmp_path / "rows.json").read_text()) == json.loads(
        (tmp_path / "page" / "summary.json").read_text())


def test_without_ends_or_latencies_there_is_a_page(command, tmp_path):
    write_study(tmp_path / "study", {"tarq": 1.0}, seeds=(0,))
    done = command("-m", "tarq_jax.experiments.report", f"--study={tmp_path / 'study'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "study" / "report" / "index.html").exists()


@pytest.mark.parametrize(("break_it", "message"), [
    (lambda root: (root / run_table.FILE).unlink(), "no runs in"),
    (lambda root: (root / run_table.FILE).write_bytes(b"no"), "cannot be read as Parquet"),
    (lambda root: run_table.write(root / run_table.FILE, [
        {key: value for key, value in row.items() if key != "influence"}
        for row in run_table.read(root / run_table.FILE)]), r"has no columns \['influence'\]"),
])
def test_broken_studies(break_it, message, tmp_path):
    break_it(write_study(tmp_path, {"tarq": 1.0}))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        study.load(tmp_path)


def test_runs_of_different_settings_are_refused(tmp_path):
    write_study(tmp_path, {"tarq": 1.0})
    row, *rest = run_table.read(tmp_path / run_table.FILE)
    run_table.write(tmp_path / run_table.FILE, [row | {"settings": "other"}, *rest])
    with pytest.raises(ValueError, match="the runs of tarq are of 2 settings"):
        study.load(tmp_path)


def test_joined_tables_count_a_run_once(tmp_path):
    write_study(tmp_path, {"tarq": 1.0})
    path = tmp_path / run_table.FILE
    rows = run_table.read(path)
    run_table.write(path, rows + rows[1:])
    assert study.load(tmp_path)["tarq"].seeds == SEEDS
    run_table.write(path, [*rows, rows[1] | {"auc": 0.25}])
    with pytest.raises(ValueError, match=r"tarq has runs of seed 1 with an AUC of .* and of 0\.250000"):
        study.load(tmp_path)


def test_a_flipped_bit_is_found(tmp_path):
    """Within the columns, whose pages have checksums; the footer behind them has none."""
    path = write_study(tmp_path, {"tarq": 1.0}) / run_table.FILE
    content, rows = path.read_bytes(), run_table.read(path)
    columns = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for position in np.random.default_rng(6).integers(4, columns, size=60):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1:])
        try:
            assert run_table.read(path) == rows
        except ValueError as error:
            assert "runs.parquet" in str(error)


def test_a_point_without_latencies_is_named(folder, command, tmp_path):
    (tmp_path / "serving.json").write_text(json.dumps(SERVING))
    done = command("-m", "tarq_jax.experiments.report", f"--study={folder}", f"--out={tmp_path / 'page'}",
                   f"--serving={tmp_path / 'serving.json'}", "--point=10,6")
    assert done.returncode == 1 and not (tmp_path / "page").exists()
    assert "has no latencies for --point=10,6, expected one of ['10,5']" in done.stderr


def test_of_a_step_that_was_evaluated_twice_the_last_counts(folder, tmp_path):
    shutil.copytree(folder / "tarq-0", tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 10, "validation/tarq/auc": 0.9}) + "\n")
    row = study.row_of_run([{"model": "tarq", "auc": 0.5}], settings("tarq"), tmp_path / "run")
    assert (row["curve_step"], row["curve_auc"]) == ([5, 10], [0.55, 0.9])


def test_runs_of_different_data_are_refused(tmp_path):
    write_study(tmp_path, {"tarq": 1.0})
    rows = run_table.read(tmp_path / run_table.FILE)
    run_table.write(tmp_path / run_table.FILE, [{**row, "data": str(row["seed"])} for row in rows])
    with pytest.raises(ValueError, match="runs are of 4 data sets, expected one"):
        study.load(tmp_path)


@pytest.mark.parametrize(("text", "words"), [
    ("{", "cannot be read as JSON"), ("{}", "has another form, expected rows"), ("[1]", "has another form")])
def test_a_broken_serving_file(text, words, tmp_path):
    (tmp_path / "serving.json").write_text(text)
    with pytest.raises(ValueError, match=rf"serving\.json {words}"):
        report.read_serving(str(tmp_path / "serving.json"))
