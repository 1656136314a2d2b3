"""
Spreading groups over optimizer steps so that as many steps as possible hold enough rollouts of either sign.

No more steps can be filled than the groups hold enough for when they are taken together and could be divided (the
bound of `choosing.py`). From there downwards, groups that come near are dealt out, and change places while that lowers
what the steps lack. Where this falls short of the bound, all ways to fill the steps are searched, as far as `CONTENTS`
and `BRANCHES` go.
"""

from collections.abc import Iterator
from itertools import islice
from math import comb

import numpy as np

from .choosing import Pool, between, bound


CONTENTS = 2_000  # different contents of a step that are looked at
BRANCHES = 5_000  # branches of the search: more than 12 groups need, and a tenth of a second


def fill_steps(counts: np.ndarray, num_steps: int, target: int) -> list[list[int]]:
    """
    The groups of as many steps as can be filled.

    Args:
        counts (`np.ndarray` of shape `(M, 2)`):
            Rollouts of either sign in each group, in the order in which groups of equal counts are used.
        num_steps (`int`):
            Steps, each of M / `num_steps` groups.
        target (`int`):
            What a step should have of either sign.

    Returns:
        `list[list[int]]`: Numbers of groups, for each step that is filled.
    """
    # Of what one group has more than a step needs, no other step has anything.
    kinds, kind_of, available = np.unique(np.minimum(counts, target), axis=0, return_inverse=True, return_counts=True)
    room = len(counts) // num_steps
    found, most = np.zeros((0, len(kinds)), dtype=np.int64), 0
    for number in range(num_steps, 0, -1):
        if number <= len(found):
            break
        pools, targets = [Pool(kinds, available, number * room)], (number * target, number * target)
        limit = bound(pools, targets)
        if limit.slack >= 0:
            most = most or number
            chosen = between(pools, limit.ends, targets) or limit.ends[0]
            filled = _dealt_and_swapped(kinds, available, chosen[0], number, room, target)
            found = filled if len(filled) > len(found) else found
    if len(found) < most:
        searched = _Search(kinds, room, target).filling(available, len(found) + 1, most)
        found = found if searched is None else searched
    members = [list(np.flatnonzero(kind_of.reshape(-1) == kind)[::-1]) for kind in range(len(kinds))]
    return [[int(members[kind].pop()) for kind in np.repeat(np.arange(len(kinds)), step)] for step in found]


def _dealt_and_swapped(
    kinds: np.ndarray, available: np.ndarray, chosen: np.ndarray, number: int, room: int, target: int
) -> np.ndarray:
    """
    Deals groups out, heaviest first, each to the step in which it meets fewest of its own kind: the one that raises
    the sum of squared counts over the steps least. Then groups change places, also with those that are left over.

    Args:
        kinds (`np.ndarray` of shape `(K, 2)`):
            Rollouts of either sign in a group of each kind.
        available (`np.ndarray` of shape `(K,)`):
            Groups of each kind.
        chosen (`np.ndarray` of shape `(K,)`):
            Those that are dealt out.
        number (`int`):
            Steps.
        room (`int`):
            Groups of a step.
        target (`int`):
            What a step should have of either sign.

    Returns:
        `np.ndarray` of shape `(S, K)`: How many groups of each kind are in each step that is filled.
    """
    steps = np.zeros((number + 1, len(kinds)), dtype=np.int64)  # the last holds what is left over
    steps[-1] = available - chosen
    for kind in np.repeat(np.arange(len(kinds)), chosen)[::-1][_heaviest_first(kinds, chosen)]:
        raised = np.where(steps[:-1].sum(1) < room, steps[:-1] @ kinds @ kinds[kind], np.iinfo(np.int64).max)
        steps[np.argmin(raised), kind] += 1
    wanted = np.full((number + 1, 1), target)
    wanted[-1] = 0
    while _swap(steps, kinds, wanted):
        pass
    return steps[:-1][(steps[:-1] @ kinds >= target).all(1)]


