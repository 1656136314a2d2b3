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

        needs_entropies (`bool`, *optional*):
            Set it to `True` to find `entropies` in the rollouts, of the same passes.

        by_rollout (`bool`, *optional*):
            Set it to `True` if all tokens of a rollout carry the same, so that coefficients are of shape `(B, 1)` and
            advantages stay of shape `(B,)`, for losses that take no others.

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
