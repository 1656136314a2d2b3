"""
Blame: where in the wrong rollouts the push downwards lands, when the first wrong token of each is known.

What a rollout does before its first wrong token is right, and what it does after may be right as well, given what went
before; only the first wrong token itself deserves to be pushed down for sure.
"""

import torch

from ..arguments import finite, floats, marks, shaped, single, whole, whole_numbers, within


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

    Raises:
        `ValueError`: If an index is negative or not a whole number.
    """
    (first_wrong,) = whole_numbers(first_wrong=first_wrong)
    shaped(first_wrong=(first_wrong, "B"))
    within(None, first_wrong=first_wrong)
    length = whole("length", length, 0)
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
        `torch.Tensor` of shape `(3,)`: Sums of the magnitudes of negative pushes, in float32 or better.

    Raises:
        `ValueError`: If the shapes differ, a push that counts is not finite, or a place is none of these.
    """
    (pushes,), (places,), (counted,) = floats(pushes=pushes), whole_numbers(places=places), marks(counted=counted)
    shaped(pushes=(pushes, "B T"), places=(places, "B T"), counted=(counted, "B T"))
    pushes, places = single(pushes[counted])[0], places[counted]
    finite(pushes=pushes)
    within(len(PLACES), places=places)
    return pushes.new_zeros(len(PLACES)).index_add_(0, places, (-pushes).clamp(min=0))


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
        `torch.Tensor` of shape `(B, T)`: They sum to what the pushes sum to; 0 for padding, whatever its push.

    Raises:
        `ValueError`: If the shapes differ, or the push of a token is not finite.
    """
    (pushes,), (contexts,) = floats(pushes=pushes), whole_numbers(contexts=contexts)
    shaped(pushes=(pushes, "B T"), contexts=(contexts, "B T"))
    pushes = single(pushes)[0].masked_fill(contexts == 0, 0.0)
    finite(pushes=pushes)
    names, index, counts = contexts.flatten().unique(return_inverse=True, return_counts=True)
    net = pushes.new_zeros(len(names)).index_add_(0, index, pushes.flatten())
    return (net / counts)[index].view_as(pushes)