def _heaviest_first(kinds: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    weights = np.repeat((kinds**2).sum(1), chosen)[::-1]
    return np.argsort(-weights, kind="stable")


def _swap(steps: np.ndarray, kinds: np.ndarray, wanted: np.ndarray) -> bool:
    """Swaps two groups so that the steps lack less, the best pair of the first step that can be helped."""
    sums = steps @ kinds
    lacks = np.clip(wanted - sums, 0, None).sum(1)
    for step in np.argsort(-lacks, kind="stable"):
        if not lacks[step]:
            return False
        own = np.flatnonzero(steps[step])
        change = kinds[None, :] - kinds[own][:, None]  # (own, K, 2), of this step
        here = np.clip(wanted[step] - sums[step] - change, 0, None).sum(-1)
        there = np.clip(wanted[:, None, None] - sums[:, None, None] + change, 0, None).sum(-1)  # (steps, own, K)
        after = here + there - lacks[step] - lacks[:, None, None]
        after[np.broadcast_to((steps == 0)[:, None], after.shape)] = 0
        after[step] = 0
        other, gone, come = np.unravel_index(after.argmin(), after.shape)
        if after[other, gone, come] < 0:
            for index, kind, sign in (
                (step, own[gone], -1),
                (step, come, 1),
                (other, own[gone], 1),
                (other, come, -1),
            ):
                steps[index, kind] += sign
            return True
    return False


class _Search:
    """
    All ways to fill steps.

    Args:
        kinds (`np.ndarray` of shape `(K, 2)`):
            Rollouts of either sign in a group of each kind.
        room (`int`):
            Groups of a step.
        target (`int`):
            What a step should have of either sign.
    """

    def __init__(self, kinds: np.ndarray, room: int, target: int):
        self.kinds, self.room, self.target = kinds, room, target
        self.branches = 0
        self.hopeless: set[tuple[int, bytes]] = set()

    def filling(self, available: np.ndarray, least: int, most: int) -> np.ndarray | None:
        """
        The contents of as many steps as can be filled, `None` if that are fewer than `least` or the search is too
        large.

        Args:
            available (`np.ndarray` of shape `(K,)`):
                Groups of each kind.
            least, most (`int`):
                Numbers of steps to look for.
        """
        contents = self._contents(available)
        if contents is None:
            return None
        for number in range(most, least - 1, -1):
            found = self._filled(available, number, contents)
            if found is not None:
                return np.array(found)
        return None

    def _contents(self, available: np.ndarray) -> np.ndarray | None:
        """All contents of a step that hold enough, `None` if there are too many to look at."""
        if comb(len(self.kinds), self.room) > CONTENTS:  # of different kinds alone
            return None
        looked_at = list(islice(self._choices(available.tolist(), self.room), CONTENTS + 1))
        if len(looked_at) > CONTENTS:
            return None
        contents = np.array(looked_at)
        return contents[(contents @ self.kinds >= self.target).all(1)]

    def _choices(self, available: list[int], number: int) -> Iterator[list[int]]:
        if not available:
            if not number:
                yield []
            return
        first, *others = available
        for count in range(max(0, number - sum(others)), min(first, number) + 1):
            yield from ([count, *rest] for rest in self._choices(others, number - count))

    def _filled(self, available: np.ndarray, number: int, contents: np.ndarray) -> list[np.ndarray] | None:
        """Contents of `number` steps: the first kind that is left goes into one of them, or all of it is left over."""
        if not number:
            return []
        self.branches += 1
        key = (number, available.tobytes())
        enough = available.sum() >= number * self.room and (available @ self.kinds >= number * self.target).all()
        if not enough or key in self.hopeless or self.branches > BRANCHES:
            return None
        kind = int(np.argmax(available > 0))
        fitting = contents[(contents <= available).all(1)]
        for content in fitting[fitting[:, kind] > 0]:
            if self.branches > BRANCHES:
                return None
            found = self._filled(available - content, number - 1, fitting)
            if found is not None:
                return [content, *found]
        without = available.copy()
        without[kind] = 0
        found = self._filled(without, number, fitting)
        if found is None:
            self.hopeless.add(key)
        return found
