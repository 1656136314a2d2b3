"""What a loss does to each token, read off the loss, against the gradients of losses without a KL term."""

import pytest
import torch

from trl_cancel.doctor.loss import LossHarness


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_pushes_are_the_policy_gradient(monkeypatch, tiny_model, loss_type, level):
    """With a KL term the pushes stay what the gradient is without one."""
    torch.manual_seed(0)
    logps = -torch.rand(4, 6, dtype=torch.float64)
    old_logps, ref_logps = logps + 0.3 * torch.randn_like(logps), logps + 0.3 * torch.randn_like(logps)
    advantages, mask = torch.randn(4, dtype=torch.float64), torch.ones(4, 6, dtype=torch.long)
    settings = {"loss_type": loss_type, "importance_sampling_level": level}
    with monkeypatch.context() as patch:
        _, plain = LossHarness(patch, tiny_model, **settings)(logps, old_logps, advantages, mask)
    with monkeypatch.context() as patch:
        loss_of = LossHarness(patch, tiny_model, beta=0.5, **settings)
        seen = []
        monitor = loss_of.trainer._monitor
        monitor.end_step = lambda: seen.extend(monitor._shared) or {}
        _, with_kl = loss_of(logps, old_logps, advantages, mask, ref_per_token_logps=ref_logps)
    assert not torch.allclose(plain, with_kl)
    torch.testing.assert_close(seen[0][0].view(4, 6), -plain, rtol=1e-9, atol=1e-12)
