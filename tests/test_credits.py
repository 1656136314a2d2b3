"""Your own credit: the protocol, what is refused, and that coefficients reach each token's gradient exactly."""

import pytest
import torch

from tests import references
from trl_cancel import Rollouts
from trl_cancel.batch.clipping import CLIPPED_LOSSES
from trl_cancel.credit import SignControl
from trl_cancel.doctor.loss import LossHarness
from trl_cancel.pipeline.credit import combine

from .runs import OFF_POLICY, assert_same_weights, build, load, noisy_reward, train


class Recorder:
    """A credit that remembers what it saw and returns what it is told."""

    scope = "rollout"

    def __init__(self, value=1.0, per_token=True):
        self.value, self.per_token, self.seen = value, per_token, []

    def coefficients(self, rollouts):
        self.seen.append(rollouts)
        return torch.full_like(
            rollouts.mask if self.per_token else rollouts.mask[:, :1], self.value, dtype=torch.float
        )


def rollouts(advantages, length=3, **changes):
    rows = len(advantages)
    values = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": torch.zeros(rows, length, dtype=torch.long),
        "mask": torch.ones(rows, length, dtype=torch.long),
        "advantages": torch.tensor(advantages),
        "group_ids": torch.arange(rows) // 2,
        "rewards": torch.zeros(rows, 1),
        "reward_names": ["reward"],
        "examples": [{}] * rows,
        "num_generations": 2,
    }
    return Rollouts(**{**values, **changes})


@pytest.mark.parametrize(
    ("sign", "expected"), [("both", [1, 1, 1, 1]), ("positive", [1, 0, 1, 0]), ("negative", [0, 1, 1, 1])]
)
def test_sign_control(sign, expected):
    coefficients = SignControl(sign).coefficients(rollouts([2.0, -1.0, 0.0, -1.0]))
    assert coefficients.shape == (4, 1)
    assert coefficients.flatten().tolist() == expected


def test_what_the_model_computes_is_not_blamed_on_the_credit():
    """Only where a token counts, and only if a credit is to be computed."""
    logps = torch.tensor([[-1.0, float("nan"), -1.0]] * 2)
    for mask, credits in (([1, 0, 1], [Recorder()]), ([1, 1, 1], [])):
        combine(credits, rollouts([1.0, -1.0], old_logps=logps, mask=torch.tensor([mask] * 2)))
    with pytest.raises(ValueError, match=r"log-probabilities of the rollouts are nan.*it is the model"):
        combine([Recorder()], rollouts([1.0, -1.0], old_logps=logps))


@pytest.mark.parametrize("credit", ["nthr", "delta_credit"])
@pytest.mark.parametrize("weight", ["embed_tokens", "layers.1.mlp.up_proj"])
def test_weights_that_are_nan_are_refused_at_once(tiny_model, credit, weight):
    model = load(tiny_model)
    torch.nn.init.constant_(model.get_submodule(f"model.{weight}").weight, float("nan"))
    with pytest.raises(ValueError, match="logits of Qwen3ForCausalLM are not finite: its weights hold nan"):
        build(model, **{credit: True})


def test_credits_multiply():
    product = combine([Recorder(2.0), Recorder(3.0, per_token=False)], rollouts([1.0, -1.0]))
    assert product.tolist() == [[6.0] * 3] * 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), r"returned \(2,\); return a tensor of shape \(2, 3\)"),
        (torch.ones(3, 2), r"returned \(3, 2\)"),
        ([1.0, 1.0], "returned list"),
        (torch.tensor([[1.0], [-0.5]]), "values from -0.5 to 1.0"),
        (torch.tensor([[1.0], [float("nan")]]), "finite and not negative"),
        (torch.tensor([[1.0], [float("inf")]]), "finite and not negative"),
    ],
)
def test_wrong_coefficients_are_refused(value, message):
    class Wrong:
        scope = "rollout"

        def coefficients(self, rollouts):
            return value

    with pytest.raises(ValueError, match=f"Wrong.coefficients.*{message}"):
        combine([Wrong()], rollouts([1.0, -1.0]))


def test_padding_may_hold_anything():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    values = torch.where(mask.bool(), 2.0, float("nan"))

    class Padded:
        scope = "rollout"

        def coefficients(self, rollouts):
            return values

    product = combine([Padded()], rollouts([1.0, -1.0], mask=mask))
    assert product[mask.bool()].tolist() == [2.0] * 3
    assert torch.isfinite(product).all(), "a loss multiplies padding by 0, which does not remove nan"


@pytest.mark.parametrize("credit", [object(), type("NoScope", (), {"coefficients": None})(), Recorder])
def test_objects_that_are_no_credits_are_refused(tiny_model, credit):
    with pytest.raises(ValueError, match=r"credits: \w+ needs"):
        build(tiny_model, arguments={"credits": [credit]})


