"""The serving benchmark at a tiny size: correct scores, consistent rows, claims checked by hand."""

import json

import numpy as np
import pytest

from benchmarks import serving, serving_claims, serving_parts, serving_report
from benchmarks.machine import Peaks
from benchmarks.serving_contenders import COLD, IN_BLOCKS, TWO_TOWER, WHOLE, tarq_name
from benchmarks.timing import in_turns

PLAN = serving.TINY
SCALAR, ORDER_1 = tarq_name(0, "scalar", 8), tarq_name(1, "mlp", 4)
MODELS = (TWO_TOWER, COLD, IN_BLOCKS, SCALAR, ORDER_1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory, silent):
    return serving.load(PLAN, tmp_path_factory.mktemp("artefacts"), silent, MODELS)


@pytest.fixture(scope="module")
def rows(bench, silent):
    parts = list(serving.part_rows(bench, Peaks(1e9, 1e9, 1e9), silent))
    measured = [*parts, *serving.request_rows(bench, parts, silent)]
    found = serving.medians(measured, PLAN)
    return [*measured, *(serving.breakdown(bench, found, name) for name in MODELS)]


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_training_code(bench, name):
    assert serving.check(bench, name) < serving.TOLERANCE


def test_other_scores_are_refused(bench):
    other = bench._replace(contenders=bench.contenders | {COLD: bench.contenders[TWO_TOWER]})
    with pytest.raises(ValueError, match="COLD-style MLP: scores differ from the training code's by"):
        serving.check(other, COLD)


def test_stages_make_the_state_of_the_user_side(bench):
    """The stages that are measured one by one together compute what a request computes."""
    made = bench.contenders[SCALAR]
    inputs = serving_parts.filled(serving_parts.request_specs(made.method, 6, 1))
    encoded = inputs
    for stage in serving_parts.user_stages(made.module, serving_parts.SERVED).values():
        encoded = stage(made.method.user_weights, encoded)
    whole = made.method.user_side(made.method.user_weights, inputs)
    assert encoded.keys() == whole.keys()
    for name, values in whole.items():
        np.testing.assert_allclose(encoded[name], values, rtol=1e-5, atol=1e-6)


def test_every_point_has_its_rows(rows):
    """Requests at each point, the item side for each number of candidates, codebooks for each history."""
    def found(kind, **wanted):
        return [row for row in rows if row["kind"] == kind and wanted.items() <= row.items()]

    for name in MODELS:
        assert {(row["candidates"], row["history"]) for row in found("request", model=name)} == {
            (600, 6), (1_100, 6), (600, 4)}
        assert {row["candidates"] for row in found("part", model=name, part="items", history=6)} == {
            512, 600, 1_100}
    for name in (SCALAR, ORDER_1):
        assert {row["history"] for row in found("part", model=name, part="codebooks")} == {4, 6}
    assert all(row["latency_p50_ms"] > 0 for row in rows if row["kind"] in ("part", "request"))
    assert all(row["index_mb"] > 0 and row["state_mb"] > 0 for row in found("request"))


def test_a_breakdown_sums_to_the_request(rows):
    for row in rows:
        if row["kind"] == "breakdown":
            spent = [value for key, value in row.items() if key.endswith("_ms") and key != "request_ms"]
            assert sum(spent) == pytest.approx(row["request_ms"])


def test_methods_are_charged_only_with_the_encoders_that_they_have(rows):
    found = {row["model"]: row for row in rows if row["kind"] == "breakdown"}
    assert {name for name, row in found.items() if "encoder_ms" in row} == {IN_BLOCKS, SCALAR, ORDER_1}
    assert {name for name, row in found.items() if "codebooks_ms" in row} == {SCALAR, ORDER_1}
    assert all("towers_ms" in row for row in found.values())


