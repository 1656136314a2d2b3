"""Selection of balanced groups: against all choices there are."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_cancel.batching import select_balanced_groups


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
