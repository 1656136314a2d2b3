"""Group weights through the trainer: what is really multiplied, wherever the members of a group are."""

import logging
import re

import pytest
import torch
import trl

from tests import references
from trl_cancel import CancelGRPOConfig, DFPOConfig, DFPOTrainer, GRPOFixConfig, GRPOFixTrainer
from trl_cancel.batch.clipping import CLIPPED_LOSSES
from trl_cancel.doctor.loss import LossHarness
from trl_cancel.methods.group_weights import TRANSFORMATIONS
from trl_cancel.pipeline.weights import OF_GROUPS, WeightStage
from trl_cancel.playground.data import load_prompts

from .runs import DEFAULTS, OFF_POLICY, build, noisy_reward, train


G, B, T = 4, 8, 6
LOW, HIGH = 0.1, 0.2
SEQUENCE = {"importance_sampling_level": "sequence", "loss_type": "grpo", "per_device_train_batch_size": B}
ACCUMULATED = {"gradient_accumulation_steps": 4}
RANGE = {"epsilon": LOW, "epsilon_high": HIGH}


@pytest.fixture
def batch():
    """Two groups whose ratios lie inside the clipping range and outside, on both sides and for both signs."""
    torch.manual_seed(0)
    logps = -torch.rand(B, T, dtype=torch.float64)
    old_logps = logps + 0.1 * torch.randn_like(logps)
    old_logps -= torch.tensor([0.5, 0.02, -0.4, -0.05, 0.3, -0.3, 0.01, 0.04], dtype=torch.float64).unsqueeze(1)
    advantages = torch.randn(2, G, dtype=torch.float64)
    advantages -= advantages.mean(1, keepdim=True)
    mask = (torch.arange(T) < torch.tensor([6, 3, 1, 6, 4, 5, 2, 6]).unsqueeze(1)).long()
    return logps, old_logps, advantages.flatten(), mask


def harness(monkeypatch, model, transformation, **settings):
    return LossHarness(monkeypatch, model, **{**SEQUENCE, **RANGE, "group_weights": transformation, **settings})


def post_clip(ratio, advantage):
    return references.post_clip_weight(ratio, advantage, LOW, HIGH)


def two_sided(ratio, advantage, delta):
    """TRL's surrogate as a weight: min(min(r, delta) A, clip(r) A) / A."""
    bounded, clipped = min(ratio, delta), min(max(ratio, 1 - LOW), 1 + HIGH)
    return min(bounded * advantage, clipped * advantage) / advantage


def weights_of_groups(
    transformation,
    ratios,
    advantages,
    active,
    region="none",
    correction=None,
    clip=post_clip,
    low=1 - LOW,
    high=1 + HIGH,
):
    """The weights of every rollout, one group at a time, from the loop references."""
    weights = []
    for first in range(0, len(ratios), G):
        members = [i for i in range(first, first + G) if active[i]]
        clipped = {i: clip(ratios[i], advantages[i]) for i in members}
        if region == "mask":
            members = [i for i in members if clipped[i] == ratios[i]]
        top = high if callable(high) else lambda advantage: high
        if region == "group" and any(not low <= ratios[i] <= top(advantages[i]) for i in members):
            members = []
        before = [clipped[i] * (correction[i] if correction else 1.0) for i in members]
        consistent = dict(
            zip(members, references.consistent(transformation, before, [advantages[i] for i in members]), strict=True)
        )
        weights += [consistent.get(i, 0.0) for i in range(first, first + G)]
    return weights


def sequence_ratios(logps, old_logps, mask):
    return [
        references.ratio(new, old, counts, "sequence")[0]
        for new, old, counts in zip(logps.tolist(), old_logps.tolist(), mask.tolist(), strict=True)
    ]


