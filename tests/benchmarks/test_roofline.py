"""The roofline's formulas, checked against calculations by hand."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.roofline")


def workload(roofline, rows=800, **changes):
    return roofline.Workload(
        flops=1e6, activation_bytes=1e3, ids=10, width=4, rows=rows, dense_parameters=100,
        table_optimizer="adamw")._replace(**changes)


def test_bytes_of_a_table_over_all_devices(roofline):
    """2 requests of 10 ids: 5 ids of 4 bytes go to each of 7 other devices; 5 rows of 16 bytes come back."""
    moved = roofline.network_bytes(workload(roofline), roofline.Split(2, 4, 8), requests=2)
    assert moved == {"look_up": (7 * 5 * 20, 8), "table_gradient": (7 * 5 * 20, 8), "copies": (0, 8),
                     "dense_gradient": (2 * 7 / 8 * 400, 8)}


def test_bytes_of_a_table_over_two_devices(roofline):
    """With so few devices, not only the owners are asked: all 20 ids are sent, and 20 rows come back."""
    moved = roofline.lookup_bytes(workload(roofline), roofline.Split(1, 2, 2), requests=2)
    assert moved == {"look_up": (20 * 20, 2), "table_gradient": (20 * 20, 2), "copies": (0, 2)}


def test_bytes_do_not_grow_with_the_devices_that_split_a_table(roofline):
    few, many = (sum(sent for sent, _ in roofline.lookup_bytes(
        workload(roofline, ids=1000), roofline.Split(1, devices, devices), requests=8).values())
        for devices in (8, 4000))
    assert few < many < 1.2 * few


def test_gradients_of_a_table_with_copies_go_the_cheaper_way(roofline):
    split = roofline.Split(2, 4, 4)
    small, large = (roofline.lookup_bytes(workload(roofline, rows=rows), split, requests=2)
                    for rows in (40, 80_000))
    assert small["table_gradient"] == large["table_gradient"] == (3 * 10 * 20, 4)
    # either two copies of 10 rows are summed, or all that four devices received goes to the other copy
    assert (small["copies"], large["copies"]) == ((2 * (1 / 2) * 10 * 16, 8), (4 * 10 * 20, 8))


def test_one_device_sends_nothing(roofline):
    found = roofline.roofline(
        roofline.CHIPS["H100"], workload(roofline), roofline.Split(1, 1, 1), requests=2)
    assert found["network_mb"] == 0 and found["efficiency"] == 1.0


def test_slow_links_are_used_beyond_an_island(roofline):
    chip = roofline.Chip(1e12, 1e9, 1e12, link=100.0, island=8, beyond=10.0)
    within, beyond = (roofline.roofline(chip, workload(roofline, ids=0), roofline.Split(devices, 1, 1), 1)
                      for devices in (8, 16))
    share = roofline.LINK_SHARE
    block = 800 * 4 * 4  # the few ids are gathered, which moves nothing
    assert within["network_ms"] == pytest.approx(1e3 * 2 * 7 / 8 * 400 / (share * 100))
    assert beyond["network_ms"] == pytest.approx(1e3 * 2 * 15 / 16 * 400 / (share * 10))
    assert within["table_gb"] == pytest.approx(4 * block / 1e9) and within["fits"] == "yes"


@pytest.mark.parametrize(("optimizer", "passes", "kept"), [
    ("adamw", 9 * 200, 4 * 200), ("lazy_adam", 21 * 80, 3 * 200 + 4 * 80),
    ("rowwise_adagrad", 9 * 80, 200 + 2 * 80)])
def test_row_wise_optimizers_visit_rows_that_are_looked_up(roofline, optimizer, passes, kept):
    """8 devices look up 10 ids each, and keep 200 rows of 16 bytes each; of 100 rows, they visit all."""
    work, split = workload(roofline, rows=1600, table_optimizer=optimizer), roofline.Split(2, 4, 8)
    assert roofline.table_cost(work, split, requests=1) == (passes * 16, kept * 16)
    whole = roofline.table_cost(work._replace(rows=800), split, requests=1)
    assert whole == (roofline.TABLE_PASSES[optimizer] * 100 * 16, (roofline.KEPT[optimizer] + 1) * 100 * 16)
