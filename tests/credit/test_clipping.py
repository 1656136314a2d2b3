"""Symmetric clipping and the weights of clipped surrogates, against loops in float64."""

import math

import pytest
import torch

from tests import references
from trl_cancel.credit import post_clip_weights, sequence_ratios, surrogate_weight, symmetric_clip, token_ratios


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logps = torch.randn(6, 5, dtype=torch.float64)
    old_logps = logps + 0.3 * torch.randn_like(logps)
    mask = (torch.arange(5) < torch.tensor([5, 3, 1, 0, 4, 5]).unsqueeze(1)).long()
    return logps, old_logps, mask


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratios(batch, level):
    logps, old_logps, mask = batch
    expected = [
        references.ratio(*row, level) for row in zip(logps.tolist(), old_logps.tolist(), mask.tolist(), strict=True)
    ]
    if level == "token":
        found = token_ratios(logps, old_logps)
    else:
        found = sequence_ratios(logps, old_logps, mask).unsqueeze(1).expand(6, 5)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_ratio_of_a_sequence_without_tokens_is_one(batch):
    logps, old_logps, mask = batch
    assert sequence_ratios(logps, old_logps, mask)[3] == 1


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0, 1.2, 1.3, 1e8])
def test_symmetric_clip_has_one_weight_for_both_signs(r):
    assert symmetric_clip(torch.tensor(r, dtype=torch.float64), 0.2).item() == min(max(r, 0.0), 1.2)


def test_symmetric_clip_of_an_infinite_ratio_is_finite():
    assert symmetric_clip(torch.tensor(math.inf), 0.2) == torch.tensor(1.2)


@pytest.mark.parametrize("delta", [None, 1.5, 1.1, 1.0, 0.9, 0.5])
def test_surrogate_weight_is_the_slope_of_the_surrogate(delta):
    torch.manual_seed(0)
    log_ratios = (0.6 * torch.randn(500, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(500, dtype=torch.float64)
    ratios = log_ratios.exp()
    bounded = ratios if delta is None else ratios.clamp(max=delta)
    surrogate = torch.min(bounded * advantages, ratios.clamp(0.8, 1.3) * advantages)
    (slope,) = torch.autograd.grad(surrogate.sum(), log_ratios)
    weight = surrogate_weight(ratios.detach(), advantages, 0.2, 0.3, delta)
    torch.testing.assert_close(weight * advantages, slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        post_clip_weights(ratios.detach(), advantages, 0.2, 0.3, delta) * advantages,
        surrogate.detach(),
        rtol=1e-12,
        atol=0,
    )
    assert (weight == 0).any()
    assert (weight != 0).any()
