"""The table of docs/versions.md, made of what `tests/versions/run` has left."""

import json
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[2] / "docs" / "versions.md"
START, END = "<!-- versions -->\n", "<!-- / -->"


def table(results: dict[str, Any]) -> str:
    """A row for each combination of versions."""
    packages = [*next(iter(results.values()))["versions"]]
    lines = [f"| {' | '.join(['', *packages, 'tests'])} |", f"|{' --- |' * (len(packages) + 2)}"]
    for name, result in results.items():
        came = f"{result['passed']} passed" + (f", {result['failed']} failed" if result["failed"] else "")
        lines.append(f"| {' | '.join([name, *result['versions'].values(), came])} |")
    return "\n".join(lines) + "\n"


def rewritten(page: str, results: dict[str, Any]) -> str:
    """The page with the table."""
    before, _, rest = page.partition(START)
    return before + START + table(results) + END + rest.partition(END)[2]


def write(results: dict[str, Any] | None = None) -> None:
    """Writes the page."""
    results = json.loads(RESULTS.read_text()) if results is None else results
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
