"""What is sent between processes: the committed measurement is what the formulas say and what the documentation shows."""

import json

import pytest

from benchmarks.communication import CASES, RESULTS, ROOT, table


FOUND = json.loads(RESULTS.read_text())


@pytest.mark.parametrize(
    ("name", "engine"), [(name, engine) for name, case in CASES.items() for engine in case.engines]
)
def test_formula(name, engine):
    assert FOUND[engine][name]["bytes"] == FOUND[engine][name]["formula"]


def test_documentation():
    assert table(FOUND) in (ROOT / "docs" / "scaling.md").read_text()
