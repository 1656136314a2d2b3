"""The methods by name, for the command line: each is a handful of settings."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """
    A named combination of settings.

    Args:
        settings (`dict[str, Any]`):
            Fields of [`~trl_cancel.CancelGRPOConfig`] and their values.
        summary (`str`):
            What it does, in a few words.
        paper (`str`, *optional*):
            arXiv id of its source.
    """

    settings: dict[str, Any]
    summary: str
    paper: str | None = None


SEQUENCE = {"importance_sampling_level": "sequence", "loss_type": "grpo"}
METHODS = {
    "grpo": Method({"query_preserved": False}, "TRL's GRPO, unchanged"),
    "query-preserved": Method({"query_preserved": True}, "rollouts of a prompt share an optimizer step", "2605.08666"),
    "reward-balanced": Method(
        {"query_preserved": True, "reward_balance": 0.25}, "a quarter of either sign in each step", "2605.08666"
    ),
    "dynamic-sampling": Method(
        {"query_preserved": True, "filter_zero_variance": True}, "groups of equal rewards are replaced"
    ),
    "grpo-fix": Method({"symmetric_clip": True}, "symmetric clipping, and whole groups", "2604.13088"),
    "gspo": Method(SEQUENCE, "ratios of whole sequences, clipped"),
    "dfpo-min": Method(
        {**SEQUENCE, "group_weights": "min"}, "each rollout weighs as the lightest of its group", "2604.13088"
    ),
    "dfpo-orth": Method(
        {**SEQUENCE, "group_weights": "orth"}, "nearest weights that are orthogonal to the advantages", "2604.13088"
    ),
    "dfpo-positive-orth": Method(
        {**SEQUENCE, "group_weights": "positive_orth"}, "the nearest such weights without negative ones", "2604.13088"
    ),
    "dfpo-rebalance": Method(
        {**SEQUENCE, "group_weights": "rebalance"}, "the heavier side of each group scaled down", "2604.13088"
    ),
    "nthr": Method({"nthr": True}, "wrong rollouts' tokens that right ones need pushed less", "2505.18830"),
    "nthr-random": Method(
        {"nthr": True, "nthr_selection": "random"}, "control: as many tokens, drawn at random", "2505.18830"
    ),
    "delta": Method({"delta_credit": True}, "more credit to tokens that tell good from bad", "2605.21467"),
    "delta-random": Method(
        {"delta_credit": True, "delta_assignment": "random"},
        "control: the same credits, dealt out at random",
        "2605.21467",
    ),
    "positive-only": Method({"advantage_sign": "positive"}, "control: bad rollouts left out", "2605.08666"),
    "negative-only": Method({"advantage_sign": "negative"}, "control: good rollouts left out", "2605.08666"),
}


def complete_settings(name: str) -> dict[str, Any]:
    """The settings of a method, with those of this package that make up other methods at their defaults."""
    from ..configs import CancelGRPOConfig

    own = set.union(*(set(method.settings) for method in METHODS.values())) - set(SEQUENCE)
    defaults = {field: CancelGRPOConfig.__dataclass_fields__[field].default for field in sorted(own)}
    return {**defaults, **METHODS[name].settings}
