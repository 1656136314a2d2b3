"""
Symmetric clipping, and the weight that a clipped surrogate puts on a token or rollout.

Stock clipping, min(rA, clip(r)A), treats one ratio r differently for positive and negative advantages, so tokens that
good and bad rollouts share no longer cancel outside the clipping range (Appendix F of 2604.13088). Symmetric clipping
(Appendix H) uses one function of r for both signs.
"""

import torch

from ..arguments import floats, not_negative, shaped, stretch


def symmetric_clip(ratios: torch.Tensor, epsilon: float) -> torch.Tensor:
    r"""
    The sign-independent weight of Eq. 79 of [2604.13088](https://huggingface.co/papers/2604.13088):
    \\( \phi(r) = \mathrm{clip}(r, 0, 1+\varepsilon) \\).

    The surrogate \\( A\,\phi(r) \\) (Eq. 80) has gradient zero above the bound. The score form (Eq. 81) takes
    \\( \phi(r) \\) as a constant, so its gradient \\( A\,\phi(r)\nabla\log\pi \\) goes on above the bound.

    Args:
        ratios (`torch.Tensor`):
            Importance ratios of tokens or sequences, of any shape.
        epsilon (`float`):
            Distance of the upper bound from 1.

    Returns:
        `torch.Tensor` of the same shape: The weights; `nan` where the ratio is.

    Raises:
        `ValueError`: If `epsilon` is negative or not a number.
    """
    (ratios,) = floats(ratios=ratios)
    not_negative("epsilon", epsilon, "0.2")
    return ratios.clamp(0.0, 1.0 + epsilon)


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
