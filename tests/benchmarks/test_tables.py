"""The tables of pages show what the result files hold."""

import re

import pytest

from benchmarks import tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: str(page.relative_to(tables.ROOT)))
def test_tables_are_those_of_the_files(page):
    assert page.read_text() == tables.rendered(page), "call `python -m benchmarks.tables`"


def test_every_table_has_its_place():
    marked = [name for page in tables.PAGES
              for name in re.findall(r"^<!-- table (\w+) -->$", page.read_text(), re.MULTILINE)]
    assert sorted(marked) == sorted(tables.TABLES)


def test_only_the_table_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: ["| a |", "| --- |", "| 2 |"]})
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table one -->\n\n| a |\n| 1 |\n\n<!-- end -->\nafter\n")
    expected = "before\n<!-- table one -->\n\n| a |\n| --- |\n| 2 |\n\n<!-- end -->\nafter\n"
    assert tables.rendered(page) == expected
    page.write_text(expected)
    assert tables.rendered(page) == expected
