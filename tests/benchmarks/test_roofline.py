"""The roofline's formulas, by hand."""

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
    """2 requests of 10 ids: 20 ids of 4 bytes with rows of 16, to 7 others and back."""
    moved = roofline.network_bytes(workload(roofline), roofline.Split(2, 4, 8), requests=2)
    assert moved == {"look_up": (7 * 20 * 20, 8), "table_gradient": (7 * 20 * 20, 8),
                     "dense_gradient": (2 * 7 / 8 * 400, 8)}


def test_gradients_of_a_table_with_copies_go_the_cheaper_way(roofline):
    split = roofline.Split(2, 4, 4)
    small, large = (roofline.lookup_bytes(workload(roofline, rows=rows), split, requests=2)
                    for rows in (40, 80_000))
    # within four devices, then two copies of 10 rows; or the whole batch's to all
    assert small["table_gradient"] == (3 * 20 * 20 + 2 * (1 / 2) * 10 * 16, 8)
    assert large["table_gradient"] == (7 * 20 * 20, 8)


def test_one_device_sends_nothing(roofline):
    found = roofline.roofline(
        roofline.CHIPS["H100"], workload(roofline), roofline.Split(1, 1, 1), requests=2)
    assert found["network_mb"] == 0 and found["efficiency"] == 1.0


def test_slow_links_are_used_beyond_an_island(roofline):
    chip = roofline.Chip(1e12, 1e9, 1e12, link=100.0, island=8, beyond=10.0)
    within, beyond = (roofline.roofline(chip, workload(roofline, ids=0), roofline.Split(devices, 1, 1), 1)
                      for devices in (8, 16))
    share = roofline.LINK_SHARE
    block = 800 * 4 * 4  # ids are few: gathered, and nothing is
    assert within["network_ms"] == pytest.approx(1e3 * 2 * 7 / 8 * 400 / (share * 100))
    assert beyond["network_ms"] == pytest.approx(1e3 * 2 * 15 / 16 * 400 / (share * 10))
    assert within["table_gb"] == pytest.approx(4 * block / 1e9) and within["fits"] == "yes"
