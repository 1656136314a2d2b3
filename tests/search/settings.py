"""Draws configurations over all fields of `CancelGRPOConfig` and over those of TRL's that bear on training."""

import random
from dataclasses import fields
from typing import Any

from trl_cancel.batch.clipping import CLIPPED_LOSSES, LOSS_TYPES
from trl_cancel.config import CancelGRPOConfig
from trl_cancel.methods import METHODS
from trl_cancel.methods.group_weights import TRANSFORMATIONS
from trl_cancel.methods.method import Method

from ..methods import METHODS as ROWS
from ..runs import DEFAULTS
from .standins import CREDITS, MODELS, REWARDS


# What the trainer is given beside its configuration, with the defaults of the search.
ARGUMENTS: dict[str, Any] = {
    "model": "tied",
    "lora": False,
    "credits": [],
    "rewards": ["tokens"],
    "prompts": 64,
    "conversational": True,
    "streamed": False,
    "environment": False,
}
# Fields of `GRPOConfig` that are not drawn, and why.
LEFT_ALONE = {
    "trust_remote_code": "code of models from the Hub",
    "router_aux_loss_coef": "mixtures of experts",
    "ds3_gather_for_generation": "DeepSpeed",
    "chat_template_kwargs": "the playground's template takes none",
    "remove_unused_columns": "rewards need the columns",
    "cache_implementation": "speed of generation only",
    "vllm_importance_sampling_cap": "deprecated",
    "max_tool_calling_iterations": "tools",
    "log_multimodal": "images",
    "log_completions_hub_repo": "the Hub",
    "use_transformers_continuous_batching": "needs a GPU",
    "transformers_continuous_batching_config": "needs a GPU",
    "use_transformers_paged": "deprecated",
    **{
        f"vllm_{name}": "vLLM itself, for which these runs have a stand-in"
        for name in [
            "mode",
            "model_impl",
            "enable_sleep_mode",
            "structured_outputs_regex",
            "server_base_url",
            "server_host",
            "server_port",
            "server_timeout",
            "group_port",
            "gpu_memory_utilization",
            "max_model_length",
            "tensor_parallel_size",
        ]
    },
}
# Methods whose settings are drawn with more than their choices and those of their rows.
BY_HAND = {
    *(
        "query_preserved",
        "filter_zero_variance",
        "reward_balance",
        "symmetric_clip",
        "group_weights",
        "advantage_sign",
    ),
    *("nthr", "delta_credit"),
}
MOST_ROLLOUTS = 32  # of a generation or an optimizer step, so that a run takes a fraction of a second


def draw(seed: Any, processes: int = 1) -> dict[str, Any]:
    """
    Settings of one run, those alone that differ from the defaults of the search.

    Args:
        seed (`Any`):
            Seed of the draw; equal seeds draw equal settings.
        processes (`int`, *optional*, defaults to `1`):
            Number of processes that the settings are for.
    """
    rng = _Chance(repr(seed))
    settings = _sizes(rng, processes)
    settings |= _methods(rng)
    settings |= _loss(rng, settings)
    settings |= _sampling(rng)
    settings |= _rewards(rng)
    settings |= _training(rng, settings, processes)
    settings |= _logging(rng)
    settings |= _arguments(rng, settings)
    return trimmed(settings)


