"""Several runs side by side, as a page of curves."""

import re
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from .comparison import Comparison, short_count
from .curves import METRICS, REWARD, band, smoothed
from .figures import COLOURS, Figure, new_figure
from .page import Page
from .runs import Series


STEPS, TOKENS = "optimizer steps", "tokens of prompts and completions"
NAMES = {
    REWARD: "reward",
    "completions/mean_length": "length",
    "entropy": "entropy",
    "cancel/shared_prefix_residual": "residual",
}
LINEAR = {REWARD, "completions/mean_length", "entropy"}  # never on a logarithmic axis
HOW_TO_READ = {
    "reward": "The mean reward of the rollouts in training. Higher is better, as long as the reward means what it "
    "should. The spread that a run logs (reward_std) is that of single rollouts, and is not drawn.",
    "completions/mean_length": "The mean number of tokens in a completion.",
    "entropy": "The mean entropy of the policy at the completions' tokens. Near 0 it has stopped exploring.",
    "cancel/shared_prefix_residual": "How much of the push on tokens that good and bad rollouts share is left that the "
    "advantages do not justify: 0 is perfect cancellation. A run that does not log it has no curve.",
}
DECADES = 100  # highest over lowest value from which on an axis is logarithmic
LINES = ["-", "--", ":", "-."]  # once the colours are used up


def comparison_page(comparison: Comparison) -> Page:
    """
    The page of a comparison.

    Args:
        comparison ([`~trl_cancel.diagnostics.reports.comparison.Comparison`]):
            The runs.

    Returns:
        [`~trl_cancel.diagnostics.reports.page.Page`].
    """
    methods = {name: len(runs) for name, runs in comparison.methods.items()}
    page = Page(
        f"Comparison of {', '.join(methods)}" if len(methods) < 5 else f"Comparison of {len(methods)} methods",
        summary="Training runs side by side, from what they have logged.",
        facts={name: f"{count} {'seeds' if count > 1 else 'run'}" for name, count in methods.items()},
    )
    page.section("Results", "Where the runs ended, and how fast and how smoothly they got there.")
    page.table(*comparison.table())
    for note in comparison.notes():
        page.text(note)
    for metric in comparison.metrics:
        page.section(_title(comparison, metric), HOW_TO_READ.get(metric, f"The metric {metric} of the logs."))
        name = NAMES.get(metric) or _file_name(metric, list(comparison.metrics))
        page.figure(name, _curves(comparison, metric, STEPS), **_words(comparison, metric, STEPS))
        if metric == REWARD and any(_series(comparison, method, metric, TOKENS) for method in methods):
            page.figure(f"{name}-by-tokens", _curves(comparison, metric, TOKENS), **_words(comparison, metric, TOKENS))
    return page


def _curves(comparison: Comparison, metric: str, axis: str) -> Figure:
    figure, axes = new_figure()
    values: list[float] = []
    for (method, runs), style in zip(comparison.methods.items(), _styles(), strict=False):
        series = _series(comparison, method, metric, axis)
        if not series:
            continue
        label = _literal(f"{method} ({len(runs)} seeds)" if len(runs) > 1 else method)
        _draw(axes, series, comparison.window, axis, label, style)
        values += [value for one in series for value in one.values]
    if metric == REWARD and comparison.threshold:
        axes.axhline(comparison.threshold.value, color="black", linestyle=(0, (1, 3)), linewidth=1, label="threshold")
    if metric not in LINEAR:
        _scale(axes, values)
    if axis == TOKENS:
        axes.xaxis.set_major_formatter(lambda count, _: short_count(count))
    axes.set(xlabel=axis, ylabel=_literal(comparison.metrics[metric]))
    axes.legend()
    return figure


def _draw(axes: Any, series: Sequence[Series], window: int, axis: str, label: str, style: dict[str, Any]) -> None:
    """What was logged as a thin line, its moving average as a thick one, and the range of the seeds' averages."""
    logged = band([(_x(one, axis), one.values) for one in series])
    averages = [smoothed(one, window) for one in series]
    average = band([(_x(one, axis), one.values) for one in averages])
    if len(average.x) < len(logged.x):
        axes.plot(logged.x, logged.mean, linewidth=0.8, alpha=0.4, **style)
    marker = "o" if len(average.x) == 1 else None
    axes.plot(average.x, average.mean, linewidth=1.8, label=label, marker=marker, **style)
    if len(series) > 1:
        axes.fill_between(average.x, average.low, average.high, color=style["color"], alpha=0.18, linewidth=0)


def _series(comparison: Comparison, method: str, metric: str, axis: str) -> list[Series]:
    found = [run.series(metric) for run in comparison.methods[method]]
    return [series for series in found if series and (axis == STEPS or series.tokens)]


def _x(series: Series, axis: str) -> Sequence[float]:
    return series.steps if axis == STEPS else series.tokens or []


def _literal(name: str) -> str:
    """A name as a label: matplotlib reads formulas between dollars, and leaves names with a leading underscore out."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _styles() -> Any:
    return cycle({"color": colour, "linestyle": line} for line in LINES for colour in COLOURS.values())


def _scale(axes: Any, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0]
    if positive and min(values) >= 0 and max(positive) >= DECADES * min(positive):
        axes.set_yscale("log", nonpositive="mask")


def _words(comparison: Comparison, metric: str, axis: str) -> dict[str, str]:
    """Caption of a figure, and what it shows for those who cannot see it."""
    label, window = comparison.metrics[metric], comparison.window
    series = [one for method in comparison.methods for one in _series(comparison, method, metric, axis)]
    caption = [f"{_title(comparison, metric)} by {axis}."]
    if any(len(smoothed(one, window).values) < len(one.values) for one in series):
        caption.append(f"Thick: mean of the last {window} logged values; thin: the values.")
    if any(len(runs) > 1 for runs in comparison.methods.values()):
        caption.append("Curves are means over seeds, the band goes from the lowest to the highest.")
    if metric not in LINEAR and any(0 in one.values for one in series):
        caption.append("A logarithmic axis does not show 0.")
    return {
        "caption": " ".join(caption),
        "alt": f"Curves of the {label} by {axis} for {', '.join(comparison.methods)}. The table has the last values.",
    }


def _title(comparison: Comparison, metric: str) -> str:
    """A metric in words, or the name that a user gave."""
    return comparison.metrics[metric].capitalize() if metric in METRICS else metric


def _file_name(metric: str, metrics: list[str]) -> str:
    """Name of a figure; a number keeps those apart that differ only in signs."""
    names = [re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") for name in metrics]
    name = names[metrics.index(metric)]
    number = f"-{metrics.index(metric)}" if names.count(name) > 1 or name in NAMES.values() else ""
    return f"{name}{number}" if name[:1].isalpha() else f"metric-{name}{number}"
