"""The figures that the documents show are those that were measured."""

import re

import pytest

from benchmarks.evidence import DOCUMENTS, RESULTS, ROOT, TABLES, Results, filled


@pytest.fixture(scope="module")
def results() -> Results:
    return Results(ROOT / RESULTS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_tables_are_made_from_the_results(name, results):
    text = (ROOT / name).read_text()
    assert filled(text, results) == text, "run python -m benchmarks.evidence"


def test_each_table_stands_somewhere():
    text = "".join((ROOT / name).read_text() for name in DOCUMENTS)
    assert set(re.findall(r"<!-- (\w+): made by", text)) == set(TABLES)


def test_a_table_that_was_edited_is_made_again(results):
    text = (ROOT / "README.md").read_text()
    assert filled(re.sub(r"[\d.]+ / [\d.]+ times", "9.9 / 9.9 times", text), results) == text
    with pytest.raises(ValueError, match="wanted one row of data.json"):
        results.one("data", "photos", who="nobody")
