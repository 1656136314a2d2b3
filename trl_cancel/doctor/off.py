"""With everything off, or a method at its neutral setting, this package's trainer computes what TRL's does."""

import math
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer

from ..methods import METHODS
from ..playground import CHECKPOINT
from .check import Checks, holds
from .runs import OFF_POLICY, ON_POLICY, Run, same_weights, train, without


CHECKS = Checks()
OFF = {"query_preserved": False, "cancellation_metrics": False}
OF_TRL = GRPOConfig.__dataclass_fields__.keys()
NEUTRAL = {method.switch: method for method in METHODS if method.neutral is not None}


@CHECKS.assume(
    "with everything off, losses, metrics and weights are TRL's, bit for bit",
    over=[
        OFF_POLICY,
        ON_POLICY,
        {**OFF_POLICY, "importance_sampling_level": "sequence", "loss_type": "grpo", "beta": 0.1},
    ],
)
def off_is_off(model: str, settings: dict[str, Any]) -> None:
    _agree(train(model, **settings, **OFF), train(model, GRPOTrainer, **settings))


@CHECKS.assume("so they are on the playground, with the metrics on")
def metrics_change_nothing(model: str) -> None:
    settings = {**OFF_POLICY, "max_steps": 2, "learning_rate": 1e-3}
    ours = train(str(CHECKPOINT), **settings, query_preserved=False)
    ours.logs = [without(log, ("cancel/",)) for log in ours.logs]
    _agree(ours, train(str(CHECKPOINT), GRPOTrainer, **settings))


@CHECKS.assume("a method at its neutral setting changes nothing", over=NEUTRAL)
def neutral(model: str, switch: str) -> None:
    method = NEUTRAL[switch]
    settings = {**OFF_POLICY, "query_preserved": False, **(method.neutral or {})}
    theirs = train(model, GRPOTrainer, **{name: value for name, value in settings.items() if name in OF_TRL})
    ours = train(model, **settings)
    ours.logs = [
        {name: value for name, value in log.items() if name in expected}
        for log, expected in zip(ours.logs, theirs.logs, strict=True)
    ]
    _agree(ours, theirs, exactly=method.is_neutral_exactly)


def _agree(ours: Run, theirs: Run, exactly: bool = True) -> None:
    holds(len(ours.logs) == len(theirs.logs), f"{len(ours.logs)} logs, TRL's has {len(theirs.logs)}")
    for step, (log, expected) in enumerate(zip(ours.logs, theirs.logs, strict=True), start=1):
        other = [name for name in {**log, **expected} if not _equal(log.get(name), expected.get(name), exactly)]
        found = ", ".join(f"{name} is {log.get(name)}, TRL's {expected.get(name)}" for name in other)
        holds(not other, f"in log {step} {found}")
    differ = same_weights(ours.weights, theirs.weights)
    if not exactly:
        differ = [
            name
            for name in differ
            if not torch.allclose(ours.weights[name], theirs.weights[name], rtol=1e-4, atol=1e-6)
        ]
    holds(not differ, f"{', '.join(differ[:3])} {'differ' if len(differ) > 1 else 'differs'} at the end")


def _equal(found: Any, expected: Any, exactly: bool) -> bool:
    if exactly or not isinstance(found, float) or not isinstance(expected, float):
        return bool(found == expected)
    return math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-6)
