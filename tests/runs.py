"""Short training runs on tiny models, for tests that compare trainers."""

from dataclasses import replace
from typing import Any

import torch
import trl
from transformers import AutoModelForCausalLM

from trl_cancel.doctor.runs import (
    DEFAULTS,
    OFF_POLICY,
    ON_POLICY,
    TINY,
    UNREPEATABLE,
    Run,
    build,
    noisy_reward,
    repeatable,
    train,
    weights_of,
    without,
)


__all__ = [
    "DEFAULTS",
    "OFF_POLICY",
    "ON_POLICY",
    "TINY",
    "UNREPEATABLE",
    "Run",
    "assert_same_weights",
    "build",
    "load",
    "noisy_reward",
    "repeatable",
    "train",
    "trained_by_trl",
    "weights_of",
    "without",
]


def trained_by_trl(model: str, **settings: Any) -> Run:
    """What [`train`] returns for TRL's own trainer; equal settings are run once a session."""
    key = (model, repr(sorted(settings.items(), key=str)))
    if key not in _RUNS_OF_TRL:
        run = train(model, trl.GRPOTrainer, **settings)
        _RUNS_OF_TRL[key] = replace(run, trainer=None)  # which holds the model and more
    return _RUNS_OF_TRL[key]


_RUNS_OF_TRL: dict[Any, Run] = {}


def load(path: str) -> Any:
    """The model at `path`, in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Equal to the last bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{different} differ"
