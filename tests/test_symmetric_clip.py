"""Symmetric clipping through the trainer: TRL's own loss, with other bounds or a frozen ratio, is Eq. 80 and Eq. 81."""

import pytest
import torch

from tests import references
from trl_cancel.batch.clipping import CLIPPED_LOSSES
from trl_cancel.doctor.loss import LossHarness

from .runs import OFF_POLICY, train


B, T = 8, 6


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logps = -torch.rand(B, T, dtype=torch.float64)
    old_logps = logps + 0.4 * torch.randn_like(logps) + 0.3 * torch.randn(B, 1, dtype=torch.float64)
    mask = (torch.arange(T) < torch.tensor([6, 3, 1, 6, 4, 5, 2, 6]).unsqueeze(1)).long()
    return logps, old_logps, torch.randn(B, dtype=torch.float64), mask


def as_lists(*tensors):
    return [tensor.tolist() for tensor in tensors]


@pytest.mark.parametrize("gradient", ["surrogate", "score"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", CLIPPED_LOSSES)
def test_value_and_gradient(monkeypatch, tiny_model, batch, loss_type, level, gradient):
    loss_of = LossHarness(
        monkeypatch,
        tiny_model,
        per_device_train_batch_size=B,
        loss_type=loss_type,
        importance_sampling_level=level,
        symmetric_clip=True,
        symmetric_clip_gradient=gradient,
        epsilon=0.1,
        epsilon_high=0.2,
    )
    value, by_logps = loss_of(*batch)
    expected_value, expected = references.clipped_loss(
        *as_lists(*batch),
        bounds=references.symmetric_bounds(0.2),
        level=level,
        loss_type=loss_type,
        max_length=loss_of.trainer.max_completion_length,
        score=gradient == "score",
    )
    torch.testing.assert_close(value.item(), expected_value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(by_logps, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert loss_of.forward_passes == 1


@pytest.mark.parametrize("gradient", ["surrogate", "score"])
def test_both_signs_share_one_coefficient(monkeypatch, tiny_model, gradient):
    """Equal ratios, opposite advantages: the gradients are opposite, inside and outside the range."""
    loss_of = LossHarness(
        monkeypatch,
        tiny_model,
        symmetric_clip=True,
        symmetric_clip_gradient=gradient,
        importance_sampling_level="token",
    )
    logps = torch.tensor([[0.9, 0.0, -0.9, 0.1]], dtype=torch.float64).expand(2, 4)
    advantages = torch.tensor([1.5, -1.5], dtype=torch.float64)
    _, by_logps = loss_of(logps, torch.zeros_like(logps), advantages, torch.ones(2, 4, dtype=torch.long))
    torch.testing.assert_close(by_logps[0], -by_logps[1], rtol=0, atol=1e-15)
    assert by_logps[0, 1:].all()
    assert bool(by_logps[0, 0]) == (gradient == "score"), "above the bound only the score form pushes on"


def test_stock_clipping_does_not_share_it(monkeypatch, tiny_model):
    """The asymmetry that is repaired (Eq. 75 and 76): the test above can fail."""
    loss_of = LossHarness(monkeypatch, tiny_model)
    logps = torch.tensor([[0.9, -0.9]], dtype=torch.float64).expand(2, 2)
    advantages = torch.tensor([1.5, -1.5], dtype=torch.float64)
    _, by_logps = loss_of(logps, torch.zeros_like(logps), advantages, torch.ones(2, 2, dtype=torch.long))
    assert by_logps[:, 0].tolist() == [0, pytest.approx(1.5 * 2.4596 / 4, rel=1e-3)]
    assert by_logps[:, 1].tolist() == [pytest.approx(-1.5 * 0.40657 / 4, rel=1e-3), 0]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clip_fractions(monkeypatch, tiny_model, batch, level):
    logps, old_logps, advantages, mask = batch
    loss_of = LossHarness(
        monkeypatch,
        tiny_model,
        per_device_train_batch_size=B,
        symmetric_clip=True,
        importance_sampling_level=level,
        loss_type="grpo",
    )
    loss_of(*batch)
    counts = {"": [0, 0], "_positive": [0, 0], "_negative": [0, 0]}
    for i, row in enumerate(mask.tolist()):
        ratios = references.ratio(logps[i].tolist(), old_logps[i].tolist(), row, level)
        clipped = [r > 1.2 for r, counts_too in zip(ratios, row, strict=True) if counts_too]
        clipped = clipped if level == "token" else clipped[:1]
        for sign in ("", "_positive" if advantages[i] > 0 else "_negative"):
            counts[sign][0] += sum(clipped)
            counts[sign][1] += len(clipped)
    for sign, (clipped, total) in counts.items():
        assert loss_of.metrics[f"symmetric_clip/clip_fraction{sign}"] == pytest.approx(clipped / total, abs=1e-6)
    assert 0 < counts[""][0] < counts[""][1]
    assert loss_of.metrics["clip_ratio/region_mean"] == 0, "TRL's own metric cannot see it, as documented"


def test_off_policy_mask_sees_the_true_old_log_probs(monkeypatch, tiny_model, batch):
    """A frozen ratio hides the drift from TRL's loss; the off-policy mask must drop the same rollouts as ever."""
    logps, old_logps, advantages, mask = batch
    settings = {"per_device_train_batch_size": B, "off_policy_mask_threshold": 0.05, "symmetric_clip": True}
    dropped = {}
    for gradient in ("surrogate", "score"):
        with monkeypatch.context() as patch:
            loss_of = LossHarness(patch, tiny_model, symmetric_clip_gradient=gradient, **settings)
            _, by_logps = loss_of(logps, old_logps, advantages, mask)
            _, without_mask = LossHarness(
                patch, tiny_model, symmetric_clip_gradient=gradient, **{**settings, "off_policy_mask_threshold": None}
            )(logps, old_logps, advantages, mask)
            dropped[gradient] = (without_mask.any(1) & ~by_logps.any(1)).tolist()
    assert any(dropped["score"])
    drift = ((old_logps - logps) * mask).sum(1) / mask.sum(1)
    assert dropped["score"] == ((drift > 0.05) & (advantages < 0)).tolist()


def test_off_policy_mask_prefers_the_samplers_log_probs(monkeypatch, tiny_model, batch):
    """Where the sampling engine gave its own log-probs, the drift is measured from these, as in TRL."""
    logps, old_logps, advantages, mask = batch
    sampling = logps + torch.tensor([0.5, -0.5] * 4, dtype=torch.float64).unsqueeze(1)
    loss_of = LossHarness(
        monkeypatch,
        tiny_model,
        per_device_train_batch_size=B,
        off_policy_mask_threshold=0.05,
        symmetric_clip=True,
        symmetric_clip_gradient="score",
    )
    _, by_logps = loss_of(logps, old_logps, advantages, mask, sampling_per_token_logps=sampling)
    even = torch.arange(B) % 2 == 0
    assert ((advantages < 0) & even).any()
    assert ((advantages < 0) & ~even).any()
    assert (~by_logps.any(1)).tolist() == ((advantages < 0) & even).tolist()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tool_results_do_not_count(monkeypatch, tiny_model, batch, level):
    """Their log-probs change neither the ratio of a sequence nor the fraction that is clipped."""
    logps, old_logps, advantages, mask = batch
    loss_of = LossHarness(
        monkeypatch,
        tiny_model,
        per_device_train_batch_size=B,
        importance_sampling_level=level,
        loss_type="grpo",
        symmetric_clip=True,
        symmetric_clip_gradient="score",
    )
    tool_mask = torch.ones_like(mask)
    tool_mask[:, 1] = 0
    _, by_logps = loss_of(*batch, tool_mask=tool_mask)
    clipped = loss_of.metrics["symmetric_clip/clip_fraction"]
    _, moved = loss_of(logps, old_logps - 2.0 * (1 - tool_mask), advantages, mask, tool_mask=tool_mask)
    assert torch.equal(by_logps * tool_mask, moved * tool_mask)
    assert loss_of.metrics["symmetric_clip/clip_fraction"] == clipped


def test_off_policy_run_differs_from_stock_clipping(tiny_model):
    stock = train(tiny_model, **OFF_POLICY)
    symmetric = train(tiny_model, **OFF_POLICY, symmetric_clip=True)
    assert any(entry.get("symmetric_clip/clip_fraction", 0) > 0 for entry in symmetric.logs)
    assert any((stock.weights[name] != symmetric.weights[name]).any() for name in stock.weights)
