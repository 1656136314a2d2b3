r"""
Reward-balanced batching (section 4 of 2605.08666): an update must hold enough rollouts of either sign of the advantage
for their pushes to cancel, \\( \min(N_+, N_-) / |B| \ge \rho \\).

Choosing whole groups that meet the target is a knapsack with two constraints, which is solved exactly (`knapsack/choosing.py`):
first how much of the target any choice reaches, then with how few exchanges between the groups that came first and the
others. Spreading the groups over steps is `knapsack/spreading.py`.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..arguments import is_number, is_whole
from ..batch.groups import Choice, Groups
from ..knapsack.choosing import Pool, bound, choose, exchanged
from ..knapsack.spreading import fill_steps
from ..papers import CANCELLATION
from .method import ActiveMethod, Config, Method, Named, Row, check_groups_are_local, documented, whole_groups


Counts = torch.Tensor | np.ndarray | Sequence[int]


def select_balanced_groups(
    positives: Counts, negatives: Counts, num_groups: int, group_size: int, min_fraction: float
) -> tuple[torch.Tensor, bool]:
    r"""
    Chooses groups that hold enough rollouts of either sign together.

    The first groups are taken if they do. Otherwise as few as possible of them are exchanged for later ones, rather
    the one-sided than the mixed; if no choice meets the target, the one that comes nearest is taken.

    Args:
        positives (`torch.Tensor` of shape `(M,)`, or `Sequence[int]`):
            Rollouts of positive advantage in each group, in the order in which the groups came.
        negatives (`torch.Tensor` of shape `(M,)`, or `Sequence[int]`):
            Rollouts of negative advantage in each group.
        num_groups (`int`):
            Groups to choose.
        group_size (`int`):
            Rollouts of each group.
        min_fraction (`float`):
            \\( \rho \\), the least share of all rollouts of the chosen groups that each sign must have.

    Returns:
        `tuple`: Indices of the chosen groups, a `torch.Tensor` of shape `(num_groups,)` in ascending order; and whether
        they meet the target, which they do if and only if some choice does.

    Raises:
        `ValueError`: If there are too few groups, counts do not fit into a group, or a number makes no sense.

    Example:

    ```python
    >>> positives, negatives = torch.tensor([0, 4, 4, 2]), torch.tensor([4, 0, 0, 2])
    >>> select_balanced_groups(positives, negatives, num_groups=2, group_size=4, min_fraction=0.5)
    (tensor([0, 1]), True)
    >>> select_balanced_groups(positives[1:], negatives[1:], num_groups=2, group_size=4, min_fraction=0.25)
    (tensor([0, 2]), True)
    ```
    """
    counts = _counts(positives, negatives, group_size)
    num_groups = _whole("num_groups", num_groups)
    if len(counts) < num_groups:
        raise ValueError(f"num_groups={num_groups} cannot be chosen among {len(counts)} groups.")
    target = _target(min_fraction, num_groups * group_size)
    if counts[:num_groups].sum(0).min() >= target:
        return torch.arange(num_groups), True
    exchanges = _Exchanges(counts, num_groups)
    reached, chosen = exchanges.nearest(target)
    return torch.from_numpy(exchanges.fewest(reached, chosen)), reached == target


def balanced_order(
    order: Counts,
    positives: Counts,
    negatives: Counts,
    num_steps: int,
    group_size: int,
    min_fraction: float,
) -> tuple[torch.Tensor, int]:
    r"""
    Spreads groups over optimizer steps so that each holds enough rollouts of either sign.

    The given order is kept if it does. Otherwise as many steps as possible are filled, and come first. That is the most
    there is for up to 12 groups, and wherever as many steps are filled as the groups hold enough for when they are taken
    together; for large pools with little to spare a search of bounded size may miss a step or two.

    Args:
        order (`torch.Tensor` of shape `(M,)`, or `Sequence[int]`):
            Groups in the order in which they fill the steps.
        positives (`torch.Tensor` of shape `(M,)`, or `Sequence[int]`):
            Rollouts of positive advantage in each group.
        negatives (`torch.Tensor` of shape `(M,)`, or `Sequence[int]`):
            Rollouts of negative advantage in each group.
        num_steps (`int`):
            Optimizer steps, each of M / `num_steps` groups.
        group_size (`int`):
            Rollouts of each group.
        min_fraction (`float`):
            Least share of the rollouts of a step that each sign must have.

    Returns:
        `tuple`: The order, a `torch.Tensor` of shape `(M,)`, and in how many steps it leaves both signs enough.

    Raises:
        `ValueError`: If the groups do not fill the steps, `order` does not hold each once, or a number makes no sense.
    """
    counts = _counts(positives, negatives, group_size)
    num_steps = _whole("num_steps", num_steps)
    given = _whole_numbers("order", order)
    order = order if isinstance(order, torch.Tensor) else torch.from_numpy(given)
    _check_order(order, len(counts), num_steps)
    room = len(order) // num_steps
    target = _target(min_fraction, room * group_size)
    enough = int((counts[given].reshape(num_steps, room, 2).sum(1).min(1) >= target).sum())
    if enough == num_steps:
        return order, enough
    steps = fill_steps(counts[given], num_steps, target)
    if len(steps) <= enough:
        return order, enough
    filled = [place for step in steps for place in step]
    left_over = np.setdiff1d(np.arange(len(given)), filled)
    return order[torch.as_tensor([*filled, *left_over], device=order.device)], len(steps)


def _whole_numbers(name: str, given: Counts) -> np.ndarray:
    """One for each group, of shape `(M,)`."""
    try:
        numbers = given.cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
    except (TypeError, ValueError):  # a type that NumPy does not have, or rows of unequal length
        numbers = np.zeros(())
    if numbers.ndim != 1 or not (numbers.dtype.kind in "iub" or numbers.size == 0):
        what = f"{given.dtype} of shape {tuple(np.shape(given))}" if hasattr(given, "dtype") else repr(given)
        raise ValueError(f"{name} ({what}): must be a tensor or a sequence of one whole number for each group.")
    return numbers.astype(np.int64)


def _counts(positives: Counts, negatives: Counts, group_size: int) -> np.ndarray:
    """Rollouts of either sign in each group, of shape `(M, 2)`."""
    columns = [_whole_numbers("positives", positives), _whole_numbers("negatives", negatives)]
    if len(positives) != len(negatives):
        raise ValueError(
            f"positives are of {len(positives)} groups and negatives of {len(negatives)}: must be the same."
        )
    group_size = _whole("group_size", group_size)
    counts = np.stack(columns, axis=1)
    if (counts < 0).any() or (counts.sum(1) > group_size).any():
        raise ValueError(f"Counts of positives and negatives must fit into groups of group_size={group_size}.")
    return counts


def _target(min_fraction: float, rollouts: int) -> int:
    """The rollouts of either sign that a share of all stands for."""
    if not (is_number(min_fraction) and 0 <= min_fraction <= 1):
        raise ValueError(f"min_fraction={min_fraction!r}: must be a number between 0 and 1; more than 0.5 never fits.")
    return math.ceil(float(min_fraction) * rollouts - 1e-9)


def _whole(name: str, value: int) -> int:
    if not (is_whole(value) and value >= 1):
        raise ValueError(f"{name}={value!r}: must be a whole number of at least 1.")
    return int(value)


def _check_order(order: torch.Tensor, num_groups: int, num_steps: int) -> None:
    if sorted(order.tolist()) != list(range(num_groups)):
        raise ValueError(f"order must hold each of the {num_groups} groups once.")
    if num_groups % num_steps:
        raise ValueError(f"{num_groups} groups cannot be dealt to num_steps={num_steps} steps of equal size.")


class _Exchanges:
    """
    The exchanges between the first `num_groups` groups and the others.

    Args:
        counts (`np.ndarray` of shape `(M, 2)`):
            Rollouts of either sign in each group.
        num_groups (`int`):
            Groups that are chosen.
    """

    def __init__(self, counts: np.ndarray, num_groups: int):
        self.kinds, kind_of = np.unique(counts, axis=0, return_inverse=True)
        self.kind_of = kind_of.reshape(-1)
        self.num_groups = num_groups
        self.first, self.later = (
            np.bincount(part, minlength=len(self.kinds)) for part in np.split(self.kind_of, [num_groups])
        )

    def nearest(self, target: int) -> tuple[int, np.ndarray]:
        """The highest number of rollouts of either sign, up to `target`, and how many of each kind have it."""
        everything = [Pool(self.kinds, self.first + self.later, self.num_groups)]
        reached = min(target, bound(everything, (0, 0)).height)
        while (chosen := choose(everything, (reached, reached))) is None:
            reached -= 1
        return reached, chosen[0]

    def fewest(self, target: int, chosen: np.ndarray) -> np.ndarray:
        """
        The groups that reach a target with the fewest exchanges, rather the one-sided for the mixed.

        Args:
            target (`int`):
                Rollouts of either sign.
            chosen (`np.ndarray` of shape `(K,)`):
                How many of each kind reach it.
        """
        kept = np.minimum(chosen, self.first)
        found = [kept, chosen - kept]
        most = int(found[1].sum())
        # What divisible groups could reach rises with the exchanges up to where it suffices, so there is a first place.
        least = bisect_left(
            range(most), True, key=lambda number: bound(self._pools(number), (target, target)).slack >= 0
        )
        for number in range(least, most):
            fewer = choose(self._pools(number), (target, target))
            if fewer is not None:
                found = fewer
                break
        pools = self._pools(int(found[1].sum()))
        smaller, larger = self.kinds.min(1), self.kinds.max(1)
        exchanged(pools, found, smaller * (self.kinds.max() + 1) + larger, (target, target))
        return self._earliest(found)

    def _pools(self, number: int) -> list[Pool]:
        """What is kept of the first groups, and what comes of the others, for a number of exchanges."""
        kept = self.num_groups - number
        return [Pool(self.kinds, self.first, kept), Pool(self.kinds, self.later, number)]

    def _earliest(self, chosen: Sequence[np.ndarray]) -> np.ndarray:
        """The groups that come first of each kind, in ascending order."""
        kind_of = self.kind_of + len(self.kinds) * (np.arange(len(self.kind_of)) >= self.num_groups)
        order = np.argsort(kind_of, kind="stable")
        available = np.concatenate([self.first, self.later])
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - (np.cumsum(available) - available)[kind_of[order]]
        return np.flatnonzero(rank < np.concatenate(chosen)[kind_of])


@documented
@dataclass
class Settings:
    """
    reward_balance (`float`, *optional*, defaults to `0.0`):
        Least share, up to 0.5, of the rollouts of an optimizer step that must have positive and that must have
        negative advantages. Where the rollouts of a generation do not allow it, further rounds are generated from
        fresh prompts and groups are exchanged. Source: section 4 of
        [2605.08666](https://huggingface.co/papers/2605.08666).
    """

    reward_balance: float = 0.0


class BothSigns:
    """
    Takes groups that can fill each optimizer step with enough rollouts of both signs.

    Args:
        share (`float`):
            The least share of each.
    """

    def __init__(self, share: float):
        self.share = share
        self.wants = f"{share:.0%} of either sign in each optimizer step"

    def rejects(self, groups: Groups) -> torch.Tensor:
        return torch.zeros_like(groups.idle)

    def choose(self, groups: Groups, wanted: int) -> Choice:
        best, enough = self._spread(groups, wanted, self.share)
        steps = groups.layout.steps_apart
        if enough < steps:  # enough of both signs in all, but not for each step
            other, more = self._spread(groups, wanted, 0.5)
            best, enough = (other, more) if more > enough else (best, enough)
        chosen, order = best
        return Choice(chosen, enough / steps, order)

    def _spread(self, groups: Groups, wanted: int, share: float) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
        """
        Groups that hold at least a share of both signs, or as much as there is, with an order of them; and how many
        steps that fills.
        """
        size, steps = groups.layout.num_generations, groups.layout.steps_apart
        chosen, _ = select_balanced_groups(groups.positives, groups.negatives, wanted, size, share)
        counts = (groups.positives.cpu()[chosen], groups.negatives.cpu()[chosen])
        order, enough = balanced_order(torch.arange(wanted), *counts, steps, size, self.share)
        return (chosen, order), enough

    def arranged(self, order: torch.Tensor, groups: Groups, choice: Choice) -> torch.Tensor:
        size, steps = groups.layout.num_generations, groups.layout.steps_apart
        arranged, enough = balanced_order(order, groups.positives, groups.negatives, steps, size, self.share)
        return arranged if enough >= steps * choice.satisfied else choice.order


class RewardBalance(Method):
    """Chooses groups by the signs of their advantages, and spreads them over the optimizer steps."""

    Settings = Settings
    switch = "reward_balance"
    needs_whole_groups = True
    neutral = {"reward_balance": 0.01, "max_generation_rounds": 1, "steps_per_generation": 1, "num_iterations": 1}
    off = 0.0
    row = Row(
        "docs/balance.md",
        "reward-balanced batching",
        "each optimizer step holds enough good and enough bad rollouts; further rounds are generated where that takes it",
        "prompts that are too hard or too easy",
        "the rounds that it generates",
        "{reward-balanced}",
        CANCELLATION.id,
    )
    named = {
        "reward-balanced": Named(
            {"query_preserved": True, "reward_balance": 0.25}, "a quarter of either sign in each step", CANCELLATION.id
        )
    }
    logs = ("balance/",)
    acts_in_generation = True

    def check(self, args: Config) -> None:
        share = args.reward_balance
        if not (is_number(share) and 0 <= share <= 0.5):
            raise ValueError(f"reward_balance={share!r} must be between 0 and 0.5, e.g. 0.25.")
        if not share:
            return
        check_groups_are_local(f"{self.chosen(args)} chooses whole groups", args)
        rollouts = args.layout.rollouts_together
        if 2 * math.ceil(share * rollouts - 1e-9) > rollouts:
            raise ValueError(
                f"reward_balance={share} asks for {math.ceil(share * rollouts - 1e-9)} rollouts of either sign among "
                f"the {rollouts} of an optimizer step, which cannot be. Set reward_balance to "
                f"{rollouts // 2 / rollouts:.3g} or less."
            )
        if args.tears_groups:
            raise ValueError(f"reward_balance={share} needs whole groups in each optimizer step. {whole_groups(args)}")

    def active(self, args: Config) -> ActiveMethod:
        does = f"at least {args.reward_balance:.0%} of either sign of the advantage in each optimizer step"
        return ActiveMethod("Reward-balanced batching", does, ("reward-balanced",), (CANCELLATION,))

    def selector(self, args: Config) -> BothSigns:
        return BothSigns(args.reward_balance)
