r"""
Group-consistent weights: DFPO, *Design Conditions for Intra-Group Learning of Sequence-Level Rewards: Token Gradient
Cancellation* ([2604.13088](https://huggingface.co/papers/2604.13088), section 4, Appendices B and K).

A sequence-level ratio weighs each rollout of a group differently, so tokens that good and bad rollouts share keep the
push \\( \sum_i s_iA_i \ne 0 \\) (Eq. 38). Each function here turns the weights of a group into others that are
orthogonal to the advantages, \\( \sum_i \tilde s_iA_i = 0 \\) (Eq. 63), given that \\( \sum_i A_i = 0 \\).

Departs from the paper: \\( \beta \\) of Eq. 55 is taken with the sign that makes it positive, and the weights after it
are positive but not, as the text says, above the floor.

Shapes: the last dimension is the group (G); leading dimensions are free. Rollouts that are missing from the update
(`active` is 0) get weight 0, and the others are made consistent without them. A weight or advantage that is `nan` or
infinite makes all weights of its group `nan`. Half precision is computed in single.
"""

import torch

from ..arguments import common, floats, not_negative, shaped, single, to_one


def min_replace(weights: torch.Tensor) -> torch.Tensor:
    r"""
    Every rollout gets the smallest weight of its group (Eq. 50): \\( \tilde s_i = \min_j \bar s_j \\).

    Args:
        weights (`torch.Tensor` of shape `(..., G)`):
            Weights.

    Returns:
        `torch.Tensor` of shape `(..., G)`: The weights, all equal in a group.
    """
    (weights,) = floats(weights=weights)
    shaped(weights=(weights, "... G"))
    return weights.amin(-1, keepdim=True).expand_as(weights) if weights.size(-1) else weights


