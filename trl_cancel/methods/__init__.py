"""
The methods, each in a file that holds all there is of it: the formula, the settings and what they refuse, what is said
of it, its paper, and what it gives to the pipeline.
"""

from dataclasses import dataclass, fields
from typing import Any

from ..batch.clipping import Clipping
from ..batch.groups import GroupWeigher, Selector
from ..batch.protocol import Credit
from . import (
    conflict,
    delta,
    dynamic_sampling,
    entropy_filter,
    group_weights,
    nthr,
    query_preserved,
    reward_balance,
    sign,
    symmetric_clip,
)
from .method import Method, Named, PaperConfiguration


@dataclass
class MethodSettings(
    # In the order in which they act, from the last to the first: fields of a dataclass come in that order.
    entropy_filter.Settings,
    conflict.Settings,
    delta.Settings,
    nthr.Settings,
    sign.Settings,
    group_weights.Settings,
    symmetric_clip.Settings,
    dynamic_sampling.Settings,
    reward_balance.Settings,
    query_preserved.Settings,
):
    """The settings of all methods, and what those that are on give to the pipeline."""

    @property
    def methods(self) -> list[Method]:
        """The methods that are on."""
        return [method for method in METHODS if method.is_on(self)]

    @property
    def clipping(self) -> Clipping:
        """How the loss clips ratios."""
        args: Any = self
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        clipping = Clipping(args.loss_type, args.epsilon, high, args.delta)
        for method in self.methods:
            clipping = method.clipping(self, clipping)
        return clipping

    @property
    def weigher(self) -> GroupWeigher | None:
        """What weighs rollouts within their groups."""
        weighers = [weigher for method in self.methods if (weigher := method.weigher(self)) is not None]
        return weighers[-1] if weighers else None

    @property
    def selectors(self) -> list[Selector]:
        """What chooses groups of several rounds of generation."""
        return [selector for method in self.methods if (selector := method.selector(self)) is not None]

    @property
    def token_credits(self) -> list[Credit]:
        """What the advantages of tokens are multiplied with."""
        return [credit for method in self.methods if (credit := method.credit(self)) is not None]

    @property
    def set_by_methods(self) -> set[str]:
        """Settings of TRL's that are not the user's."""
        return {setting for method in self.methods for setting in method.sets}

    @property
    def in_force(self) -> dict[str, Any]:
        """Settings whose value is left to others, with what they come to."""
        return {name: value for method in METHODS for name, value in method.in_force(self).items()}

    @property
    def tears_groups(self) -> bool:
        """Whether the rollouts of a prompt are spread over several optimizer steps."""
        args: Any = self
        return args.layout.is_split and not any(method.cuts(self) for method in self.methods)


METHODS: tuple[Method, ...] = tuple(Method.of(settings) for settings in reversed(MethodSettings.__bases__))
NAMED: dict[str, Named] = {name: named for method in METHODS for name, named in method.named.items()}
CONFIGURATIONS: dict[str, PaperConfiguration] = {
    configuration.name: configuration for method in METHODS for configuration in method.configurations
}


def complete_settings(name: str) -> dict[str, Any]:
    """
    The settings of a named method, with those that make up others at their defaults.

    Args:
        name (`str`):
            One of `NAMED`.
    """
    own = {setting.name: setting.default for setting in fields(MethodSettings)}
    chosen = {setting for named in NAMED.values() for setting in named.settings}
    used = sorted(own.keys() & (chosen | {method.switch for method in METHODS}))
    return {**{setting: own[setting] for setting in used}, **NAMED[name].settings}
