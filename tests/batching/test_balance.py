"""Selection of balanced groups: against all choices there are."""

import math
import tracemalloc
from collections import deque
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_cancel.batching import balanced_order, select_balanced_groups, without_variance


@st.composite
def pools(draw):
    """Groups of some rollouts with counts of either sign, and how many to choose."""
    size = draw(st.integers(2, 6))
    groups = draw(
        st.lists(
            st.tuples(st.integers(0, size), st.integers(0, size)).filter(lambda g: sum(g) <= size),
            min_size=1,
            max_size=8,
        )
    )
    return size, groups, draw(st.integers(1, len(groups)))


def least(groups, chosen):
    return min(sum(groups[i][sign] for i in chosen) for sign in (0, 1))


@given(pool=pools(), fraction=st.sampled_from([0.0, 0.1, 0.25, 0.3, 1 / 3, 0.5]))
def test_all_choices(pool, fraction):
    size, groups, number = pool
    positives, negatives = torch.tensor(groups).unbind(1)
    indices, satisfied = select_balanced_groups(positives, negatives, number, size, fraction)
    found = indices.tolist()
    assert found == sorted(set(found))
    assert len(found) == number

    choices = list(combinations(range(len(groups)), number))
    meeting = [chosen for chosen in choices if least(groups, chosen) >= fraction * number * size - 1e-9]
    assert satisfied is bool(meeting)
    if meeting:
        assert tuple(found) in meeting
        later = min(sum(i >= number for i in chosen) for chosen in meeting)
        assert sum(i >= number for i in found) == later, "as few exchanges as possible"
    else:
        assert least(groups, found) == max(least(groups, chosen) for chosen in choices)


@pytest.mark.parametrize(
    ("groups", "number", "size", "fraction"),
    [
        ([(0, 12), (4, 4), (4, 4), (4, 4), (0, 12), (5, 1), (5, 1), (0, 12), (4, 4), (4, 4), (5, 1)], 6, 12, 0.35),
        ([(3, 7), (0, 9), (3, 7), (7, 1), (9, 0), (7, 1), (7, 1), (7, 1), (3, 7)], 6, 12, 0.35),
        ([(10, 2), (1, 9), (1, 9), (8, 4), *[(8, 3)] * 4, (10, 2), (8, 4), (2, 3)], 4, 12, 0.45),
        ([(7, 1), (8, 0), (1, 4), (0, 6), (0, 6), (7, 1)], 3, 8, 0.4),
    ],
)
def test_choices_that_no_single_exchange_finds(groups, number, size, fraction):
    """Where only the search of all counts finds what divisible groups would promise."""
    indices, satisfied = select_balanced_groups(*torch.tensor(groups).unbind(1), number, size, fraction)
    choices = list(combinations(range(len(groups)), number))
    best = max(least(groups, chosen) for chosen in choices)
    goal = min(best, math.ceil(fraction * number * size - 1e-9))
    assert satisfied == (best >= fraction * number * size - 1e-9)
    assert least(groups, indices.tolist()) >= goal
    fewest = min(sum(i >= number for i in chosen) for chosen in choices if least(groups, chosen) >= goal)
    assert int((indices >= number).sum()) == fewest


def test_first_groups_are_taken_if_they_do():
    positives = torch.tensor([2, 3, 1, 4, 4])
    indices, satisfied = select_balanced_groups(positives, 8 - positives, 3, 8, 0.25)
    assert (indices.tolist(), satisfied) == ([0, 1, 2], True)


@given(pool=pools(), fraction=st.sampled_from([0.25, 0.3, 1 / 3, 0.5]))
def test_no_one_sided_group_stays_where_a_mixed_one_would_do(pool, fraction):
    size, groups, number = pool
    positives, negatives = torch.tensor(groups).unbind(1)
    indices, satisfied = select_balanced_groups(positives, negatives, number, size, fraction)
    chosen = indices.tolist()
    if not satisfied or chosen == list(range(number)):
        return
    for gone in chosen:
        for come in set(range(len(groups))) - {*chosen}:
            if (gone < number) == (come < number) and min(groups[come]) > min(groups[gone]):
                other = [come if index == gone else index for index in chosen]
                assert least(groups, other) < fraction * number * size - 1e-9


