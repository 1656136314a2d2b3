r"""
Reward-balanced batching (section 4 of 2605.08666): an update must hold enough rollouts of either sign of the advantage
for their pushes to cancel, \\( \min(N_+, N_-) / |B| \ge \rho \\).

Choosing whole groups that meet the target is a knapsack with two constraints. It is solved exactly, as a search for the
fewest exchanges between the groups that came first and the others: leaving e groups out and taking e others in changes
both counts by sums over few groups, and of all sums that change one count alike only the best for the other matters.
"""

import math

import torch

from ..arguments import floats, shaped, single


IMPOSSIBLE = -(2**24)  # below every sum of counts


def select_balanced_groups(
    positives: torch.Tensor, negatives: torch.Tensor, num_groups: int, group_size: int, min_fraction: float
) -> tuple[torch.Tensor, bool]:
    r"""
    Chooses groups that hold enough rollouts of either sign together.

    The first groups are taken if they do. Otherwise as few as possible of them are exchanged for later ones, rather
    the one-sided than the mixed; if no choice meets the target, the one that comes nearest is taken.

    Args:
        positives (`torch.Tensor` of shape `(M,)`):
            Rollouts of positive advantage in each group, in the order in which the groups came.
        negatives (`torch.Tensor` of shape `(M,)`):
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
        `ValueError`: If there are too few groups, or counts do not fit into a group.

    Example:

    ```python
    >>> positives, negatives = torch.tensor([0, 4, 4, 2]), torch.tensor([4, 0, 0, 2])
    >>> select_balanced_groups(positives, negatives, num_groups=2, group_size=4, min_fraction=0.5)
    (tensor([0, 1]), True)
    >>> select_balanced_groups(positives[1:], negatives[1:], num_groups=2, group_size=4, min_fraction=0.25)
    (tensor([0, 2]), True)
    ```
    """
    counts = torch.stack([positives, negatives]).long().cpu()  # (2, M)
    if counts.size(1) < num_groups:
        raise ValueError(f"num_groups={num_groups} cannot be chosen among {counts.size(1)} groups.")
    if (counts < 0).any() or (counts.sum(0) > group_size).any():
        raise ValueError(f"Counts of positives and negatives must fit into groups of group_size={group_size}.")
    target = math.ceil(min_fraction * num_groups * group_size - 1e-9)
    search = _Exchanges(counts, num_groups)
    chosen = search.reaching(target)
    if chosen is not None:
        return chosen, True
    reachable, beyond = 0, target
    while beyond - reachable > 1:
        middle = (reachable + beyond) // 2
        reachable, beyond = (reachable, middle) if search.reaching(middle) is None else (middle, beyond)
    nearest = search.reaching(reachable)
    assert nearest is not None, "every choice has no fewer than 0"
    return nearest, False


def balanced_order(
    order: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    num_steps: int,
    group_size: int,
    min_fraction: float,
) -> tuple[torch.Tensor, int]:
    r"""
    Spreads groups over optimizer steps so that each holds enough rollouts of either sign.

    The given order is kept if it does. Otherwise the groups are dealt out, those with most rollouts of nonzero
    advantage first, each to the step in which it meets fewest of its own kind: the one that raises
    \\( \sum N_+^2 + N_-^2 \\) over the steps least. Then groups change places while
    that brings steps nearer to the target. This finds most of what there is to be found, not all.

    Args:
        order (`torch.Tensor` of shape `(M,)`):
            Groups in the order in which they fill the steps.
        positives (`torch.Tensor` of shape `(M,)`):
            Rollouts of positive advantage in each group.
        negatives (`torch.Tensor` of shape `(M,)`):
            Rollouts of negative advantage in each group.
        num_steps (`int`):
            Optimizer steps, each of M / `num_steps` groups.
        group_size (`int`):
            Rollouts of each group.
        min_fraction (`float`):
            Least share of the rollouts of a step that each sign must have.

    Returns:
        `tuple`: The order, a `torch.Tensor` of shape `(M,)`, and in how many steps it leaves both signs enough.
    """
    counts = torch.stack([positives, negatives], dim=1).long().cpu()  # (M, 2)
    room = len(order) // num_steps
    target = math.ceil(min_fraction * room * group_size - 1e-9)

    def enough(order: torch.Tensor) -> int:
        return int((counts[order].view(num_steps, room, 2).sum(1).amin(1) >= target).sum())

    given = enough(order)
    if given == num_steps:
        return order, given
    steps: list[list[int]] = [[] for _ in range(num_steps)]
    sums = torch.zeros(num_steps, 2, dtype=torch.long)
    heaviest = order[counts[order].square().sum(1).argsort(descending=True, stable=True)]
    for group in heaviest.tolist():
        raised = (sums @ counts[group]).tolist()
        step = min((step for step in range(num_steps) if len(steps[step]) < room), key=lambda step: raised[step])
        steps[step].append(group)
        sums[step] += counts[group]
    dealt = _swapped(torch.tensor(steps), counts, target).flatten()
    found = enough(dealt)
    return (dealt, found) if found > given else (order, given)


