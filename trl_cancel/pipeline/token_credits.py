"""Which token credits a run has, and when each is computed."""

from collections.abc import Sequence
from typing import Any

from ..batch.clipping import CLIPPED_LOSSES
from ..batch.protocol import SCOPES, Credit
from ..methods.method import check_groups_are_local, said


class TokenCredits:
    """
    The configured credits and the user's own.

    All are computed when a generation batch has been scored. Those that need what a forward pass gives wait for that of
    the loss, and so cost no pass of their own, where that sees the weights that sampled and the groups whole.

    Args:
        args ([`~trl_cancel.CancelGRPOConfig`]):
            Configuration.
        own (`Sequence` of [`~trl_cancel.credit.Credit`]):
            The user's credits.
        may_wait (`bool`, *optional*, defaults to `True`):
            As in [`TokenCredits.settle`].

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
        settings = [method.chosen(args) for method in args.methods if method.credit(args) is not None]
        self._names = [*settings, *(f"the token credit {type(credit).__name__}" for credit in self.own)]
        self.of_states = [credit for credit in self.all if getattr(credit, "needs_states", False)]
        self.need_entropies = any(getattr(credit, "needs_entropies", False) for credit in self.all)
        self.settle(may_wait)

    def __bool__(self) -> bool:
        return bool(self.all)

    def settle(self, may_wait: bool) -> None:
        """
        Decides when each credit is computed.

        Args:
            may_wait (`bool`):
                Whether credits may wait for the loss: where nobody changes which rollouts of the generation batch that
                is computed from.
        """
        of_pass = [credit for credit in self.all if _needs_pass(credit)]
        self.in_loss = of_pass if may_wait and self._fits_loss(of_pass) else []
        self.when_scored = [credit for credit in self.all if credit not in self.in_loss]
        self.pass_when_scored = bool(of_pass) and not self.in_loss

    def named(self, credits: Sequence[Credit]) -> list[str]:
        """What asks for some of the credits: the settings, and the classes of the user's own."""
        return [name for name, credit in zip(self._names, self.all, strict=True) if credit in credits]

    @property
    def of_tokens(self) -> list[Credit]:
        """Credits with which the advantages of a rollout's tokens may differ."""
        return [credit for credit in self.all if not getattr(credit, "by_rollout", False)]

    def _fits_loss(self, credits: Sequence[Credit]) -> bool:
        fits = self.layout.is_on_policy and self.layout.groups_are_local and self.layout.groups_fit_micro_batches
        # What `torch.compile` has made of the model calls no hooks, by which hidden states are caught.
        fits = fits and not self.args.torch_compile
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
            if credit.scope == "group":
                check_groups_are_local(f"{name} looks at whole groups", self.args)
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
                f"{said(args, 'use_bias_correction_kl')} with beta={args.beta} would lose its ratio. Set "
                "use_bias_correction_kl=False, importance_sampling_level='token' or beta=0."
            )

    @property
    def spread_over_tokens(self) -> bool:
        """Whether the loss would average a rollout's token credits, since its tokens share one ratio."""
        return (
            bool(self) and self.args.importance_sampling_level == "sequence" and self.args.loss_type in CLIPPED_LOSSES
        )


def _needs_pass(credit: Credit) -> bool:
    return getattr(credit, "needs_states", False) or getattr(credit, "needs_entropies", False)


def makes_old_logps(args: Any) -> bool:
    """Whether TRL passes over each generation batch for the log-probs under the policy that sampled it."""
    return not args.layout.is_on_policy or (args.use_vllm and args.vllm_importance_sampling_correction)
