"""The token credits of a run: which there are, when each is computed, and what they make of the advantages."""

from collections.abc import Sequence
from typing import Any

import torch

from ..batch.protocol import SCOPES, combine
from ..batch.rollouts import Rollouts
from ..configs import CLIPPED_LOSSES, CancelGRPOConfig
from ..credit import NTHR, Credit, DelTA, SignControl


class TokenCredits:
    """
    The configured credits and the user's own.

    All are computed when a generation batch has been scored. Those that need hidden states wait for the forward pass of
    the loss, and so cost no pass of their own, where that sees the weights that sampled and the groups whole.

    Args:
        args ([`CancelGRPOConfig`]):
            Configuration.
        own (`Sequence` of [`~trl_cancel.credit.Credit`]):
            The user's credits.
        may_wait (`bool`, *optional*, defaults to `True`):
            Whether credits may wait for the loss; not for that of a subclass that goes its own way.

    Raises:
        `ValueError`: If a credit is none, or cannot be honoured with these settings.
    """

    def __init__(self, args: CancelGRPOConfig, own: Sequence[Credit] = (), may_wait: bool = True):
        if not isinstance(own, Sequence):
            raise ValueError(f"credits={own!r} must be a list, e.g. credits=[{type(own).__name__}(...)].")
        self.own = list(own)
        self.args, self.layout = args, args.layout
        self._check()
        self.all = [*configured(args), *self.own]
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
        if self.own or configured(self.args):
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


def configured(args: CancelGRPOConfig) -> list[Credit]:
    """The credits that the configuration asks for."""
    credits: list[Credit] = []
    if args.advantage_sign != "both":
        credits.append(SignControl(args.advantage_sign))
    if args.nthr:
        credits.append(NTHR(args.nthr_beta, args.nthr_eta, args.nthr_selection))
    if args.delta_credit:
        credits.append(
            DelTA(
                refinements=args.delta_refinements,
                lambda_min=args.delta_lambda_min,
                lambda_max=args.delta_lambda_max,
                gamma=args.delta_gamma,
                normalize=args.delta_normalize,
                proxy=args.delta_proxy,
                assignment=args.delta_assignment,
                top_fraction=args.delta_top_fraction,
            )
        )
    return credits


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
