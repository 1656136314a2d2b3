"""
Subclasses of the trainer, written as people write them for TRL's: what an override returns is what is trained on.

Each override is a mixin that goes before either trainer, so what it gets from this package's can be compared with what
it gets from TRL's.
"""

import logging
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from accelerate.logging import MultiProcessAdapter
from transformers import TrainerCallback
from trl.experimental.gmpo import GMPOTrainer

from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer, NTHRTrainer
from trl_cancel.pipeline.overrides import FOR_SUBCLASSES
from trl_cancel.upstream.hooks import private_names

from .methods import FirstTokens
from .runs import OFF_POLICY, assert_same_weights, build, noisy_reward, train, trained_by_trl, weights_of


class Rewards:
    """Doubled and turned round, seen by everything that judges by rewards."""

    def _calculate_rewards(self, *args, **kwargs):
        return -2 * super()._calculate_rewards(*args, **kwargs)


class OwnRewards:
    """Without asking the reward functions."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = [[float(sum(ids) % 5)] for ids in completion_ids_list]
        return self.accelerator.gather(torch.tensor(rewards, device=self.accelerator.device))


class NewBatch:
    """A new dictionary, with advantages of its own."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        rank = torch.arange(len(batch["advantages"])) % 4
        return {**batch, "advantages": 0.3 * batch["advantages"] + (rank - 1.5)}


class TokenAdvantages:
    """One advantage a token, as TRL's loss takes them."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        fading = 1 / (1 + torch.arange(batch["completion_ids"].size(1)))
        return {**batch, "advantages": batch["advantages"].unsqueeze(1) * fading}


class PreparedInputs:
    """Changes the micro-batch on its way to the loss."""

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        return {**inputs, "advantages": inputs["advantages"].clamp(max=1)}


class OwnPreparation:
    """Without this package's or TRL's: a buffer of its own, never shuffled."""

    def _prepare_inputs(self, generation_batch):
        every = self.args.steps_per_generation * self.num_iterations
        if self._step % every == 0:
            batch = self._generate_and_score_completions(generation_batch)
            rows = len(batch["advantages"]) // self.args.steps_per_generation
            self.own_buffer = [
                {
                    name: value[k * rows :][:rows] if isinstance(value, torch.Tensor) and value.dim() else value
                    for name, value in batch.items()
                }
                for k in range(self.args.steps_per_generation)
            ]
        return self.own_buffer[self._step % self.args.steps_per_generation]


class MoreLoss:
    """Another term."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + 1e-3 * sum(weight.square().sum() for weight in model.parameters())


class MoreLossWithin:
    """Another term, within."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        return loss + 1e-3 * sum(weight.square().sum() for weight in model.parameters())


class LossInputs:
    """Other inputs than it was given."""

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"] * 0.5})


class OwnLoss:
    """With TRL's forward pass, without its loss."""

    takes_token_advantages = True

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        length = inputs["completion_ids"].size(1)
        logps, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, length)
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        return -(advantages * logps * inputs["completion_mask"]).mean()


class OwnPass:
    """With a forward pass and a loss of its own."""

    takes_token_advantages = True

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        length = inputs["completion_ids"].size(1)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
        logps = logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
        return -(inputs["advantages"].view(len(ids), -1) * logps * inputs["completion_mask"]).mean()


class LogProbs:
    """What the loss reads is what the override makes of the log-probs."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return 0.9 * logps, entropies, loss


class OwnLogProbs:
    """Without TRL's."""

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
        logps = (logits / self.temperature).log_softmax(-1)
        entropies = -(logps.exp() * logps).sum(-1).detach()
        return logps.gather(-1, input_ids[:, -logits_to_keep:].unsqueeze(-1)).squeeze(-1), entropies, None


class Generation:
    """Shorter completions than were sampled."""

    def _generate_single_turn(self, *args, **kwargs):
        completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        return [ids[:4] for ids in completion_ids], logprobs


class Step:
    """What happens around a micro-step."""

    def training_step(self, *args, **kwargs):
        for weight in self.model.parameters():
            weight.data.mul_(0.999)
        return super().training_step(*args, **kwargs)


class Sampler:
    """Another order of the prompts, each repeated for its group."""

    def _get_train_sampler(self, dataset=None):
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation // self.num_generations
        order = [row for first in range(32, 64, rows) for row in range(first, first + rows)]
        uses = self.num_iterations * self.args.steps_per_generation
        return [
            row
            for first in range(0, len(order), rows)
            for _ in range(uses)
            for row in order[first : first + rows]
            for _ in range(self.num_generations)
        ]


class EntropyMask:
    """Another choice of tokens."""

    def get_high_entropy_mask(self, entropies, mask, threshold):
        return mask.bool() & (torch.arange(mask.size(1)) % 2 == 0)


