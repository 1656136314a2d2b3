"""Measures of how a group's weights and a run's curves behave."""

import torch


def gradient_asymmetry(weights: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    r"""
    Spread of the coefficients with which the rollouts of a group enter the gradient, \\( \mathrm{Var}_i(w_iA_i) \\)
    (Eq. 23 of [2604.13088](https://huggingface.co/papers/2604.13088)). The variance is that of the population.

    Args:
        weights (`torch.Tensor` of shape `(..., G)`):
            Weights of the rollouts.
        advantages (`torch.Tensor` of shape `(..., G)`):
            Their advantages.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    return (weights * advantages).var(-1, correction=0)


def asymmetry_by_group(coefficients: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """
    [`gradient_asymmetry`] of groups whose rollouts stand in any order.

    Args:
        coefficients (`torch.Tensor` of shape `(B,)`):
            Weight times advantage of each rollout.
        group_ids (`torch.Tensor` of shape `(B,)`):
            Which rollouts form a group.

    Returns:
        `torch.Tensor` of shape `(P,)`: The variance in each group.
    """
    groups, index = group_ids.unique(return_inverse=True)
    sums = coefficients.new_zeros(3, groups.numel())
    sums.index_add_(1, index, torch.stack([torch.ones_like(coefficients), coefficients, coefficients**2]))
    count, total, squares = sums
    return squares / count - (total / count) ** 2
