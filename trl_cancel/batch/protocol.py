"""What a token credit is: the protocol that the built-in ones and yours are written against."""

from typing import Literal, Protocol, runtime_checkable

import torch

from .rollouts import Rollouts


Scope = Literal["rollout", "group", "batch"]
SCOPES: tuple[Scope, ...] = ("rollout", "group", "batch")


@runtime_checkable
class Credit(Protocol):
    """
    A rule that says how much of a rollout's advantage each of its tokens carries.

    The trainer calls it once for each generation batch, before the batch is split into micro-batches, and multiplies
    the advantages by what it returns. Several credits multiply.

    Attributes:
        scope (`str`):
            What the coefficients of a rollout may depend on: `"rollout"` (itself), `"group"` (all rollouts of its
            prompt, which must then lie on one process) or `"batch"` (the generation batch of all processes, through
            [`~trl_cancel.batch.rollouts.Rollouts.reduce`]).
        needs_states (`bool`, *optional*):
            Set it to `True` to find `states`, `old_logps` and `head` in the rollouts. They cost a forward pass where no
            pass that is made anyway has them. Credits of a rollout or group may then be called for each micro-batch
            instead, within the loss.

    Example:

    ```python
    import torch


    class FirstTokens:
        '''Credit for the first `count` tokens only.'''

        scope = "rollout"

        def __init__(self, count):
            self.count = count

        def coefficients(self, rollouts):
            position = torch.arange(rollouts.completion_ids.size(1), device=rollouts.completion_ids.device)
            return (position < self.count).float().expand_as(rollouts.completion_ids)
    ```
    """

    scope: Scope

    def coefficients(self, rollouts: Rollouts) -> torch.Tensor:
        """
        The coefficients of one generation batch.

        Args:
            rollouts ([`~trl_cancel.batch.rollouts.Rollouts`]):
                The scored generation batch of this process.

        Returns:
            `torch.Tensor` of shape `(B, T)`, or `(B, 1)` for one coefficient a rollout: Finite and not negative.
        """
        ...


def combine(credits: list[Credit], rollouts: Rollouts) -> torch.Tensor:
    """
    Product of the coefficients of several credits.

    Args:
        credits (`list` of [`Credit`]):
            Credits to combine.
        rollouts ([`~trl_cancel.batch.rollouts.Rollouts`]):
            The scored generation batch.

    Returns:
        `torch.Tensor` of shape `(B, T)` or `(B, 1)`: The coefficients.

    Raises:
        `ValueError`: If a credit returns something else than finite, non-negative coefficients of a right shape, or
            the model's log-probabilities are `nan`.
    """
    if credits:
        _check_model(rollouts)
    product = rollouts.advantages.new_ones(rollouts.advantages.size(0), 1)
    for credit in credits:
        product = product * _checked(credit, rollouts).to(product)
    return product


def _check_model(rollouts: Rollouts) -> None:
    """Credit of a model that computes nothing would be blamed on the credit, or come out as 1."""
    if rollouts.old_logps is not None and rollouts.old_logps[rollouts.mask.bool()].isnan().any():
        raise ValueError(
            "The log-probabilities of the rollouts are nan, so there is no credit to compute: it is the model whose "
            "weights hold nan, or whose outputs overflow in their precision. Look at loss and grad_norm of earlier steps; "
            "go on from a checkpoint before, with a smaller learning_rate or in another precision."
        )


def _checked(credit: Credit, rollouts: Rollouts) -> torch.Tensor:
    """The coefficients of one credit, 1 where the loss counts nothing."""
    coefficients = credit.coefficients(rollouts)
    name, (rows, length) = type(credit).__name__, rollouts.mask.shape
    if not isinstance(coefficients, torch.Tensor) or coefficients.shape not in {(rows, length), (rows, 1)}:
        found = tuple(coefficients.shape) if isinstance(coefficients, torch.Tensor) else type(coefficients).__name__
        raise ValueError(
            f"{name}.coefficients returned {found}; return a tensor of shape {(rows, length)}, one coefficient a "
            f"token, or {(rows, 1)}, one a rollout."
        )
    counted = rollouts.mask.bool() if coefficients.size(1) == length else rollouts.mask.any(1, keepdim=True)
    values = coefficients[counted]
    if not (torch.isfinite(values).all() and (values >= 0).all()):
        raise ValueError(
            f"{name}.coefficients returned values from {values.min().item()} to {values.max().item()}; coefficients "
            "multiply the advantages inside the clipped loss and must be finite and not negative."
        )
    return coefficients.where(counted, 1.0)