def test_a_gather_moves_only_the_rows_that_it_reads(bench):
    made, slots = bench.contenders[TWO_TOWER], bench.slots(TWO_TOWER, 600)
    assert len(slots) == 1_024 and (np.diff(slots) >= 0).all() and len(set(slots)) == 600
    part = serving_parts.item_parts(made, bench.scorers[TWO_TOWER].index, slots, 6, ["gather"])["gather"]
    vector, bias = 8 * 4, 4  # bytes of an item
    assert part.cost.bytes in (2 * 1_024 * vector + slots.nbytes, 2 * 1_024 * (vector + bias) + slots.nbytes)


def test_costs_are_counted_without_loops(bench):
    """Attention in blocks costs as much as all together: M x N x D products twice, M x N x H exponentials."""
    made, slots = bench.contenders[IN_BLOCKS], bench.slots(IN_BLOCKS, 1_100)
    part = serving_parts.item_parts(made, bench.scorers[IN_BLOCKS].index, slots, 6, ["look_ups"])["look_ups"]
    pairs = len(slots) * 6
    assert part.cost.exponentials == pairs * 2
    assert 4 * pairs * 8 <= part.cost.flops < 8 * pairs * 8


def test_the_page(rows, tmp_path):
    further = [{"kind": "ratio", "model": SCALAR, "what": "work", "against": WHOLE, "ratio": 2.0,
                "target": None, "verdict": None}]
    serving_report.write([*rows, *further], PLAN.main, tmp_path)
    assert SCALAR in (tmp_path / "serving.html").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == set(serving_report.FILES)


def test_calls_are_spread_over_turns():
    """After four calls to prepare, as many as fit, but at least `least`, each after an uncounted one."""
    made = []
    calls = {name: lambda name=name: made.append(name) for name in "ab"}
    times = in_turns(calls, seconds=0.0, least=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert made == [*"aaaabbbb", *"aabb" * 3]


def test_ratios_by_hand():
    """Target attention takes 10 ms for 512 candidates; TARQ takes 2 ms for codebooks and 1 ms for items."""
    sizes = PLAN.sizes
    parts, requests = {}, {}
    names = [tarq_name(order, head, codewords) for order, codewords in ((0, 8), (1, 8), (1, 4))
             for head in ("scalar", "dot", "mlp")]
    for name in (*names, TWO_TOWER, IN_BLOCKS, WHOLE):
        cost = {IN_BLOCKS: 10.0, WHOLE: 40.0}.get(name, 1.0)
        for count in (512, 600):
            parts[name, "items", count, 6] = cost * count / 512
            parts[name, "look_ups", count, 6] = cost / 2 * count / 512
            requests[name, count, 6] = cost
        if name in names:
            parts[name, "codebooks", 0, 6] = 2.0
    parts[tarq_name(0, "dot", 8), "personalized", 0, 6] = 1.0
    found = serving_claims.Medians(parts, requests, (512, 600), (512, 6))
    ratios = list(serving_claims.against_target_attention(found, sizes))
    of_scalar = [(row["against"], row["ratio"], row["verdict"]) for row in ratios if row["model"] == SCALAR]
    assert of_scalar == [
        (IN_BLOCKS, pytest.approx(10 / 3), "missed"), (WHOLE, pytest.approx(40 / 3), "missed")]
    attention = [row["ratio"] for row in ratios if row["what"] == "codebooks and look-ups"]
    assert attention == pytest.approx([5 / 2.5, 20 / 2.5] * 2)
    further = list(serving_claims.further_ratios(found, sizes, (512, 600)))
    assert [row["ratio"] for row in further] == pytest.approx([3 / 2, (2 + 600 / 512) / 3, 1.0])
    crossing = {row["against"]: row["candidates"] for row in serving_claims.crossovers(found, [SCALAR])}
    assert crossing == {IN_BLOCKS: round(2 / 9 * 512), WHOLE: round(2 / 39 * 512)}


@pytest.mark.slow
def test_the_command(command, tmp_path):
    done = command("-m", "benchmarks.serving", "--quick", f"--json={tmp_path}/rows.json",
                   f"--report={tmp_path}")
    assert done.returncode == 0, done.stderr
    kinds = {row["kind"] for row in json.loads((tmp_path / "rows.json").read_text())}
    assert kinds == {"machine", "check", "part", "request", "breakdown", "ratio", "crossover"}
