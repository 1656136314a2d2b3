"""What TRL's loss reads, when it reads it, and what it makes of advantages of shape (B, T)."""

import pytest
import torch
import trl

from tests.loss import LossHarness


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logps = -torch.rand(4, 6, dtype=torch.float64)
    mask = (torch.arange(6) < torch.tensor([6, 3, 5, 1]).unsqueeze(1)).long()
    return logps, logps + 0.3 * torch.randn_like(logps), torch.randn(4, dtype=torch.float64), mask


def harness(monkeypatch, model, **settings):
    return LossHarness(monkeypatch, model, trainer=trl.GRPOTrainer, **settings)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("entry", ["advantages", "old_per_token_logps", "sampling_per_token_logps", "level"])
def test_read_after_the_forward_pass(monkeypatch, tiny_model, batch, loss_type, entry):
    """What is written during the forward pass is what the loss uses."""
    logps, old_logps, advantages, mask = batch
    changed = {
        "advantages": 2 * advantages,
        "old_per_token_logps": old_logps - 0.1,
        "sampling_per_token_logps": logps + 1,
    }
    settings = {"loss_type": loss_type, "off_policy_mask_threshold": 0.05}
    settings |= {"epsilon_high": 5.0} if loss_type == "cispo" else {}  # its bound is on the ratio, not on ratio - 1
    with monkeypatch.context() as patch:
        unchanged = harness(patch, tiny_model, **settings)(*batch)
        loss_of = harness(patch, tiny_model, **settings)
        if entry == "level":
            loss_of.trainer.importance_sampling_level = "sequence"
            expected = loss_of(*batch)
        else:
            entries = dict(zip(("advantages", "old_per_token_logps"), (advantages, old_logps), strict=True))
            entries = {**entries, entry: changed[entry]}
            expected = loss_of(logps, entries.pop("old_per_token_logps"), entries.pop("advantages"), mask, **entries)
    with monkeypatch.context() as patch:
        loss_of = harness(patch, tiny_model, **settings)
        forward = trl.GRPOTrainer._get_per_token_logps_and_entropies

        def writing_forward(trainer, *args, **kwargs):
            if entry == "level":
                trainer.importance_sampling_level = "sequence"
            else:
                inputs[entry] = changed[entry]
            return forward(trainer, *args, **kwargs)

        patch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", writing_forward)
        compute = loss_of.trainer.compute_loss
        inputs = {}

        def compute_on_a_copy(model, given):
            inputs.update(given)
            return compute(model, inputs)

        loss_of.trainer.compute_loss = compute_on_a_copy
        found = loss_of(*batch)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    if (loss_type, entry) != ("vespo", "level"):  # which has ratios of its own
        assert not torch.equal(found[1], unchanged[1])


