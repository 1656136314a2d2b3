"""Group-consistent weights against loops in float64, and what makes them what they are."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests import references
from trl_cancel.credit import (
    min_replace,
    orthogonal_projection,
    positive_orthogonal_projection,
    post_clip_weights,
    truncate_and_rebalance,
)
from trl_cancel.methods.group_weights import consistent_weights


FINITE = st.floats(-3, 3).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
RATIOS = st.one_of(st.floats(0.5, 2.0), st.floats(1e-6, 1e6), st.just(1.0))


@st.composite
def groups(draw, centred=True, max_size=6):
    """Weights and advantages of a group, with ties, zeros, one sign only, and huge and tiny ratios among them."""
    size = draw(st.integers(1, max_size))
    weights = draw(st.lists(RATIOS, min_size=size, max_size=size))
    advantages = draw(st.lists(st.one_of(FINITE, st.sampled_from([-1.0, 1.0])), min_size=size, max_size=size))
    weights, advantages = (torch.tensor(values, dtype=torch.float64) for values in (weights, advantages))
    return weights, advantages - advantages.mean() if centred else advantages


def relative(weights, advantages):
    """|sum of weights times advantages| relative to the sum of magnitudes, the rounding that can be asked for."""
    gross = (weights * advantages).abs().sum(-1)
    return ((weights * advantages).sum(-1).abs() / gross.where(gross > 0, 1.0)).max().item()


@given(groups(), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_post_clip_weights(group, low, high):
    ratios, advantages = group
    found = post_clip_weights(ratios, advantages, low, high)
    expected = [
        references.post_clip_weight(r, a, low, high) for r, a in zip(ratios.tolist(), advantages.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    surrogate = torch.min(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)
    torch.testing.assert_close(found * advantages, surrogate, rtol=1e-12, atol=0)


@given(groups())
def test_min_replace(group):
    weights, _ = group
    assert min_replace(weights).tolist() == [min(weights.tolist())] * len(weights)


@given(groups(centred=False))
def test_orthogonal_projection(group):
    weights, advantages = group
    found = orthogonal_projection(weights, advantages)
    expected = references.orthogonal_projection(weights.tolist(), advantages.tolist())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@given(groups(centred=False))
def test_positive_projection_against_every_face(group):
    weights, advantages = group
    found = positive_orthogonal_projection(weights, advantages)
    expected = references.positive_orthogonal_projection(weights.tolist(), advantages.tolist())
    scale = weights.max().item()
    torch.testing.assert_close(
        found / scale, torch.tensor(expected, dtype=torch.float64) / scale, rtol=1e-9, atol=1e-9
    )


@given(groups(centred=False), st.sampled_from([1e-6, 0.1]))
def test_truncate_and_rebalance(group, floor):
    weights, advantages = group
    found = truncate_and_rebalance(weights, advantages, floor)
    expected = references.truncate_and_rebalance(weights.tolist(), advantages.tolist(), floor)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert (found <= weights.clamp(min=floor)).all()


TRANSFORMATIONS = {
    "min": lambda weights, advantages: min_replace(weights),
    "orth": orthogonal_projection,
    "positive_orth": positive_orthogonal_projection,
    "rebalance": truncate_and_rebalance,
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@given(group=groups())
def test_orthogonal_to_the_advantages(name, group):
    weights, advantages = group
    found = TRANSFORMATIONS[name](weights, advantages)
    if name == "min":  # one weight times advantages that sum to zero
        assert abs((found * advantages).sum()) <= 1e-9 * found.max() * max(advantages.abs().sum(), 1)
    else:
        assert (found * advantages).sum().abs() <= 1e-9 * weights.max() * advantages.abs().sum()


@pytest.mark.parametrize("name", ["min", "positive_orth", "rebalance"])
@given(group=groups(centred=False))
def test_not_negative(name, group):
    assert (TRANSFORMATIONS[name](*group) >= 0).all()


def test_the_plain_projection_can_be_negative():
    weights, advantages = torch.tensor([0.1, 0.1, 2.0]), torch.tensor([1.0, -2.0, 1.0])
    assert (orthogonal_projection(weights, advantages) < 0).any()


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@given(group=groups())
def test_on_policy_groups_are_unchanged(name, group):
    _, advantages = group
    assume(advantages.abs().max() > 1e-6)  # rounding alone may put all on one side, where nothing balances
    ones = torch.ones_like(advantages)
    torch.testing.assert_close(TRANSFORMATIONS[name](ones, advantages), ones, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@given(weights=st.lists(RATIOS, min_size=1, max_size=6))
def test_all_zero_advantages(name, weights):
    weights = torch.tensor(weights, dtype=torch.float64)
    found = TRANSFORMATIONS[name](weights, torch.zeros_like(weights))
    assert torch.isfinite(found).all()
    if name != "min":
        torch.testing.assert_close(found, weights)


@given(group=groups(centred=False, max_size=5), other=groups(centred=False, max_size=5))
def test_no_feasible_point_is_nearer(group, other):
    """The positive projection of anything else is a feasible point; none is nearer than the projection itself."""
    size = min(len(group[0]), len(other[0]))
    weights, advantages, elsewhere = group[0][:size], group[1][:size], other[0][:size]
    nearest = positive_orthogonal_projection(weights, advantages)
    feasible = truncate_and_rebalance(elsewhere, advantages)
    assert (weights - nearest).norm() <= (weights - feasible).norm() * (1 + 1e-9)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_groups_in_a_batch_do_not_mix(name):
    torch.manual_seed(0)
    weights, advantages = torch.rand(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    found = TRANSFORMATIONS[name](weights, advantages)
    for i in range(3):
        for j in range(5):
            torch.testing.assert_close(found[i, j], TRANSFORMATIONS[name](weights[i, j], advantages[i, j]))


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_gradients(name):
    """Differentiable, for the ablation without stop-gradient: against finite differences, and finite at zero groups."""
    torch.manual_seed(0)
    weights = (0.5 + torch.rand(4, 5, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w: TRANSFORMATIONS[name](w, advantages), weights)
    (gradient,) = torch.autograd.grad(TRANSFORMATIONS[name](weights, torch.zeros_like(advantages)).sum(), weights)
    assert torch.isfinite(gradient).all()


def test_one_sided_groups():
    weights, advantages = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 2.0, 0.0])
    assert positive_orthogonal_projection(weights, advantages).tolist() == [0, 0, 2]
    assert truncate_and_rebalance(weights, advantages).tolist() == [0, 0, 2]
    assert positive_orthogonal_projection(weights, -advantages).tolist() == [0, 0, 2]


@pytest.mark.parametrize("transformation", ["min", "orth", "positive_orth", "rebalance", "identity"])
@pytest.mark.parametrize("worst", [float("inf"), float("nan")])
def test_a_rollout_that_is_left_out_has_no_effect_whatever_its_weight(transformation, worst):
    """A ratio overflows where the policy has left a rollout that the loss drops anyway."""
    weights, advantages = torch.tensor([[1.0, 0.5, 2.0, 1.5]]), torch.tensor([[1.0, -1.0, 0.5, -0.5]])
    active = torch.tensor([[True, True, True, False]])
    expected = consistent_weights(weights, advantages, active, transformation)
    weights[0, 3] = worst
    assert torch.equal(consistent_weights(weights, advantages, active, transformation), expected)


def test_positive_projection_where_only_small_advantages_are_left():
    """The first weight is 0 and stays it; the others balance, however small what they weigh is beside the first."""
    weights, advantages = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([1.0, 1e-30, -1e-30])
    assert positive_orthogonal_projection(weights, advantages).tolist() == [0.0, 0.75, 0.75]