def test_what_a_credit_sees(tiny_model):
    recorder = Recorder()
    train(tiny_model, **OFF_POLICY, arguments={"credits": [recorder]})
    assert len(recorder.seen) == 1, "once a generation batch, though it is used twice"
    seen = recorder.seen[0]
    assert seen.completion_ids.shape == seen.mask.shape
    assert seen.completion_ids.size(0) == len(seen.examples) == 16
    assert seen.group_ids.tolist() == [group for group in range(4) for _ in range(4)]
    prompts = [example["prompt"] for example in seen.examples]
    assert all(prompts[i] == prompts[4 * (i // 4)] for i in range(16))
    lengths = seen.lengths.tolist()
    ids = [row[:length] for row, length in zip(seen.completion_ids.tolist(), lengths, strict=True)]
    assert seen.rewards.flatten().tolist() == noisy_reward(ids)
    assert seen.reward_names == ["noisy_reward"]
    by_group = seen.by_group(seen.rewards.squeeze(1))
    expected = (by_group - by_group.mean(1, keepdim=True)) / (by_group.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(seen.by_group(seen.advantages), expected)
    assert torch.equal(seen.reduce(seen.advantages), seen.advantages), "a single process"


def test_parts_of_groups_do_not_fold():
    with pytest.raises(ValueError, match="3 rollouts do not fold into groups of num_generations=2"):
        rollouts([1.0, -1.0, 0.0]).by_group(torch.zeros(3))


@pytest.mark.parametrize("per_token", [True, False])
def test_ones_change_nothing(tiny_model, per_token):
    without = train(tiny_model, **OFF_POLICY)
    ones = train(tiny_model, **OFF_POLICY, arguments={"credits": [Recorder(1.0, per_token)]})
    assert ones.logs == without.logs
    assert_same_weights(ones.weights, without.weights)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", CLIPPED_LOSSES)
@pytest.mark.parametrize("clipping", ["stock", "surrogate", "score"])
def test_token_coefficients_reach_the_gradient(monkeypatch, tiny_model, clipping, loss_type, level):
    """
    At sequence level too, where TRL's loss alone would average a rollout's coefficients: each token's push is its own
    coefficient times what the clipped loss does to the rollout.
    """
    torch.manual_seed(0)
    rows, length = 8, 6
    logps = -torch.rand(rows, length, dtype=torch.float64)
    old_logps = logps + 0.4 * torch.randn_like(logps) + 0.3 * torch.randn(rows, 1, dtype=torch.float64)
    advantages = torch.randn(rows, dtype=torch.float64)
    coefficients = torch.rand(rows, length, dtype=torch.float64)
    mask = (torch.arange(length) < torch.tensor([6, 3, 1, 6, 4, 5, 2, 6]).unsqueeze(1)).long()
    loss_of = LossHarness(
        monkeypatch,
        tiny_model,
        per_device_train_batch_size=rows,
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon=0.1,
        epsilon_high=0.2,
        symmetric_clip=clipping != "stock",
        symmetric_clip_gradient="score" if clipping == "score" else "surrogate",
        arguments={"credits": [Recorder()]},
    )
    _, by_logps = loss_of(logps, old_logps, advantages.unsqueeze(1) * coefficients, mask)
    _, expected = references.clipped_loss(
        logps.tolist(),
        old_logps.tolist(),
        advantages.tolist(),
        mask.tolist(),
        bounds=references.stock_bounds(0.1, 0.2) if clipping == "stock" else references.symmetric_bounds(0.2),
        level=level,
        loss_type=loss_type,
        max_length=loss_of.trainer.max_completion_length,
        credit=coefficients.tolist(),
        score=clipping == "score",
    )
    torch.testing.assert_close(by_logps, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert loss_of.trainer.importance_sampling_level == level


def test_level_is_restored_after_an_error(monkeypatch, tiny_model):
    loss_of = LossHarness(
        monkeypatch,
        tiny_model,
        importance_sampling_level="sequence",
        loss_type="grpo",
        arguments={"credits": [Recorder()]},
    )
    values = torch.zeros(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"mask of shape \(4, 2\) does not fit logps of shape \(4, 3\)"):
        loss_of(values, values, values, torch.ones(4, 3, dtype=torch.long), completion_mask=torch.ones(4, 2))
    assert loss_of.trainer.importance_sampling_level == "sequence"
    assert loss_of.trainer._losses.progress is None


def test_sapo_cannot_spread_token_credit(tiny_model):
    with pytest.raises(ValueError, match="loss_type='sapo' with importance_sampling_level='sequence'"):
        build(
            tiny_model,
            loss_type="sapo",
            importance_sampling_level="sequence",
            arguments={"credits": [Recorder()]},
        )


def test_frozen_ratios_refuse_the_bias_correction_of_the_kl(tiny_model):
    with pytest.raises(ValueError, match="use_bias_correction_kl=False"):
        build(
            tiny_model,
            loss_type="grpo",
            importance_sampling_level="sequence",
            beta=0.1,
            use_bias_correction_kl=True,
            arguments={"credits": [Recorder()]},
        )


@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_sign_control_in_a_run(tiny_model, sign):
    logs = train(tiny_model, **OFF_POLICY, advantage_sign=sign).logs[:-1]
    silenced = {"positive": "negative", "negative": "positive"}[sign]
    assert all(entry[f"cancel/{silenced}_fraction"] == 0 for entry in logs)
    assert any(entry[f"cancel/{sign}_fraction"] > 0 for entry in logs)
