"""The probe against updates and passes written out by hand, and against the trainer; and that it leaves no trace."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoTokenizer, TrainerCallback

from tests.runs import build, load, noisy_reward, weights_of
from trl_cancel import CancelGRPOTrainer, Rollouts
from trl_cancel.diagnostics import UpdateProbe, Variant, sample_rollouts
from trl_cancel.diagnostics.probing.masking import CONDITIONS, boost_rate, masking_effects
from trl_cancel.diagnostics.probing.off_policy import off_policy_steps
from trl_cancel.diagnostics.probing.sampling import group_advantages
from trl_cancel.methods import NAMED
from trl_cancel.playground.data import load_prompts


def rollouts_of(model, path, prompts=4, **settings):
    settings = {"num_generations": 4, "max_completion_length": 6, "temperature": 0.9, **settings}
    rows = list(load_prompts("train", prompts))
    return sample_rollouts(model, AutoTokenizer.from_pretrained(path), rows, as_reward, **settings)


def as_reward(prompts, completions, completion_ids, **columns):
    return noisy_reward(completion_ids)


@pytest.fixture
def probed(tiny_model):
    model = load(tiny_model).double()
    return UpdateProbe(model, rollouts_of(model, tiny_model), learning_rate=0.05, batch_size=5)


def plain_logps(model, rollouts):
    """Log-probabilities from the model's own full logits."""
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.mask], 1)
    logits = model(input_ids=ids, attention_mask=mask).logits / rollouts.temperature
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return logps[:, rollouts.prompt_ids.size(1) - 1 :] * rollouts.mask


def test_before_is_a_plain_pass(probed):
    with torch.no_grad():
        torch.testing.assert_close(probed.before, plain_logps(probed.model, probed.rollouts))


@pytest.mark.parametrize("name", ["grpo", "positive_only", "negative_only", "nthr", "nthr_random", "delta", "dfpo"])
def test_shifts_against_an_update_by_hand(probed, name):
    rollouts, weights = probed.rollouts, probed.weights(name)
    model = copy.deepcopy(probed.model)
    loss = -(weights * plain_logps(model, rollouts)).sum() / rollouts.mask.sum()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
        expected = plain_logps(model, rollouts) - plain_logps(probed.model, rollouts)
    shifts = probed.shifts(name)
    assert shifts.abs().max() > 1e-3
    torch.testing.assert_close(shifts, expected, rtol=1e-9, atol=1e-12)


def test_part_of_the_rollouts(probed):
    rows = torch.tensor([4, 5, 6, 7])
    weights = probed.weights("grpo")
    gradient = probed.gradient(weights, rows)
    logps = plain_logps(probed.model, probed.rollouts)
    loss = -(weights * logps)[rows].sum() / probed.rollouts.mask[rows].sum()
    for found, expected in zip(gradient, torch.autograd.grad(loss, probed.parameters), strict=True):
        torch.testing.assert_close(found, expected)


