"""
The table that every method must pass: a method is a row, and `test_methods.py` puts each row through the same tests.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from .runs import OFF_POLICY


class FirstTokens:
    """A custom credit for the table: the first two tokens of each rollout."""

    scope = "rollout"

    def __init__(self, weight=0.0):
        self.weight = weight

    def coefficients(self, rollouts):
        later = torch.arange(rollouts.mask.size(1)) >= 2
        return torch.where(later, self.weight, 1.0).expand_as(rollouts.mask)


@dataclass(frozen=True)
class Row:
    """
    A method of the table.

    Args:
        settings (`dict`):
            Settings that turn it on, over `OFF_POLICY` unless they say otherwise.
        neutral (`dict`):
            Changes of the settings under which it must compute what TRL computes.
        metrics (`tuple[str, ...]`):
            What it logs.
        credits (`Callable`, *optional*):
            Makes its credits.
        neutral_credits (`Callable`, *optional*):
            Makes credits that must change nothing.
        exact (`bool`):
            Whether its neutral setting agrees with TRL to the last bit, and not only to rounding.
        depends_on_processes (`bool`):
            Whether each process draws at random on its own, so that one and two cannot agree.
    """

    settings: dict[str, Any]
    neutral: dict[str, Any]
    metrics: tuple[str, ...] = (
        "cancel/shared_prefix_residual",
        "cancel/positive_fraction",
        "cancel/negative_fraction",
    )
    credits: Any = list
    neutral_credits: Any = list
    exact: bool = True
    depends_on_processes: bool = False
    refused: tuple[tuple[dict[str, Any], str], ...] = field(default=())


ON_POLICY = {"num_iterations": 1, "steps_per_generation": 1, "max_steps": 3}
CLIP_METRICS = tuple(f"symmetric_clip/clip_fraction{sign}" for sign in ("", "_positive", "_negative"))

GROUP_METRICS = tuple(
    f"group_weights/{name}" for name in ("ratio_min", "ratio_max", "weight_mean", "clip_fraction", "orthogonality")
)
BALANCE_METRICS = tuple(
    f"balance/{name}"
    for name in (
        "rounds",
        "positive_fraction",
        "negative_fraction",
        "discarded_fraction",
        "zero_variance_fraction",
        "satisfied",
    )
)
NTHR_METRICS = tuple(f"nthr/{name}" for name in ("selected_fraction", "threshold", "score_mean"))
SHIFT_METRICS = (
    *(f"shift/{sign}{kind}" for sign in ("positive_", "negative_", "") for kind in ("boosted", "suppressed", "mean")),
    "shift/mean_magnitude",
)
DELTA_METRICS = (
    *("delta/lambda_mean", "delta/lambda_std", "delta/lambda_mean_positive", "delta/lambda_mean_negative"),
    *("delta/margin_std_pos", "delta/margin_std_neg"),
)
SEQUENCE = {"importance_sampling_level": "sequence", "loss_type": "grpo"}


def dfpo(transformation: str, **changes: Any) -> Row:
    """Group weights of one kind; `min` and `orth` leave on-policy groups as they are."""
    return Row(
        settings={**SEQUENCE, "group_weights": transformation, **changes.pop("settings", {})},
        neutral={**ON_POLICY, **changes.pop("neutral", {})},
        metrics=(*GROUP_METRICS, "cancel/asymmetry", "cancel/asymmetry_before"),
        exact=False,
        **changes,
    )


METHODS = {
    "query-preserved": Row(
        settings={},
        neutral={"gradient_accumulation_steps": 4, "num_iterations": 2},
        refused=(
            (
                {"per_device_train_batch_size": 2, "query_preserved": True},
                r"query_preserved=True cannot keep groups whole: per_device_train_batch_size=2 .* keeps 2 rollouts.*"
                r"Set one of per_device_train_batch_size=4, gradient_accumulation_steps=2, .*query_preserved=False",
            ),
        ),
    ),
    "reward-balanced": Row(
        settings={"reward_balance": 0.4, "max_generation_rounds": 3},
        neutral={"reward_balance": 0.0, "query_preserved": False},
        metrics=BALANCE_METRICS,
        refused=(
            ({"query_preserved": False}, "reward_balance=0.4 needs whole groups in each optimizer step"),
            ({"reward_balance": 0.6}, "reward_balance=0.6 must be between 0 and 0.5"),
        ),
    ),
    "dynamic-sampling": Row(
        settings={"filter_zero_variance": True},
        neutral={"query_preserved": False},  # all groups of these runs have some variance
        metrics=BALANCE_METRICS,
        refused=(({"max_generation_rounds": 0}, "max_generation_rounds=0 must be a whole number of at least 1"),),
    ),
    "symmetric-clip": Row(
        settings={"symmetric_clip": True},
        neutral=ON_POLICY,
        metrics=CLIP_METRICS,
        refused=(
            ({"loss_type": "cispo"}, "symmetric_clip=True has no meaning with loss_type='cispo'.*'dapo'"),
            ({"loss_type": "sapo"}, "loss_type='sapo'"),
            ({"loss_type": "vespo"}, "loss_type='vespo'"),
            ({"delta": 1.5}, "delta=1.5 and symmetric_clip=True both bound"),
            ({"symmetric_clip_gradient": "zero"}, "symmetric_clip_gradient='zero' is not one of 'surrogate', 'score'"),
        ),
    ),
    "symmetric-clip-score": Row(
        settings={"symmetric_clip": True, "symmetric_clip_gradient": "score"},
        neutral=ON_POLICY,
        metrics=CLIP_METRICS,
        exact=False,
        refused=(({"beta": 0.1, "use_bias_correction_kl": True}, "use_bias_correction_kl=True"),),
    ),
    "symmetric-clip-score-without-weights": Row(
        # A setting of group weights that are not there must not reach another method's frozen ratio.
        settings={"symmetric_clip": True, "symmetric_clip_gradient": "score", "group_weights_stop_gradient": False},
        neutral=ON_POLICY,
        metrics=CLIP_METRICS,
        exact=False,
    ),
    "symmetric-clip-sequence": Row(
        settings={"symmetric_clip": True, "importance_sampling_level": "sequence", "loss_type": "grpo"},
        neutral=ON_POLICY,
        metrics=CLIP_METRICS,
    ),
    "dfpo-min": dfpo(
        "min",
        refused=(
            (
                {"importance_sampling_level": "token"},
                "Set importance_sampling_level='sequence', or group_weights='none'",
            ),
            ({"loss_type": "sapo"}, "loss_type='sapo' bends it in its own way. Set loss_type to one of 'grpo', "),
            ({"loss_type": "vespo"}, "loss_type='vespo'"),
            ({"loss_type": "cispo"}, "epsilon_high=0.2 bounds the ratio itself there"),
            ({"beta": 0.1, "use_bias_correction_kl": True}, "would lose its ratio. Set use_bias_correction_kl=False"),
            ({"query_preserved": False}, "needs whole groups in each optimizer step. Set query_preserved=True, or"),
            ({"group_weights": "mean"}, "group_weights='mean' is not one of 'none', 'identity', 'min'"),
            ({"group_weights_trust_region": "soft"}, "group_weights_trust_region='soft' is not one of 'none', 'mask'"),
            ({"delta": 0.9}, "delta=0.9 would cut off every positive rollout"),
            ({"group_weights_scale": 0.0}, "group_weights_scale=0.0 must be positive"),
        ),
    ),
    "dfpo-orth": dfpo("orth"),
    "dfpo-positive-orth": dfpo("positive_orth", settings={"group_weights_trust_region": "none"}),
    "dfpo-rebalance": dfpo("rebalance", settings={"group_weights_trust_region": "group"}),
    "dfpo-spread": dfpo(
        "min",
        neutral={"steps_per_generation": 2},
        settings={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 8},
    ),
    "dfpo-through-weights": dfpo(
        "identity",
        settings={"group_weights_stop_gradient": False},
        refused=(
            ({"loss_type": "cispo", "epsilon_high": 5.0}, "has no meaning with loss_type='cispo'"),
            (
                {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
                "make per_device_train_batch_size=2 a multiple of num_generations=4",
            ),
        ),
    ),
    "dfpo-symmetric": dfpo("min", settings={"symmetric_clip": True}),
    "dfpo-nthr-delta": dfpo(
        "min",
        settings={"nthr": True, "delta_credit": True},
        neutral={"nthr_eta": 1, "delta_lambda_min": 1.0, "delta_lambda_max": 1.0},
    ),
    "dfpo-with-credit": dfpo(
        "min", credits=lambda: [FirstTokens()], neutral_credits=lambda: [FirstTokens(weight=1.0)]
    ),
    "positive-only": Row(
        settings={"advantage_sign": "positive"},
        neutral={"advantage_sign": "both", "query_preserved": False},
        refused=(({"advantage_sign": "up"}, "advantage_sign='up' is not one of 'both', 'positive', 'negative'"),),
    ),
    "negative-only": Row(
        settings={"advantage_sign": "negative"}, neutral={"advantage_sign": "both", "query_preserved": False}
    ),
    "custom-credit": Row(
        settings={},
        neutral={"query_preserved": False},
        credits=lambda: [FirstTokens()],
        neutral_credits=lambda: [FirstTokens(weight=1.0)],
    ),
    "custom-credit-sequence": Row(
        settings={"importance_sampling_level": "sequence", "loss_type": "grpo"},
        neutral={"query_preserved": False},
        credits=lambda: [FirstTokens()],
        neutral_credits=lambda: [FirstTokens(weight=1.0)],
        refused=(({"loss_type": "sapo"}, "loss_type='sapo'"),),
    ),
    "nthr": Row(
        settings={"nthr": True},
        neutral={"nthr_eta": "1", "query_preserved": False},
        metrics=NTHR_METRICS,
        refused=(
            ({"nthr_beta": "1"}, "nthr_beta='1' must be a number"),
            ({"nthr_eta": "half"}, "nthr_eta='half' is not one of 'balanced', 'p', '1-p' or a number"),
            ({"nthr_eta": -1.0}, "nthr_eta=-1.0 is not one of"),
            ({"nthr_selection": "best"}, "nthr_selection='best' is not one of 'score', 'random'"),
            ({"state_cache_gib": -1}, "state_cache_gib=-1 must be a number of GiB"),
        ),
    ),
    "nthr-random": Row(
        settings={"nthr": True, "nthr_selection": "random"},
        neutral={"nthr_eta": 1, "query_preserved": False},
        metrics=NTHR_METRICS,
        depends_on_processes=True,
    ),
    "nthr-in-the-loss": Row(
        settings={"nthr": True, **ON_POLICY, "per_device_train_batch_size": 8, "max_steps": 12},
        neutral={"nthr_eta": 1, "query_preserved": False},
        metrics=NTHR_METRICS,
    ),
    "nthr-in-the-loss-accumulated": Row(
        settings={"nthr": True, "num_iterations": 1, "gradient_accumulation_steps": 4, "max_steps": 12, "beta": 0.05},
        neutral={"nthr_eta": 1, "generation_kwargs": {"min_new_tokens": 6}},  # TRL's entropy depends on the cut
        metrics=NTHR_METRICS,
        exact=False,
    ),
    "nthr-own-pass": Row(
        settings={
            "nthr": True,
            "num_iterations": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "max_steps": 12,
        },
        neutral={"nthr_eta": 1},
        metrics=NTHR_METRICS,
    ),
    "delta": Row(
        settings={"delta_credit": True},
        neutral={"delta_lambda_min": 1.0, "delta_lambda_max": 1.0, "query_preserved": False},
        metrics=DELTA_METRICS,
        refused=(
            ({"delta_lambda_min": 1.3}, "delta_lambda_min=1.3 and delta_lambda_max=1.2 must be numbers"),
            ({"delta_refinements": -1}, "delta_refinements=-1 must be a whole number"),
            ({"delta_gamma": 0.0}, "delta_gamma=0.0 must be a positive number"),
            ({"delta_proxy": "full"}, "delta_proxy='full' is not one of 'lm_head_row', 'hidden_gradient'"),
            ({"delta_assignment": "mean"}, "delta_assignment='mean' is not one of 'soft', 'hard', 'random'"),
            ({"delta_top_fraction": 1.5}, "delta_top_fraction=1.5 must be between 0 and 1"),
        ),
    ),
    "delta-on-policy": Row(
        settings={"delta_credit": True, **ON_POLICY, "per_device_train_batch_size": 8, "max_steps": 12},
        neutral={"delta_lambda_min": 1.0, "delta_lambda_max": 1.0},
        metrics=DELTA_METRICS,
    ),
    "delta-hidden-gradient-hard": Row(
        settings={"delta_credit": True, "delta_proxy": "hidden_gradient", "delta_assignment": "hard"},
        neutral={"delta_lambda_min": 1.0, "delta_lambda_max": 1.0, "query_preserved": False},
        metrics=DELTA_METRICS,
    ),
    "delta-top-fraction": Row(
        settings={"delta_credit": True, "delta_top_fraction": 0.5},
        neutral={"delta_top_fraction": 1.0, "query_preserved": False},
        metrics=DELTA_METRICS,
    ),
    "delta-random": Row(
        settings={"delta_credit": True, "delta_assignment": "random"},
        neutral={"delta_credit": False, "query_preserved": False},
        metrics=DELTA_METRICS,
        depends_on_processes=True,
    ),
    "conflict-tokens": Row(
        settings={"conflict_tokens": True},
        neutral={"conflict_tokens_positive": 1.0, "conflict_tokens_negative": 1.0, "query_preserved": False},
        metrics=("conflict/token_fraction",),
        refused=(
            ({"conflict_tokens_positive": -1.0}, "conflict_tokens_positive=-1.0 must be a number"),
            ({"conflict_tokens_selection": "all"}, "conflict_tokens_selection='all' is not one of"),
        ),
    ),
    "entropy-filter": Row(
        settings={"max_completion_entropy": 2.5},
        neutral={"max_completion_entropy": 1e9, "query_preserved": False},
        metrics=("entropy_filter/entropy", "entropy_filter/dropped_fraction"),
        refused=(
            ({"max_completion_entropy": "0.7"}, "max_completion_entropy='0.7' must be a positive number of nats"),
        ),
    ),
    "nthr-delta-sequence": Row(
        settings={**SEQUENCE, "nthr": True, "delta_credit": True},
        neutral={"nthr_eta": 1, "delta_lambda_min": 1.0, "delta_lambda_max": 1.0, "query_preserved": False},
        metrics=(*NTHR_METRICS, *DELTA_METRICS),
        refused=(
            ({"loss_type": "sapo"}, "loss_type='sapo'"),
            ({"delta": 0.9}, "delta=0.9 would cut off every positive rollout"),
        ),
    ),
    "token-shifts": Row(
        settings={"token_shift_steps": 3},
        neutral={"query_preserved": False},
        metrics=SHIFT_METRICS,
        refused=tuple(
            ({"token_shift_steps": steps}, f"token_shift_steps={steps!r} must be a whole number of at least 0")
            for steps in (-1, True, 2.5, None)
        ),
    ),
    "everything": Row(
        settings={
            "token_shift_steps": 1,
            "symmetric_clip": True,
            "symmetric_clip_gradient": "score",
            "advantage_sign": "negative",
            "reward_balance": 0.3,
            "filter_zero_variance": True,
            "max_generation_rounds": 2,
            "nthr": True,
            "delta_credit": True,
            "beta": 0.05,
            "use_bias_correction_kl": False,
        },
        neutral={**ON_POLICY, "advantage_sign": "both", "nthr": False, "delta_credit": False, "reward_balance": 0.0},
        metrics=CLIP_METRICS[:1],
        credits=lambda: [FirstTokens()],
        exact=False,
    ),
}


def settings_of(row: Row, **changes: Any) -> dict[str, Any]:
    """The settings of a row for a run off policy."""
    return {**OFF_POLICY, **row.settings, **changes}
