"""Credit: how much of a rollout's advantage each token carries, as pure functions of tensors."""

from .batch.clipping import post_clip_weights, surrogate_weight
from .batch.protocol import Credit
from .batch.ratios import sequence_ratios, token_ratios
from .methods.conflict import ConflictTokens
from .methods.delta import DelTA, delta_coefficients
from .methods.entropy_filter import EntropyFilter
from .methods.group_weights import (
    min_replace,
    orthogonal_projection,
    positive_orthogonal_projection,
    truncate_and_rebalance,
)
from .methods.nthr import NTHR, nthr_eta, nthr_scores
from .methods.sign import SignControl
from .methods.symmetric_clip import symmetric_clip


__all__ = [
    "NTHR",
    "ConflictTokens",
    "Credit",
    "DelTA",
    "EntropyFilter",
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
