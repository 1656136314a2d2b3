"""Selection of balanced groups: against all choices there are."""

from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given
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


def test_first_groups_are_taken_if_they_do():
    positives = torch.tensor([2, 3, 1, 4, 4])
    indices, satisfied = select_balanced_groups(positives, 8 - positives, 3, 8, 0.25)
    assert (indices.tolist(), satisfied) == ([0, 1, 2], True)


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


def test_too_few_groups_and_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_groups=3 cannot be chosen among 2 groups"):
        select_balanced_groups(torch.tensor([1, 1]), torch.tensor([1, 1]), 3, 4, 0.25)
    with pytest.raises(ValueError, match="must fit into groups of group_size=4"):
        select_balanced_groups(torch.tensor([3, 1]), torch.tensor([2, 1]), 1, 4, 0.25)


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


def best_order(groups, number, size, fraction):
    return max(
        permutations(range(len(groups))), key=lambda order: steps_with_enough(groups, order, number, size, fraction)
    )


def test_order_balances_what_can_be():
    """Four wrong groups and four right ones, in the worst order; and mixed groups among idle ones."""
    positives = torch.tensor([8, 8, 8, 8, 0, 0, 0, 0])
    order, enough = balanced_order(torch.arange(8), positives, 8 - positives, 4, 8, 0.5)
    assert enough == 4
    # Dealing alone leaves a step short here.
    stubborn = torch.tensor([(2, 6), (0, 0), (2, 6), (0, 8), (2, 6), (7, 1)])
    _, enough = balanced_order(torch.arange(6), *stubborn.unbind(1), 2, 8, 0.25)
    assert enough == steps_with_enough(stubborn.tolist(), best_order(stubborn.tolist(), 2, 8, 0.25), 2, 8, 0.25)
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
