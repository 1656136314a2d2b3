"""Displacement of right responses and GWHES against loops over tokens and pairs."""

import pytest
import torch

from tests import references
from tests.credit.test_nthr import group
from trl_cancel.diagnostics import gwhes, likelihood_displacement, top_k_overlap


@pytest.mark.parametrize("seed", range(4))
def test_displacement(seed):
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    mask = (torch.rand(3, 4, 5, generator=generator) < 0.7).long()
    positive = torch.tensor([[True, False, True, False], [True] * 4, [False, True, False, False]])
    found = likelihood_displacement(before, after, mask, positive)
    for prompt in range(3):
        expected = references.displacement(
            before[prompt].tolist(), after[prompt].tolist(), mask[prompt].tolist(), positive[prompt].tolist()
        )
        assert found[prompt].item() == pytest.approx(expected)


def test_displacement_without_right_responses():
    zeros = torch.zeros(2, 3)
    assert likelihood_displacement(zeros, zeros, zeros, torch.tensor([False, False])).isnan()


@pytest.mark.parametrize("seed", range(4))
def test_gwhes(seed):
    hidden, _, ids, mask, positive, layer, logits = group(seed)
    positive[1] = False
    found = gwhes(hidden, ids, mask, positive, layer)
    expected = references.gwhes(
        hidden.tolist(), logits.softmax(-1).tolist(), ids.tolist(), mask.tolist(), positive.tolist()
    )
    assert found.item() == pytest.approx(expected, rel=1e-9)
    assert gwhes(hidden, ids, mask, positive, layer.layer).item() == found.item()


def test_gwhes_predicts_the_displacement_of_a_small_step():
    """It is minus the derivative of the right responses' mean log-likelihood along GRPO's update of the output layer."""
    hidden, _, ids, mask, positive, layer, _ = group(5)
    positive[1] = False
    rate = positive.double().mean()
    advantages = (positive.double() - rate) / (rate * (1 - rate)).sqrt()

    def likelihood(weight):
        logps = (hidden @ weight.T).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        return (logps * mask).sum(1)

    leaf = layer.layer.clone().requires_grad_()
    (update,) = torch.autograd.grad((advantages * likelihood(leaf)).sum(), leaf)
    (right,) = torch.autograd.grad(likelihood(leaf)[positive].mean(), leaf)
    assert gwhes(hidden, ids, mask, positive, layer).item() == pytest.approx(-(update * right).sum().item())


def test_gwhes_needs_both_signs():
    hidden, _, ids, mask, positive, layer, _ = group(0)
    with pytest.raises(ValueError, match="right and wrong responses"):
        gwhes(hidden, ids, mask, torch.ones_like(positive), layer)


def test_overlap():
    displacements, scores = torch.tensor([0.1, -1.0, 3.0, 0.0]), torch.tensor([1.0, 5.0, -2.0, 2.0])
    assert top_k_overlap(displacements, scores, 2) == 1.0
    assert top_k_overlap(displacements, -scores, 2) == 0.0
    assert top_k_overlap(displacements, torch.tensor([5.0, 5.5, 1.0, 2.0]), 2) == 0.5
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k={k}"):
            top_k_overlap(displacements, scores, k)
