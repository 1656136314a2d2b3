"""Credit: how much of a rollout's advantage each token carries, as pure functions of tensors."""

from .clipping import post_clip_weights, surrogate_weight, symmetric_clip
from .controls import SignControl
from .delta import DelTA, delta_coefficients
from .group_weights import (
    min_replace,
    orthogonal_projection,
    positive_orthogonal_projection,
    truncate_and_rebalance,
)
from .nthr import NTHR, nthr_eta, nthr_scores
from .protocol import Credit
from .ratios import sequence_ratios, token_ratios


__all__ = [
    "NTHR",
    "Credit",
    "DelTA",
    "SignControl",
    "delta_coefficients",
    "min_replace",
    "nthr_eta",
    "nthr_scores",
    "orthogonal_projection",
    "positive_orthogonal_projection",
    "post_clip_weights",
    "sequence_ratios",
    "surrogate_weight",
    "symmetric_clip",
    "token_ratios",
    "truncate_and_rebalance",
]
