"""Several runs side by side, as numbers."""

import difflib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from .curves import METRICS, REWARD, Threshold, default_threshold, default_window, estimate, summarize
from .runs import Run


MISSING = "—"
END = "At the end: the mean over the last tenth of what was logged."
SEEDS = "In brackets: 95% bootstrap intervals over seeds. Few seeds make them too narrow."


@dataclass(frozen=True)
class Comparison:
    """
    Runs of one or several methods, and how to look at them.

    Args:
        methods (`Mapping[str, Sequence[Run]]`):
            Runs by method: one, or one a seed.
        metrics (`dict[str, str]`):
            Metrics that some run has logged, with their labels.
        window (`int`):
            Window of the moving average, in logs.
        threshold ([`~trl_cancel.diagnostics.reports.curves.Threshold`], *optional*):
            Reward to reach.
    """

    methods: Mapping[str, Sequence[Run]]
    metrics: dict[str, str]
    window: int
    threshold: Threshold | None

    def summaries(self, method: str) -> list[dict[str, float | None]]:
        """What each run of a method came to."""
        value = self.threshold.value if self.threshold else None
        return [summarize(run, self.metrics, self.window, value) for run in self.methods[method]]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table: one column a method, and a row for each quantity that some method has."""
        columns = {name: self.summaries(name) for name in self.methods}
        rows = []
        for quantity, (label, form) in self._quantities().items():
            cells = [self._cell(name, quantity, form, columns[name]) for name in self.methods]
            if set(cells) != {MISSING}:
                rows.append([label, *cells])
        return ["", *self.methods], rows

    def notes(self) -> list[str]:
        """What a reader of the table must know."""
        seeds = max(map(len, self.methods.values()))
        steps = sorted({run.steps for run in self._runs()})
        spacings = sorted({spacing for run in self._runs() if (spacing := _spacing(run))})
        alone = [runs[0] for runs in self.methods.values() if len(runs) == 1]
        scores = any(run.score("greedy") or run.score("sampled") for run in alone)
        ends = f"The runs have {steps[0]} to {steps[-1]} steps; each is judged at its own end."
        uneven = f"The reward is logged every {spacings[0]:g} to {spacings[-1]:g} steps" if spacings else ""
        return [
            *([self._about_threshold()] if REWARD in self.metrics else []),
            END,
            *([SEEDS] if seeds > 1 else []),
            *(["The interval of a single run's test score is over problems."] if scores else []),
            *([ends] if len(steps) > 1 else []),
            *([f"{uneven}: Jitter2 cannot be compared."] if len(spacings) > 1 else []),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return {
            "smooth": self.window,
            "threshold": asdict(self.threshold) if self.threshold else None,
            "notes": self.notes(),
            "methods": {name: self._method(name) for name in self.methods},
        }

    def _method(self, name: str) -> dict[str, Any]:
        summaries = self.summaries(name)
        means = {quantity: _mean([summary[quantity] for summary in summaries]) for quantity in summaries[0]}
        runs = [
            {
                "source": str(run.source),
                **summary,
                "score_intervals": {how: run.score(how) for how in ("greedy", "sampled")},
                "series": {metric: asdict(series) for metric in self.metrics if (series := run.series(metric))},
            }
            for run, summary in zip(self.methods[name], summaries, strict=True)
        ]
        return {"mean": means, "runs": runs}

    def _quantities(self) -> dict[str, tuple[str, Callable[[float], str]]]:
        """Label and form of each row of the table."""
        goal = f"reward {self.threshold.value:.3g}" if self.threshold else ""
        return {
            "steps": ("optimizer steps", short_count),
            "tokens": ("tokens, with prompts", short_count),
            **{f"last/{metric}": (f"{label} at the end", _three_digits) for metric, label in self.metrics.items()},
            "greedy": ("test score, greedy", _three_digits),
            "sampled": ("test score, sampled", _three_digits),
            "seconds": ("training time", lambda seconds: f"{seconds:.0f} s"),
            "jitter2": ("Jitter2 of the reward", _three_digits),
            **({"steps_to_threshold": (f"steps to {goal}", short_count)} if goal else {}),
            **({"tokens_to_threshold": (f"tokens to {goal}", short_count)} if goal else {}),
        }

    def _cell(
        self, name: str, quantity: str, form: Callable[[float], str], summaries: list[dict[str, float | None]]
    ) -> str:
        values = [value for summary in summaries if (value := summary[quantity]) is not None]
        total = len(summaries)
        if quantity.endswith("_to_threshold") and len(values) < total:
            return self._not_reached(name, quantity, len(values))
        if not values:
            return MISSING
        alone = self.methods[name][0].score(quantity) if total == 1 else None
        text = _with_interval(alone or _estimate(values), form)
        return text if len(values) == total else f"{text} ({len(values)} of {total} seeds)"

    def _not_reached(self, name: str, quantity: str, reached: int) -> str:
        """A mean over those seeds alone that get there would flatter the method."""
        runs = self.methods[name]
        can_tell = [run for run in runs if run.series(REWARD) and (run.tokens or quantity.startswith("steps"))]
        if not can_tell:
            return MISSING
        return f"{reached} of {len(runs)} seeds" if reached else "not reached"

    def _about_threshold(self) -> str:
        smooth = f"the mean of the last {self.window} logged values" if self.window > 1 else "a logged value"
        if self.threshold is None:
            return "No threshold: no method ends above the lowest start; give one with --threshold."
        return f"Threshold: {self.threshold.value:.3g}, {self.threshold.reason}. Reached where {smooth} is there."

    def _runs(self) -> list[Run]:
        return [run for runs in self.methods.values() for run in runs]


def compare(
    methods: Mapping[str, Sequence[Run]],
    metrics: Iterable[str] = (),
    window: int | None = None,
    threshold: float | None = None,
) -> Comparison:
    """
    Puts runs side by side.

    Args:
        methods (`Mapping[str, Sequence[Run]]`):
            Runs by method: one, or one a seed.
        metrics (`Iterable[str]`, *optional*):
            Metrics to compare besides the usual ones.
        window (`int`, *optional*):
            Window of the moving average, in logs. By default
            [`~trl_cancel.diagnostics.reports.curves.default_window`].
        threshold (`float`, *optional*):
            Reward to reach. By default [`~trl_cancel.diagnostics.reports.curves.default_threshold`].

    Returns:
        [`Comparison`].

    Raises:
        `ValueError`: If a metric is in no run, a run has none of the metrics, or too few for the window.
    """
    runs = [run for several in methods.values() for run in several]
    known = set().union(*(run.metrics() for run in runs))
    wanted = METRICS | {metric: metric for metric in metrics if metric not in METRICS}
    for metric in wanted.keys() - METRICS.keys() - known:
        raise ValueError(f"metric={metric}: no run has logged it; {_instead(metric, known)}")
    shown = {metric: label for metric, label in wanted.items() if metric in known}
    for run in runs:
        if not run.metrics() & shown.keys():
            raise ValueError(f"{run.source}: has logged none of {', '.join(shown or METRICS)}.")
        rewards = run.series(REWARD)
        if window and rewards and 1 < window > len(rewards.values) // 2:
            raise ValueError(
                f"smooth={window}: {run.source} has logged the reward {len(rewards.values)} times; use at most "
                f"{max(1, len(rewards.values) // 2)}."
            )
    given = Threshold(threshold, "as given") if threshold is not None else default_threshold(methods)
    return Comparison(methods, shown, window or default_window(runs), given)


def _instead(metric: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(metric, known, n=3)
    return f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(sorted(known))}."


def short_count(value: float) -> str:
    """
    A number of steps or tokens: `160`, `16.6k`, `1.23M`.

    Args:
        value (`float`):
            The number.

    Returns:
        `str`.
    """
    if value < 1e4:
        return f"{value:.0f}"
    value = float(f"{value:.3g}")
    size, unit = next((size, unit) for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if value >= size)
    return f"{value / size:.3g}{unit}"


def _three_digits(value: float) -> str:
    return f"{value:.3g}"


def _estimate(values: list[float]) -> tuple[float, ...]:
    """The value, or its mean and interval if there are several that differ."""
    return estimate(values) if len(set(values)) > 1 else (values[0],)


def _with_interval(value: tuple[float, ...], form: Callable[[float], str]) -> str:
    middle, *ends = map(form, value)
    return f"{middle} [{', '.join(ends)}]" if ends else middle


def _mean(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if not known:
        return {"value": None, "interval": None, "runs": 0}
    mean, *interval = _estimate(known)
    return {"value": mean, "interval": interval or None, "runs": len(known)}


def _spacing(run: Run) -> float | None:
    """Usual number of steps from one logged reward to the next."""
    rewards = run.series(REWARD)
    steps = rewards.steps if rewards else []
    return statistics.median(b - a for a, b in pairwise(steps)) if len(steps) > 1 else None