def test_few_logits_at_a_time(tiny_model, probed, monkeypatch):
    from trl_cancel.diagnostics import forward

    weights = probed.weights("grpo")
    whole = probed.gradient(weights)
    monkeypatch.setattr(forward, "HELD_LOGITS", 70)  # three tokens
    torch.testing.assert_close(probed.log_probs(), probed.before)
    for found, expected in zip(probed.gradient(weights), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_output_layer_alone(tiny_model):
    model = load(tiny_model).double()
    probe = UpdateProbe(model, rollouts_of(model, tiny_model), learning_rate=1e-3)
    weights = probe.weights("grpo")
    shifts = probe.head_shifts(probe.head_step(weights))
    leaf = model.lm_head.weight.detach().clone().requires_grad_()

    def logps(weight):
        logits = probe.hidden @ weight.T / probe.rollouts.temperature
        return logits.log_softmax(1).gather(1, probe.token_ids.unsqueeze(1)).squeeze(1)

    (gradient,) = torch.autograd.grad((weights[probe.active] * logps(leaf)).sum() / probe.active.sum(), leaf)
    moved = leaf + 1e-3 * gradient
    torch.testing.assert_close(shifts, (logps(moved) - logps(leaf)).detach(), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(probe.head_shifts(probe.head_step(weights), torch.tensor([3, 0])), shifts[[3, 0]])
    predicted = probe.predicted_shifts(weights)
    assert torch.corrcoef(torch.stack([predicted, shifts]))[0, 1] > 0.99
    assert (predicted.sign() == shifts.sign()).double().mean() > 0.95


# The trainer's loss on the same rollouts


class _Look(CancelGRPOTrainer):
    """Keeps the inputs of the losses of an optimizer step and the gradient that they add up to."""

    step_to_keep = 1

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept, self.before, self.gradient = [], None, None
        trainer = self

        class Watch(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
                if state.global_step == trainer.step_to_keep:
                    trainer.gradient = [parameter.grad.clone() for parameter in model.parameters()]

        self.add_callback(Watch())

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.state.global_step == self.step_to_keep:
            self.before = weights_of(self.accelerator.unwrap_model(model))
            self.kept.append({name: value for name, value in inputs.items() if value is not None})
        return super().compute_loss(model, inputs, *args, **kwargs)


def _rollouts(inputs, **changes):
    """The inputs of losses as the probe takes them."""
    rows = len(inputs["group_ids"])
    return Rollouts(
        **{field: inputs[field] for field in ("prompt_ids", "prompt_mask", "completion_ids", "group_ids")},
        mask=inputs["completion_mask"],
        advantages=inputs["rollout_advantages"],
        rewards=torch.zeros(rows, 1),
        reward_names=["reward"],
        examples=[{"prompt": ""}] * rows,
        num_generations=4,
        **changes,
    )


EPSILON = {"token": 0.02, "sequence": 0.3}  # some tokens and rollouts leave the range, not all


def _model_of(trainer, path):
    model = load(path).double()
    model.load_state_dict(trainer.before)
    return model


@pytest.mark.parametrize("name", [name for name in NAMED if name not in ("reward-balanced", "dynamic-sampling")])
def test_gradient_is_that_of_the_trainer(tiny_model, name):
    """Off policy, with each group in a micro-batch, and the token-level normalisation that the probe has."""
    settings = {**NAMED[name].settings, "loss_type": "dapo"}
    if name == "entropy-filter":
        settings["max_completion_entropy"] = 2.4  # of random weights
    level = settings.get("importance_sampling_level", "token")
    trainer = build(
        load(tiny_model).double(),
        _Look,
        arguments={"processing_class": AutoTokenizer.from_pretrained(tiny_model)},
        per_device_train_batch_size=8,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        num_iterations=2,
        max_steps=2,
        max_grad_norm=0,
        epsilon=EPSILON[level],
        learning_rate=3e-3,
        temperature=0.9,
        **settings,
    )
    trainer.train()
    (inputs,) = trainer.kept
    rollouts = _rollouts(inputs, temperature=0.9, old_logps=inputs["old_per_token_logps"])
    variant = Variant(name, epsilon=EPSILON[level])
    probe = UpdateProbe(_model_of(trainer, tiny_model), rollouts)
    # Token credit was settled when the rollouts were scored, by the weights of then.
    advantages = inputs["advantages"].double()
    weights = variant.weights(probe.rollouts, probe.before, advantages)
    assert (weights != 0).any()
    for found, expected in zip(probe.gradient(weights), trainer.gradient, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


class _LookAtFirst(_Look):
    step_to_keep = 0


def test_token_credit_is_that_of_the_trainer(tiny_model):
    """The credits that the trainer settles when the rollouts are scored are those that the probe settles."""
    for name in ("nthr", "delta", "positive-only", "conflict-tokens", "entropy-filter"):
        trainer = build(
            load(tiny_model).double(),
            _LookAtFirst,
            arguments={"processing_class": AutoTokenizer.from_pretrained(tiny_model)},
            per_device_train_batch_size=8,
            steps_per_generation=2,
            gradient_accumulation_steps=2,
            num_iterations=2,
            max_steps=1,
            **NAMED[name].settings,
        )
        trainer.train()
        rows = {
            key: torch.cat([inputs[key] for inputs in trainer.kept])
            for key in trainer.kept[0]
            if key != "num_items_in_batch"
        }
        order = rows["group_ids"].argsort(stable=True)
        rows = {key: value[order] for key, value in rows.items()}
        rollouts = _rollouts(rows)
        credited = UpdateProbe(_model_of(trainer, tiny_model), rollouts).credited_advantages(Variant(name))
        credited = credited.unsqueeze(1) if credited.dim() == 1 else credited
        given = rows["advantages"].unsqueeze(1) if rows["advantages"].dim() == 1 else rows["advantages"]
        mask = rows["completion_mask"]
        torch.testing.assert_close(credited.double() * mask, given.double() * mask, rtol=1e-5, atol=1e-6)


# No trace


def state_of(model, optimizer):
    generators = [torch.get_rng_state(), random.getstate(), str(np.random.get_state())]
    tensors = [
        *(parameter.detach().clone() for parameter in model.parameters()),
        *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None),
        *(value.clone() for entries in optimizer.state.values() for value in entries.values()),
    ]
    return tensors, generators, [module.training for module in model.modules()], copy.deepcopy(optimizer.param_groups)


def assert_same(first, second):
    assert len(first[0]) == len(second[0])
    assert all(torch.equal(one, other) for one, other in zip(first[0], second[0], strict=True))
    assert torch.equal(first[1][0], second[1][0])
    assert first[1][1:] == second[1][1:]
    assert first[2] == second[2]
    for one, other in zip(first[3], second[3], strict=True):
        assert {k: v for k, v in one.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}


def _fail_in_the_middle(probe):
    with probe.updated(probe.weights("grpo")):
        torch.rand(3), random.random(), np.random.rand()
        probe.optimizer.param_groups[0]["lr"] = 7.0
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_restores_everything(tiny_model, lora, fails):
    model = load(tiny_model)
    if lora:
        model = get_peft_model(model, LoraConfig(lora_dropout=0.5, task_type="CAUSAL_LM", init_lora_weights=False))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rollouts = rollouts_of(model, tiny_model)
    for parameter in optimizer.param_groups[0]["params"]:  # an optimizer in the middle of a run
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    probe = UpdateProbe(model, rollouts, optimizer)
    base = [parameter.clone() for parameter in model.parameters() if not parameter.requires_grad]
    before = state_of(model, optimizer)
    if fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            _fail_in_the_middle(probe)
    else:
        with probe.updated(probe.weights("grpo")):
            assert not torch.equal(next(iter(probe.parameters)), before[0][0]) or lora
            assert (probe.log_probs() - probe.before).abs().max() > 0
    assert_same(before, state_of(model, optimizer))
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert all(torch.equal(one, other) for one, other in zip(base, frozen, strict=True))
    assert torch.equal(probe.log_probs(), probe.before)


def test_restores_what_others_hold(tiny_model):
    """Gradients, buffers, the optimizer's settings and its other parameters: whatever is done to them meanwhile."""
    model = load(tiny_model)
    rollouts = rollouts_of(model, tiny_model)
    model.register_buffer("counter", torch.zeros(2))
    model.model.layers[0].eval()
    frozen, stranger = model.lm_head.weight.requires_grad_(False), torch.nn.Parameter(torch.zeros(3))
    rate = torch.tensor(1e-2)
    optimizer = torch.optim.AdamW([*model.parameters(), stranger], lr=rate)
    for parameter in [*model.parameters(), stranger]:
        parameter.grad = torch.ones_like(parameter)
    probe = UpdateProbe(model, rollouts, optimizer)
    before = state_of(model, optimizer), frozen.clone(), stranger.clone(), stranger.grad.clone()
    with probe.updated(probe.weights("grpo")):
        probe.model(input_ids=torch.arange(5).unsqueeze(0), labels=torch.arange(5).unsqueeze(0)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.zero_grad(set_to_none=False)
        optimizer.param_groups[0]["lr"].mul_(2)
        optimizer.param_groups[0]["initial_lr"] = 1.0
        model.counter += 1
        model.train()
    assert_same(before[0], state_of(model, optimizer))
    assert torch.equal(frozen, before[1])
    assert torch.equal(stranger, before[2])
    assert torch.equal(stranger.grad, before[3])
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(1e-2)
    assert model.counter.tolist() == [0, 0]


def test_leaves_a_trainer_at_work_alone(tiny_model):
    """Accelerate's state belongs to the process."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = load(tiny_model)
    probe = UpdateProbe(model, rollouts_of(model, tiny_model))
    for name in ("grpo", "dfpo", "delta"):
        probe.weights(name)
    assert accelerator.mixed_precision == "bf16"


def test_restores_an_optimizer_that_has_not_begun(probed):
    probed.optimizer = torch.optim.AdamW(probed.parameters, lr=1e-3)
    probed.shifts("grpo")
    assert len(probed.optimizer.state) == 0
    assert all(parameter.grad is None for parameter in probed.parameters)


def test_lora_moves_the_adapter_alone(tiny_model):
    model = get_peft_model(load(tiny_model), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    probe = UpdateProbe(model, rollouts_of(model, tiny_model))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    assert len(probe.parameters) == sum("lora_" in name for name, _ in model.named_parameters())
    assert probe.shifts("grpo").abs().max() > 0


def test_a_frozen_model_is_refused(tiny_model):
    model = load(tiny_model)
    rollouts = rollouts_of(model, tiny_model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="requires gradients"):
        UpdateProbe(model, rollouts)


def test_prompt_tuning_is_refused(tiny_model):
    model = load(tiny_model)
    rollouts = rollouts_of(model, tiny_model)
    with pytest.raises(ValueError, match="PROMPT_TUNING adapters add tokens"):
        UpdateProbe(get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), rollouts)


def test_half_precision_is_refused(tiny_model):
    model = load(tiny_model)
    rollouts = rollouts_of(model, tiny_model)
    with pytest.raises(ValueError, match=r"torch.bfloat16.*dtype='float32'"):
        UpdateProbe(model.bfloat16(), rollouts)


def test_an_unknown_variant_is_refused(probed):
    with pytest.raises(ValueError, match="'grop' is not one of grpo"):
        probed.shifts("grop")
    with pytest.raises(ValueError, match="nthr_et is not a setting"):
        Variant("nthr", nthr_et=0.0)
    with pytest.raises(ValueError, match="'minimum' is not one of"):
        Variant("dfpo", group_weights="minimum")


# The masking experiment


def test_masking_effects_against_updates_of_their_own(probed, monkeypatch):
    """Each effect is the difference of two whole updates, with and without the tokens."""
    from trl_cancel.diagnostics.probing import masking

    left_out, candidates, weights = [], [], probed.weights("grpo")
    shift = masking.Update.shift
    monkeypatch.setattr(
        masking.Update, "shift", lambda self, probe, place: (candidates.append(place), shift(self, probe, place))[1]
    )
    make = masking.Update.of.__func__
    monkeypatch.setattr(
        masking.Update, "of", classmethod(lambda cls, probe, some: (left_out.append(some), make(cls, probe, some))[1])
    )
    effects = masking_effects(probed, num_candidates=3, num_masked=2, low_confidence=0.9)
    assert torch.equal(left_out[0], weights)
    usual, parts, measured = probed.shifts("grpo"), iter(left_out[1:]), iter(candidates)
    usual_head = probed.head_shifts(probed.head_step(weights))
    everything = [tuple(place) for place in probed.active.nonzero().tolist()]
    for candidate in range(3):
        where, count = next(measured), None
        for name, (same, _) in CONDITIONS.items():
            assert next(measured) == where
            part = next(parts)
            removed = (part != 0).nonzero()
            count = len(removed) if count is None else count
            assert (part[part != 0] == weights[part != 0]).all()
            assert (probed.rollouts.advantages[removed[:, 0]] > 0).all()
            with probed.updated(weights - part):
                full = (usual - (probed.log_probs() - probed.before))[probed.active]
            head = usual_head - probed.head_shifts(probed.head_step(weights - part))
            # The model's normalisation layers compute in float32, so passes over other batches differ by rounding.
            assert full[where].item() == pytest.approx(effects.full[name][candidate].item(), abs=1e-6)
            assert head[where].item() == pytest.approx(effects.head[name][candidate].item(), rel=1e-6, abs=1e-12)
            assert where not in {everything.index(tuple(place)) for place in removed.tolist()}
            assert len(removed) == count
            if same:
                ids = probed.rollouts.completion_ids[removed[:, 0], removed[:, 1]]
                assert (ids == probed.token_ids[where]).all()


def test_boost_rate():
    assert boost_rate(torch.tensor([1.0, -1.0, 0.0, 2.0])) == pytest.approx(0.625)


# Off policy


@pytest.mark.parametrize("name", ["grpo", "grpo-fix", "gspo", "dfpo-min", "dfpo-orth"])
def test_off_policy_steps(probed, name):
    probed.optimizer = torch.optim.AdamW(probed.parameters, lr=3e-3)
    weights = [parameter.clone() for parameter in probed.parameters]
    steps = off_policy_steps(probed, name, num_steps=2, num_iterations=2)
    assert len(steps) == 4
    assert steps[0].residual == pytest.approx(0, abs=1e-6)  # on policy
    later = max(step.residual for step in steps[2:])
    assert (later < 1e-6) == (name in ("grpo-fix", "dfpo-min"))
    assert all(torch.equal(one, other) for one, other in zip(weights, probed.parameters, strict=True))


def test_torn_groups_leave_a_residual(probed):
    steps = off_policy_steps(probed, "grpo", num_steps=4, whole_groups=False)
    assert max(step.residual for step in steps) > 0.1


def test_steps_that_cannot_be_are_refused(probed):
    with pytest.raises(ValueError, match="num_steps=5"):
        off_policy_steps(probed, "grpo", num_steps=5)
    with pytest.raises(ValueError, match="whole_groups=False"):
        off_policy_steps(probed, "dfpo", whole_groups=False)


def test_advantages_are_those_of_trl(tiny_model):
    """Also where a reward function gives no reward; equal rewards, though, have none, not that of their rounding."""
    rewards = [[1, 0, None, 1], [None, 0, 1, None], [0.1] * 4, [None] * 4, [0.3, None, None, None]]
    flat = [value for group in rewards for value in group]
    trainer = build(
        tiny_model,
        per_device_train_batch_size=20,
        max_steps=1,
        arguments={"reward_funcs": lambda completions, **_: flat},
    )
    made = []
    score = trainer._scoring.score
    trainer._scoring.score = lambda *args: made.append(score(*args)) or made[0]
    trainer.train()
    values = torch.tensor([math.nan if value is None else value for value in flat]).view(5, 4)
    torch.testing.assert_close(group_advantages(values), made[0].batch["advantages"].view(5, 4), atol=1e-3, rtol=0)
    assert not group_advantages(values)[2:].any()
