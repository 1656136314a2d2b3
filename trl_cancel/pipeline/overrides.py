"""Overrides of subclasses that leave out what a method cannot do without."""

from typing import Any

from trl import GRPOTrainer

from ..upstream.hooks import is_of, left_out
from .token_credits import TokenCredits


def asked_for_in_generation(args: Any, credits: TokenCredits) -> list[str]:
    """What cannot do without the way from the generation to the micro-batches."""
    chosen = [method.chosen(args) for method in args.methods if method.acts_in_generation]
    return [*chosen, *(f"the token credit {type(credit).__name__}" for credit in credits.all)]


def asked_for_in_loss(args: Any, credits: TokenCredits) -> list[str]:
    """What cannot do without TRL's loss."""
    chosen = [method.chosen(args) for method in args.methods if method.acts_in_loss]
    there = credits.all if credits.spread_over_tokens else credits.in_loss
    return [*chosen, *(f"the token credit {type(credit).__name__}" for credit in there)]


def has_own_loss(trainer_class: type, base: type) -> bool:
    """Whether a class derived from this package's trainer computes losses without TRL's."""
    return any(left_out(trainer_class, hook, base) for hook in ("compute_loss", "_compute_loss"))


def check_overrides(trainer: Any, base: type, args: Any, credits: TokenCredits) -> None:
    """
    Refuses subclasses whose overrides leave out what a method cannot do without.

    Args:
        trainer ([`~trl_cancel.CancelGRPOTrainer`]):
            The trainer.
        base (`type`):
            This package's trainer, from which its class derives.
        args ([`~trl_cancel.CancelGRPOConfig`]):
            Its configuration.
        credits ([`~trl_cancel.pipeline.token_credits.TokenCredits`]):
            Its token credits.

    Raises:
        `ValueError`: Names the hook, the class and the settings.
    """
    name = type(trainer).__name__
    generation, loss = asked_for_in_generation(args, credits), asked_for_in_loss(args, credits)
    for hook, asked_for in (("compute_loss", loss), ("_compute_loss", loss), ("_prepare_inputs", generation)):
        if asked_for and not is_of(trainer, hook, base, GRPOTrainer):
            raise ValueError(
                f"A class that stands after CancelGRPOTrainer in {name}'s bases overrides {hook}, but "
                f"{' and '.join(asked_for)} acts there. Put it before, as in class {name}(Its, CancelGRPOTrainer)."
            )
    for hook, asked_for in (("_prepare_inputs", generation), ("compute_loss", loss), ("_compute_loss", loss)):
        override = left_out(type(trainer), hook, base)
        if override is not None and asked_for:
            raise ValueError(
                f"{override}.{hook} does not call super().{hook}, but {' and '.join(asked_for)} acts there. Call "
                "it, or turn that off."
            )
