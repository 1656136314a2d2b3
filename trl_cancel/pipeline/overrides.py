"""Overrides of subclasses that leave out what a method cannot do without."""

from collections.abc import Iterator
from typing import Any

from ..upstream.hooks import left_out, overridden, overrides, private_names, taken_names
from .token_credits import TokenCredits


# Hooks that compute the loss, from the outermost on, with what each may call in its place.
LOSS = {"compute_loss": ("_compute_loss",), "_compute_loss": ()}
# Hooks in which a user may change which rollouts of a generation batch a loss is computed from.
WAY_TO_LOSS = ("training_step", "_prepare_inputs", *LOSS)
TAKES = "If it takes these, set takes_token_advantages = True in the class; otherwise call super(), or turn that off."
FOR_SUBCLASSES = {"_config_class"}  # names that begin with `_` and are for subclasses to set


def asked_for_in_generation(args: Any, credits: TokenCredits) -> list[str]:
    """What cannot do without the way from the generation to the micro-batches."""
    chosen = [method.chosen(args) for method in args.methods if method.acts_in_generation]
    return list(dict.fromkeys([*chosen, *credits.named(credits.all)]))


def asked_for_in_loss(args: Any, credits: TokenCredits) -> list[str]:
    """What cannot do without TRL's loss."""
    chosen = [method.chosen(args) for method in args.methods if method.acts_in_loss]
    there = credits.all if credits.spread_over_tokens else credits.in_loss
    return list(dict.fromkeys([*chosen, *credits.named(there)]))


def asked_for_of_groups(args: Any, credits: TokenCredits) -> list[str]:
    """What compares the rollouts of a prompt."""
    chosen = [
        method.chosen(args) for method in args.methods if method.selector(args) or method.weigher(args) is not None
    ]
    there = [credit for credit in credits.all if credit.scope == "group"]
    return list(dict.fromkeys([*chosen, *credits.named(there)]))


def check_overrides(trainer: Any, base: type, args: Any, credits: TokenCredits) -> None:
    """
    Refuses subclasses whose overrides leave out what a method cannot do without, and hooks set on the object that do.

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
    asked_for = {"_prepare_inputs": asked_for_in_generation(args, credits)}
    asked_for |= dict.fromkeys(LOSS, asked_for_in_loss(args, credits))
    for hook, methods in asked_for.items():
        if methods and overrides(trainer, hook, after=base):
            raise ValueError(
                f"A class that stands after CancelGRPOTrainer in {name}'s bases overrides {hook}, but "
                f"{' and '.join(methods)} acts there. Put it before, as in class {name}(Its, CancelGRPOTrainer)."
            )
    for hook, methods in asked_for.items():
        override = left_out(trainer, hook, *LOSS.get(hook, ()))
        if override is not None and methods:
            raise ValueError(
                f"{override}.{hook} does not call super().{hook}, but {' and '.join(methods)} acts there. Call "
                "it, or turn that off."
            )
    of_tokens = credits.named(credits.of_tokens)
    for override, hook in _own_losses(trainer):
        if of_tokens and not trainer.takes_token_advantages:
            raise ValueError(
                f"{override}.{hook} does not call super().{hook}, but {' and '.join(of_tokens)} gives it "
                f"inputs['advantages'] of shape (B, T), one a token, where TRL's are of shape (B,). {TAKES}"
            )


def _own_losses(trainer: Any) -> Iterator[tuple[str, str]]:
    """The hooks that compute losses without TRL's, with the classes that hold them."""
    for hook, inner in LOSS.items():
        override = left_out(trainer, hook, *inner)
        if override is not None:
            yield override, hook


def check_private_names(trainer_class: type, base: type, given: Any = ()) -> None:
    """
    Refuses names of the user's that this package's trainer has given to something else.

    Args:
        trainer_class (`type`):
            A class derived from `base`.
        base (`type`):
            This package's trainer.
        given (`Iterable[str]`, *optional*):
            Attributes that the object has before it is initialised.

    Raises:
        `ValueError`: Names them.
    """
    taken = taken_names(trainer_class, base) | dict.fromkeys(private_names(base) & {*given}, trainer_class.__name__)
    for name in sorted(taken.keys() - FOR_SUBCLASSES):
        raise ValueError(
            f"{taken[name]}.{name} is a name that trl-cancel's trainer uses for something of its own. Choose another, "
            "e.g. without the underscore; docs/subclassing.md lists these names."
        )


def blamed(trainer: Any, hooks: tuple[str, ...]) -> str:
    """Who may be at fault, as a sentence: the user's overrides of some hooks, or this package where there is none."""
    own = overridden(trainer, hooks)
    if own:
        return f"Look at {' and '.join(own)}, which must leave rollouts and groups whole (docs/subclassing.md)."
    return "This is a fault of trl-cancel: please report it with your configuration."
