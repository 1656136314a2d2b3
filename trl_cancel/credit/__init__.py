"""Credit: how much of a rollout's advantage each token carries, as pure functions of tensors."""

from .clipping import surrogate_weight, symmetric_clip
from .controls import SignControl
from .protocol import Credit
from .ratios import sequence_ratios, token_ratios


__all__ = ["Credit", "SignControl", "sequence_ratios", "surrogate_weight", "symmetric_clip", "token_ratios"]
