"""Token credit: what the credits of a run make of the advantages."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..batch.protocol import Credit
from ..batch.rollouts import Rollouts, Rows
from ..batch.states import StateStore
from .forward import Passes
from .rounds import ENTROPIES, Scored
from .token_credits import TokenCredits


def credited(advantages: torch.Tensor, credits: Sequence[Credit], rollouts: Rollouts) -> torch.Tensor:
    """
    Advantages times the coefficients of some credits.

    Args:
        advantages (`torch.Tensor` of shape `(B,)` or `(B, T)`):
            Advantages.
        credits (`Sequence` of [`~trl_cancel.credit.Credit`]):
            Credits.
        rollouts ([`~trl_cancel.batch.rollouts.Rollouts`]):
            The rollouts, in the order of the advantages.

    Returns:
        `torch.Tensor` of shape `(B,)` or `(B, T)`: As before, unless the tokens of a rollout differ.
    """
    with torch.no_grad():
        coefficients = combine(list(credits), rollouts)
    if coefficients.size(1) > 1 and (coefficients[rollouts.mask.bool()] == 1).all():
        return advantages
    if advantages.dim() == 1:
        return (
            advantages * coefficients.squeeze(1) if coefficients.size(1) == 1 else advantages[:, None] * coefficients
        )
    return advantages * coefficients


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
    if coefficients.size(1) > 1 and getattr(credit, "by_rollout", False):
        raise ValueError(
            f"{name}.coefficients returned {tuple(coefficients.shape)}, but by_rollout=True promises one a rollout: return "
            f"a tensor of shape {(rows, 1)}, or leave by_rollout out."
        )
    counted = rollouts.mask.bool() if coefficients.size(1) == length else rollouts.mask.any(1, keepdim=True)
    values = coefficients[counted]
    if not (torch.isfinite(values).all() and (values >= 0).all()):
        raise ValueError(
            f"{name}.coefficients returned values from {values.min().item()} to {values.max().item()}; coefficients "
            "multiply the advantages inside the clipped loss and must be finite and not negative."
        )
    return coefficients.where(counted, 1.0)


class CreditStage:
    """
    Puts the credits into the advantages: of a generation batch, and of a micro-batch for those that wait for the loss.

    Args:
        args ([`~trl_cancel.CancelGRPOConfig`]):
            Configuration.
        credits ([`TokenCredits`]):
            The credits.
        passes ([`~trl_cancel.pipeline.forward.Passes`]):
            Makes passes for those that need what one gives, where TRL has made none.
    """

    def __init__(self, args: Any, credits: TokenCredits, passes: Passes):
        self.args, self.credits, self.passes = args, credits, passes
        self.rollouts: Rollouts | None = None  # of the generation batch, for credits that wait for the loss

    def of_batch(self, scored: Scored, rollouts: Rollouts) -> Rows:
        """
        The entries of a scored generation batch that carry its credit.

        Args:
            scored ([`~trl_cancel.pipeline.rounds.Scored`]):
                The batch.
            rollouts ([`~trl_cancel.batch.rollouts.Rollouts`]):
                The same, as the methods see it.
        """
        waiting: Rows = {}
        if self.credits.in_loss:
            if self.credits.of_states:
                _ = self.passes.head  # while all processes are here, in case the model is sharded
            waiting = {"rollout_rows": torch.arange(len(scored), device=rollouts.mask.device)}
            self.rollouts = rollouts
        if self.credits.pass_when_scored:
            rollouts = self._with_pass(rollouts, scored)
        return {**waiting, "advantages": credited(scored.batch["advantages"], self.credits.when_scored, rollouts)}

    def of_micro_batch(
        self, inputs: Rows, logps: torch.Tensor, entropies: torch.Tensor | None, states: StateStore | None
    ) -> torch.Tensor:
        """
        The advantages of a micro-batch with the credits that have waited for the loss's own forward pass.

        Args:
            inputs (`dict`):
                The micro-batch.
            logps (`torch.Tensor` of shape `(B, T)`):
                Log-probs of that pass.
            entropies (`torch.Tensor` of shape `(B, T)`, *optional*):
                Its entropies.
            states ([`~trl_cancel.batch.states.StateStore`], *optional*):
                Its hidden states, where they are needed.
        """
        assert self.rollouts is not None
        order = inputs["rollout_rows"].argsort()  # TRL may have shuffled the rollouts within the micro-batch
        found: dict[str, Any] = {}
        if states is not None:
            found |= {"states": states[:][order], "head": self.passes.head}
        if self.credits.need_entropies and entropies is not None:
            found["entropies"] = entropies.detach()[order]
        rollouts = self.rollouts.take(inputs["rollout_rows"][order], old_logps=logps.detach()[order], **found)
        back = order.argsort()
        return credited(inputs["advantages"][order], self.credits.in_loss, rollouts)[back]

    def _with_pass(self, rollouts: Rollouts, scored: Scored) -> Rollouts:
        """The rollouts with what credits need of a pass: of TRL's own if it has made one, otherwise of another."""
        states, batch, needs_states = scored.states, scored.batch, bool(self.credits.of_states)
        logps, entropies = rollouts.old_logps, batch.pop(ENTROPIES, None)
        if (needs_states and states is None) or (self.credits.need_entropies and entropies is None):
            states = StateStore(self.args.state_cache_gib) if needs_states else None
            logps, entropies = self.passes.over(batch, torch.arange(len(scored)), states, self.credits.need_entropies)
        found: dict[str, Any] = {"entropies": entropies} if self.credits.need_entropies else {}
        if needs_states and states is not None:
            states.recompute = self._recomputed(batch, len(scored))
            found |= {"states": states, "head": self.passes.head}
        return replace(rollouts, old_logps=logps, **found)

    def _recomputed(self, batch: Rows, rows: int) -> Callable[[slice], torch.Tensor]:
        """What computes the states of some rollouts again."""

        def recompute(part: slice) -> torch.Tensor:
            again = StateStore()
            self.passes.over(batch, torch.arange(rows)[part], again)
            return again[:]

        return recompute
