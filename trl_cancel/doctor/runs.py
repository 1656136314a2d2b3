"""Short training runs on tiny models, by which trainers are compared."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from transformers import set_seed

from ..config import CancelGRPOConfig
from ..methods import METHODS
from ..playground.data import load_prompts
from ..playground.tokenizer import build_tokenizer
from ..playground.warm_start import build_model
from ..trainer import CancelGRPOTrainer


# Times and counts that no two runs share.
UNREPEATABLE = ("time", "runtime", "per_second", "flos")
DEFAULTS = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 6,
    "learning_rate": 1e-2,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "beta": 0.0,
}
# A model of a few thousand parameters.
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
# Every method switched off.
OFF = {method.switch: method.off for method in METHODS}
# Several optimizer steps with one generation batch, so that ratios leave 1 and groups can be torn.
OFF_POLICY = {"steps_per_generation": 4, "gradient_accumulation_steps": 1, "num_iterations": 2, "max_steps": 8}
# One optimizer step with each generation batch.
ON_POLICY = {"num_iterations": 1, "steps_per_generation": 1, "max_steps": 3}


def noisy_reward(completion_ids, **kwargs):
    """A reward that depends on the tokens, so that most groups hold different rewards."""
    return [float(sum(ids) % 7) for ids in completion_ids]


@dataclass
class Run:
    """A finished run: its trainer, its final weights and what it logged."""

    trainer: Any
    weights: dict[str, torch.Tensor]
    logs: list[dict[str, Any]]


def build(model: Any, trainer: type = CancelGRPOTrainer, *, arguments: dict[str, Any] | None = None, **settings: Any):
    """
    A trainer on the playground's prompts.

    Args:
        model (`Any`):
            Path or model.
        trainer (`type`, *optional*):
            Class of the trainer.
        arguments (`dict`, *optional*):
            Further arguments of the trainer.
        **settings:
            Settings that differ from `DEFAULTS`.
    """
    config = trl.GRPOConfig if trainer is trl.GRPOTrainer else CancelGRPOConfig
    folder = settings.pop("output_dir", None) or tempfile.mkdtemp()
    set_seed(42)  # for adapters, which TRL before 1.15 begins without a seed
    return trainer(
        model,
        **{
            "reward_funcs": noisy_reward,
            "args": config(**{"output_dir": folder, **DEFAULTS, **settings}),
            "train_dataset": load_prompts("train", 64),
            **(arguments or {}),
        },
    )


def train(*args: Any, resume: Any = None, **kwargs: Any) -> Run:
    """Builds a trainer as [`build`] does and trains it."""
    trainer = build(*args, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return run_of(trainer)


def run_of(trainer: Any) -> Run:
    """What a trainer has come to."""
    return Run(trainer, weights_of(trainer.model), [repeatable(entry) for entry in trainer.state.log_history])


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def repeatable(entry: dict[str, Any]) -> dict[str, Any]:
    """A log without what no two runs share."""
    return {name: value for name, value in entry.items() if not any(part in name for part in UNREPEATABLE)}


def without(entry: dict[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    """A log without the metrics whose names start with one of `prefixes`."""
    return {name: value for name, value in entry.items() if not name.startswith(prefixes)}


def tiny_model(folder: Path) -> str:
    """Writes a model of a few thousand random parameters, whose answers are noise; returns the folder."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    # Peaked enough that rollouts share prefixes.
    build_model(tokenizer, **TINY, initializer_range=0.4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names of the weights that differ, be it in the last bit."""
    return [name for name in first.keys() | second.keys() if not torch.equal(first[name], second[name])]