OVERRIDES = {
    override.__name__: override
    for override in (
        *(Rewards, OwnRewards, NewBatch, TokenAdvantages, PreparedInputs, OwnPreparation, MoreLoss, MoreLossWithin),
        *(LossInputs, OwnLoss, OwnPass, LogProbs, OwnLogProbs, Generation, Step, Sampler, EntropyMask),
    )
}
SIZES = {"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 2e-3}
SPLIT = {**SIZES, **OFF_POLICY, "num_iterations": 1, "max_steps": 4}
SEQUENCE = {"importance_sampling_level": "sequence", "loss_type": "grpo"}
# What is on, and whether it acts on the way to the micro-batches ("prepared") or in TRL's loss ("loss").
FEATURES = {
    "positive-only": ({"advantage_sign": "positive", **SIZES}, {"prepared"}),
    "nthr, in the loss": ({"nthr": True, **SIZES}, {"prepared"}),
    "nthr, off policy": ({"nthr": True, **SPLIT}, {"prepared"}),
    "delta": ({"delta_credit": True, **SIZES}, {"prepared"}),
    "filter": ({"filter_zero_variance": True, **SIZES}, {"prepared"}),
    "balance": ({"reward_balance": 0.25, **SPLIT}, {"prepared"}),
    "symmetric clip": ({"symmetric_clip": True, **SPLIT}, {"loss"}),
    "symmetric clip, score": ({"symmetric_clip": True, "symmetric_clip_gradient": "score", **SPLIT}, {"loss"}),
    "min": ({"group_weights": "min", **SEQUENCE, **SPLIT}, {"prepared", "loss"}),
    "min, spread": (
        {
            "group_weights": "min",
            **SEQUENCE,
            **SPLIT,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 8,
        },
        {"prepared", "loss"},
    ),
    "shifts": ({"token_shift_steps": 1, **SIZES}, set()),
}
LEFT_OUT = {"OwnPreparation": ("_prepare_inputs", "prepared"), "OwnLoss": ("_compute_loss", "loss")}
LEFT_OUT["OwnPass"] = LEFT_OUT["OwnLoss"]


def subclass(override, base=CancelGRPOTrainer):
    return type(f"Mine{override.__name__}", (override, base), {})


def needs_quantile(name):
    return {"top_entropy_quantile": 0.5} if name == "EntropyMask" else {}


@pytest.mark.parametrize("sizes", [SIZES, {**SPLIT, "query_preserved": False}], ids=["whole", "split"])
@pytest.mark.parametrize("name", OVERRIDES)
def test_subclass_gets_what_it_gets_from_trl(tiny_model, name, sizes):
    """Bit for bit, with this package's metrics on."""
    override, settings = OVERRIDES[name], {**sizes, **needs_quantile(name)}
    ours = train(tiny_model, subclass(override), **settings)
    settings.pop("query_preserved", None)
    theirs = train(tiny_model, subclass(override, trl.GRPOTrainer), **settings)
    assert_same_weights(ours.weights, theirs.weights)
    plain = trained_by_trl(tiny_model, **settings)
    same = all(torch.equal(theirs.weights[name], plain.weights[name]) for name in plain.weights)
    assert not same or name in ("OwnPreparation", "OwnLogProbs"), "the override changes something"


def every_fourth():
    """All pairs; those of the default suite still have each override and each feature several times."""
    for i, name in enumerate(OVERRIDES):
        for j, feature in enumerate(FEATURES):
            marks = [] if (i + j) % 4 == 0 or name in LEFT_OUT else [pytest.mark.slow]
            yield pytest.param(name, feature, marks=marks, id=f"{name}-{feature}")


@pytest.mark.parametrize(("name", "feature"), list(every_fourth()))
def test_features_act_or_are_refused(tiny_model, name, feature):
    """What a method cannot do without is named before the training; everything else trains."""
    settings, acts_in = FEATURES[feature]
    hook, room = LEFT_OUT.get(name, (None, None))
    make = subclass(OVERRIDES[name])
    settings = {**settings, **needs_quantile(name)}
    if room in acts_in:
        with pytest.raises(
            ValueError, match=rf"{OVERRIDES[name].__name__}\.{hook} does not call super\(\)\.{hook}, but"
        ):
            build(tiny_model, make, **settings)
        return
    run = train(tiny_model, make, **settings)
    assert all(torch.isfinite(value).all() for value in run.weights.values())
    assert any(entry.get("grad_norm", 0) > 0 for entry in run.logs)


def watched(monkeypatch):
    """What reaches TRL's own loss."""
    seen, loss = [], trl.GRPOTrainer._compute_loss

    def look(self, model, inputs):
        seen.append(inputs["advantages"].detach().clone())
        return loss(self, model, inputs)

    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", look)
    return seen


@pytest.mark.parametrize("settings", [SIZES, SPLIT, {**SIZES, "filter_zero_variance": True}], ids=str)
def test_advantages_of_an_override_are_trained_on(tiny_model, monkeypatch, settings):
    """Also where this package cuts the micro-batches, or chooses the groups."""

    class Ranked(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            return {**batch, "advantages": torch.arange(len(batch["advantages"])) % 4 - 1.5}

    seen = watched(monkeypatch)
    train(tiny_model, type("Mine", (Ranked, CancelGRPOTrainer), {}), **settings)
    values = torch.cat(seen)
    assert set(values.tolist()) == {-1.5, -0.5, 0.5, 1.5}


def constant_reward(completion_ids, **kwargs):
    return [1.0] * len(completion_ids)


@pytest.mark.parametrize("settings", [{"nthr": True}, {"delta_credit": True}, {"filter_zero_variance": True}], ids=str)
def test_rewards_of_an_override_are_judged(tiny_model, settings):
    """Reward functions give all the same; the override makes rewards differ, and methods see that."""

    class Varied(CancelGRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            return rewards + torch.tensor(noisy_reward(completion_ids_list)).unsqueeze(1)

    run = train(tiny_model, Varied, **SIZES, **settings, arguments={"reward_funcs": constant_reward})
    assert all(entry["grad_norm"] > 0 for entry in run.logs[:-1])
    assert all(entry.get("balance/zero_variance_fraction", 0) < 1 for entry in run.logs[:-1])


def test_rewards_that_an_override_makes_equal_are_filtered(tiny_model):
    class Equal(CancelGRPOTrainer):
        def _calculate_rewards(self, *args):
            return torch.ones_like(super()._calculate_rewards(*args))

    logs = train(tiny_model, Equal, **SIZES, filter_zero_variance=True, max_generation_rounds=2).logs[:-1]
    assert {entry["balance/zero_variance_fraction"] for entry in logs} == {1.0}


def test_credit_multiplies_what_the_override_gives(tiny_model, monkeypatch):
    """Advantages of tokens, times this package's coefficients of tokens."""
    seen = watched(monkeypatch)
    credits = {"credits": [FirstTokens(weight=0.5)]}
    settings = {**SIZES, "max_steps": 1, "arguments": credits}
    train(tiny_model, subclass(TokenAdvantages), **settings)
    (found,) = seen
    monkeypatch.undo()
    seen = watched(monkeypatch)
    train(tiny_model, subclass(TokenAdvantages), **{**settings, "arguments": {}})
    ratio = (found / seen[0]).nan_to_num(1.0)
    assert set(ratio.flatten().tolist()) == {0.5, 1.0}


def test_a_hook_of_the_instance_is_heard_too(tiny_model):
    trainer = build(tiny_model, **SIZES)
    calculate, seen = trainer._calculate_rewards, []

    def doubled(*args):
        seen.append(len(args))
        return 2 * calculate(*args)

    trainer._calculate_rewards = doubled
    trainer.train()
    assert len(seen) == 4
    assert trainer._calculate_rewards is doubled


def test_metrics_that_cannot_be_read_are_left_out_with_one_warning(tiny_model, caplog):
    MultiProcessAdapter.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        logs = train(tiny_model, subclass(OwnPass), **SIZES).logs[:-1]
    assert not any(name.startswith("cancel/shared") for entry in logs for name in entry)
    assert caplog.text.count("cancel/* is left out: the loss of MineOwnPass cannot be read") == 1


def test_micro_batches_that_lost_what_methods_need(tiny_model):
    class Forgetful(CancelGRPOTrainer):
        def _prepare_inputs(self, generation_batch):
            inputs = super()._prepare_inputs(generation_batch)
            return {name: value for name, value in inputs.items() if name != "group_ids"}

    trainer = build(tiny_model, Forgetful, **SEQUENCE, **SPLIT, group_weights="min")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(
        RuntimeError, match="group_weights='min' could not act: Forgetful's micro-batches have no group_ids"
    ):
        trainer.train()
    assert_same_weights(before, dict(trainer.model.state_dict()))


class Twice:
    """TRL's loss in two halves."""

    def _compute_loss(self, model, inputs):
        return 0.5 * super()._compute_loss(model, inputs) + 0.5 * super()._compute_loss(model, inputs)


@pytest.mark.parametrize(
    "settings",
    [
        {**SPLIT, **SEQUENCE, "group_weights": "min"},
        {**SPLIT, "symmetric_clip": True, "symmetric_clip_gradient": "score"},
        {**SIZES, "nthr": True},
    ],
    ids=str,
)
def test_every_loss_has_its_weights(tiny_model, settings):
    """Also the second one that an override computes: two halves of it are the whole."""
    settings = {**settings, "epsilon": 0.001, "learning_rate": 2e-2}
    halves, whole = (train(tiny_model, make, **settings) for make in (subclass(Twice), CancelGRPOTrainer))
    for name, value in whole.weights.items():
        torch.testing.assert_close(halves.weights[name], value, rtol=1e-4, atol=1e-5)


def test_a_class_that_stands_after_this_packages(tiny_model, monkeypatch):
    """What it gives is trained on too; where methods would not see what it does, that is refused."""

    class Ranked(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            return {**batch, "advantages": torch.arange(len(batch["advantages"])) % 4 - 1.5}

    class Halved(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return 0.5 * super()._compute_loss(model, inputs)

    seen, constant = watched(monkeypatch), {"reward_funcs": constant_reward}
    mine = type("Mine", (CancelGRPOTrainer, Ranked), {})
    train(tiny_model, mine, **SIZES, advantage_sign="positive", arguments=constant)
    assert set(torch.cat(seen).tolist()) == {0.0, 0.5, 1.5}
    train(tiny_model, type("Mine", (CancelGRPOTrainer, Halved), {}), **SIZES)
    with pytest.raises(
        ValueError, match=r"overrides _compute_loss, but symmetric_clip=True acts there. Put it before"
    ):
        build(tiny_model, type("Mine", (CancelGRPOTrainer, Halved), {}), **SPLIT, symmetric_clip=True)


def test_advantages_of_a_subclass_are_something_to_weigh(tiny_model, caplog):
    """On policy too, where they need not sum to 0 in a group."""
    with caplog.at_level(logging.WARNING):
        build(tiny_model, subclass(NewBatch), **SIZES, **SEQUENCE, group_weights="orth")
    assert "changes nothing here" not in caplog.text


def plain_decorator(function):
    """Without functools.wraps."""

    def wrapper(self, *args):
        return function(self, *args)

    return wrapper


def loss_of_super(cls, trainer, model, inputs):
    return super(cls, trainer)._compute_loss(model, inputs)


class Never(CancelGRPOTrainer):
    def _compute_loss(self, model, inputs):
        return torch.zeros(())


class Decorated(CancelGRPOTrainer):
    @plain_decorator
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs)


class ByHelper(CancelGRPOTrainer):
    def _compute_loss(self, model, inputs):
        return self.loss_of(model, inputs)

    def loss_of(self, model, inputs):
        return super()._compute_loss(model, inputs)


class ByFunction(CancelGRPOTrainer):
    def _compute_loss(self, model, inputs):
        return loss_of_super(ByFunction, self, model, inputs)


class ByName(CancelGRPOTrainer):
    def _compute_loss(self, model, inputs):
        return getattr(super(), "_compute" + "_loss")(model, inputs)


class Past(Never):
    def _compute_loss(self, model, inputs):
        return CancelGRPOTrainer._compute_loss(self, model, inputs)


class PastBySuper(Never):
    def _compute_loss(self, model, inputs):
        return super(Never, self)._compute_loss(model, inputs)


class Partly(CancelGRPOTrainer):
    def __init__(self, *args, **kwargs):
        self.loss_of = partial(CancelGRPOTrainer._compute_loss, self)
        super().__init__(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        return self.loss_of(model, inputs)


@pytest.mark.parametrize(
    "make",
    [Decorated, ByHelper, ByFunction, ByName, Past, PastBySuper, Partly],
    ids=lambda make: make.__name__,
)
def test_super_may_be_reached_in_other_ways(tiny_model, make):
    """Nobody is blamed who calls it."""
    build(tiny_model, make, **SPLIT, symmetric_clip=True)


def test_who_does_not_call_super_is_blamed(tiny_model):
    """Through those that call it too."""

    class Calls(Never):
        @plain_decorator
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    for make in (Never, Calls):
        with pytest.raises(
            ValueError, match=r"^Never\._compute_loss does not call super\(\)\._compute_loss, but symm"
        ):
            build(tiny_model, make, **SPLIT, symmetric_clip=True)


def test_a_class_between_a_papers_trainer_and_the_packages(tiny_model):
    """As in class Mine(NTHRTrainer, Bonus): its overrides are told from those behind the package's trainer."""

    class Bonus(CancelGRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    class Forgets(CancelGRPOTrainer):
        def _compute_loss(self, model, inputs):
            return torch.zeros(())

    def make(other):
        mine = type("Mine", (NTHRTrainer, other), {"_config_class": CancelGRPOConfig})
        return build(tiny_model, mine, **SPLIT, symmetric_clip=True, nthr=True)

    make(Bonus)
    with pytest.raises(ValueError, match=r"Forgets\._compute_loss does not call super\(\)\._compute_loss"):
        make(Forgets)


def test_off_policy_mask_of_an_override_decides(tiny_model):
    """Which rollouts take part in a group's weights."""

    class KeepsAll(CancelGRPOTrainer):
        @staticmethod
        def get_off_policy_mask(advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold):
            return torch.ones_like(advantages)

    settings = {**SEQUENCE, **SPLIT, "group_weights": "min", "group_weights_trust_region": "none"}
    mine = train(tiny_model, KeepsAll, **settings, off_policy_mask_threshold=1e-9)
    assert_same_weights(mine.weights, train(tiny_model, **settings).weights)


class OfTrl:
    """A loss as TRL's users write it, for advantages of rollouts."""

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logps, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))
        ratio = torch.exp(logps - logps.detach())
        return -(ratio * inputs["advantages"].unsqueeze(1) * inputs["completion_mask"]).mean()


@pytest.mark.parametrize("other", [OfTrl, GMPOTrainer])
def test_a_loss_of_rollouts_gets_no_advantages_of_tokens(tiny_model, other):
    """They would broadcast to (B, B, T) in silence."""
    mine = type("Mine", (other, CancelGRPOTrainer), {})
    for credit in ({"nthr": True}, {"delta_credit": True}):
        name = next(iter(credit))
        with pytest.raises(ValueError, match=rf"{other.__name__}\._compute_loss .* but {name}=True gives it inputs"):
            build(tiny_model, mine, **SIZES, **credit)
    with pytest.raises(ValueError, match="but the token credit FirstTokens gives it inputs"):
        build(tiny_model, mine, **SIZES, arguments={"credits": [FirstTokens()]})
    build(tiny_model, type("Mine", (mine,), {"takes_token_advantages": True}), **SIZES, nthr=True)
    build(tiny_model, mine, **SIZES, advantage_sign="positive", max_completion_entropy=5.0)


def test_a_loss_that_only_looks_as_if_it_called_super(tiny_model):
    class Perhaps(OfTrl, CancelGRPOTrainer):
        def _compute_loss(self, model, inputs):
            return OfTrl._compute_loss(self, model, inputs)

    with pytest.raises(RuntimeError, match=r"nthr=True gives Perhaps's loss, .* of shape \(8, 6\)"):
        build(tiny_model, Perhaps, **SIZES, nthr=True).train()


def test_a_credit_of_rollouts_gives_no_advantages_of_tokens(tiny_model):
    class Halved:
        scope, by_rollout, columns = "rollout", True, 1

        def coefficients(self, rollouts):
            return torch.full((len(rollouts.mask), self.columns), 0.5)

    mine, credit = type("Mine", (OfTrl, CancelGRPOTrainer), {}), Halved()
    build(tiny_model, mine, **SIZES, arguments={"credits": [credit]}).train()
    credit.columns = 6
    with pytest.raises(ValueError, match="by_rollout=True promises one a rollout"):
        build(tiny_model, mine, **SIZES, arguments={"credits": [credit]}).train()


def in_chunks(loss, trainer, model, inputs):
    """The micro-batch in parts, which save memory."""
    parts = torch.arange(len(inputs["advantages"])).split(2)
    return sum(loss(model, only(inputs, rows)) for rows in parts) / len(parts)


def replayed(prepare, trainer, generation_batch):
    """Every second micro-batch is the one before, again."""
    inputs = prepare(generation_batch)
    before, trainer.before = getattr(trainer, "before", inputs), inputs
    return before if trainer._step % 2 else inputs


def half(prepare, trainer, generation_batch):
    return only(prepare(generation_batch), slice(0, None, 2))


def only(inputs, rows):
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in inputs.items()
    }


def hooked(hook, function, base=CancelGRPOTrainer):
    """A subclass with a hook that is given the one that it overrides."""

    def method(self, *args):
        return function(partial(getattr(base, hook), self), self, *args)

    return type("Mine", (base,), {hook: method})


class Numbered:
    """Credit that tells tokens and prompts apart, and waits for a forward pass."""

    scope, needs_states = "rollout", True

    def coefficients(self, rollouts):
        return numbers(vars(rollouts))


def numbers(rows):
    return 1.0 + rows["completion_ids"] + rows["prompt_ids"].sum(1, keepdim=True)


@pytest.mark.parametrize("function", [in_chunks, replayed, half], ids=lambda function: function.__name__)
@pytest.mark.parametrize("place", ["class", "object"])
def test_credits_are_of_the_rows_that_the_loss_is_of(tiny_model, monkeypatch, function, place):
    """Also those that need a forward pass, which otherwise wait for that of the loss."""
    seen, loss = [], trl.GRPOTrainer._compute_loss

    def look(self, model, inputs):
        seen.extend([inputs] * torch.is_grad_enabled())  # not those of a pass of this package's
        return loss(self, model, inputs)

    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", look)
    hook = "_compute_loss" if function is in_chunks else "_prepare_inputs"
    settings = {**SIZES, "gradient_accumulation_steps": 2, "steps_per_generation": 2, "max_steps": 2}
    make = hooked(hook, function) if place == "class" else CancelGRPOTrainer
    trainer = build(tiny_model, make, **settings, arguments={"credits": [Numbered()]})
    assert bool(trainer._credits.in_loss) == (place == "object")
    if place == "object":
        setattr(trainer, hook, partial(function, getattr(trainer, hook), trainer))
    trainer.train()
    assert len(seen) == (16 if function is in_chunks else 4)
    for inputs in seen:
        plain = inputs["rollout_advantages"].unsqueeze(1)
        expected = torch.where(inputs["completion_mask"].bool(), plain * numbers(inputs), plain)
        torch.testing.assert_close(inputs["advantages"], expected)


def test_a_hook_that_is_set_while_rollouts_wait(tiny_model):
    class Sets(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            trainer._prepare_inputs = partial(replayed, trainer._prepare_inputs, trainer)

    settings = {**SIZES, "gradient_accumulation_steps": 2, "steps_per_generation": 2, "max_steps": 2}
    trainer = build(tiny_model, **settings, nthr=True, arguments={"callbacks": [Sets()]})
    with pytest.raises(RuntimeError, match=r"CancelGRPOTrainer\._prepare_inputs was set .* nthr=True looks at"):
        trainer.train()


@pytest.mark.parametrize("settings", [{"nthr": True}, {"symmetric_clip": True, **SPLIT}], ids=str)
def test_compute_loss_as_trl_writes_it(tiny_model, settings):
    """It calls self._compute_loss, in a subclass or set on the object, and methods act all the same."""

    def own(model, inputs, return_outputs=False, num_items_in_batch=None):
        return trainer._compute_loss(model, inputs)

    class Mine(CancelGRPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return self._compute_loss(model, inputs)

    settings = {**SIZES, **settings}
    trainer = build(tiny_model, **settings)
    trainer.compute_loss = own
    trainer.train()
    whole, mine = train(tiny_model, **settings), train(tiny_model, Mine, **settings)
    for weights in (trainer.model.state_dict(), mine.weights):
        for name, value in whole.weights.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    assert "cancel/positive_fraction" in mine.logs[0].keys() & trainer.state.log_history[0].keys()


@pytest.mark.parametrize("place", ["class", "object", "during the training"])
def test_a_loss_that_is_not_this_packages(tiny_model, place, caplog):
    """Methods that would drop out are refused before an update; metrics are left out with one warning."""

    def own(model, inputs, return_outputs=False, num_items_in_batch=None):
        return sum(weight.square().sum() for weight in model.parameters())

    class Mine(CancelGRPOTrainer):
        takes_token_advantages = True

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return own(model, inputs)

    class Sets(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer.compute_loss = own

    def make(**settings):
        callbacks = {"callbacks": [Sets()]} if place == "during the training" else {}
        made = build(tiny_model, Mine if place == "class" else CancelGRPOTrainer, **settings, arguments=callbacks)
        if place == "object":
            made.compute_loss = own
            made.takes_token_advantages = True
        return made

    refusal = r"symmetric_clip=True (acts there|could not act)"
    if place == "class":
        with pytest.raises(ValueError, match=refusal):
            make(**SPLIT, symmetric_clip=True)
    else:
        trainer = make(**SPLIT, symmetric_clip=True)
        before = weights_of(trainer.model)
        with pytest.raises((ValueError, RuntimeError), match=refusal):
            trainer.train()
        assert_same_weights(before, weights_of(trainer.model))
    with caplog.at_level(logging.WARNING):
        trainer = make(**SIZES, delta_credit=True)
        trainer.train()
    assert caplog.text.count("is left out") == 1
    assert "compute_loss computes it without this package's" in caplog.text
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert "delta/lambda_mean" in logged
    assert not any(name.startswith("cancel/") for name in logged)


class Silent(trl.GRPOTrainer):
    """Nothing to learn from."""

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        return {**inputs, "advantages": inputs["advantages"] * 0}


def test_micro_batches_of_a_class_that_stands_after_this_packages(tiny_model, monkeypatch):
    """Also the first of each generation batch, where this package cuts it."""
    seen = watched(monkeypatch)
    train(tiny_model, type("Mine", (CancelGRPOTrainer, Silent), {}), **SPLIT)
    assert len(seen) == 4
    assert not torch.cat(seen).any()


@pytest.mark.parametrize("rounds", [1, 3])
def test_num_items_of_an_override_divide_the_loss(tiny_model, rounds, monkeypatch):
    """Also where groups are chosen, of several rounds too."""

    def fewer(generate, trainer, inputs):
        batch = generate(inputs)
        return {**batch, "num_items_in_batch": batch["num_items_in_batch"] * 4}

    settings = {**SIZES, "filter_zero_variance": True, "max_generation_rounds": rounds, "learning_rate": 0.0}
    seen, loss = [], trl.GRPOTrainer._compute_loss

    def look(self, model, inputs):
        seen.append((inputs["num_items_in_batch"] / inputs["completion_mask"].sum()).item())
        return loss(self, model, inputs)

    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", look)
    reward = {"reward_funcs": noisy_reward if rounds == 1 else mostly_constant_reward}
    run = train(tiny_model, hooked("_generate_and_score_completions", fewer), **settings, arguments=reward)
    assert {round(value, 4) for value in seen} == {4.0}
    assert (max(entry["balance/rounds"] for entry in run.logs[:-1]) > 1) == (rounds > 1)


def mostly_constant_reward(completion_ids, **kwargs):
    """So that most groups of four teach nothing."""
    return [float(ids[0] % 17 == 0) for ids in completion_ids]


def shuffled(generate, trainer, inputs):
    batch = generate(inputs)
    return only(batch, torch.arange(len(inputs)).view(-1, 4).T.flatten())


def turned(generate, trainer, inputs):
    """Within the groups."""
    batch = generate(inputs)
    return only(batch, torch.arange(len(inputs)).view(-1, 4).flip(1).flatten())


def best_and_worst(generate, trainer, inputs):
    batch = generate(inputs)
    order = batch["advantages"].view(-1, 4).argsort(1)[:, [0, 3]]
    return only(batch, (order + 4 * torch.arange(len(order)).unsqueeze(1)).flatten())


def own_rollouts(generate, trainer, inputs):
    """Without super(): rollouts of the second prompt, and of the first, in turn."""
    prompts = [str(row["prompt"]) for row in inputs]
    prompt_ids = torch.tensor([[3 + prompts.index(prompt)] for prompt in prompts]).view(-1, 4).T.reshape(-1, 1)
    completion_ids = 2 + torch.arange(len(inputs) * 3).view(-1, 3) % 7
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
        "advantages": torch.arange(len(inputs)) % 4 - 1.5,
        "num_items_in_batch": torch.tensor(completion_ids.numel()),
    }


GENERATION = "_generate_and_score_completions"


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (shuffled, "rollouts in another order than its rows"),
        (turned, "rollouts in another order than its rows"),
        (best_and_worst, r"\d+ rollouts where it was given \d+ rows"),
        (own_rollouts, "rollouts of different prompts in a group"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_rollouts_that_do_not_stand_by_their_rows(tiny_model, caplog, function, problem):
    """They are refused where a method takes them for those of their prompts; otherwise they are left to TRL, in full."""
    make = hooked(GENERATION, function)
    for method in ({"nthr": True}, {"filter_zero_variance": True}, {**SEQUENCE, "group_weights": "min"}):
        name, value = list(method.items())[-1]
        match = rf"{name}={value!r} could not act: Mine\.{GENERATION} has returned {problem}"
        with pytest.raises(RuntimeError, match=match):
            build(tiny_model, make, **{**(SPLIT if "group_weights" in method else SIZES), **method}).train()
    if function is own_rollouts:
        return  # which is TRL's own business, and this package keeps its groups whole
    settings = {**SPLIT, "per_device_train_batch_size": 4 if function is best_and_worst else 8}
    with caplog.at_level(logging.WARNING):
        ours = train(tiny_model, make, **settings)
    assert caplog.text.count("left out") == 1
    assert re.search(
        rf"cancel/\* and query_preserved='auto' are left out: Mine\.\w+ has returned {problem}", caplog.text
    )
    theirs = train(tiny_model, hooked(GENERATION, function, trl.GRPOTrainer), **settings)
    assert_same_weights(ours.weights, theirs.weights)


@pytest.mark.parametrize("settings", [{"nthr": True}, {"advantage_sign": "positive"}], ids=str)
def test_rewards_are_those_of_the_rollouts_that_are_returned(tiny_model, settings):
    """Of several calls of super(), of which an override takes groups."""
    seen = []

    def first_of_two(generate, trainer, inputs):
        first, second = generate(inputs), generate(inputs)
        width = min(first["completion_ids"].size(1), second["completion_ids"].size(1))
        mixed = dict(first)
        for name, value in second.items():
            if isinstance(value, torch.Tensor) and value.dim():
                columns = slice(None) if value.dim() == 1 or name.startswith("prompt") else slice(width)
                mixed[name] = (
                    torch.cat([first[name][:4], value[4:]])
                    if value.dim() == 1
                    else torch.cat([first[name][:4, columns], value[4:, columns]])
                )
        return mixed

    class Watch:
        scope, by_rollout = "group", True

        def coefficients(self, rollouts):
            ids = [ids[mask.bool()].tolist() for ids, mask in zip(rollouts.completion_ids, rollouts.mask, strict=True)]
            seen.append((rollouts.rewards.squeeze(1).tolist(), noisy_reward(ids)))
            return torch.ones(len(ids), 1)

    make = hooked(GENERATION, first_of_two)
    train(tiny_model, make, **SIZES, **settings, arguments={"credits": [Watch()]})
    assert len(seen) == 4
    assert all(rewards == expected for rewards, expected in seen)


def every_second(loss, trainer, model, inputs):
    return loss(model, only(inputs, slice(0, None, 2)))


def trimmed(rows):
    names = ("completion_ids", "completion_mask", "old_per_token_logps", "ref_per_token_logps")
    return {name: value[:, :4] if name in names else value for name, value in rows.items()}


def fewer_tokens(loss, trainer, model, inputs):
    return loss(model, trimmed(inputs))


def fewer_tokens_prepared(prepare, trainer, generation_batch):
    return trimmed(prepare(generation_batch))


def forgetful(prepare, trainer, generation_batch):
    return {name: value for name, value in prepare(generation_batch).items() if name != "shared_contexts"}


def in_place(loss, trainer, model, inputs):
    inputs["advantages"] *= 0.5
    return loss(model, inputs)


def as_numpy(loss, trainer, model, inputs):
    assert np.isfinite(inputs["advantages"].cpu().numpy()).all()
    return loss(model, inputs)


def measured_after(loss, trainer, model, inputs):
    found = loss(model, inputs)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    trainer._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))
    return found


@pytest.mark.parametrize(
    ("hook", "function", "reads"),
    [
        ("_compute_loss", every_second, True),
        ("_compute_loss", fewer_tokens, False),
        ("_prepare_inputs", fewer_tokens_prepared, False),
        ("_prepare_inputs", forgetful, False),
        ("_compute_loss", in_place, True),
        ("_compute_loss", as_numpy, True),
        ("_compute_loss", measured_after, True),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_metrics_end_no_run(tiny_model, caplog, hook, function, reads, beta):
    """What is trained is what TRL trains; what cannot be read is left out with one warning."""
    settings = {**SIZES, "beta": beta, "token_shift_steps": 2}
    with caplog.at_level(logging.WARNING):
        ours = train(tiny_model, hooked(hook, function), **settings)
    assert caplog.text.count("cancel/* is left out: the loss of Mine cannot be read (") == (not reads)
    assert caplog.text.count("left out") == (not reads)
    del settings["token_shift_steps"]
    assert_same_weights(ours.weights, train(tiny_model, hooked(hook, function, trl.GRPOTrainer), **settings).weights)
    residuals = [
        entry["cancel/shared_prefix_residual"] for entry in ours.logs if "cancel/shared_prefix_residual" in entry
    ]
    assert bool(residuals) == reads
    assert function is every_second or all(residual < 1e-6 for residual in residuals)


def test_shifts_end_no_run(tiny_model, caplog):
    """Also where an override leaves no trace of the rollouts' advantages."""
    with caplog.at_level(logging.WARNING):
        run = train(tiny_model, hooked(GENERATION, best_and_worst), **SIZES, token_shift_steps=1)
    assert caplog.text.count("shift/* is left out: the rollouts of Mine cannot be read (KeyError: ") == 1
    assert not any(name.startswith("shift/") for entry in run.logs for name in entry)


def test_torn_groups_are_of_whoever_tears_them(tiny_model):
    settings = {**SEQUENCE, **SPLIT, "group_weights": "min"}
    for hook, function in (("_compute_loss", in_chunks), ("_prepare_inputs", half)):
        with pytest.raises(
            RuntimeError, match=rf"group_weights='min': .* Look at Mine\.{hook}, which must leave"
        ) as info:
            build(tiny_model, hooked(hook, function), **settings).train()
        assert "report" not in str(info.value)
    with pytest.raises(RuntimeError, match=r"4 tokens .* of 6, which nthr=True makes .* Look at Mine\._compute_loss,"):
        build(tiny_model, hooked("_compute_loss", fewer_tokens), **SIZES, nthr=True).train()


@pytest.mark.parametrize("names", [{"_generation": lambda self, prompts: prompts}, {"_credits": 3}], ids=" ".join)
def test_private_names_of_this_package(tiny_model, names):
    """Of a class, of one that it is mixed with, and of attributes that it sets."""
    (name,) = names
    for bases in ((CancelGRPOTrainer,), (type("Theirs", (), names), CancelGRPOTrainer)):
        with pytest.raises(
            ValueError, match=rf"\.{name} is a name that trl-cancel's trainer uses for something of its"
        ):
            type("Mine", bases, names if len(bases) == 1 else {})


def test_private_names_that_are_set(tiny_model):
    with pytest.raises(ValueError, match=r"Mine\._rounds is a name that"):

        class Mine(CancelGRPOTrainer):
            def count(self):
                self._rounds = 0

    class Sets(CancelGRPOTrainer):
        def __init__(self, *args, **kwargs):
            setattr(self, "_sco" + "red", 0)
            super().__init__(*args, **kwargs)

    with pytest.raises(ValueError, match=r"Sets\._scored is a name that"):
        build(tiny_model, Sets)


def test_private_names_are_documented():
    page = (Path(__file__).parents[1] / "docs" / "subclassing.md").read_text(encoding="utf-8")
    listed = re.search(r"<!-- private names -->(.*?)<!-- end -->", page, re.DOTALL)[1]
    names = private_names(CancelGRPOTrainer) - FOR_SUBCLASSES
    assert re.findall(r"`(\w+)`", listed) == sorted(names)


def test_a_pass_that_an_override_costs_is_explained(tiny_model):
    """Credits wait for the loss's pass only where nobody else decides which rollouts that is of."""
    added = "adds one without gradients for each generation batch, for the hidden states"
    said = [
        " ".join(build(tiny_model, make, **SIZES, nthr=True).explain().split())
        for make in (CancelGRPOTrainer, subclass(Step))
    ]
    assert [added in lines for lines in said] == [False, True]


def test_metrics_are_read_off_the_pass_of_the_loss(tiny_model):
    """Not off one that an override makes after it, on which nothing depends."""
    trainer, seen = build(tiny_model, hooked("_compute_loss", measured_after), **SIZES), []
    trainer._monitor.observers.append(lambda pushes, inputs: seen.append(pushes.any().item()))
    trainer.train()
    assert seen == [True] * 4