def trimmed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that are the defaults."""
    return {name: value for name, value in settings.items() if value != default_of(name)}


def default_of(name: str) -> Any:
    """The value of a setting that is not named."""
    if name in ARGUMENTS:
        return ARGUMENTS[name]
    return DEFAULTS.get(name, CancelGRPOConfig.__dataclass_fields__[name].default)


class _Chance(random.Random):
    def often(self, usual: Any, *others: Any, share: float = 0.3) -> Any:
        """One of the other values in a share of all draws."""
        return self.choice(others) if self.random() < share else usual

    def happens(self, share: float) -> bool:
        return self.random() < share


def _sizes(rng: _Chance, processes: int) -> dict[str, Any]:
    """Sizes that meet the cases in which groups stay whole, are spread, torn, repeated or straddle processes."""
    while True:
        group = rng.choice((2, 3, 4, 4, 4))
        kinds = ["step"] * 3 + ["split"] * 4 + ["spread"] * 3 + ["misaligned", "repeated", "torn", "torn", "any"]
        kind = rng.choice([*kinds, *["straddling"] * (4 if processes > 1 else 0)])
        micro_batch, iterations = group * rng.choice((1, 1, 2)), rng.often(1, 2, 3, share=0.35)
        accumulation, query_preserved = rng.choice((1, 1, 2, 3, 4)), True
        split = accumulation
        if kind == "split":
            split = accumulation * rng.choice((2, 3, 4))
        elif kind == "spread":
            micro_batch = rng.choice([size for size in range(1, group) if group % size == 0])
            accumulation = group // micro_batch * rng.choice((1, 2))
            split = accumulation * rng.choice((1, 1, 2, 3))
        elif kind == "misaligned":
            accumulation, split = rng.choice(((2, 3), (3, 2), (4, 3), (4, 6), (6, 4), (4, 1), (4, 2)))
        elif kind == "repeated":
            iterations, split = 2, rng.choice((1, 2))
            accumulation = split * iterations
        elif kind == "straddling":
            micro_batch = rng.choice((1, 2, 3, 6))
            split = rng.choice((1, accumulation))
            accumulation = split * rng.choice((1, 2))
            query_preserved = rng.choice((True, True, False))
        elif kind in ("torn", "any"):
            micro_batch, split = rng.randint(1, 6), rng.randint(1, 6)
            query_preserved = kind == "any"
        fits = micro_batch * split * processes % group == 0 or kind == "any"
        if fits and micro_batch * max(split, accumulation) * processes <= MOST_ROLLOUTS:
            break
    sizes = {
        "num_generations": group,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "num_iterations": iterations,
        "query_preserved": query_preserved and not rng.happens(0.1),
        "max_steps": 2 if accumulation > 2 else rng.choice((2, 3, 4)),
    }
    if split != accumulation or rng.happens(0.5):
        name, value = rng.often(
            ("steps_per_generation", split), ("generation_batch_size", split * micro_batch * processes), share=0.2
        )
        sizes[name] = value
    return sizes


def _methods(rng: _Chance) -> dict[str, Any]:
    """Each method on its own, several together, or none; settings of a method that is off are drawn now and then."""
    settings: dict[str, Any] = {}
    group_weights = rng.happens(0.4)
    if group_weights or rng.happens(0.05):
        settings |= {
            "group_weights_trust_region": rng.choice(("mask", "mask", "none", "group")),
            "group_weights_include_sampling_ratio": not rng.happens(0.2),
            "group_weights_scale": rng.often(1.0, 0.5, 2.0),
            "group_weights_stop_gradient": not rng.happens(0.1),
        }
    if group_weights:
        settings["group_weights"] = rng.choice(TRANSFORMATIONS)
    settings["symmetric_clip"] = rng.happens(0.2)
    settings["symmetric_clip_gradient"] = rng.often("surrogate", "score", share=0.4)
    settings["advantage_sign"] = rng.often("both", "positive", "negative", share=0.15)
    if rng.happens(0.3):
        settings |= {
            "nthr": True,
            "nthr_beta": rng.often(1.0, 0.0, 0.2, 0.7, 2.0, float("-inf"), share=0.6),
            "nthr_eta": rng.often("balanced", "p", "1-p", "0.5", 0.0, share=0.6),
            "nthr_selection": rng.often("score", "random"),
        }
    if rng.happens(0.3):
        settings |= _delta(rng)
    if rng.happens(0.15):
        settings["reward_balance"] = rng.choice((0.1, 0.25, 0.25, 0.4))
    settings["filter_zero_variance"] = rng.happens(0.15)
    if rng.happens(0.3):
        settings["max_generation_rounds"] = rng.choice((1, 2, 3))
    for method in METHODS:
        if method.switch not in BY_HAND and rng.happens(0.15):
            settings |= _as_in_its_row(rng, method)
    return settings


def _as_in_its_row(rng: _Chance, method: Method) -> dict[str, Any]:
    """Settings of a method: its choices, and what its row in `tests/methods.py` has for them."""
    row = next(row for row in ROWS.values() if method.switch in row.settings)
    drawn = {}
    for setting in fields(method.Settings):
        values = [settings[setting.name] for settings in (row.settings, row.neutral) if setting.name in settings]
        drawn[setting.name] = rng.choice(setting.metadata.get("choices") or [setting.default, *values])
    return drawn


def _delta(rng: _Chance) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "delta_credit": True,
        "delta_refinements": rng.often(1, 0, 2, share=0.5),
        "delta_gamma": rng.often(None, 0.1, 3.0),
        "delta_proxy": rng.often("lm_head_row", "hidden_gradient", share=0.4),
        "delta_assignment": rng.often("soft", "hard", "random", share=0.4),
        "delta_normalize": rng.choice(NORMALIZATIONS),
    }
    if rng.happens(0.3):
        settings["delta_lambda_min"], settings["delta_lambda_max"] = rng.choice(((0.0, 1.0), (0.5, 0.5), (0.1, 3.0)))
    if rng.happens(0.2) and settings["delta_assignment"] != "hard":
        settings["delta_top_fraction"] = rng.choice((0.2, 0.5, 1.0))
    return settings


def _loss(rng: _Chance, chosen: dict[str, Any]) -> dict[str, Any]:
    weighs, symmetric = "group_weights" in chosen, chosen["symmetric_clip"]
    losses = CLIPPED_LOSSES if symmetric else (*CLIPPED_LOSSES, "cispo") if weighs else LOSS_TYPES
    loss = rng.choice(losses if not rng.happens(0.03) else LOSS_TYPES)
    loss = "grpo" if weighs and rng.happens(0.4) else loss
    credits = chosen.get("nthr") or chosen.get("delta_credit")
    level = rng.often("token", "sequence", share=0.97 if weighs else 0.5 if credits else 0.35)
    high = rng.often(None, 0.002, 0.05, 0.28, share=0.4)
    settings: dict[str, Any] = {
        "loss_type": loss,
        "importance_sampling_level": level,
        "epsilon": rng.often(0.2, 0.003, 0.02, 0.1, share=0.7),
        "epsilon_high": rng.choice((1.0, 1.5, 5.0)) if loss == "cispo" else high,
        "mask_truncated_completions": rng.happens(0.25),
        "off_policy_mask_threshold": rng.often(None, 0.0, 0.001, 0.1, share=0.15),
        "top_entropy_quantile": rng.often(1.0, 0.2, 0.5, share=0.12),
        "beta": rng.often(0.0, 0.01, 0.1),
    }
    if loss in ("sapo", "vespo"):
        names = {
            "sapo": ("temperature_neg", "temperature_pos"),
            "vespo": ("k_pos", "lambda_pos", "k_neg", "lambda_neg"),
        }
        for name in (f"{loss}_{of}" for of in names[loss]):
            settings[name] = rng.often(default_of(name), 0.5, 1.5, 4.0, share=0.4)
    if not symmetric:
        settings["delta"] = rng.often(None, 1.01, 1.1, 1.5, 0.9 if rng.happens(0.1) else 4.0, share=0.35)
        if loss in CLIPPED_LOSSES and rng.happens(0.4 if level == "sequence" else 0.1):
            # Far within the clipping range, where it bounds positive advantages alone.
            settings |= {
                "epsilon": 0.2,
                "epsilon_high": rng.often(None, 0.28),
                "delta": rng.choice((1.0, 1.001, 1.02)),
            }
    if settings["beta"]:
        settings["use_bias_correction_kl"] = rng.happens(0.1 if weighs else 0.3)
    if rng.happens(0.15):
        settings["entropy_coef"] = 0.05
        if rng.happens(0.4):
            settings |= {
                "use_adaptive_entropy": True,
                "entropy_coef_min": 0.01,
                "entropy_coef_max": 0.1,
                "entropy_coef_delta": 0.02,
                "entropy_target": rng.choice((0.1, 3.0)),
            }
    return settings


def _sampling(rng: _Chance) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "max_completion_length": rng.choice((3, 6, 8, 12)),
        "temperature": rng.often(1.0, 0.7, 1.3),
        "top_p": rng.often(1.0, 0.9, share=0.1),
        "top_k": rng.often(0, 10, share=0.1),
        "min_p": rng.often(None, 0.05, share=0.1),
        "repetition_penalty": rng.often(1.0, 1.1, share=0.1),
        "pad_to_multiple_of": rng.often(default_of("pad_to_multiple_of"), 4, share=0.1),
        "generation_kwargs": rng.often(None, {"min_new_tokens": 2}, share=0.1),
    }
    if rng.happens(0.2):
        mode = rng.choice(("sequence_mask", "sequence_truncate", "token_mask", "token_truncate"))
        settings |= {
            "use_vllm": True,
            "vllm_importance_sampling_correction": not rng.happens(0.15),
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_max": rng.choice((1.1, 1.5, 3.0)),
            "vllm_importance_sampling_clip_min": rng.often(None, 0.5, 0.8),
        }
    return settings


def _rewards(rng: _Chance) -> dict[str, Any]:
    rewards = rng.sample(sorted(REWARDS), rng.choice((1, 1, 2)))
    settings: dict[str, Any] = {
        "rewards": rewards,
        "scale_rewards": rng.often("group", "batch", "none"),
        "multi_objective_aggregation": rng.often("sum_then_normalize", "normalize_then_sum", share=0.25),
    }
    if rng.happens(0.3):
        settings["reward_weights"] = [rng.choice((0.5, 1.0, 2.0)) for _ in rewards]
    return settings


def _training(rng: _Chance, chosen: dict[str, Any], processes: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "optim": rng.often("adamw_torch_fused", "sgd", share=0.3),
        "weight_decay": rng.often(0.0, 0.1, share=0.15),
        "max_grad_norm": rng.often(1.0, 0.1, 0.0, share=0.2),
        "lr_scheduler_type": rng.often("linear", "constant", share=0.3),
        "gradient_checkpointing": rng.happens(0.1),
        "bf16": rng.happens(0.05),
        "seed": rng.randint(0, 1000),
        "shuffle_dataset": not rng.happens(0.1),
        "disable_dropout": rng.happens(0.2),
        "cast_lm_head_to_fp32": rng.happens(0.05),
        "state_cache_gib": rng.often(2.0, 0.0, 1e-5, 1e-6, share=0.3),
        "save_on_signal": not rng.happens(0.1),
    }
    settings["learning_rate"] = 0.1 if settings["optim"] == "sgd" else rng.often(1e-2, 1e-3, 3e-2, share=0.4)
    if chosen["beta"] and rng.happens(0.3):
        settings |= {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1}
    if rng.happens(0.1):
        group = rng.choice((chosen["num_generations"], 1, 2))
        settings |= {
            "do_eval": True,
            "eval_strategy": "steps",
            "eval_steps": rng.choice((1, 2)),
            "num_generations_eval": group,
            "per_device_eval_batch_size": group * rng.choice((1, 2)),
        }
    if rng.happens(0.05):
        settings["model_init_kwargs"] = {"attn_implementation": "eager"}
    return settings


def _logging(rng: _Chance) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "cancellation_metrics": rng.happens(0.6),
        "token_shift_steps": rng.often(0, 1, 2, share=0.2),
        "log_unique_prompts": rng.happens(0.05),
    }
    if rng.happens(0.05):
        settings |= {"log_completions": True, "num_completions_to_print": 1}
    return settings


def _arguments(rng: _Chance, chosen: dict[str, Any]) -> dict[str, Any]:
    lora = rng.happens(0.15) and not chosen.get("sync_ref_model")
    return {
        "model": rng.choice(sorted(MODELS)),
        "lora": lora,
        "credits": rng.sample(sorted(CREDITS), rng.choice((1, 1, 2))) if rng.happens(0.15) else [],
        "prompts": rng.often(64, 33, 40, share=0.2),
        "conversational": not rng.happens(0.2),
        "streamed": rng.happens(0.08),
        "environment": rng.happens(0.08) and not chosen.get("use_vllm"),
    }


NORMALIZATIONS = ("batch", "side", "none") if isinstance(default_of("delta_normalize"), str) else (True, False)