def expected_gradient(weights, advantages, mask, loss_type, max_length):
    """-s A alpha, the gradient of the loss by each log-prob (Eq. 68)."""
    alpha = references.normalisation(mask.tolist(), loss_type, max_length)
    rows = [
        [-weight * advantage * a for a in row]
        for weight, advantage, row in zip(weights, advantages.tolist(), alpha, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("region", ["none", "mask", "group"])
@pytest.mark.parametrize("loss_type", CLIPPED_LOSSES)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_update_is_the_weighted_score(monkeypatch, tiny_model, batch, transformation, loss_type, region):
    logps, old_logps, advantages, mask = batch
    loss_of = harness(monkeypatch, tiny_model, transformation, loss_type=loss_type, group_weights_trust_region=region)
    _, by_logps = loss_of(*batch)
    weights = weights_of_groups(
        transformation, sequence_ratios(logps, old_logps, mask), advantages.tolist(), [True] * B, region
    )
    assert region == "group" or any(weights)
    expected = expected_gradient(weights, advantages, mask, loss_type, loss_of.trainer.max_completion_length)
    torch.testing.assert_close(by_logps, expected, rtol=1e-9, atol=1e-12)
    assert loss_of.forward_passes == 1


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_cispo(monkeypatch, tiny_model, batch, transformation):
    """The bound is on the ratio itself, on one side, and cuts no gradient off."""
    logps, old_logps, advantages, mask = batch
    loss_of = harness(monkeypatch, tiny_model, transformation, loss_type="cispo", epsilon_high=1.3)
    _, by_logps = loss_of(*batch)
    clipped = [min(ratio, 1.3) for ratio in sequence_ratios(logps, old_logps, mask)]
    assert 1.3 in clipped
    weights = [
        weight
        for first in (0, G)
        for weight in references.consistent(
            transformation, clipped[first : first + G], advantages[first : first + G].tolist()
        )
    ]
    expected = expected_gradient(weights, advantages, mask, "dapo", None)
    torch.testing.assert_close(by_logps, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("region", ["none", "mask", "group"])
@pytest.mark.parametrize(
    ("settings", "clip", "low", "high"),
    [
        ({"symmetric_clip": True}, lambda s, a: min(s, 1 + HIGH), 0.0, 1 + HIGH),
        ({"delta": 1.3}, lambda s, a: two_sided(s, a, 1.3), 1 - LOW, 1 + HIGH),
        ({"delta": 1.12}, lambda s, a: two_sided(s, a, 1.12), 1 - LOW, lambda a: 1.12 if a >= 0 else 1 + HIGH),
        ({"loss_type": "cispo", "epsilon_high": 1.3}, lambda s, a: min(s, 1.3), 0.0, 1.3),
    ],
    ids=["symmetric", "delta", "delta within the range", "cispo"],
)
def test_other_clipping(monkeypatch, tiny_model, batch, settings, clip, low, high, region):
    """The weight is what each kind of clipping leaves of the ratio, and its trust region follows its own range."""
    logps, _, advantages, mask = batch
    moved = torch.tensor([0.7, 1.5, 1.5, 1.0, 1.02, 1.1, 1.15, 0.95], dtype=torch.float64)
    old_logps = logps - moved.log().unsqueeze(1)
    loss_of = harness(monkeypatch, tiny_model, "rebalance", group_weights_trust_region=region, **settings)
    _, by_logps = loss_of(logps, old_logps, advantages, mask)
    ratios, active = sequence_ratios(logps, old_logps, mask), [True] * B
    assert any(ratio > 1.3 and a < 0 for ratio, a in zip(ratios, advantages.tolist(), strict=True))
    cutting = "none" if settings.get("loss_type") == "cispo" and region == "mask" else region
    weights = weights_of_groups(
        "rebalance", ratios, advantages.tolist(), active, cutting, clip=clip, low=low, high=high
    )
    loss_type = "dapo" if settings.get("loss_type") == "cispo" else "grpo"
    expected = expected_gradient(weights, advantages, mask, loss_type, None)
    torch.testing.assert_close(by_logps, expected, rtol=1e-9, atol=1e-12)


def test_who_does_not_take_part_stops_no_one_and_is_not_counted(monkeypatch, tiny_model, batch):
    """A rollout that the sampling correction has dropped: its ratio, far outside, neither rests its group nor is logged."""
    logps, _, advantages, mask = batch
    loss_of = harness(monkeypatch, tiny_model, "min", group_weights_trust_region="group")
    loss_of.trainer.use_vllm = loss_of.trainer.vllm_importance_sampling_correction = True
    old_logps = logps - 0.01
    old_logps[0] -= 2
    correction = torch.ones(B, 1, dtype=torch.float64)
    correction[0] = 0
    _, by_logps = loss_of(
        logps, old_logps, advantages, mask, importance_sampling_ratio=correction, sampling_per_token_logps=old_logps
    )
    assert by_logps[1:G].any()
    assert not by_logps[0].any()
    ratios = torch.tensor(sequence_ratios(logps, old_logps, mask), dtype=torch.float64)
    weights = torch.tensor(
        weights_of_groups("min", ratios.tolist(), advantages.tolist(), [False] + [True] * (B - 1)), dtype=torch.float64
    )
    metrics = loss_of.metrics
    assert metrics["group_weights/ratio_max"] == pytest.approx(ratios[1:].max().item())
    assert metrics["group_weights/weight_mean"] == pytest.approx(weights[1:].mean().item())
    assert metrics["group_weights/clip_fraction"] == 0
    before = ratios.clone()
    before[0] = 0
    expected = (before * advantages).view(2, G).var(1, correction=0).mean().item()
    assert metrics["cancel/asymmetry_before"] == pytest.approx(expected, rel=1e-5)


def test_off_policy_mask_does_not_look_at_the_sign_of_a_weight(monkeypatch, tiny_model):
    """A good rollout that drifted is kept, also where its weight has become negative."""
    ratios = torch.tensor([0.5, 8.0, 1.0], dtype=torch.float64)
    logps, advantages = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64)
    old_logps, mask = logps - ratios.log().unsqueeze(1), torch.ones(3, 2, dtype=torch.long)
    settings = {
        "num_generations": 3,
        "per_device_train_batch_size": 3,
        "group_weights_trust_region": "none",
        "epsilon": 0.99,
        "epsilon_high": 10.0,
    }
    gradients = []
    for threshold in (None, 0.1):
        with monkeypatch.context() as patch:
            loss_of = harness(patch, tiny_model, "orth", off_policy_mask_threshold=threshold, **settings)
            gradients.append(loss_of(logps, old_logps, advantages, mask)[1])
    assert (gradients[0][0] > 0).all(), "pushed down, though its advantage is positive"
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("mode", ["sequence", "token"])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_correction_for_the_sampling_engine(monkeypatch, tiny_model, batch, transformation, include, mode):
    """
    A correction is transformed with the ratio and acts once; one of tokens counts with its mean over the rollout, which
    is what TRL spreads over the tokens at this level.
    """
    logps, old_logps, advantages, mask = batch
    loss_of = harness(
        monkeypatch,
        tiny_model,
        transformation,
        group_weights_include_sampling_ratio=include,
        group_weights_trust_region="none",
    )
    loss_of.trainer.use_vllm = loss_of.trainer.vllm_importance_sampling_correction = True
    by_rollout = torch.tensor([0.7, 1.4, 0.0, 1.1, 2.0, 0.3, 1.0, 0.9], dtype=torch.float64)
    correction = by_rollout.unsqueeze(1) if mode == "sequence" else 0.5 + torch.rand(B, T, dtype=torch.float64)
    if mode == "token":
        correction[2] = 0  # no token of it is left
        by_rollout = (correction * mask).sum(1) / mask.sum(1)
    _, by_logps = loss_of(*batch, importance_sampling_ratio=correction, sampling_per_token_logps=old_logps)
    active = [ratio > 0 for ratio in by_rollout.tolist()]
    inside = by_rollout.tolist() if include else None
    weights = weights_of_groups(
        transformation, sequence_ratios(logps, old_logps, mask), advantages.tolist(), active, correction=inside
    )
    outside = [1.0] * B if include else by_rollout.tolist()
    multiplied = [weight * factor for weight, factor in zip(weights, outside, strict=True)]
    expected = expected_gradient(multiplied, advantages, mask, "grpo", None)
    torch.testing.assert_close(by_logps, expected, rtol=1e-9, atol=1e-12)
    pushes = (torch.tensor(multiplied, dtype=torch.float64) * advantages).view(2, G)
    norms = [
        torch.tensor(x, dtype=torch.float64).view(2, G).norm(dim=1) for x in (weights, outside * advantages.numpy())
    ]
    told = loss_of.metrics["group_weights/orthogonality"]
    assert told == pytest.approx((pushes.sum(1).abs() / (norms[0] * norms[1])).mean().item(), rel=1e-5, abs=1e-9)
    if include and transformation != "identity":
        assert pushes.sum(1).abs().max() < 1e-9


def test_token_credit_shares_the_mean_correction_of_its_rollout(monkeypatch, tiny_model, batch):
    """As the rollout's tokens do without credit: a credit of nearly 1 changes the update hardly, whatever the tokens'."""
    logps, old_logps, advantages, mask = batch
    gradients = []
    for credit in (0.0, 1e-9):
        with monkeypatch.context() as patch:
            loss_of = harness(patch, tiny_model, "none", advantage_sign="both", nthr=True)
            loss_of.trainer._credits.in_loss = []  # the credited advantages are given
            loss_of.trainer.use_vllm = loss_of.trainer.vllm_importance_sampling_correction = True
            correction = torch.rand(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            credited = advantages.unsqueeze(1) * (1 + credit * torch.arange(T)) if credit else advantages
            extra = {"importance_sampling_ratio": correction, "sampling_per_token_logps": old_logps}
            gradients.append(loss_of(logps, old_logps, credited, mask, **extra)[1])
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("sampler", ["policy", "engine"])
@pytest.mark.parametrize("transformation", TRANSFORMATIONS[1:])
def test_rollouts_that_are_dropped_leave_the_rest_consistent(monkeypatch, tiny_model, batch, transformation, sampler):
    """A truncated completion (empty mask) and one that the off-policy mask drops; what is left still balances."""
    logps, old_logps, advantages, mask = batch
    mask[1] = 0
    threshold = 0.2
    loss_of = harness(
        monkeypatch,
        tiny_model,
        transformation,
        group_weights_trust_region="none",
        loss_type="dr_grpo",
        off_policy_mask_threshold=threshold,
    )
    # The engine's own log-probs, where there are any, say how far a rollout has drifted.
    sampling = old_logps if sampler == "policy" else logps + 0.5 * (torch.arange(B) % 3 == 0).unsqueeze(1)
    extra = {} if sampler == "policy" else {"sampling_per_token_logps": sampling}
    _, by_logps = loss_of(logps, old_logps, advantages, mask, **extra)
    drift = ((sampling - logps) * mask).sum(1) / mask.sum(1).clamp(min=1)
    kept = ~((advantages < 0) & (drift > threshold))
    assert not kept.all()
    active = kept & mask.any(1)
    weights = weights_of_groups(
        transformation, sequence_ratios(logps, old_logps, mask), advantages.tolist(), active.tolist()
    )
    length = loss_of.trainer.max_completion_length
    expected = expected_gradient(weights, advantages, mask, "dr_grpo", length)
    torch.testing.assert_close(by_logps, expected, rtol=1e-9, atol=1e-12)
    assert (torch.tensor(weights, dtype=torch.float64) * advantages).view(2, G).sum(1).abs().max() < 1e-9
    assert not by_logps[~active].any()


def test_tool_results_count_for_nothing(monkeypatch, tiny_model, batch):
    """Neither in the ratio nor in the update."""
    logps, old_logps, advantages, mask = batch
    tool_mask = torch.ones_like(mask)
    tool_mask[:, 0] = 0
    tool_mask[2] = 1  # it has one token only
    loss_of = harness(monkeypatch, tiny_model, "min")
    _, by_logps = loss_of(*batch, tool_mask=tool_mask)
    elsewhere = old_logps + 3.0 * (1 - tool_mask)
    _, moved = loss_of(logps, elsewhere, advantages, mask, tool_mask=tool_mask)
    assert torch.equal(by_logps, moved)
    assert by_logps.any()
    assert not by_logps[tool_mask == 0].any()


def test_kl_term_stays_what_it_is(monkeypatch, tiny_model, batch):
    """The gradient of the KL term is added to that of the weighted score, whatever the weights."""
    reference = batch[0] + 0.2 * torch.randn_like(batch[0])
    settings = {"use_bias_correction_kl": False}
    gradients = {}
    for transformation in ("none", "min"):
        for beta in (0.0, 0.5):
            with monkeypatch.context() as patch:
                loss_of = harness(patch, tiny_model, transformation, beta=beta, **settings)
                _, gradients[transformation, beta] = loss_of(*batch, ref_per_token_logps=reference)
    kl = {name: gradients[name, 0.5] - gradients[name, 0.0] for name in ("none", "min")}
    assert kl["none"].any()
    torch.testing.assert_close(kl["min"], kl["none"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("transformation", ["min", "orth"])
def test_on_policy_groups_are_left_alone(monkeypatch, tiny_model, batch, transformation):
    logps, _, advantages, mask = batch
    gradients = []
    for weights in ("none", transformation):
        with monkeypatch.context() as patch:
            gradients.append(harness(patch, tiny_model, weights)(logps, logps.clone(), advantages, mask)[1])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-15)


def test_scale(monkeypatch, tiny_model, batch):
    gradients = []
    for scale in (1.0, 0.5):
        with monkeypatch.context() as patch:
            gradients.append(harness(patch, tiny_model, "min", group_weights_scale=scale)(*batch)[1])
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], 0.5 * gradients[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_without_stop_gradient(monkeypatch, tiny_model, batch, transformation, loss_type):
    """
    The gradient is that of -sum of A s(theta) times each rollout's share of the loss: zero where the weights are
    orthogonal whatever theta is and rollouts count alike, and not where they count with their lengths.
    """
    logps, old_logps, advantages, mask = batch
    loss_of = harness(
        monkeypatch,
        tiny_model,
        transformation,
        group_weights_stop_gradient=False,
        group_weights_trust_region="none",
        loss_type=loss_type,
    )
    value, by_logps = loss_of(*batch)
    shares = [sum(row) for row in references.normalisation(mask.tolist(), loss_type, None)]

    def objective(log_probs):
        ratios = sequence_ratios(log_probs, old_logps, mask)
        weights = weights_of_groups(transformation, ratios, advantages.tolist(), [True] * B)
        return -sum(w * a * share for w, a, share in zip(weights, advantages.tolist(), shares, strict=True))

    assert value.item() == pytest.approx(objective(logps), abs=1e-9)
    step, differences = 1e-6, torch.zeros_like(logps)
    for i in range(B):
        for t in range(T):
            up, down = logps.clone(), logps.clone()
            up[i, t] += step
            down[i, t] -= step
            differences[i, t] = (objective(up) - objective(down)) / (2 * step)
    torch.testing.assert_close(by_logps, differences, rtol=1e-5, atol=1e-8)
    assert bool(by_logps.abs().max() > 1e-6) == (transformation == "identity" or loss_type == "dapo")


def test_metrics(monkeypatch, tiny_model, batch):
    logps, old_logps, advantages, mask = batch
    loss_of = harness(monkeypatch, tiny_model, "orth", group_weights_trust_region="none")
    loss_of(*batch)
    ratios = sequence_ratios(logps, old_logps, mask)
    rows = list(zip(ratios, advantages.tolist(), strict=True))
    before = [references.post_clip_weight(ratio, advantage, LOW, HIGH) for ratio, advantage in rows]
    after = weights_of_groups("orth", ratios, advantages.tolist(), [True] * B)

    def asymmetry(weights):
        pushes = torch.tensor(weights, dtype=torch.float64) * advantages
        return pushes.view(2, G).var(1, correction=0).mean().item()

    metrics = loss_of.metrics
    assert metrics["group_weights/ratio_min"] == pytest.approx(min(ratios), rel=1e-5)
    assert metrics["group_weights/ratio_max"] == pytest.approx(max(ratios), rel=1e-5)
    assert metrics["group_weights/weight_mean"] == pytest.approx(sum(after) / B, rel=1e-5)
    clipped = sum(weight != ratio for weight, ratio in zip(before, ratios, strict=True)) / B
    assert metrics["group_weights/clip_fraction"] == pytest.approx(clipped)
    assert 0 < clipped < 1
    assert metrics["group_weights/orthogonality"] == pytest.approx(0, abs=1e-7)
    assert metrics["cancel/asymmetry_before"] == pytest.approx(asymmetry(before), rel=1e-5)
    assert metrics["cancel/asymmetry"] == pytest.approx(asymmetry(after), rel=1e-5)
    assert metrics["cancel/asymmetry"] != pytest.approx(metrics["cancel/asymmetry_before"], rel=1e-3)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_asymmetry_of_stock_ratios(monkeypatch, tiny_model, batch, level):
    """GRPO's and GSPO's, for comparison: the mean weight of a rollout's tokens, 0 where the gradient is cut off."""
    logps, old_logps, advantages, mask = batch
    loss_of = harness(monkeypatch, tiny_model, "none", importance_sampling_level=level)
    loss_of(*batch)
    weights = []
    for i, advantage in enumerate(advantages.tolist()):
        low, high = references.stock_bounds(LOW, HIGH)(advantage)
        ratios = references.ratio(logps[i].tolist(), old_logps[i].tolist(), mask[i].tolist(), level)
        slopes = [r if low <= r <= high else 0.0 for r, counts in zip(ratios, mask[i].tolist(), strict=True) if counts]
        weights.append(sum(slopes) / len(slopes))
    pushes = torch.tensor(weights, dtype=torch.float64) * advantages
    expected = pushes.view(2, G).var(1, correction=0).mean().item()
    assert loss_of.metrics["cancel/asymmetry"] == pytest.approx(expected, rel=1e-5)


# The toy problem of Appendix A: "answer is 25" and "answer is 20" share two tokens; "20" and "10+10=20" are both right.


@pytest.mark.parametrize("transformation", ["none", *TRANSFORMATIONS[1:]])
def test_shared_prefix_of_the_toy_problem(monkeypatch, tiny_model, transformation):
    """GSPO pushes the shared prefix (Eq. 38); consistent weights do not."""
    loss_of = harness(
        monkeypatch,
        tiny_model,
        transformation,
        num_generations=2,
        per_device_train_batch_size=2,
        group_weights_trust_region="none",
    )
    logps = torch.tensor([[0.05, 0.02, 0.06], [0.05, 0.02, -0.1]], dtype=torch.float64)
    mask, advantages = torch.ones(2, 3, dtype=torch.long), torch.tensor([-1.0, 1.0], dtype=torch.float64)
    _, by_logps = loss_of(logps, torch.zeros_like(logps), advantages, mask)
    assert by_logps[:, 2].abs().min() > 0.1, "what differs is learned"
    shared = by_logps[:, :2].sum(0).abs()
    assert shared.max() < 1e-12 if transformation != "none" else shared.min() > 1e-3


@pytest.mark.parametrize(("transformation", "alike"), [("none", False), ("min", True)])
def test_equivalent_answers_of_the_toy_problem(monkeypatch, tiny_model, transformation, alike):
    """GSPO pushes the likelier of two right answers harder, which narrows the policy; Min-Replace pushes both alike."""
    loss_of = harness(
        monkeypatch,
        tiny_model,
        transformation,
        num_generations=3,
        per_device_train_batch_size=3,
        group_weights_trust_region="none",
    )
    logps = torch.tensor([[0.05, 0.0, 0.0], [0.05, 0.1, 0.1], [-0.05, -0.1, -0.02]], dtype=torch.float64)
    advantages = torch.tensor([-2 / 3, 1 / 3, 1 / 3], dtype=torch.float64)
    _, by_logps = loss_of(logps, torch.zeros_like(logps), advantages, torch.ones(3, 3, dtype=torch.long))
    assert torch.allclose(by_logps[1], by_logps[2]) == alike


# Where the members of a group are

MOVED = {"num_generations": 4, "num_iterations": 3, "max_steps": 6, "importance_sampling_level": "sequence"}
CUTS = {
    "whole": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "two micro-batches": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "four micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "eight micro-batches": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
}


def canned(prompts, trainer):
    """Rollouts that do not depend on how they are cut: by prompt and number in the group."""
    tokenizer = trainer.processing_class
    prompt_ids = [tokenizer(prompt[0]["content"])["input_ids"] for prompt in prompts]
    completions = [[20, 21, 16 + (sum(ids) + 3 * n) % 10, 16 + n % 4, 3] for n, ids in enumerate(prompt_ids)]
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": [[0.0] * 5 for _ in prompts]}


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_same_update_however_groups_are_cut(tiny_model, monkeypatch, transformation, loss_type):
    """Eight rollouts an optimizer step, as one micro-batch, two, four and eight."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    settings = {**MOVED, "loss_type": loss_type, "group_weights": transformation, "learning_rate": 2e-3}
    runs = {
        cut: train(tiny_model, **settings, **sizes, arguments={"rollout_func": canned}) for cut, sizes in CUTS.items()
    }
    whole = runs["whole"]
    assert any(entry.get("group_weights/ratio_max", 1) > 1.01 for entry in whole.logs)
    for run in runs.values():
        for name, value in whole.weights.items():
            torch.testing.assert_close(run.weights[name], value, rtol=1e-4, atol=1e-5)
        for entry, expected in zip(run.logs[:-1], whole.logs[:-1], strict=True):
            shared = {key: value for key, value in expected.items() if key.startswith(("group_weights/", "cancel/"))}
            assert {key: entry[key] for key in shared} == pytest.approx(shared, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("sizes", "extra"),
    [
        ({"per_device_train_batch_size": 4, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 8}, 0),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 3}, 0),
        # Four optimizer steps a generation batch, used twice: all but the first need a pass of two micro-batches.
        (
            {
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "steps_per_generation": 8,
                "num_iterations": 2,
                "max_steps": 8,
            },
            7 * 2,
        ),
    ],
    ids=["whole groups", "on-policy", "spread"],
)
def test_forward_passes(tiny_model, monkeypatch, sizes, extra):
    """None of its own where groups are whole or on-policy; otherwise one without gradients for each optimizer step."""
    passes = {True: 0, False: 0}
    forward = trl.GRPOTrainer._get_per_token_logps_and_entropies

    def counted(self, model, *args, **kwargs):
        passes[torch.is_grad_enabled()] += 1
        return forward(self, model, *args, **kwargs)

    monkeypatch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", counted)
    settings = {**sizes, "importance_sampling_level": "sequence"}
    train(tiny_model, **settings)
    stock = dict(passes)
    passes.update({True: 0, False: 0})
    train(tiny_model, **settings, group_weights="min")
    assert passes == {True: stock[True], False: stock[False] + extra}


def test_weights_ahead_are_those_of_the_loss(tiny_model, monkeypatch):
    """The pass before the step and the loss's own forward pass see the same ratios."""
    seen, weigh = [], WeightStage._of_groups

    def compared(self, weigher, inputs, logps):
        assert OF_GROUPS in inputs
        ahead = weigh(self, weigher, dict(inputs), logps)
        rows = {name: value for name, value in inputs.items() if name != OF_GROUPS}
        seen.append((ahead.squeeze(1), self.update.ratios(rows, logps.detach()).squeeze(1)))
        return ahead

    monkeypatch.setattr(WeightStage, "_of_groups", compared)
    settings = {**MOVED, **CUTS["four micro-batches"], "loss_type": "grpo", "epsilon": 0.5}
    train(tiny_model, **settings, group_weights="identity", group_weights_trust_region="none")
    weights, ratios = (torch.cat(column) for column in zip(*seen, strict=True))
    assert (ratios - 1).abs().max() > 0.02
    inside = (ratios - 1).abs() < 0.4
    torch.testing.assert_close(weights[inside], ratios[inside], rtol=1e-4, atol=1e-5)


def claimed_log_probs(prompts, trainer):
    """Canned rollouts of a sampler that claims to have been certain of every token."""
    ids = [trainer.processing_class(prompt[0]["content"])["input_ids"] for prompt in prompts]
    completions = [[20, 21, 16 + (sum(row) + 3 * i) % 10, 16 + i % 4, 3] for i, row in enumerate(ids)]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [[0.0] * 5 for _ in prompts]}


def test_off_policy_mask_sees_the_policy_however_groups_are_cut(tiny_model):
    """On policy no log-probs are needed for the ratios, but for the drift from those that the sampler claims."""
    logs = [
        train(
            tiny_model,
            **{**DEFAULTS, **SEQUENCE, **sizes, "max_steps": 1},
            group_weights="min",
            off_policy_mask_threshold=0.1,
            arguments={"rollout_func": claimed_log_probs},
        ).logs[0]
        for sizes in ({"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 2, **ACCUMULATED})
    ]
    assert [log["group_weights/weight_mean"] for log in logs if "group_weights/weight_mean" in log] in ([], [0.0, 0.0])
    assert [log["grad_norm"] for log in logs] == [0.0, 0.0], "all negative rollouts are dropped, so min leaves nothing"


def test_on_policy_run_is_trls(tiny_model):
    """Also where the batch could be cut anew: there is nothing to weigh."""
    settings = {**SEQUENCE, **ACCUMULATED, "per_device_train_batch_size": 4, "max_steps": 3}
    ours = train(tiny_model, **settings, group_weights="min")
    theirs = train(tiny_model, trl.GRPOTrainer, **settings)
    for log, expected in zip(ours.logs, theirs.logs, strict=True):
        assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


TORN = {**SEQUENCE, **ACCUMULATED, "per_device_train_batch_size": 4, "max_steps": 2}


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_torn_groups_on_policy(tiny_model, monkeypatch, transformation):
    """TRL's own micro-batches hold parts of groups there, and the weights are those of the true groups: all 1."""
    seen, freeze = [], WeightStage._freeze_ratios

    def watched(self, inputs, logps, weighted_advantages):
        seen.append((inputs["group_ids"].clone(), weighted_advantages / inputs["advantages"].view(-1, 1)))
        freeze(self, inputs, logps, weighted_advantages)

    monkeypatch.setattr(WeightStage, "_freeze_ratios", watched)
    run = train(tiny_model, **TORN, group_weights=transformation)
    assert any(len(ids.unique()) > 1 for ids, _ in seen), "the micro-batches hold parts of groups"
    weights = torch.cat([weight for _, weight in seen])
    torch.testing.assert_close(weights.nan_to_num(1.0), torch.ones_like(weights), rtol=1e-5, atol=1e-5)
    assert all(entry.get("group_weights/orthogonality", 0) < 1e-5 for entry in run.logs[:-1])
    theirs = train(tiny_model, trl.GRPOTrainer, **TORN)
    for name, value in theirs.weights.items():
        torch.testing.assert_close(run.weights[name], value, rtol=1e-5, atol=1e-6)


def test_groups_are_balanced_where_members_are_missing_on_policy(tiny_model):
    """Truncated completions are masked out, so the others' advantages do not sum to zero although all ratios are 1."""
    settings = {**TORN, "mask_truncated_completions": True, "max_completion_length": 3, "max_steps": 4}
    told = [
        entry["group_weights/orthogonality"]
        for entry in train(tiny_model, **settings, group_weights="min").logs
        if "group_weights/orthogonality" in entry
    ]
    assert max(told) < 1e-5
    untold = train(tiny_model, **settings, group_weights="identity").logs
    assert any(entry.get("group_weights/orthogonality", 0) > 1e-2 for entry in untold)


def test_parts_of_groups_are_an_error(monkeypatch, tiny_model, batch):
    logps, old_logps, advantages, mask = batch
    loss_of = harness(monkeypatch, tiny_model, "min")
    with pytest.raises(RuntimeError, match=r"groups of 4 rollouts were to be made of groups of \[3, 5\]"):
        loss_of(logps, old_logps, advantages, mask, group_ids=torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]))


# What is said and refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, True),
        ({"gradient_accumulation_steps": 4}, True),
        ({"mask_truncated_completions": True}, False),
        ({"mask_truncated_completions": True, "group_weights": "identity"}, True),
        ({"off_policy_mask_threshold": 0.1}, False),
        ({"group_weights_scale": 0.5, "group_weights": "identity"}, False),
        ({"group_weights_stop_gradient": False}, False),
        (OFF_POLICY, False),
        ({"num_iterations": 2}, False),
    ],
)
def test_notice_where_nothing_can_change(tiny_model, caplog, settings, said):
    with caplog.at_level(logging.WARNING):
        build(tiny_model, **{"group_weights": "min", "importance_sampling_level": "sequence", **settings})
    assert bool(re.search(r"group_weights='\w+' changes nothing here", caplog.text)) == said


def test_named_trainers_have_the_papers_settings(tiny_model, tmp_path):
    sizes = {name: value for name, value in DEFAULTS.items() if name not in ("learning_rate", "num_generations")}
    for trainer_class, config, tag in (
        (DFPOTrainer, DFPOConfig, "dfpo"),
        (GRPOFixTrainer, GRPOFixConfig, "grpo-fix"),
    ):
        args = config(output_dir=str(tmp_path / tag), **{**sizes, "per_device_train_batch_size": 8, "max_steps": 1})
        trainer = trainer_class(tiny_model, noisy_reward, args, load_prompts("train", 64))
        assert (args.num_generations, args.learning_rate, args.beta) == (32, 8e-7, 0.0)
        assert args.layout.updates_per_generation == 8
        trainer.train()
        trainer.create_model_card("a-model")
        card = (tmp_path / tag / "README.md").read_text()
        assert "2604.13088" in card
        assert tag in card
    assert (DFPOConfig(**DEFAULTS).group_weights, GRPOFixConfig(**DEFAULTS).symmetric_clip) == ("min", True)


def test_named_trainers_refuse_a_configuration_that_is_not_theirs(tiny_model):

    for config in (CancelGRPOConfig, trl.GRPOConfig, GRPOFixConfig):
        with pytest.raises(
            TypeError, match=f"args is a {config.__name__}; pass a DFPOConfig, which holds the paper's"
        ):
            DFPOTrainer(tiny_model, noisy_reward, config(**DEFAULTS), load_prompts("train", 8))