def orthogonal_projection(weights: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    r"""
    The nearest weights that are orthogonal to the advantages (Eq. 18):
    \\( \tilde s = \bar s - \frac{A \cdot \bar s}{\|A\|^2} A \\). They can be negative.

    Args:
        weights (`torch.Tensor` of shape `(..., G)`):
            Weights.
        advantages (`torch.Tensor` of shape `(..., G)`):
            Advantages; a group in which all are 0 is left alone.

    Returns:
        `torch.Tensor` of shape `(..., G)`: The weights.

    Raises:
        `ValueError`: If the shapes differ.
    """
    dtype, weights, advantages = _of_groups(weights, advantages)
    (weights, scale), (advantages, _) = to_one(weights, -1), to_one(advantages, -1)
    projected = weights - _quotient(_dot(advantages, weights), _dot(advantages, advantages)) * advantages
    return (projected * scale).to(dtype)


def positive_orthogonal_projection(weights: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    r"""
    The nearest non-negative weights that are orthogonal to the advantages (Eq. 51):

    $$ \tilde s = \arg\min_v \tfrac12\|v-\bar s\|^2 \quad\text{s.t.}\quad A \cdot v = 0,\ v \ge 0 $$

    In closed form \\( v = \max(0, \bar s - \nu A) \\), where \\( \nu \\) is the root of
    \\( f(\nu) = \sum_i A_i \max(0, \bar s_i - \nu A_i) \\), which falls and is linear between the breakpoints
    \\( \bar s_i/A_i \\). On its way from \\( f(0) = A \cdot \bar s \\) to 0 only rollouts of the heavier side reach 0;
    these are the ones with \\( f \\) still on the same side of 0 at their breakpoints. Without them the root is that of
    a line: exact, without iteration.

    Args:
        weights (`torch.Tensor` of shape `(..., G)`):
            Weights, not negative.
        advantages (`torch.Tensor` of shape `(..., G)`):
            Advantages; a group in which all are 0 is left alone. In a group of one sign, the rollouts with that sign
            get 0.

    Returns:
        `torch.Tensor` of shape `(..., G)`: The weights.

    Raises:
        `ValueError`: If the shapes differ.
    """
    dtype, weights, advantages = _of_groups(weights, advantages)
    (weights, scale), (advantages, _) = to_one(weights, -1), to_one(advantages, -1)
    # With the advantages' sign turned so that f(0) >= 0, the root is not negative and the heavier side is positive.
    heavy = advantages * torch.where(_dot(advantages, weights) < 0, -1.0, 1.0)
    # f at the breakpoint of each rollout of the heavier side, times its advantage, which is positive: no quotient that
    # could overflow.
    at_breakpoints = (weights.unsqueeze(-2) * heavy.unsqueeze(-1) - weights.unsqueeze(-1) * heavy.unsqueeze(-2)).clamp(
        min=0
    )  # (..., G, G)
    f = (to_one(at_breakpoints, -1)[0] * heavy.unsqueeze(-2)).sum(-1)  # (..., G)
    dropped = (heavy > 0) & (f >= 0)
    kept, _ = to_one(heavy.where(~dropped, 0.0), -1)  # without the dropped, all may be small
    root = _quotient(_dot(kept, weights), _dot(kept, kept))
    return ((weights - root * kept).clamp(min=0).where(~dropped, 0.0) * scale).to(dtype)


def truncate_and_rebalance(weights: torch.Tensor, advantages: torch.Tensor, floor: float = 1e-6) -> torch.Tensor:
    r"""
    Weights raised to a floor, then the heavier side of the group scaled down until both balance (Eq. 52 to 55): with
    \\( s^+ = \max(\bar s, \epsilon) \\), \\( P = \sum_{A_i>0} A_is^+_i \\) and \\( N = \sum_{A_i<0} |A_i|s^+_i \\), the
    positive side is scaled by \\( \alpha = N/P \\) if \\( P > N \\), the negative one by \\( \beta = P/N \\) if
    \\( N > P \\).

    Args:
        weights (`torch.Tensor` of shape `(..., G)`):
            Weights.
        advantages (`torch.Tensor` of shape `(..., G)`):
            Advantages. In a group of one sign, the rollouts with that sign get 0.
        floor (`float`, *optional*, defaults to `1e-6`):
            Smallest weight before scaling.

    Returns:
        `torch.Tensor` of shape `(..., G)`: The weights, none negative and none above `max(weights, floor)`.

    Raises:
        `ValueError`: If the shapes differ, or `floor` is negative or not a number.
    """
    dtype, weights, advantages = _of_groups(weights, advantages)
    not_negative("floor", floor, "1e-6")
    (raised, scale), (advantages, _) = to_one(weights.clamp(min=floor), -1), to_one(advantages, -1)
    positive = _dot(advantages.clamp(min=0), raised)
    negative = _dot((-advantages).clamp(min=0), raised)
    alpha = _quotient(negative, positive).clamp(max=1)
    beta = _quotient(positive, negative).clamp(max=1)
    factor = torch.where(advantages > 0, alpha, torch.where(advantages < 0, beta, 1.0))
    return (raised * factor * scale).to(dtype)


def _of_groups(weights: torch.Tensor, advantages: torch.Tensor) -> tuple[torch.dtype, torch.Tensor, torch.Tensor]:
    """The type of the result, and both in that in which it is computed; `nan` for groups that are not finite."""
    weights, advantages = floats(weights=weights, advantages=advantages)
    shaped(weights=(weights, "... G"), advantages=(advantages, "... G"))
    dtype = common(weights, advantages)
    weights, advantages = single(weights, advantages)
    is_finite = (weights.isfinite() & advantages.isfinite()).all(-1, keepdim=True)
    return dtype, weights.where(is_finite, torch.nan), advantages.where(is_finite, torch.nan)


def _dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Inner product of each group, of shape `(..., 1)`."""
    return (first * second).sum(-1, keepdim=True)


def _quotient(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """The quotient, 0 where the denominator is 0, with gradients that stay finite there."""
    zero = denominator == 0
    return (numerator / denominator.where(~zero, 1.0)).where(~zero, 0.0)


TRANSFORMATIONS = ("identity", "min", "orth", "positive_orth", "rebalance")
TRUST_REGIONS = ("none", "mask", "group")


def consistent_weights(
    weights: torch.Tensor, advantages: torch.Tensor, active: torch.Tensor, transformation: str
) -> torch.Tensor:
    r"""
    Makes the weights of the active rollouts of a group consistent, so that \\( \sum_i \tilde s_iA_i = 0 \\) over what
    takes part in the update. Rollouts that do not get weight 0.

    Where a rollout is missing the advantages of the others do not sum to zero. The projections and `rebalance` need
    not care; the equal weights of `min` are then rebalanced, so that none is above the minimum.

    Args:
        weights (`torch.Tensor` of shape `(..., G)`):
            Weights.
        advantages (`torch.Tensor` of shape `(..., G)`):
            Advantages.
        active (`torch.Tensor` of shape `(..., G)` and type `bool`):
            Rollouts that take part.
        transformation (`str`):
            `"min"`, `"orth"`, `"positive_orth"`, `"rebalance"`, or `"identity"` for none (then nothing is consistent).

    Returns:
        `torch.Tensor` of shape `(..., G)`: The weights.
    """
    present = advantages.where(active, 0.0)
    weights = weights.where(active, 0.0)  # what is left out may be infinite
    if transformation == "min":
        largest = weights.amax(-1, keepdim=True)
        equal = min_replace(weights.where(active, largest))
        weights = equal.where(active.all(-1, keepdim=True), truncate_and_rebalance(equal, present, floor=0.0))
    elif transformation == "orth":
        projected = orthogonal_projection(weights, present)
        # What is left of a group with one member is rounding, and must not look like a push.
        rounding = 8 * torch.finfo(weights.dtype).eps * weights.abs().amax(-1, keepdim=True)
        weights = projected.where(projected.abs() > rounding, 0.0)
    elif transformation == "positive_orth":
        weights = positive_orthogonal_projection(weights, present)
    elif transformation == "rebalance":
        weights = truncate_and_rebalance(weights, present)
    return weights.where(active, 0.0)


def inside_trust_region(cut: torch.Tensor, outside: torch.Tensor, trust_region: str) -> torch.Tensor:
    """
    Rollouts that an update may still move. The paper leaves open what stops the push on a rollout whose ratio has left
    the clipping range, since its weights are constants and nothing is cut off (Eq. 86).

    Args:
        cut (`torch.Tensor` of shape `(..., G)` and type `bool`):
            Rollouts whose gradient the clipped surrogate would cut off.
        outside (`torch.Tensor` of shape `(..., G)` and type `bool`):
            Rollouts whose ratio is outside the clipping range, on either side.
        trust_region (`str`):
            `"none"`: all rollouts (the paper, read literally). `"mask"`: those that are not cut off. `"group"`: those
            of groups in which none is outside.

    Returns:
        `torch.Tensor` of shape `(..., G)` and type `bool`.
    """
    if trust_region == "mask":
        return ~cut
    if trust_region == "group":
        return (~outside).all(-1, keepdim=True).expand_as(outside)
    return torch.ones_like(cut)
