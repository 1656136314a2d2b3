"""Importance ratios, per token and per sequence."""

import torch

from ..arguments import common, floats, marks, shaped, single


def token_ratios(logps: torch.Tensor, old_logps: torch.Tensor) -> torch.Tensor:
    """
    Ratio of each token's probability under the current and the sampling policy (Eq. 7 of
    [2604.13088](https://huggingface.co/papers/2604.13088)).

    Args:
        logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities under the current policy.
        old_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities under the policy that sampled.

    Returns:
        `torch.Tensor` of shape `(B, T)`: The ratios; `nan` where a log-probability is.

    Raises:
        `ValueError`: If the shapes differ.
    """
    logps, old_logps = floats(logps=logps, old_logps=old_logps)
    shaped(logps=(logps, "..."), old_logps=(old_logps, "..."))
    new, old = single(logps, old_logps)
    return torch.exp(new - old).to(common(logps, old_logps))


def sequence_ratios(logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Length-normalised ratio of each sequence (GSPO; Eq. 44 of
    [2604.13088](https://huggingface.co/papers/2604.13088)):

    $$ s_i = \exp\Big( \frac{1}{|y_i|} \sum_t m_{it} (\log\pi_\theta - \log\pi_{old}) \Big) $$

    Args:
        logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities under the current policy.
        old_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities under the policy that sampled.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 for the tokens that count, 0 for the others, whose log-probabilities do not matter, not even if they are
            `nan`.

    Returns:
        `torch.Tensor` of shape `(B,)`: The ratios, 1 for a sequence in which no token counts; `nan` for one with a
        token that counts and has none.

    Raises:
        `ValueError`: If the shapes differ, or the mask holds something else than 0 and 1.
    """
    logps, old_logps = floats(logps=logps, old_logps=old_logps)
    (active,) = marks(mask=mask)
    shaped(logps=(logps, "... T"), old_logps=(old_logps, "... T"), mask=(active, "... T"))
    new, old = single(logps, old_logps)
    log_ratios = (new - old).where(active, 0.0).sum(-1) / active.sum(-1).clamp(min=1)
    return torch.exp(log_ratios).to(common(logps, old_logps))
