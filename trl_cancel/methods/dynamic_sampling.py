"""
Dynamic sampling, DAPO ([2503.14476](https://huggingface.co/papers/2503.14476), section 3.2): groups whose rewards are
all equal teach nothing, and are replaced by others.
"""

from dataclasses import dataclass

import torch

from ..batch.groups import Choice, Groups
from ..papers import DAPO
from .method import ActiveMethod, Config, Method, Named, Row, check_groups_are_local, documented


@documented
@dataclass
class Settings:
    """
    filter_zero_variance (`bool`, *optional*, defaults to `False`):
        Replace groups whose rewards are all equal by groups of further rounds (dynamic sampling).
    """

    filter_zero_variance: bool = False


class DifferingRewards:
    """Takes groups whose rewards differ first."""

    wants = "groups whose rewards differ"

    def rejects(self, groups: Groups) -> torch.Tensor:
        return groups.idle

    def choose(self, groups: Groups, wanted: int) -> Choice | None:
        return None

    def arranged(self, order: torch.Tensor, groups: Groups, choice: Choice) -> torch.Tensor:
        return order


class DynamicSampling(Method):
    """Rejects groups without variance while there are others."""

    Settings = Settings
    switch = "filter_zero_variance"
    neutral = {"filter_zero_variance": True}
    row = Row(
        "docs/balance.md",
        "dynamic sampling",
        "groups whose rewards are all equal are replaced (dynamic sampling)",
        "prompts that are too hard or too easy",
        "the rounds that it generates",
        "{dynamic sampling}",
        DAPO.id,
    )
    named = {
        "dynamic-sampling": Named(
            {"query_preserved": True, "filter_zero_variance": True}, "groups of equal rewards are replaced"
        )
    }
    logs = ("balance/",)
    acts_in_generation = True

    def active(self, args: Config) -> ActiveMethod:
        does = "groups whose rewards are all equal are replaced"
        return ActiveMethod("Dynamic sampling", does, ("dynamic-sampling",), (DAPO,))

    def check(self, args: Config) -> None:
        if self.is_on(args):
            check_groups_are_local(f"{self.chosen(args)} chooses whole groups", args)

    def selector(self, args: Config) -> DifferingRewards:
        return DifferingRewards()