@pytest.mark.parametrize("loss_type", LOSSES)
def test_advantages_a_token_scale_loss_and_gradient(monkeypatch, tiny_model, batch, loss_type):
    """At token level a non-negative coefficient on the advantage is one on the token's gradient, exactly."""
    logps, old_logps, advantages, mask = batch
    coefficients = torch.tensor([0.0, 0.25, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)  # powers of two do not round
    loss_of = harness(monkeypatch, tiny_model, loss_type=loss_type)
    _, plain = loss_of(logps, old_logps, advantages, mask)
    _, scaled = loss_of(logps, old_logps, advantages.unsqueeze(1) * coefficients, mask)
    assert torch.equal(scaled, plain * coefficients)
    value, _ = loss_of(logps, old_logps, advantages, mask)
    same, _ = loss_of(logps, old_logps, advantages.unsqueeze(1).expand_as(logps), mask)
    torch.testing.assert_close(same, value, rtol=1e-12, atol=0)


def test_sequence_level_averages_advantages_a_token(monkeypatch, tiny_model, batch):
    """Why token credit at sequence level needs the frozen ratio: TRL's loss would spread it over the rollout."""
    logps, _, advantages, mask = batch
    loss_of = harness(monkeypatch, tiny_model, importance_sampling_level="sequence", loss_type="grpo")
    first_token_only = torch.zeros_like(logps)
    first_token_only[:, 0] = 1
    _, gradient = loss_of(logps, logps, advantages.unsqueeze(1) * first_token_only, mask)
    assert gradient[0].all()


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_old_log_probs_equal_to_new_ones_freeze_the_ratio(monkeypatch, tiny_model, batch, loss_type, level):
    """The ratio is 1 in value; the gradient is that of the score, weighted by the advantage alone."""
    logps, _, advantages, mask = batch
    loss_of = harness(monkeypatch, tiny_model, loss_type=loss_type, importance_sampling_level=level)
    _, missing = loss_of(logps, None, advantages, mask)
    _, equal = loss_of(logps, logps, advantages, mask)
    assert torch.equal(missing, equal)
    assert (equal.sign() == -(advantages.unsqueeze(1) * mask).sign()).all()


def test_off_policy_mask_prefers_the_sampling_log_probs(monkeypatch, tiny_model, batch):
    logps, _, advantages, mask = batch
    loss_of = harness(monkeypatch, tiny_model, off_policy_mask_threshold=0.05)
    _, kept = loss_of(logps, logps, -advantages.abs(), mask)
    _, dropped = loss_of(logps, logps, -advantages.abs(), mask, sampling_per_token_logps=logps + 1)
    assert kept.any()
    assert not dropped.any()


def test_off_policy_mask_drops_negative_rollouts_that_have_drifted():
    """What group weights ask for beforehand, to know who is left: 0 for a rollout that the loss will drop."""
    logps = torch.tensor([[0.0, 0.0], [-1.0, -1.0], [-1.0, -1.0], [0.0, -1.0]])
    kept = trl.GRPOTrainer.get_off_policy_mask(
        torch.tensor([[-1.0], [-1.0], [1.0], [-1.0]]),
        logps,
        torch.zeros(4, 2),
        torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0]]),
        0.5,
    )
    assert kept.flatten().tolist() == [1, 0, 1, 1]


def test_loss_asks_for_its_forward_pass_first(monkeypatch, tiny_model, batch):
    """Nothing is logged or changed before it, so that a pass without gradients can be taken out of the loss."""

    class Stop(Exception):
        pass

    def stop(self, *args, **kwargs):
        assert kwargs["compute_entropy"] is True, "by name, since the pass turns it off"
        raise Stop

    loss_of = harness(monkeypatch, tiny_model)
    monkeypatch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", stop)
    before = {name: list(values) for name, values in loss_of.trainer._metrics["train"].items()}
    with pytest.raises(Stop):
        loss_of(*batch)
    assert before == loss_of.trainer._metrics["train"]


def test_sequence_level_correction_multiplies_the_loss(monkeypatch, tiny_model, batch):
    """Of shape (B, 1), as the sequence-level modes of the sampling correction have it; ones change nothing."""
    loss_of = harness(monkeypatch, tiny_model, importance_sampling_level="sequence", loss_type="grpo")
    _, without = loss_of(*batch)
    loss_of.trainer.use_vllm = loss_of.trainer.vllm_importance_sampling_correction = True
    ratio = torch.linspace(0.5, 2, batch[0].size(0), dtype=torch.float64).unsqueeze(1)
    _, ones = loss_of(*batch, importance_sampling_ratio=torch.ones_like(ratio))
    _, corrected = loss_of(*batch, importance_sampling_ratio=ratio)
    assert torch.equal(ones, without)
    torch.testing.assert_close(corrected, ratio * without, rtol=1e-12, atol=0)


def test_clipping_bounds_are_attributes_of_the_trainer(monkeypatch, tiny_model, batch):
    """`epsilon_low` and `epsilon_high` are read from the trainer, `delta` from its arguments."""
    logps, _, advantages, mask = batch
    cuts = [
        (-0.5, 1, {"epsilon_high": 1.0}),  # a positive advantage is cut above 1 + epsilon_high
        (0.5, -1, {"epsilon_low": 1.0}),  # a negative one below 1 - epsilon_low
    ]
    for shift, sign, looser in cuts:
        loss_of = harness(monkeypatch, tiny_model)
        assert not loss_of(logps, logps + shift, sign * advantages.abs(), mask)[1].any()
        vars(loss_of.trainer).update(looser)
        assert loss_of(logps, logps + shift, sign * advantages.abs(), mask)[1].any()
    loss_of = harness(monkeypatch, tiny_model)
    assert loss_of(logps, logps - 0.5, -advantages.abs(), mask)[1].any()
    loss_of.trainer.args.delta = 1.2
    assert not loss_of(logps, logps - 0.5, -advantages.abs(), mask)[1].any()