def test_the_one_sided_go_first():
    positives, negatives = torch.tensor([2, 0, 1, 0, 4, 4]), torch.tensor([6, 8, 7, 0, 4, 4])
    indices, satisfied = select_balanced_groups(positives, negatives, 4, 8, 0.2)
    assert (indices.tolist(), satisfied) == ([0, 1, 2, 4], True), (
        "the group without any sign goes before the wrong one"
    )


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_many_groups(share):
    """Mostly hopeless, or mostly solved: as large as it gets in practice."""
    generator = torch.Generator().manual_seed(0)
    positives = torch.where(torch.rand(512, generator=generator) < 0.1, 4, 0)
    positives, negatives = (positives, 8 - positives) if share == 0.1 else (8 - positives, positives)
    indices, satisfied = select_balanced_groups(positives, negatives, 128, 8, 0.1)
    assert satisfied
    assert min(positives[indices].sum(), negatives[indices].sum()) >= 0.1 * 128 * 8
    _, satisfied = select_balanced_groups(positives, negatives, 128, 8, 0.25)
    assert not satisfied


@pytest.mark.parametrize("of", ["one-sided", "even", "any", "idle and one-sided"])
@pytest.mark.parametrize("fraction", [0.25, 0.4, 0.5])
def test_memory_of_many_groups_and_targets_out_of_reach(of, fraction):
    """Four rounds of 512 groups of 16: 4 GB with a table for each group."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(2048, generator=generator)
    positives = torch.binomial(torch.full((2048,), 16.0), shares, generator=generator).long()
    if of == "even":
        positives = positives // 2 * 2
    positives = torch.where(shares < 0.9, 0, positives) if "one-sided" in of else positives
    negatives = 16 - positives
    if of in ("any", "idle and one-sided"):
        negatives = (negatives * torch.rand(2048, generator=generator)).long()
    tracemalloc.start()
    indices, satisfied = select_balanced_groups(positives, negatives, 512, 16, fraction)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    reached = min(positives[indices].sum(), negatives[indices].sum())
    assert satisfied == (reached >= fraction * 512 * 16)
    if not satisfied:  # for no weights of the two signs is there a choice that holds more
        weights = torch.linspace(0, 1, 1001).unsqueeze(1)
        best = (weights * positives + (1 - weights) * negatives).topk(512).values.sum(1)
        assert reached > best.min() - 2


def test_sums_that_common_divisors_forbid():
    """Divisible groups would do: 3 of 5 rollouts of either sign in each of 7 groups."""
    positives = torch.tensor([0, 5] * 20)
    _, satisfied = select_balanced_groups(positives, 5 - positives, 7, 5, 0.5)
    assert not satisfied
    indices, satisfied = select_balanced_groups(positives, 5 - positives, 7, 5, 0.4)
    assert satisfied
    assert positives[indices].sum() in (15, 20)


def test_too_few_groups_and_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_groups=3 cannot be chosen among 2 groups"):
        select_balanced_groups(torch.tensor([1, 1]), torch.tensor([1, 1]), 3, 4, 0.25)
    with pytest.raises(ValueError, match="must fit into groups of group_size=4"):
        select_balanced_groups(torch.tensor([3, 1]), torch.tensor([2, 1]), 1, 4, 0.25)


ONES = torch.ones(4, dtype=torch.long)
REFUSED = {
    "negative": ({"positives": -ONES}, "must fit into groups"),
    "too many": ({"negatives": 4 * ONES}, "must fit into groups of group_size=4"),
    "floats": ({"positives": ONES.float()}, r"positives \(torch.float32 of shape \(4,\)\): must be"),
    "a list of floats": ({"negatives": [1, 1.5, 1, 1]}, r"negatives \(\[1, 1.5, 1, 1\]\): must be a tensor or a seq"),
    "rows of a list": ({"negatives": [[1, 1], [1]]}, "one whole number for each group"),
    "text": ({"negatives": "1111"}, "one whole number for each group"),
    "bfloat16": ({"negatives": ONES.bfloat16()}, r"negatives \(torch.bfloat16 of shape"),
    "nothing": ({"negatives": None}, "one whole number for each group"),
    "huge": ({"negatives": [1, 1, 1, 2**70]}, "one whole number for each group"),
    "two dimensions": ({"negatives": ONES.view(2, 2)}, "one whole number for each group"),
    "lengths": ({"negatives": ONES[:3]}, "positives are of 4 groups and negatives of 3"),
    "nan": ({"min_fraction": math.nan}, "min_fraction=nan: must be a number between 0 and 1"),
    "fraction": ({"min_fraction": -0.1}, "min_fraction=-0.1"),
    "group size": ({"group_size": 4.0}, "group_size=4.0: must be a whole number"),
}
REFUSED_NUMBERS = {
    "no groups": (select_balanced_groups, {"num_groups": 0}, "num_groups=0: must be a whole number of at least 1"),
    "half a group": (select_balanced_groups, {"num_groups": 1.5}, "num_groups=1.5"),
    "uneven steps": (balanced_order, {"num_steps": 3}, "4 groups cannot be dealt to num_steps=3 steps"),
    "no steps": (balanced_order, {"num_steps": 0}, "num_steps=0"),
    "float steps": (balanced_order, {"num_steps": 2.0}, "num_steps=2.0"),
    "twice in the order": (balanced_order, {"order": torch.tensor([0, 1, 2, 2])}, "each of the 4 groups once"),
    "short order": (balanced_order, {"order": torch.arange(2)}, "each of the 4 groups once"),
    "order of floats": (balanced_order, {"order": torch.arange(4.0)}, "order"),
}
REFUSALS = [
    *((function, *case) for case in REFUSED.values() for function in (select_balanced_groups, balanced_order)),
    *REFUSED_NUMBERS.values(),
]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda of: np.array(of, np.uint8), deque])
def test_any_sequence_of_whole_numbers_will_do(kind):
    positives, negatives = kind([0, 4, 4, 2]), kind([4, 0, 0, 2])
    groups, satisfied = select_balanced_groups(positives, negatives, np.int64(2), 4, np.float32(0.5))
    assert (groups.tolist(), satisfied) == ([0, 1], True)
    order, enough = balanced_order(kind([1, 2, 0, 3]), positives, negatives, 2, 4, 0.25)
    assert (sorted(order.tolist()), enough) == ([0, 1, 2, 3], 2)


@pytest.mark.parametrize(("function", "wrong", "message"), REFUSALS)
def test_what_makes_no_sense_is_refused(function, wrong, message):
    own = {"num_groups": 2} if function is select_balanced_groups else {"order": torch.arange(4), "num_steps": 2}
    given = {"positives": ONES, "negatives": ONES, "group_size": 4, "min_fraction": 0.25, **own}
    with pytest.raises(ValueError, match=message):
        function(**{**given, **wrong})


def steps_with_enough(groups, order, number, size, fraction):
    room = len(order) // number
    steps = [order[first : first + room] for first in range(0, len(order), room)]
    return sum(least(groups, step) >= fraction * room * size - 1e-9 for step in steps)


@given(
    pool=pools(),
    number=st.integers(1, 4),
    fraction=st.sampled_from([0.0, 0.1, 0.25, 0.5]),
    seed=st.integers(0, 100),
)
def test_order_spreads_groups_over_steps(pool, number, fraction, seed):
    size, groups, room = pool
    groups = [groups[i % len(groups)] for i in range(number * room)]
    positives, negatives = torch.tensor(groups).unbind(1)
    given_order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    order, enough = balanced_order(given_order, positives, negatives, number, size, fraction)
    assert sorted(order.tolist()) == list(range(len(groups)))
    before = steps_with_enough(groups, given_order.tolist(), number, size, fraction)
    assert enough == steps_with_enough(groups, order.tolist(), number, size, fraction) >= before
    if before == number:
        assert torch.equal(order, given_order), "what will do is kept"


def most_steps(groups, number, size, fraction):
    """The most steps that hold enough, over all ways to spread the groups."""
    room = len(groups) // number
    target = fraction * room * size - 1e-9
    enough = [set(step) for step in combinations(range(len(groups)), room) if least(groups, step) >= target]

    @cache
    def most(left):
        return max((1 + most(left - step) for step in map(frozenset, enough) if step <= left), default=0)

    return most(frozenset(range(len(groups))))


@st.composite
def scarce_pools(draw):
    """Up to 8 groups in 2 to 4 steps, many of them of one sign, so that seldom all steps can hold enough."""
    size, number = draw(st.integers(2, 8)), draw(st.integers(2, 4))
    mixed = st.integers(0, size).map(lambda right: (right, size - right))
    group = st.one_of(mixed, mixed, st.sampled_from([(0, size), (size, 0), (0, 0), (1, 0), (1, 1)]))
    count = number * draw(st.integers(1, 8 // number))
    return size, number, draw(st.lists(group, min_size=count, max_size=count))


@settings(max_examples=400, deadline=None)
@given(pool=scarce_pools(), fraction=st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.4, 0.5]))
def test_order_fills_as_many_steps_as_possible(pool, fraction):
    size, number, groups = pool
    order, enough = balanced_order(torch.arange(len(groups)), *torch.tensor(groups).unbind(1), number, size, fraction)
    assert sorted(order.tolist()) == list(range(len(groups)))
    assert enough == steps_with_enough(groups, order.tolist(), number, size, fraction)
    assert enough == most_steps(groups, number, size, fraction)


@pytest.mark.parametrize("kind", ["one-sided", "mixed", "with idle groups"])
@pytest.mark.parametrize("fraction", [0.2, 0.3])
def test_order_of_many_groups(kind, fraction):
    """Near to what the groups hold enough for, taken together."""
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(512, generator=generator) ** 2
    positives = torch.binomial(torch.full((512,), 16.0), shares, generator=generator).long()
    positives = torch.where(shares < 0.3, 0, 16) if kind == "one-sided" else positives
    negatives = 16 - positives
    if kind == "with idle groups":
        negatives = (negatives * torch.rand(512, generator=generator)).long()
    order, enough = balanced_order(torch.arange(512), positives, negatives, 64, 16, fraction)
    target = math.ceil(fraction * 8 * 16 - 1e-9)
    held = torch.stack([positives, negatives], 1)[order].view(64, 8, 2).sum(1).amin(1)
    assert enough == (held >= target).sum()
    assert enough >= min(64, int(min(positives.sum(), negatives.sum())) // target) - 2


def test_order_balances_what_can_be():
    """Four wrong groups and four right ones, in the worst order; and mixed groups among idle ones."""
    positives = torch.tensor([8, 8, 8, 8, 0, 0, 0, 0])
    order, enough = balanced_order(torch.arange(8), positives, 8 - positives, 4, 8, 0.5)
    assert enough == 4
    # Dealing alone leaves a step short here.
    stubborn = torch.tensor([(2, 6), (0, 0), (2, 6), (0, 8), (2, 6), (7, 1)])
    _, enough = balanced_order(torch.arange(6), *stubborn.unbind(1), 2, 8, 0.25)
    assert enough == most_steps(stubborn.tolist(), 2, 8, 0.25)
    mixed = torch.tensor([4, 4, 4, 4, 0, 0, 0, 0])
    order, enough = balanced_order(torch.arange(8), mixed, mixed, 4, 8, 0.25)
    assert enough == 4
    assert (mixed[order].view(4, 2).sum(1) == 4).all()


@given(
    rewards=st.lists(
        st.lists(st.lists(st.sampled_from([None, 0.0, 0.1, 1.0]), min_size=2, max_size=2), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
    apart=st.booleans(),
)
def test_groups_without_variance(rewards, apart):
    """Against TRL's reading: what no function has scored does not count, nor does a function that gave nothing."""
    weights = [1.0, 0.5]

    def total(rollout):
        known = [value * weight for value, weight in zip(rollout, weights, strict=True) if value is not None]
        return sum(known) if known else None

    expected = []
    for group in rewards:
        columns = zip(*group, strict=True) if apart else [[total(rollout) for rollout in group]]
        expected.append(all(len({value for value in column if value is not None}) <= 1 for column in columns))
    tensor = torch.tensor([[[float("nan") if v is None else v for v in r] for r in g] for g in rewards]).double()
    assert without_variance(tensor, torch.tensor(weights).double(), apart).tolist() == expected


def test_functions_of_weight_zero_make_no_variance():
    rewards = torch.tensor([[[1.0, 0.0], [1.0, 5.0]]])
    for apart in (False, True):
        assert without_variance(rewards, torch.tensor([1.0, 0.0]), apart).tolist() == [True]
