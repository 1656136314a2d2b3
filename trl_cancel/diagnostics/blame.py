"""
Blame: where in the wrong rollouts the push downwards lands, when the first wrong token of each is known.

What a rollout does before its first wrong token is right, and what it does after may be right as well, given what went
before; only the first wrong token itself deserves to be pushed down for sure.
"""

import torch


PLACES = ("before", "on", "after")


def token_places(first_wrong: torch.Tensor, length: int) -> torch.Tensor:
    """
    Where each token lies: 0 before the first wrong token of its rollout, 1 on it, 2 after it.

    Args:
        first_wrong (`torch.Tensor` of shape `(B,)`):
            Index of each rollout's first wrong token; `length` or more for a rollout without one.
        length (`int`):
            Number of tokens T.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    position, first = torch.arange(length, device=first_wrong.device), first_wrong.unsqueeze(1)
    return (position >= first).long() + (position > first).long()


def blame_by_place(pushes: torch.Tensor, places: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """
    How much push downwards lands before, on and after the first wrong token.

    Args:
        pushes (`torch.Tensor` of shape `(B, T)`):
            The coefficient of each token's score in the ascent direction, as
            [`~trl_cancel.diagnostics.pushes.policy_pushes`] reads it off the loss.
        places (`torch.Tensor` of shape `(B, T)`):
            From [`token_places`].
        counted (`torch.Tensor` of shape `(B, T)` and type `bool`):
            Tokens to count, such as those of wrong rollouts.

    Returns:
        `torch.Tensor` of shape `(3,)`: Sums of the magnitudes of negative pushes.
    """
    downwards = (-pushes).clamp(min=0) * counted
    return pushes.new_zeros(len(PLACES)).index_add_(0, places.flatten(), downwards.flatten())


def net_pushes(pushes: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
    """
    What is left of the pushes once those of rollouts that share a token behind the same prefix have cancelled, dealt
    out among these rollouts in equal parts.

    Args:
        pushes (`torch.Tensor` of shape `(B, T)`):
            Pushes of the tokens.
        contexts (`torch.Tensor` of shape `(B, T)`):
            Their contexts, from [`~trl_cancel.diagnostics.residual.prefix_ids`], 0 for padding.

    Returns:
        `torch.Tensor` of shape `(B, T)`: They sum to what the pushes sum to.
    """
    names, index, counts = contexts.flatten().unique(return_inverse=True, return_counts=True)
    net = pushes.new_zeros(len(names)).index_add_(0, index, pushes.flatten())
    return (net / counts)[index].view_as(pushes) * (contexts != 0)
