"""What a search has found, in words."""

from collections import Counter, defaultdict
from typing import Any

from .search import PROMISES, Outcome


class Report:
    """
    Gathers outcomes.

    Args:
        processes (`int`):
            Number of processes of each run.
    """

    def __init__(self, processes: int = 1):
        self.processes = processes
        self.kinds: Counter[str] = Counter()
        self.checks: Counter[str] = Counter()
        self.broken: dict[str, list[int]] = defaultdict(list)
        self.texts: list[str] = []
        self.refusals: list[str] = []

    def add(self, index: int, outcome: Outcome) -> None:
        self.kinds["failed" if outcome.broken else outcome.kind] += 1
        self.checks.update(outcome.checks)
        if outcome.kind == "refused":
            self.refusals.append(outcome.refusal)
        for promise, problem in outcome.broken.items():
            self.broken[promise].append(index)
            self.texts.append(f"configuration {index}, {promise}: {problem}")

    @property
    def unchecked(self) -> list[str]:
        """Promises that no configuration has put to the test."""
        return [promise for promise in PROMISES if not self.checks[promise]]

    @property
    def has_failed(self) -> bool:
        return bool(self.broken or self.unchecked)

    def table(self) -> str:
        """Counts of configurations and of checks."""
        total = self.kinds.total()
        lines = [
            f"{total} configurations: " + ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        ]
        lines += [f"{'promise':40}{'checks':>8}{'broken by':>12}"]
        for promise in PROMISES:
            lines.append(f"{promise:40}{self.checks[promise]:8}{len(self.broken[promise]) or '':>12}")
        lines += [f"{promise} was never put to the test" for promise in self.unchecked]
        self.broken = defaultdict(list, {promise: found for promise, found in self.broken.items() if found})
        return "\n".join(lines)


def reproduction(settings: dict[str, Any], promise: str, processes: int) -> str:
    """Lines to paste into Python, or into a file for several processes."""
    lines = "".join(f"    {name!r}: {value!r},\n" for name, value in settings.items())
    how = (
        ""
        if processes == 1
        else f"# in {processes} processes: accelerate launch --config_file configs/accelerate/multi_cpu.yaml\n"
    )
    return f"{how}from tests.search.search import check\nprint(check({{\n{lines}}}, {promise!r}).broken)"
