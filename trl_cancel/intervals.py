"""How sure a mean is."""

import math

import torch

from .arguments import doubles, is_number, shaped, whole


def mean_with_interval(
    scores: torch.Tensor, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """
    The mean score over prompts, with a bootstrap interval over prompts.

    Args:
        scores (`torch.Tensor` of shape `(P, k)`):
            Scores of k answers to each of P prompts; `nan` values are left out.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the interval.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        `tuple[float, float, float]`: Mean, lower and upper end; `nan` where there are no scores.

    Raises:
        `ValueError`: If `scores` has another shape or infinite values, `confidence` is not between 0 and 1, there is no
            resample, or the seed is not a whole number of at least 0.
    """
    (scores,) = doubles(scores=scores)
    shaped(scores=(scores, "P k"))
    if scores.isinf().any():
        raise ValueError("scores hold an infinite value, so they have no mean; give nan for what is to be left out.")
    if not (is_number(confidence) and 0 < confidence < 1):
        raise ValueError(f"confidence={confidence!r} must be between 0 and 1, e.g. 0.95.")
    whole("num_resamples", num_resamples, 1)
    whole("seed", seed, 0)
    by_prompt = scores.nanmean(1)
    by_prompt = by_prompt[~by_prompt.isnan()]
    if not len(by_prompt):
        return math.nan, math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(by_prompt), (num_resamples, len(by_prompt)), generator=generator)
    tail = (1 - confidence) / 2
    low, high = by_prompt[index].mean(1).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return by_prompt.mean().item(), low, high
