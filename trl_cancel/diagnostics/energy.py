"""Measures of how a group's weights and a run's curves behave."""

from collections.abc import Sequence

import torch

from ..arguments import doubles, finite, floats, log_probabilities, shaped, single, to_one, whole, whole_numbers


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
        `torch.Tensor` of shape `(...)`, in float32 or better; `nan` where a weight or advantage is, or without rollouts.

    Raises:
        `ValueError`: If the shapes differ.
    """
    weights, advantages = single(*floats(weights=weights, advantages=advantages))
    shaped(weights=(weights, "... G"), advantages=(advantages, "... G"))
    (weights, of_weights), (advantages, of_advantages) = to_one(weights, -1), to_one(advantages, -1)
    coefficients, scale = to_one(weights * advantages, -1)
    variance = (coefficients - coefficients.mean(-1, keepdim=True)).square().mean(-1)
    # Powers of two, whose exponents are added: their product could overflow on its way to where it does not.
    scale = (scale.log2() + of_weights.log2() + of_advantages.log2()).exp2().squeeze(-1)
    return torch.where(variance == 0, 0.0, variance * scale * scale)


def asymmetry_by_group(coefficients: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """
    [`gradient_asymmetry`] of groups whose rollouts stand in any order.

    Args:
        coefficients (`torch.Tensor` of shape `(B,)`):
            Weight times advantage of each rollout.
        group_ids (`torch.Tensor` of shape `(B,)`):
            Which rollouts form a group.

    Returns:
        `torch.Tensor` of shape `(P,)`: The variance in each group, in float32 or better, never negative.

    Raises:
        `ValueError`: If the shapes differ.
    """
    (coefficients,) = single(*floats(coefficients=coefficients))
    shaped(coefficients=(coefficients, "B"), group_ids=(group_ids, "B"))
    groups, index, counts = group_ids.unique(return_inverse=True, return_counts=True)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(groups.numel()).index_add_(0, index, values) / counts

    # In two passes: the mean of the squares minus the square of the mean is rounding where the mean is large.
    return mean((coefficients - mean(coefficients)[index]).square())


def energy_by_frequency(
    energies: torch.Tensor, token_ids: torch.Tensor, num_buckets: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The share of an update's energy that goes to frequent and to rare tokens (Eq. 24 of
    [2604.13088](https://huggingface.co/papers/2604.13088)),
    \( \sum_{t\in B}\|\nabla\ell_t\| / \sum_t\|\nabla\ell_t\| \).

    The buckets B hold whole tokens of the vocabulary, the most frequent ones first, and each about as many of the N
    tokens as the others.

    Args:
        energies (`torch.Tensor` of shape `(N,)`):
            Norms \( \|\nabla\ell_t\| \), or a proxy of them: [`output_row_energy`].
        token_ids (`torch.Tensor` of shape `(N,)`):
            The tokens.
        num_buckets (`int`, *optional*, defaults to `4`):
            Number of buckets.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(num_buckets,)`, in float64: The buckets' shares of the energy, `nan` if
        there is none, and their shares of the tokens.

    Raises:
        `ValueError`: If the shapes differ, an energy is negative or not finite, `token_ids` are not whole numbers, or
            there is no bucket.
    """
    (energies,), (token_ids,) = floats(energies=energies), whole_numbers(token_ids=token_ids)
    shaped(energies=(energies, "N"), token_ids=(token_ids, "N"))
    finite(energies=energies)
    if (energies < 0).any():
        raise ValueError(f"energies hold {energies.min().item()}; norms are not negative.")
    num_buckets = whole("num_buckets", num_buckets, 1)
    _, index, counts = token_ids.unique(return_inverse=True, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    ahead = torch.zeros_like(counts).scatter(0, order, counts[order].cumsum(0) - counts[order])
    middle = (ahead + counts / 2) / max(1, len(token_ids))  # of the run of equal tokens, frequent ones first
    buckets = (middle * num_buckets).long().clamp(max=num_buckets - 1)[index]

    def shares(values: torch.Tensor) -> torch.Tensor:
        sums = values.new_zeros(num_buckets, dtype=torch.double).index_add_(0, buckets, values.double())
        return sums / values.double().sum()

    return shares(energies), shares(torch.ones_like(energies))


def output_row_energy(weights: torch.Tensor, logps: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    r"""
    The norm of a token's weighted gradient in its own row of the output layer,
    \( |w|\,(1-\pi(y))\,\|h\| \): a proxy of \( \|\nabla\ell_t\| \).

    Args:
        weights (`torch.Tensor` of shape `(N,)`):
            What the update multiplies \( \nabla\log\pi \) with.
        logps (`torch.Tensor` of shape `(N,)`):
            Log-probabilities.
        hidden (`torch.Tensor` of shape `(N, d)`):
            Hidden states that predict the tokens.

    Returns:
        `torch.Tensor` of shape `(N,)`, in float32 or better.

    Raises:
        `ValueError`: If the shapes differ, something is not a number, or a log-probability is above 0.
    """
    weights, logps, hidden = single(*floats(weights=weights, logps=logps, hidden=hidden))
    shaped(weights=(weights, "N"), logps=(logps, "N"), hidden=(hidden, "N d"))
    finite(weights=weights, hidden=hidden)
    log_probabilities(logps=logps)
    hidden, size = to_one(hidden, -1)
    surprise = -torch.expm1(logps.clamp(max=0))  # a log-probability is above 0 by rounding at most
    return weights.abs() * (hidden.norm(dim=-1) * size.squeeze(-1)) * surprise


def jitter2(series: torch.Tensor | Sequence[float]) -> float:
    r"""
    How rough a curve is: the mean magnitude of its second differences,
    \( \frac{1}{T-2} \sum_{t=1}^{T-2} |m_{t+2} - 2m_{t+1} + m_t| \) (Eq. 20 of
    [2604.13088](https://huggingface.co/papers/2604.13088)). A straight line has none, however steep it is.

    Args:
        series (`torch.Tensor` of shape `(T,)` or `Sequence[float]`):
            Values of a logged metric, at equal distances.

    Returns:
        `float`: Jitter2.

    Raises:
        `ValueError`: If there are fewer than three values, or one is not finite.
    """
    values = doubles(series=series)[0]
    if values.dim() != 1 or len(values) < 3:
        raise ValueError(f"series has the shape {tuple(values.shape)}: jitter2 needs one row of at least 3 values.")
    finite(series=values)
    return values.diff(n=2).abs().mean().item()
