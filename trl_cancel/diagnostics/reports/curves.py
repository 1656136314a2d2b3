"""Curves of runs as numbers: smoothing, the step at which a threshold is reached, means over seeds."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...intervals import mean_with_interval
from ..energy import jitter2
from .runs import Run, Series


REWARD = "reward"
METRICS = {
    REWARD: "reward",
    "completions/mean_length": "tokens a completion",
    "entropy": "entropy",
    "cancel/shared_prefix_residual": "shared-prefix residual",
}
TENTH, WAY = 10, 0.9  # of the logs that are a start or an end; of the way from the start to the end

Estimate = tuple[float, float, float]  # mean, and the ends of its 95% interval


@dataclass(frozen=True)
class Threshold:
    """
    A reward to reach.

    Args:
        value (`float`):
            The reward.
        reason (`str`):
            Where it comes from.
    """

    value: float
    reason: str


@dataclass(frozen=True)
class Band:
    """
    The curves of several seeds as one.

    Args:
        x (`np.ndarray` of shape `(N,)`):
            Steps or tokens, over the range that all seeds share.
        mean, low, high (`np.ndarray` of shape `(N,)`):
            Mean, minimum and maximum over the seeds, interpolated where not all of them have logged.
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """
    Means of each value and those before it.

    Args:
        values (`Sequence[float]`):
            Values of a metric.
        window (`int`):
            Number of values in a mean.

    Returns:
        `list[float]`: One mean for each full window, so `window - 1` fewer than there are values.
    """
    return [statistics.fmean(values[start : start + window]) for start in range(len(values) - window + 1)]


def smoothed(series: Series, window: int) -> Series:
    """The moving average of a series, or the series itself if it is shorter than two windows."""
    if len(series.values) < 2 * window:
        return series
    late = slice(window - 1, None)
    values = moving_average(series.values, window)
    return Series(series.steps[late], values, series.tokens and series.tokens[late])


def default_window(runs: Iterable[Run]) -> int:
    """A tenth of the rewards that the run with the fewest has logged, and at least 1."""
    lengths = [len(series.values) for run in runs if (series := run.series(REWARD))]
    return max(1, min(lengths, default=0) // TENTH)


def first_tenth(series: Series) -> float:
    """Mean over the first tenth of the logs."""
    return statistics.fmean(series.values[: max(1, len(series.values) // TENTH)])


def last_tenth(series: Series) -> float:
    """Mean over the last tenth of the logs."""
    return statistics.fmean(series.values[-max(1, len(series.values) // TENTH) :])


def default_threshold(methods: Mapping[str, Sequence[Run]]) -> Threshold | None:
    """
    A threshold from the data: nine tenths of the way from the lowest start to the highest end, where starts and ends
    are the methods' means over the first and the last tenth of their logs and over seeds. A method that ends low does
    not lower it, so that it may be reached by some methods alone.

    Args:
        methods (`Mapping[str, Sequence[Run]]`):
            Runs by method.

    Returns:
        [`Threshold`], or `None` if no method ends above the lowest start.
    """
    rewards = {name: [series for run in runs if (series := run.series(REWARD))] for name, runs in methods.items()}
    starts = {name: statistics.fmean(map(first_tenth, series)) for name, series in rewards.items() if series}
    ends = {name: statistics.fmean(map(last_tenth, series)) for name, series in rewards.items() if series}
    if not starts or max(ends.values()) <= min(starts.values()):
        return None
    low, high = min(starts, key=starts.__getitem__), max(ends, key=ends.__getitem__)
    return Threshold(
        value=starts[low] + WAY * (ends[high] - starts[low]),
        reason=f"nine tenths of the way from the lowest start ({starts[low]:.3g}, {low}) to the highest end "
        f"({ends[high]:.3g}, {high})",
    )


def first_reaching(series: Series, threshold: float) -> int | None:
    """Index of the first value that reaches the threshold."""
    return next((index for index, value in enumerate(series.values) if value >= threshold), None)


def band(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Band:
    """
    Mean, minimum and maximum of several curves.

    Args:
        curves (`Sequence[tuple[Sequence[float], Sequence[float]]]`):
            Ascending x and the values of each curve.

    Returns:
        [`Band`].
    """
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    points = np.unique(np.concatenate([x for x, _ in curves]))
    points = points[(points >= start) & (points <= end)]
    values = np.stack([np.interp(points, x, y) for x, y in curves])
    return Band(points, values.mean(0), values.min(0), values.max(0))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% bootstrap interval over seeds."""
    return mean_with_interval(torch.tensor(values, dtype=torch.double).unsqueeze(1))


def summarize(run: Run, metrics: Iterable[str], window: int, threshold: float | None) -> dict[str, float | None]:
    """
    What a run came to, as numbers; `None` where it has not logged what it takes.

    Args:
        run ([`Run`]):
            The run.
        metrics (`Iterable[str]`):
            Metrics whose mean over the last tenth of the logs is wanted.
        window (`int`):
            Window of the moving average of the reward, in logs.
        threshold (`float`, *optional*):
            Reward that the moving average is to reach.

    Returns:
        `dict[str, float | None]`.
    """
    reward = run.series(REWARD)
    average = smoothed(reward, window) if reward else None
    reached = first_reaching(average, threshold) if average and threshold is not None else None
    series = {metric: run.series(metric) for metric in metrics}
    return {
        "steps": run.steps,
        "tokens": run.tokens,
        **{f"last/{metric}": last_tenth(found) if found else None for metric, found in series.items()},
        "greedy": score[0] if (score := run.score("greedy")) else None,
        "sampled": score[0] if (score := run.score("sampled")) else None,
        "seconds": run.seconds,
        "jitter2": jitter2(reward.values) if reward and len(reward.values) > 2 else None,
        "steps_to_threshold": average.steps[reached] if average and reached is not None else None,
        "tokens_to_threshold": average.tokens[reached] if average and average.tokens and reached is not None else None,
    }
