"""What an evaluation came to."""

from dataclasses import dataclass, field
from typing import Any


Estimate = tuple[float, float, float]  # mean, and the ends of its 95% interval


def shown(estimate: Estimate) -> str:
    """
    An estimate in words: in percent, unless it is one of rewards that are no shares.

    Args:
        estimate (`tuple[float, float, float]`):
            Mean, and the ends of its interval.
    """
    form = ".1%" if all(0 <= value <= 1 for value in estimate) else ".4g"
    mean, low, high = (format(value, form) for value in estimate)
    return f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Evaluation:
    """
    Estimates of how well a model answers a set of problems.

    Args:
        name (`str`):
            Name of the data set.
        problems (`int`):
            Number of problems.
        metrics (`dict[str, Estimate]`):
            Mean and 95% interval by metric: `"greedy"`, `"avg@8"`, `"pass@8"`, ...
        settings (`dict[str, Any]`):
            How the answers were made: `num_samples`, `temperature`, `top_p`, `max_completion_length`, `seed`, ...
        step (`int`, *optional*):
            Optimizer steps that the model had been trained for.
    """

    name: str
    problems: int
    metrics: dict[str, Estimate]
    settings: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
