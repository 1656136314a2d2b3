"""The cancellation residual against a loop over contexts, and what it is zero for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import references
from trl_cancel.diagnostics import shared_contexts, shared_prefix_residual
from trl_cancel.diagnostics.residual import prefix_ids


def random_batch(seed, rows=12, length=7, group=4, vocabulary=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    lengths = torch.randint(length + 1, (rows,), generator=generator)
    present = (torch.arange(length) < lengths.unsqueeze(1)).long()
    groups = torch.arange(rows) // group
    advantages = torch.randn(rows, dtype=torch.float64, generator=generator)
    advantages[torch.rand(rows, generator=generator) < 0.2] = 0
    return ids, present, groups, advantages, generator


@given(seed=st.integers(0, 10**6), vocabulary=st.integers(1, 3))
@settings(max_examples=60)
def test_contexts_are_prefixes(seed, vocabulary):
    ids, present, groups, *_ = random_batch(seed, vocabulary=vocabulary)
    numbers = prefix_ids(ids, present, groups)
    by_number, by_prefix = {}, {}
    for i, t in present.nonzero().tolist():
        prefix = (groups[i].item(), *ids[i, : t + 1].tolist())
        assert by_number.setdefault(numbers[i, t].item(), prefix) == prefix
        assert by_prefix.setdefault(prefix, numbers[i, t].item()) == numbers[i, t].item()
    assert not numbers[present == 0].any()


@given(seed=st.integers(0, 10**6), vocabulary=st.integers(1, 3))
@settings(max_examples=60)
def test_residual_against_loops(seed, vocabulary):
    ids, present, groups, advantages, generator = random_batch(seed, vocabulary=vocabulary)
    coefficients = torch.rand(ids.shape, dtype=torch.float64, generator=generator)
    coefficients[torch.rand(ids.shape, generator=generator) < 0.2] = 0  # clipped tokens
    in_update = present * (torch.rand(ids.size(0), 1, generator=generator) < 0.8)  # members torn away
    pushes = coefficients * advantages.unsqueeze(1)
    contexts, deserved = shared_contexts(ids, present, groups, advantages)
    residual, count = shared_prefix_residual(pushes, contexts * in_update, deserved)
    expected, tokens = references.shared_prefix_residual(
        *[x.tolist() for x in (ids, present, groups, advantages, pushes, in_update)]
    )
    assert count.item() == tokens
    assert residual.item() == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30)
def test_equal_coefficients_leave_nothing(seed):
    """Also where only a part of the group shares the prefix, and whatever the coefficient of each context."""
    ids, present, groups, advantages, generator = random_batch(seed)
    contexts, deserved = shared_contexts(ids, present, groups, advantages)
    names, index = contexts.unique(return_inverse=True)
    coefficients = torch.rand(len(names), dtype=torch.float64, generator=generator)[index]
    residual, _ = shared_prefix_residual(coefficients * advantages.unsqueeze(1), contexts, deserved)
    assert residual.item() == pytest.approx(0, abs=1e-12)


def test_known_values():
    """Two rollouts share two tokens of three; pushes 3 and -1 on advantages 1 and -1 leave (3-1)/(3+1)."""
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    ones, groups = torch.ones_like(ids), torch.zeros(2, dtype=torch.long)
    contexts, deserved = shared_contexts(ids, ones, groups, torch.tensor([1.0, -1.0]))
    assert (contexts != 0).tolist() == [[True, True, False]] * 2
    residual, count = shared_prefix_residual(torch.tensor([[3.0, 3, 9], [-1.0, -1, -9]]), contexts, deserved)
    assert (residual.item(), count.item()) == (0.5, 4)


def test_a_missing_member_leaves_everything():
    ids = torch.tensor([[1], [1]])
    contexts, deserved = shared_contexts(ids, torch.ones_like(ids), torch.zeros(2).long(), torch.tensor([1.0, -1.0]))
    residual, count = shared_prefix_residual(torch.tensor([0.7]), contexts[0], deserved[0])
    assert (residual.item(), count.item()) == (1.0, 1)


def test_nothing_shared():
    ids = torch.tensor([[1, 1], [2, 1]])
    contexts, deserved = shared_contexts(ids, torch.ones_like(ids), torch.zeros(2).long(), torch.tensor([1.0, -1.0]))
    residual, count = shared_prefix_residual(torch.ones(2, 2), contexts, deserved)
    assert (residual.item(), count.item()) == (0, 0)


def test_groups_do_not_mix():
    ids = torch.tensor([[1], [1]])
    contexts, _ = shared_contexts(ids, torch.ones_like(ids), torch.tensor([0, 1]), torch.tensor([1.0, -1.0]))
    assert not contexts.any()
