"""
Clipping of the ratio as TRL's losses do it: the weight that the clipped surrogate puts on a token or rollout.

Stock clipping, min(rA, clip(r)A), treats one ratio r differently for positive and negative advantages.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..arguments import floats, not_negative, shaped, stretch


# Loss types whose surrogate is TRL's clipped one, min(rA, clip(r)A).
CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED_LOSSES, "cispo", "sapo", "vespo")


def post_clip_weights(
    ratios: torch.Tensor,
    advantages: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> torch.Tensor:
    r"""
    The clipped surrogate of PPO written as a weight of the advantage: with
    \\( c = \mathrm{clip}(r, 1-\varepsilon_{low}, 1+\varepsilon_{high}) \\),

    $$ \bar s = \min(r, c) \text{ if } A \ge 0, \text{ else } \max(r, c) $$

    so that \\( \min(rA, cA) = \bar sA \\). For ratios of whole rollouts this is Eq. 47 of
    [2604.13088](https://huggingface.co/papers/2604.13088). With two-sided clipping TRL's surrogate is
    \\( \min(\min(r, \delta)A, cA) \\), whose weight is bounded by \\( \min(\delta, 1+\varepsilon_{high}) \\) for
    \\( A \ge 0 \\) and by \\( \max(\delta, 1+\varepsilon_{high}) \\) for \\( A < 0 \\).

    Args:
        ratios (`torch.Tensor`):
            Importance ratios of tokens or sequences.
        advantages (`torch.Tensor` of the same shape):
            Advantages.
        epsilon_low (`float`):
            Distance of the lower bound from 1; it bounds negative advantages.
        epsilon_high (`float`):
            Distance of the upper bound from 1; it bounds positive advantages.
        delta (`float`, *optional*):
            Bound on the ratio itself (two-sided clipping).

    Returns:
        `torch.Tensor` of the same shape: The weights; `nan` where the ratio or the advantage is.

    Raises:
        `ValueError`: If the shapes differ, or a bound is negative or not a number.
    """
    ratios, advantages = floats(ratios=ratios, advantages=advantages)
    shaped(ratios=(ratios, "..."), advantages=(advantages, "..."))
    check_clip_range(epsilon_low, epsilon_high, delta)
    return _clipped(ratios, advantages, epsilon_low, epsilon_high, delta)


def _clipped(
    ratios: torch.Tensor, advantages: torch.Tensor, epsilon_low: float, epsilon_high: float, delta: float | None
) -> torch.Tensor:
    low, high = 1 - epsilon_low, 1 + epsilon_high
    of_positive = ratios.clamp(max=high if delta is None else min(delta, high))
    of_negative = ratios.clamp(low, None if delta is None else max(delta, high))
    return torch.where(advantages >= 0, of_positive, of_negative).masked_fill(advantages.isnan(), torch.nan)


def surrogate_weight(
    ratios: torch.Tensor,
    advantages: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> torch.Tensor:
    r"""
    The weight w with which the clipped surrogate of PPO enters the gradient:
    \\( \nabla \min(\min(r,\delta)A, \mathrm{clip}(r)A) = w\,A\,\nabla\log\pi \\), that is r inside the clipping range
    and 0 where it is cut off, that is where [`post_clip_weights`] is flat.

    Args:
        ratios (`torch.Tensor`):
            Importance ratios of tokens or sequences.
        advantages (`torch.Tensor`):
            Advantages, broadcastable with `ratios`.
        epsilon_low, epsilon_high, delta:
            As in [`post_clip_weights`].

    Returns:
        `torch.Tensor`: The weights, of the shape that `ratios` and `advantages` broadcast to; `nan` where either is.

    Raises:
        `ValueError`: If they do not broadcast, or a bound is negative or not a number.
    """
    ratios, advantages = floats(ratios=ratios, advantages=advantages)
    stretch(ratios=ratios, advantages=advantages)
    check_clip_range(epsilon_low, epsilon_high, delta)
    weights = _clipped(ratios, advantages, epsilon_low, epsilon_high, delta)
    return torch.where((weights < ratios) | (weights > ratios), 0.0, ratios).masked_fill(advantages.isnan(), torch.nan)


def check_clip_range(epsilon_low: float, epsilon_high: float, delta: float | None = None) -> None:
    """
    Refuses bounds that are negative or not numbers.

    Raises:
        `ValueError`: Names the bound.
    """
    not_negative("epsilon_low", epsilon_low, "0.2")
    not_negative("epsilon_high", epsilon_high, "0.2")
    if delta is not None:
        not_negative("delta", delta, "4.0")


@dataclass(frozen=True)
class Clipping:
    """
    How a loss clips the ratios r of tokens or rollouts.

    Args:
        loss_type (`str`):
            TRL's loss.
        low, high (`float`):
            Distances of the bounds from 1. With `loss_type="cispo"` `high` itself is the bound.
        delta (`float`, *optional*):
            Bound on the ratio itself (two-sided clipping).

    Attributes:
        is_constant (`bool`):
            Whether the clipped ratio is a constant weight of the score, whose push goes on outside of the bounds.
    """

    is_constant: ClassVar[bool] = False

    loss_type: str
    low: float
    high: float
    delta: float | None = None

    @property
    def is_symmetric(self) -> bool:
        """Whether one range holds for both signs of the advantage."""
        return self.low >= 1 and self.delta == 1 + self.high

    def clipped(self, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """The clipped ratios: what multiplies the advantages in the value of the loss."""
        if self.loss_type == "cispo":
            return ratios.clamp(max=self.high)
        return post_clip_weights(ratios, advantages.expand_as(ratios), self.low, self.high, self.delta)

    def weights(self, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor | None:
        """
        The weight with which the loss puts a token's score into the gradient; `None` for losses that have no clipped
        surrogate.

        Args:
            ratios (`torch.Tensor` of shape `(B, T)` or `(B, 1)`):
                Importance ratios.
            advantages (`torch.Tensor` of shape `(B, T)` or `(B, 1)`):
                Advantages.
        """
        if self.loss_type == "cispo":
            return ratios.clamp(max=self.high)
        if self.loss_type not in CLIPPED_LOSSES:
            return None
        return surrogate_weight(ratios, advantages, self.low, self.high, self.delta)

    def cuts(self, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """Where the clipped surrogate is flat, so that its gradient is 0."""
        if self.loss_type == "cispo":
            return torch.zeros_like(ratios, dtype=torch.bool)
        return self.clipped(ratios, advantages) != ratios

    def is_outside(self, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """Ratios outside of the range, on either side."""
        if self.loss_type == "cispo":
            return ratios > self.high
        high = torch.full_like(ratios, 1 + self.high)
        if self.delta is not None:  # it may end the range of positive advantages earlier
            high = torch.where(advantages >= 0, high.clamp(max=self.delta), high)
        return (ratios > high) | (ratios < 1 - self.low)