def _swapped(steps: torch.Tensor, counts: torch.Tensor, target: int) -> torch.Tensor:
    """
    Groups change places, two at a time, as long as that lowers what the steps lack of the target.

    Args:
        steps (`torch.Tensor` of shape `(S, R)`):
            Groups of each step.
        counts (`torch.Tensor` of shape `(M, 2)`):
            Rollouts of either sign in each group.
        target (`int`):
            What each step should have of either sign.
    """
    steps = steps.clone()
    step_of = torch.arange(len(steps)).repeat_interleave(steps.size(1))  # of each place
    while True:
        held = counts[steps.flatten()]  # (places, 2)
        sums = held.view(*steps.shape, 2).sum(1)
        lacking = (target - sums).clamp(min=0).sum(1)[step_of]
        swapped = sums[step_of].unsqueeze(1) - held.unsqueeze(1) + held.unsqueeze(0)  # the step of the first place
        after = (target - swapped).clamp(min=0).sum(-1)
        change = after + after.T - lacking.unsqueeze(1) - lacking.unsqueeze(0)
        change[step_of.unsqueeze(1) == step_of.unsqueeze(0)] = 0
        best = int(change.argmin())
        if change.flatten()[best] >= 0:
            return steps
        one, other = divmod(best, len(step_of))
        places = steps.view(-1)
        places[one], places[other] = places[other].item(), places[one].item()


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


class _Exchanges:
    """
    The exchanges between the first `num_groups` groups and the others, those most worth it first.

    Args:
        counts (`torch.Tensor` of shape `(2, M)`):
            Rollouts of either sign in each group.
        num_groups (`int`):
            Groups that are chosen.
    """

    def __init__(self, counts: torch.Tensor, num_groups: int):
        self.num_groups, self.counts = num_groups, counts
        self.sums = counts[:, :num_groups].sum(1)
        one_sided = (counts[0] - counts[1]).abs() + 2 * (counts.sum(0) == 0)  # none of either is worth least of all
        self.out = one_sided[:num_groups].argsort(descending=True, stable=True)
        self.into = num_groups + one_sided[num_groups:].argsort(stable=True)
        self.most = 0
        self._tables: list[_Sums] = []

    def reaching(self, target: int) -> torch.Tensor | None:
        """The choice of fewest exchanges with `target` rollouts of either sign, if there is any."""
        if self.sums.min() >= target:
            return torch.arange(self.num_groups)
        limit = min(len(self.out), len(self.into))
        for exchanges in range(1, limit + 1):
            if exchanges > self.most:
                self.most = min(limit, 2 * self.most + 1)
                # What goes out takes its rollouts with it, so there the fewest are best.
                self._tables = [
                    _Sums(self.counts[0, self.out], -self.counts[1, self.out], self.most),
                    _Sums(self.counts[0, self.into], self.counts[1, self.into], self.most),
                ]
            chosen = self._with(exchanges, target)
            if chosen is not None:
                return chosen
        return None

    def _with(self, exchanges: int, target: int) -> torch.Tensor | None:
        out, into = self._tables
        lost, gained = out.best[exchanges], into.best[exchanges]  # by the number of positives that go, or come
        # Of all that bring at least so many positives, the one that brings most negatives.
        most_gained, reached = gained.flip(0).cummax(0)
        most_gained, reached = most_gained.flip(0), len(gained) - 1 - reached.flip(0)
        positives = torch.arange(len(lost))
        needed = (target - self.sums[0] + positives).clamp(min=0)
        possible = needed < len(gained)
        enough = torch.full_like(lost, IMPOSSIBLE)
        enough[possible] = self.sums[1] + lost[possible] + most_gained[needed[possible]]
        if enough.max() < target:
            return None
        gone = int((enough >= target).nonzero()[0])
        kept = torch.ones(self.num_groups, dtype=torch.bool)
        kept[self.out[out.items(exchanges, gone)]] = False
        come = self.into[into.items(exchanges, int(reached[needed[gone]]))]
        return torch.cat([kept.nonzero().squeeze(1), come.sort().values])


class _Sums:
    """
    For every number of items and sum of their weights, the highest sum of their values: `best[number, weight]`.

    Args:
        weights (`torch.Tensor` of shape `(M,)`):
            Weights, whole numbers from 0 on.
        values (`torch.Tensor` of shape `(M,)`):
            Values.
        most (`int`):
            Highest number of items.
    """

    def __init__(self, weights: torch.Tensor, values: torch.Tensor, most: int):
        self.weights = weights.tolist()
        width = 1 + int(weights.sort(descending=True).values[:most].sum())
        self.best = torch.full((most + 1, width), IMPOSSIBLE, dtype=torch.int32)
        self.best[0, 0] = 0
        self.taken = []
        for weight, value in zip(self.weights, values.tolist(), strict=True):
            with_it = torch.full_like(self.best, IMPOSSIBLE)
            with_it[1:, weight:] = self.best[:-1, : width - weight] + value
            self.taken.append(with_it > self.best)  # of equals, those of the first items
            self.best = torch.maximum(self.best, with_it)

    def items(self, number: int, weight: int) -> list[int]:
        """The items behind an entry."""
        found = []
        for item in reversed(range(len(self.weights))):
            if self.taken[item][number, weight]:
                found.append(item)
                number, weight = number - 1, weight - self.weights[item]
        return found
