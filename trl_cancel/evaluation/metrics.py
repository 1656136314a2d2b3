"""avg@k and pass@k of problems that were answered several times."""

import torch

from ..arguments import doubles, shaped, whole


def avg_at_k(rewards: torch.Tensor, k: int | None = None) -> torch.Tensor:
    """
    Mean reward of k answers to each problem.

    Args:
        rewards (`torch.Tensor` of shape `(..., n)`):
            Rewards of n answers to each problem.
        k (`int`, *optional*):
            How many answers count, the first ones; all n if not given.

    Returns:
        `torch.Tensor` of shape `(...)`, in float64; `nan` where the reward of an answer that counts is.

    Raises:
        `ValueError`: If k is not a whole number between 1 and n.
    """
    (rewards,) = doubles(rewards=rewards)
    shaped(rewards=(rewards, "... n"))
    k = _number_of_tries(rewards.size(-1) if k is None else k, rewards.size(-1))
    return rewards[..., :k].mean(-1)


def pass_at_k(correct: torch.Tensor, k: int) -> torch.Tensor:
    r"""
    Probability that at least one of k answers to a problem is correct, estimated without bias from n answers:

    $$ \text{pass@}k = 1 - \binom{n-c}{k} \Big/ \binom{n}{k} = 1 - \prod_{i=n-c+1}^{n} \left(1 - \frac{k}{i}\right) $$

    with c correct ones among them ([Chen et al. 2021](https://huggingface.co/papers/2107.03374), section 2.1). The
    product has no large numbers in it.

    Args:
        correct (`torch.Tensor` of shape `(..., n)`):
            Which answers are correct; `bool`, or 0 and 1.
        k (`int`):
            Number of tries.

    Returns:
        `torch.Tensor` of shape `(...)`, in float64.

    Raises:
        `ValueError`: If k is not a whole number between 1 and n, or a value is neither 0 nor 1.
    """
    (correct,) = doubles(correct=correct)
    shaped(correct=(correct, "... n"))
    n = correct.size(-1)
    k = _number_of_tries(k, n)
    if not ((correct == 0) | (correct == 1)).all():
        raise ValueError("correct holds values that are neither 0 nor 1; compare rewards with a threshold first.")
    wrong = n - correct.bool().sum(-1, keepdim=True)  # (..., 1)
    i = torch.arange(1, n + 1, dtype=torch.float64, device=correct.device)
    # With fewer than k wrong answers the factor at i = k is among them, and it is 0.
    return 1 - torch.where(i > wrong, 1 - k / i, 1.0).prod(-1)


def _number_of_tries(k: int, n: int) -> int:
    return whole("k", k, 1, n, "the number of answers to a problem, ")
