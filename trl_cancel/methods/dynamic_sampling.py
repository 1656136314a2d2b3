"""
Dynamic sampling, DAPO ([2503.14476](https://huggingface.co/papers/2503.14476), section 3.2): groups whose rewards are
all equal teach nothing, and are replaced by others.
"""

from dataclasses import dataclass

import torch

from ..arguments import floats, shaped, single
from ..batch.groups import Choice, Groups
from ..papers import DAPO
from .method import ActiveMethod, Config, Method, Named, Row, check_groups_are_local, documented


def without_variance(rewards: torch.Tensor, weights: torch.Tensor, apart: bool = False) -> torch.Tensor:
    """
    The groups whose rollouts all earn the same, so that none of them has an advantage.

    Args:
        rewards (`torch.Tensor` of shape `(M, G, F)`):
            Values of F reward functions; `nan` where a function gave none.
        weights (`torch.Tensor` of shape `(F,)`):
            Weights of the functions.
        apart (`bool`, *optional*, defaults to `False`):
            Whether advantages are normalised for each function on its own, so that two functions that differ by
            opposite amounts do not make up for each other.

    Returns:
        `torch.Tensor` of shape `(M,)` and type `bool`.

    Raises:
        `ValueError`: If the shapes do not fit.
    """
    rewards, weights = single(*floats(rewards=rewards, weights=weights))
    shaped(rewards=(rewards, "M G F"), weights=(weights, "F"))
    if apart:
        rewards = rewards[..., weights != 0]
    else:
        unknown = rewards.isnan().all(-1, keepdim=True)
        rewards = (rewards * weights).nansum(-1, keepdim=True).masked_fill(unknown, torch.nan)
    lowest = rewards.nan_to_num(torch.inf, torch.inf, -torch.inf).amin(1)
    highest = rewards.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1)
    return (lowest >= highest).all(-1)


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
