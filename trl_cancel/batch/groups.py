"""Groups, the rollouts of one prompt each: what is known of them where they are chosen, and where they are weighed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..arguments import floats, shaped, single
from .layout import BatchLayout


Add = Callable[..., None]  # `add(name, values, weights)` adds to a metric of the optimizer step


@dataclass(frozen=True)
class Groups:
    """
    Groups among which some are chosen, in the order in which they were generated.

    Args:
        positives, negatives (`torch.Tensor` of shape `(M,)`):
            Rollouts of positive and of negative advantage in each, as far as the loss counts any of their tokens.
        idle (`torch.Tensor` of shape `(M,)` and type `bool`):
            Whether all rewards are equal, so that nothing is learned from it.
        layout ([`~trl_cancel.batch.layout.BatchLayout`]):
            The sizes of the batch that they are chosen for.
    """

    positives: torch.Tensor
    negatives: torch.Tensor
    idle: torch.Tensor
    layout: BatchLayout

    def __len__(self) -> int:
        return len(self.idle)

    def take(self, index: torch.Tensor) -> "Groups":
        """Some of the groups."""
        return Groups(self.positives[index], self.negatives[index], self.idle[index], self.layout)


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


@dataclass
class Choice:
    """
    Groups that are kept.

    Args:
        groups (`torch.Tensor` of shape `(N,)`):
            Their numbers, in ascending order.
        satisfied (`float`):
            Share of the optimizer steps that they can fill as asked for.
        order (`torch.Tensor` of shape `(N,)`):
            An order of `groups` in which they do.
    """

    groups: torch.Tensor
    satisfied: float
    order: torch.Tensor


class Selector(Protocol):
    """What chooses groups for a method."""

    wants: str  # in words

    def rejects(self, groups: Groups) -> torch.Tensor:
        """Groups that are not to be taken while there are others, of shape `(M,)` and type `bool`."""
        ...

    def choose(self, groups: Groups, wanted: int) -> Choice | None:
        """`wanted` of the groups, at least as many, that are best for it; `None` where it does not care."""
        ...

    def arranged(self, order: torch.Tensor, groups: Groups, choice: Choice) -> torch.Tensor:
        """The order in which chosen groups fill the optimizer steps, given one drawn at random."""
        ...


@dataclass(frozen=True)
class GroupRatios:
    """
    What the weights of whole groups are made of, each of shape `(P, G)`.

    Args:
        ratios (`torch.Tensor`):
            Sequence-level importance ratios.
        active (`torch.Tensor` of type `bool`):
            Rollouts that the loss counts.
        advantages (`torch.Tensor`):
            Advantages.
        correction (`torch.Tensor`):
            What corrects each rollout for the sampling engine, where the weigher takes that in; otherwise 1.
        pushes (`torch.Tensor`):
            What the weight of each rollout is multiplied with: the mean of its advantage over its tokens, with token
            credit.
    """

    ratios: torch.Tensor
    active: torch.Tensor
    advantages: torch.Tensor
    correction: torch.Tensor
    pushes: torch.Tensor


class GroupWeigher(Protocol):
    """What weighs the rollouts of each group for a method."""

    takes_correction: bool  # the correction for the sampling engine is transformed with the ratios
    differentiates: bool  # the loss is differentiated through the weights
    changes_nothing: bool  # given advantages that sum to 0 in each group

    def weights(self, groups: GroupRatios, metrics: "Metrics") -> torch.Tensor:
        """The weights, of shape `(P, G)`."""
        ...


class Metrics(Protocol):
    """Where metrics of an optimizer step are collected; see [`~trl_cancel.batch.metrics.StepMetrics`]."""

    def add(self, name: str, values: torch.Tensor, weights: torch.Tensor | None = None) -> None: ...

    def add_range(self, lowest: str, highest: str, values: torch.Tensor) -> None: ...
