"""Evaluation: answers of a model, scored, and how sure their means are."""

from ..intervals import mean_with_interval
from .result import Estimate, Evaluation
from .scoring import (
    RewardFunction,
    as_answers,
    continuations,
    end_tokens,
    prompt_token_ids,
    rewards_of,
    sampling,
    score_samples,
)


__all__ = [
    "Estimate",
    "Evaluation",
    "RewardFunction",
    "as_answers",
    "continuations",
    "end_tokens",
    "mean_with_interval",
    "prompt_token_ids",
    "rewards_of",
    "sampling",
    "score_samples",
]
