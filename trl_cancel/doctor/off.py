"""With everything off, or a method at its neutral setting, this package's trainer computes what TRL's does."""

import math
from collections.abc import Callable
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer

from ..methods import METHODS
from ..methods.method import Method
from ..playground import CHECKPOINT
from .check import Checks, holds
from .runs import OFF, OFF_POLICY, ON_POLICY, Run, build, run_of, same_weights, train, without


CHECKS = Checks()
OF_TRL = GRPOConfig.__dataclass_fields__.keys()
NEUTRAL_CREDITS = {
    name: value
    for method in METHODS
    if method.neutral is not None and type(method).credit is not Method.credit
    for name, value in method.neutral.items()
}
WAYS: list[dict[str, Any]] = [
    {"cast_lm_head_to_fp32": True},
    {"gradient_checkpointing": True},
    {"bf16": True},
    {"entropy_coef": 0.01},
]
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
    _agree(train(model, **settings, **OFF, cancellation_metrics=False), train(model, GRPOTrainer, **settings))


@CHECKS.assume("so they are on the playground, with the metrics on")
def metrics_change_nothing(model: str) -> None:
    settings = {**OFF_POLICY, "max_steps": 2, "learning_rate": 1e-3}
    ours = train(str(CHECKPOINT), **settings, **OFF)
    ours.logs = [without(log, ("cancel/",)) for log in ours.logs]
    _agree(ours, train(str(CHECKPOINT), GRPOTrainer, **settings))


@CHECKS.assume("whatever else computes the log-probs, all methods at neutral settings change nothing", over=WAYS)
def other_ways(model: str, way: dict[str, Any]) -> None:
    sizes = {**ON_POLICY, "per_device_train_batch_size": 8}
    for settings in (OFF_POLICY, sizes):
        _agree_with(train, model, {**settings, **OFF, **NEUTRAL_CREDITS, **way})


@CHECKS.assume("so it is where TRL, before 1.15, computes log-probs in chunks (use_liger_kernel)")
def in_chunks(model: str) -> None:
    def train_in_chunks(*args: Any, **settings: Any) -> Run:
        trainer = build(*args, **settings)
        trainer.use_liger_kernel = True  # where TRL has no such attribute, this is none
        trainer.train()
        return run_of(trainer)

    _agree_with(train_in_chunks, model, {**OFF_POLICY, **OFF, **NEUTRAL_CREDITS})


@CHECKS.assume("a method at its neutral setting changes nothing", over=NEUTRAL)
def neutral(model: str, switch: str) -> None:
    method = NEUTRAL[switch]
    settings = {**OFF_POLICY, **OFF, **(method.neutral or {})}
    _agree_with(train, model, settings, method.is_neutral_exactly)


def _agree_with(trains: Callable[..., Run], model: str, settings: dict[str, Any], exactly: bool = True) -> None:
    theirs = trains(model, GRPOTrainer, **{name: value for name, value in settings.items() if name in OF_TRL})
    ours = trains(model, **settings)
    ours.logs = [
        {name: value for name, value in log.items() if name in expected}
        for log, expected in zip(ours.logs, theirs.logs, strict=True)
    ]
    _agree(ours, theirs, exactly)


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
