"""Token credit: which credits a run has, when each is computed, and what they make of the advantages."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..batch.clipping import CLIPPED_LOSSES
from ..batch.protocol import SCOPES, Credit
from ..batch.rollouts import Rollouts, Rows
from ..batch.states import StateStore
from .forward import Passes
from .rounds import Scored


class TokenCredits:
    """
    The configured credits and the user's own.

    All are computed when a generation batch has been scored. Those that need hidden states wait for the forward pass of
    the loss, and so cost no pass of their own, where that sees the weights that sampled and the groups whole.

    Args:
        args ([`~trl_cancel.CancelGRPOConfig`]):
            Configuration.
        own (`Sequence` of [`~trl_cancel.credit.Credit`]):
            The user's credits.
        may_wait (`bool`, *optional*, defaults to `True`):
            Whether credits may wait for the loss; not for that of a subclass that goes its own way.

    Raises:
        `ValueError`: If a credit is none, or cannot be honoured with these settings.
    """

    def __init__(self, args: Any, own: Sequence[Credit] = (), may_wait: bool = True):
        if not isinstance(own, Sequence):
            raise ValueError(f"credits={own!r} must be a list, e.g. credits=[{type(own).__name__}(...)].")
        self.own = list(own)
        self.args, self.layout = args, args.layout
        self._check()
        self.all = [*args.token_credits, *self.own]
        self.of_states = [credit for credit in self.all if getattr(credit, "needs_states", False)]
        self.in_loss = self.of_states if may_wait and self._fits_loss(self.of_states) else []
        self.when_scored = [credit for credit in self.all if credit not in self.in_loss]
        self.states_when_scored = bool(self.of_states) and not self.in_loss

    def __bool__(self) -> bool:
        return bool(self.all)

    def _fits_loss(self, credits: Sequence[Credit]) -> bool:
        fits = self.layout.is_on_policy and self.layout.groups_are_local and self.layout.groups_fit_micro_batches
        return fits and not makes_old_logps(self.args) and all(credit.scope != "batch" for credit in credits)

    def _check(self) -> None:
        for credit in self.own:
            name = type(credit).__name__
            if isinstance(credit, type):
                raise ValueError(f"credits: {credit.__name__} needs to be an object; pass {credit.__name__}(...).")
            if not isinstance(credit, Credit) or not callable(credit.coefficients) or credit.scope not in SCOPES:
                raise ValueError(
                    f"credits: {name} needs a method coefficients(rollouts) and an attribute scope, one of "
                    f"{', '.join(map(repr, SCOPES))}; its scope is {getattr(credit, 'scope', None)!r}."
                )
            if credit.scope == "group" and not self.layout.groups_are_local:
                raise ValueError(
                    f"{type(credit).__name__} looks at whole groups, but groups of num_generations="
                    f"{self.args.num_generations} straddle processes that generate "
                    f"{self.layout.generation_batch_per_process} rollouts each (per_device_train_batch_size x "
                    "steps_per_generation). Make that a multiple of num_generations."
                )
        if self.own or self.args.token_credits:
            self._check_loss()

    def _check_loss(self) -> None:
        args = self.args
        if args.importance_sampling_level != "sequence":
            return
        if args.loss_type == "sapo":
            raise ValueError(
                "loss_type='sapo' with importance_sampling_level='sequence' would average the token credits of a "
                "rollout. Set importance_sampling_level='token', or another loss_type."
            )
        if args.delta is not None and args.delta < 1:
            raise ValueError(
                "Token credits with importance_sampling_level='sequence' hold the ratio at 1 inside the loss, so "
                f"delta={args.delta} would cut off every positive rollout. Set delta to 1 or more, or leave it unset."
            )
        if args.use_bias_correction_kl and args.beta:
            raise ValueError(
                "Token credits with importance_sampling_level='sequence' hold the ratio at 1 inside the loss, so "
                f"use_bias_correction_kl=True (with beta={args.beta}) would lose its ratio. Set "
                "use_bias_correction_kl=False, importance_sampling_level='token' or beta=0."
            )

    @property
    def spread_over_tokens(self) -> bool:
        """Whether the loss would average a rollout's token credits, since its tokens share one ratio."""
        return (
            bool(self) and self.args.importance_sampling_level == "sequence" and self.args.loss_type in CLIPPED_LOSSES
        )


def makes_old_logps(args: Any) -> bool:
    """Whether TRL passes over each generation batch for the log-probs under the policy that sampled it."""
    return not args.layout.is_on_policy or (args.use_vllm and args.vllm_importance_sampling_correction)


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
            Makes passes for those that need hidden states, where TRL has made none.
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
            _ = self.passes.head  # while all processes are here, in case the model is sharded
            waiting = {"rollout_rows": torch.arange(len(scored), device=rollouts.mask.device)}
            self.rollouts = rollouts
        if self.credits.states_when_scored:
            rollouts = self._with_states(rollouts, scored)
        return {**waiting, "advantages": credited(scored.batch["advantages"], self.credits.when_scored, rollouts)}

    def of_micro_batch(self, inputs: Rows, logps: torch.Tensor, states: StateStore) -> torch.Tensor:
        """
        The advantages of a micro-batch with the credits that have waited for the loss's own forward pass.

        Args:
            inputs (`dict`):
                The micro-batch.
            logps (`torch.Tensor` of shape `(B, T)`):
                Log-probs of that pass.
            states ([`~trl_cancel.batch.states.StateStore`]):
                Its hidden states.
        """
        assert self.rollouts is not None
        order = inputs["rollout_rows"].argsort()  # TRL may have shuffled the rollouts within the micro-batch
        rollouts = self.rollouts.take(
            inputs["rollout_rows"][order],
            states=states[:][order],
            old_logps=logps.detach()[order],
            head=self.passes.head,
        )
        back = order.argsort()
        return credited(inputs["advantages"][order], self.credits.in_loss, rollouts)[back]

    def _with_states(self, rollouts: Rollouts, scored: Scored) -> Rollouts:
        """The rollouts with their states and log-probs: of TRL's own pass if it has made one, otherwise of another."""
        states, logps, batch = scored.states, rollouts.old_logps, scored.batch
        if states is None:
            states = StateStore(self.args.state_cache_gib)
            logps = self.passes.over(batch, torch.arange(len(scored)), states)

        def recompute(rows: slice) -> torch.Tensor:
            again = StateStore()
            self.passes.over(batch, torch.arange(len(rollouts.mask))[rows], again)
            return again[:]

        states.recompute = recompute
        return replace(rollouts, states=states, old_logps=logps, head=self.passes.head)
