"""Evaluation: answers of a model, scored, and how sure their means are."""

from ..intervals import mean_with_interval
from .callback import EvaluationCallback
from .engines import ContinuousEngine, Engine, TransformersEngine, VllmEngine
from .evaluate import answer_problems, evaluate, summarize
from .metrics import avg_at_k, pass_at_k
from .presets import PRESETS, DataSource, Preset, load_problems
from .result import Estimate, Evaluation
from .rewards import math_verify_reward
from .samples import SampleLog
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
from .settings import EvaluationSettings


__all__ = [
    "PRESETS",
    "ContinuousEngine",
    "DataSource",
    "Engine",
    "Estimate",
    "Evaluation",
    "EvaluationCallback",
    "EvaluationSettings",
    "Preset",
    "RewardFunction",
    "SampleLog",
    "TransformersEngine",
    "VllmEngine",
    "answer_problems",
    "as_answers",
    "avg_at_k",
    "continuations",
    "end_tokens",
    "evaluate",
    "load_problems",
    "math_verify_reward",
    "mean_with_interval",
    "pass_at_k",
    "prompt_token_ids",
    "rewards_of",
    "sampling",
    "score_samples",
    "summarize",
]
