r"""
Choosing a given number of items so that two sums are both high enough, exactly.

The items are groups of rollouts, the sums their rollouts of either sign. A group of G has one of at most (G+1)(G+2)/2
pairs of counts, so there are few kinds of items, each many times: what is searched for is how many of each kind.

For weights (a, b) of the two sums the best choice is known at once, the items of highest \\( a p + b n \\), and bounds
all others: where \\( \min_{a,b} \max (a P + b N - a T_p - b T_n) < 0 \\) there is no choice. That minimum is at an edge of
the hull of all choices, and its value there is how much a choice that meets the targets may lose against the best. So
only kinds within that loss of the margin have to be searched (a knapsack, with a table of counts by sums).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np


LOW = -(2**30)  # below every sum of counts


@dataclass(frozen=True)
class Pool:
    """
    Items of which some are to be chosen.

    Args:
        kinds (`np.ndarray` of shape `(K, 2)`):
            What an item of each kind adds to the two sums, whole numbers from 0 on.
        available (`np.ndarray` of shape `(K,)`):
            Items of each kind.
        number (`int`):
            Items to choose.
    """

    kinds: np.ndarray
    available: np.ndarray
    number: int

    def best(self, weights: tuple[int, int], tie: int) -> np.ndarray:
        """How many of each kind have the highest weighted sum; of equals, those with most of sum number `tie`."""
        order = np.lexsort((-self.kinds[:, tie], -(self.kinds @ weights)))
        before = np.cumsum(self.available[order]) - self.available[order]
        chosen = np.empty_like(self.available)
        chosen[order] = np.clip(self.number - before, 0, self.available[order])
        return chosen


@dataclass(frozen=True)
class Bound:
    """
    The weights of the two sums under which the best choice proves most.

    Args:
        weights (`tuple[int, int]`):
            The weights.
        slack (`int`):
            What a choice that meets the targets may lose against the best; below 0 there is none.
        ends (`tuple`):
            Two best choices: in one the first sum is further above its target, in the other the second.
    """

    weights: tuple[int, int]
    slack: int
    ends: tuple[list[np.ndarray], list[np.ndarray]]

    @property
    def height(self) -> int:
        """How far both sums can at most be above their targets."""
        return self.slack // sum(self.weights)


def bound(pools: Sequence[Pool], targets: tuple[int, int]) -> Bound:
    """
    The tightest bound on what pools can reach together.

    Args:
        pools (`Sequence[Pool]`):
            The pools.
        targets (`tuple[int, int]`):
            What the two sums should reach.
    """

    def best(weights: tuple[int, int], tie: int) -> tuple[list[np.ndarray], int, int]:
        chosen = [pool.best(weights, tie) for pool in pools]
        first, second = sums(pools, chosen)
        return chosen, first - targets[0], second - targets[1]

    left, right = best((1, 0), 1), best((0, 1), 0)  # most of the first sum, most of the second
    if left[1] <= left[2]:
        return Bound((1, 0), left[1], (left[0], left[0]))
    if right[2] <= right[1]:
        return Bound((0, 1), right[2], (right[0], right[0]))
    while True:  # the hull of all choices is walked to the edge where both sums are equally far above their targets
        a, b = right[2] - left[2], left[1] - right[1]
        a, b = a // gcd(a, b), b // gcd(a, b)
        slack = a * left[1] + b * left[2]
        between = best((a, b), 0)
        if a * between[1] + b * between[2] == slack:
            return Bound((a, b), slack, (left[0], right[0]))
        left, right = (between, right) if between[1] >= between[2] else (left, between)


def between(
    pools: Sequence[Pool], ends: tuple[list[np.ndarray], list[np.ndarray]], targets: tuple[int, int]
) -> list[np.ndarray] | None:
    """
    Goes from one best choice to another, item by item: all between are as good, and one may meet both targets, or do so
    after one more exchange.

    Args:
        pools (`Sequence[Pool]`):
            The pools.
        ends (`tuple`):
            Those of a [`Bound`].
        targets (`tuple[int, int]`):
            What the two sums should reach.

    Returns:
        `list[np.ndarray]`: For each pool how many of each kind; `None` if none was found, which proves nothing.
    """
    chosen = [counts.copy() for counts in ends[0]]
    reached = np.array(sums(pools, chosen))
    moves = [move for index, pool in enumerate(pools) for move in _moves(index, pool, *(end[index] for end in ends))]
    for index, gone, come in [(0, 0, 0), *moves]:
        kinds = pools[index].kinds
        chosen[index][gone] -= 1
        chosen[index][come] += 1
        reached = reached + kinds[come] - kinds[gone]
        if (reached >= targets).all() or _mended(pools, chosen, targets - reached):
            return chosen
    return None


def choose(pools: Sequence[Pool], targets: tuple[int, int]) -> list[np.ndarray] | None:
    """
    A choice whose sums reach both targets.

    Args:
        pools (`Sequence[Pool]`):
            One pool or two.
        targets (`tuple[int, int]`):
            What the two sums should reach.

    Returns:
        `list[np.ndarray]`: For each pool how many of each kind; `None` if there is no such choice.
    """
    reachable = _next_reachable(pools, targets)
    if reachable is None:
        return None
    limit = bound(pools, reachable)
    if limit.slack < 0:
        return None
    found = between(pools, limit.ends, reachable)
    for loss in sorted({0, limit.slack}):
        found = found or _searched(pools, limit, loss, reachable)
    return found


def exchanged(
    pools: Sequence[Pool], chosen: Sequence[np.ndarray], worth: np.ndarray, targets: tuple[int, int]
) -> None:
    """
    Exchanges items of a choice for others of their pool that are worth more, as long as both targets are met.

    Args:
        pools (`Sequence[Pool]`):
            The pools, of the same kinds.
        chosen (`Sequence[np.ndarray]`):
            How many of each kind; changed in place.
        worth (`np.ndarray` of shape `(K,)`):
            Worth of an item of each kind.
        targets (`tuple[int, int]`):
            What the two sums should reach.
    """
    kinds = pools[0].kinds
    gain = worth - worth[:, None]  # (gone, come)
    lost = kinds[:, None] - kinds  # (gone, come, 2)
    while True:
        spare = np.array(sums(pools, chosen)) - targets
        affordable = (gain > 0) & (lost <= spare).all(-1)
        steps = [
            np.where(affordable & (counts > 0)[:, None] & (counts < pool.available), gain, 0)
            for pool, counts in zip(pools, chosen, strict=True)
        ]
        index = max(range(len(steps)), key=lambda index: steps[index].max())
        if not steps[index].max():
            return
        gone, come = np.unravel_index(steps[index].argmax(), gain.shape)
        paid = lost[gone, come]
        limits = [chosen[index][gone], pools[index].available[come] - chosen[index][come]]
        limits += [left // price for left, price in zip(spare, paid, strict=True) if price > 0]
        times = int(min(limits))
        chosen[index][gone] -= times
        chosen[index][come] += times


def sums(pools: Sequence[Pool], chosen: Sequence[np.ndarray]) -> tuple[int, int]:
    """
    The two sums of a choice.

    Args:
        pools (`Sequence[Pool]`):
            The pools.
        chosen (`Sequence[np.ndarray]`):
            How many of each kind.
    """
    first, second = sum((counts @ pool.kinds for pool, counts in zip(pools, chosen, strict=True)), np.zeros(2, int))
    return int(first), int(second)


def _next_reachable(pools: Sequence[Pool], targets: tuple[int, int]) -> tuple[int, int] | None:
    """The targets, raised to what the counts' common divisors allow: sums of even counts are even."""
    raised = []
    for of_sum, target in enumerate(targets):
        least, step = 0, 0
        for pool in pools:
            if pool.number:
                counts = pool.kinds[:, of_sum]
                least += int(counts.min()) * pool.number
                step = gcd(step, *(counts - counts.min()).tolist())
        if target > least and not step:
            return None
        raised.append(least if target <= least else least + step * -(-(target - least) // step))
    return raised[0], raised[1]


def _mended(pools: Sequence[Pool], chosen: list[np.ndarray], lacking: np.ndarray) -> bool:
    """Makes the one exchange that brings what is lacking, if there is one."""
    for pool, counts in zip(pools, chosen, strict=True):
        if len(pool.kinds) and (lacking <= np.ptp(pool.kinds, axis=0)).all():
            brings = (pool.kinds - pool.kinds[:, None] >= lacking).all(-1)  # (gone, come)
            possible = np.argwhere(brings & (counts > 0)[:, None] & (counts < pool.available))
            if len(possible):
                gone, come = possible[0]
                counts[gone] -= 1
                counts[come] += 1
                return True
    return False


def _moves(index: int, pool: Pool, start: np.ndarray, end: np.ndarray) -> Iterator[tuple[int, int, int]]:
    gone = np.repeat(np.arange(len(start)), np.clip(start - end, 0, None))
    come = np.repeat(np.arange(len(start)), np.clip(end - start, 0, None))
    return ((index, int(out), int(into)) for out, into in zip(gone, come, strict=True))


def _searched(pools: Sequence[Pool], limit: Bound, loss: int, targets: tuple[int, int]) -> list[np.ndarray] | None:
    """Searches all choices that differ from a best one only in items within a loss of the margin."""
    fixed, cores, core_indices = [], [], []
    for pool, chosen in zip(pools, limit.ends[0], strict=True):
        values = pool.kinds @ limit.weights
        margin = values[chosen > 0].min() if pool.number else 0
        inside = (abs(values - margin) <= loss) & (0 < pool.number < pool.available.sum())
        fixed.append(np.where(inside, 0, chosen))
        core_indices.append(inside)
        cores.append(Pool(pool.kinds[inside], pool.available[inside], int(chosen[inside].sum())))
    held = sums(pools, fixed)
    needed = (targets[0] - held[0], targets[1] - held[1])
    rows = [_best_seconds(core) for core in cores]
    firsts = _firsts_that_do(rows, needed)
    if firsts is None:
        return None
    for counts, core, inside, first in zip(fixed, cores, core_indices, firsts, strict=True):
        if core.number:
            counts[inside] = _behind(core, first)
    return fixed


def _best_seconds(pool: Pool) -> np.ndarray:
    """For each first sum, the highest second sum of so many items."""
    if not pool.number:
        return np.zeros(1, dtype=np.int64)
    most = int(pool.best((1, 0), 1) @ pool.kinds[:, 0])
    return _table(pool.kinds, pool.available, pool.number, most + 1)[-1].astype(np.int64)


def _firsts_that_do(rows: Sequence[np.ndarray], needed: tuple[int, int]) -> list[int] | None:
    """First sums of the pools with which both sums together are enough."""
    if len(rows) == 1:
        enough = np.flatnonzero(rows[0][max(needed[0], 0) :] >= needed[1])
        return [max(needed[0], 0) + int(enough[0])] if len(enough) else None
    one, other = rows
    # Of all that have at least so much of the first sum, the one with most of the second.
    best = np.maximum.accumulate(other[::-1])[::-1]
    least = np.clip(needed[0] - np.arange(len(one)), 0, None)
    possible = np.flatnonzero(least < len(other))
    together = one[possible] + best[least[possible]]
    if not len(together) or together.max() < needed[1]:
        return None
    first = int(possible[np.argmax(together >= needed[1])])
    from_least = int(least[first])
    return [first, from_least + int(np.argmax(other[from_least:] == best[from_least]))]


def _table(kinds: np.ndarray, available: np.ndarray, number: int, width: int) -> np.ndarray:
    """For every number of items up to `number` and first sum below `width`, the highest second sum."""
    table = np.full((number + 1, width), LOW, dtype=np.int32)
    table[0, 0] = 0
    for (first, second), count in zip(kinds.tolist(), available.tolist(), strict=True):
        for items in _binary_parts(min(count, number)):
            shift = items * first
            if shift < width:
                with_them = table[:-items, : width - shift] + np.int32(items * second)
                np.maximum(table[items:, shift:], with_them, out=table[items:, shift:])
    return table


def _binary_parts(count: int) -> Iterator[int]:
    """Numbers whose subsets have all sums from 0 to `count`: 1, 2, 4, ... and the rest."""
    part = 1
    while count > 0:
        yield min(part, count)
        count -= part
        part *= 2


def _behind(pool: Pool, first: int) -> np.ndarray:
    """How many of each kind are behind an entry of the table: the kinds are halved, so that no table is kept."""
    if len(pool.kinds) == 1:
        return np.array([pool.number])
    half = len(pool.kinds) // 2
    parts = slice(None, half), slice(half, None)
    left, right = (_table(pool.kinds[part], pool.available[part], pool.number, first + 1) for part in parts)
    left += right[::-1, ::-1]
    number, of_first = divmod(int(left.argmax()), first + 1)
    del left, right
    halves = (number, of_first), (pool.number - number, first - of_first)
    return np.concatenate(
        [
            _behind(Pool(pool.kinds[part], pool.available[part], count), share)
            for part, (count, share) in zip(parts, halves, strict=True)
        ]
    )
