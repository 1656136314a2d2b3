"""The trainer as its user meets it: what it logs, what it refuses, what it leaves behind when something fails."""

import logging
import math
import re
import signal
from pathlib import Path

import pytest
import torch
import trl
from datasets import DatasetDict, IterableDataset
from transformers import TrainerCallback

from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer
from trl_cancel.batch.clipping import Clipping
from trl_cancel.methods.group_weights import TRANSFORMATIONS
from trl_cancel.pipeline.split import whole_group_batches
from trl_cancel.playground import CHECKPOINT
from trl_cancel.playground.data import load_prompts
from trl_cancel.playground.reward import answer_reward

from .runs import (
    DEFAULTS,
    OFF_POLICY,
    assert_same_weights,
    build,
    load,
    noisy_reward,
    repeatable,
    train,
    weights_of,
    without,
)


PLAYGROUND = {
    "per_device_train_batch_size": 16,
    "num_generations": 8,
    "max_completion_length": 64,
    "learning_rate": 1e-3,
    "arguments": {"reward_funcs": answer_reward},
}


@pytest.mark.parametrize(
    ("settings", "lowest", "highest"),
    [
        ({"max_steps": 2}, 0, 1e-6),
        ({**OFF_POLICY, "symmetric_clip": True}, 0, 1e-6),
        ({**OFF_POLICY, "symmetric_clip": True, "symmetric_clip_gradient": "score"}, 0, 1e-6),
        ({**OFF_POLICY}, 1e-3, 0.2),
        ({**OFF_POLICY, "symmetric_clip": True, "query_preserved": False}, 0.3, 2),
        ({**OFF_POLICY, "query_preserved": False}, 0.3, 2),
        ({"max_steps": 2, "advantage_sign": "positive"}, 0.3, 2),
    ],
    ids=["on-policy", "symmetric", "score", "stock-clip", "torn-symmetric", "torn", "positive-only"],
)
def test_residual_shows_what_breaks_cancellation(settings, lowest, highest):
    """On a trained model: 0 for GRPO and symmetric clipping, more for stock clipping off-policy and for torn groups."""
    logs = train(str(CHECKPOINT), **{**PLAYGROUND, **settings}).logs[:-1]
    residuals = [entry["cancel/shared_prefix_residual"] for entry in logs]
    assert lowest <= max(residuals) <= highest
    assert len(residuals) == settings["max_steps"]


def test_length_normalisation_leaves_a_residual(tiny_model):
    """loss_type='grpo' divides by each rollout's length: even on-policy, shared tokens do not quite cancel."""
    settings = {"per_device_train_batch_size": 64, "max_completion_length": 20, "max_steps": 1}
    dapo = train(tiny_model, **settings).logs[0]
    grpo = train(tiny_model, **settings, loss_type="grpo").logs[0]
    assert dapo["cancel/shared_prefix_residual"] < 1e-6 < 1e-2 < grpo["cancel/shared_prefix_residual"]


def test_truncated_members_are_missing_from_the_update(tiny_model):
    """A masked completion is dropped after the advantages are computed, which the residual shows."""
    settings = {"per_device_train_batch_size": 64, "max_completion_length": 20, "max_steps": 1}
    kept = train(tiny_model, **settings).logs[0]
    masked = train(tiny_model, **settings, mask_truncated_completions=True).logs[0]
    assert 0.1 < kept["completions/clipped_ratio"] < 0.9
    assert kept["cancel/shared_prefix_residual"] < 1e-6
    assert masked["cancel/shared_prefix_residual"] > 0.1


def test_fractions_count_rollouts_by_sign(tiny_model):
    entry = train(tiny_model, max_steps=1).logs[0]
    assert entry["cancel/positive_fraction"] + entry["cancel/negative_fraction"] == pytest.approx(1)
    assert 0 < entry["cancel/positive_fraction"] < 1


def test_gradient_accumulation_logs_one_mean_a_step(tiny_model):
    logs = train(tiny_model, gradient_accumulation_steps=4, max_steps=2).logs[:-1]
    fractions = [entry["cancel/positive_fraction"] * 16 for entry in logs]
    assert all(fraction == pytest.approx(round(fraction)) for fraction in fractions)


def test_drop_in_by_import(tiny_model):
    from trl_cancel import GRPOConfig, GRPOTrainer

    assert (GRPOConfig, GRPOTrainer) == (CancelGRPOConfig, CancelGRPOTrainer)
    assert issubclass(GRPOTrainer, trl.GRPOTrainer)


def test_arguments_of_trl_by_position(tiny_model):
    """The signature is TRL's, so a script may pass arguments by position."""
    args = CancelGRPOConfig(output_dir="unused", **DEFAULTS)
    tune = load_prompts("tune", 8)
    trainer = CancelGRPOTrainer(tiny_model, noisy_reward, args, load_prompts("train", 8), tune)
    assert trainer.eval_dataset is tune


def test_configuration_has_a_default(tiny_model, monkeypatch):
    """The same as TRL's own default, which trains in bf16 and asks the machine for it."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    ours, theirs = (
        trainer(tiny_model, noisy_reward, train_dataset=load_prompts("train", 8)).args
        for trainer in (CancelGRPOTrainer, trl.GRPOTrainer)
    )
    assert type(ours) is CancelGRPOConfig
    assert {name: value for name, value in ours.to_dict().items() if name in theirs.to_dict()} == theirs.to_dict()


def test_other_configurations_are_refused(tiny_model):
    with pytest.raises(TypeError, match=r"args is a dict; pass a CancelGRPOConfig or a trl\.GRPOConfig"):
        CancelGRPOTrainer(tiny_model, noisy_reward, {"beta": 0}, load_prompts("train", 8))


@pytest.mark.parametrize(
    "sizes",
    [
        {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 3, "steps_per_generation": 4},
        {"per_device_train_batch_size": 2, "steps_per_generation": 4},
    ],
    ids=["of a test of TRL's", "halves of groups"],
)
def test_sizes_that_tear_groups_are_trls_with_a_warning(tiny_model, tmp_path, caplog, sizes):
    """As a default; whoever asks for whole groups is refused."""
    plain = trl.GRPOConfig(**{**DEFAULTS, **sizes}, output_dir=str(tmp_path))
    ours = CancelGRPOTrainer(tiny_model, noisy_reward, plain, load_prompts("train", 64))
    (warning,) = [each.getMessage() for each in caplog.records if "Groups are torn" in each.getMessage()]
    assert f"as by TRL: per_device_train_batch_size={sizes['per_device_train_batch_size']} with" in warning
    assert re.search(r"Set one of (?!.*query_preserved=False,).*\. query_preserved=False has TRL's batches", warning)
    assert (ours.args.query_preserved, ours.args.tears_groups) == ("auto", True)
    assert all(active.name != "Query-preserved mini-batching" for active in ours.active_methods)
    ours = train(tiny_model, **sizes)
    theirs = train(tiny_model, trl.GRPOTrainer, **sizes)
    assert [without(entry, ("cancel/",)) for entry in ours.logs] == theirs.logs
    assert_same_weights(ours.weights, theirs.weights)
    for settings, refused in (
        ({"query_preserved": True}, "query_preserved=True cannot keep groups whole.*query_preserved=False"),
        (
            {"reward_balance": 0.25},
            r"reward_balance=0.25 needs whole groups in each optimizer step\. Set one of per_dev",
        ),
    ):
        with pytest.raises(ValueError, match=refused):
            CancelGRPOConfig(**{**DEFAULTS, **sizes, **settings})


def test_dataset_without_prompts_is_refused_before_anything_is_generated(tiny_model):
    dataset = load_prompts("train", 8).rename_column("prompt", "question")
    with pytest.raises(ValueError, match=r"train_dataset has the columns \['question', .*\] but no 'prompt'"):
        build(tiny_model, arguments={"train_dataset": dataset})


def test_a_split_is_asked_for(tiny_model):
    splits = DatasetDict(train=load_prompts("train", 8), test=load_prompts("test", 8))
    with pytest.raises(ValueError, match=r"train_dataset holds the splits \['train', 'test'\]; pass one of them"):
        build(tiny_model, arguments={"train_dataset": splits})


def test_evaluation_data_without_prompts_are_refused(tiny_model):
    unnamed = load_prompts("tune", 8).rename_column("prompt", "question")
    for evaluated in (unnamed, {"easy": load_prompts("tune", 8), "hard": unnamed}):
        with pytest.raises(ValueError, match=r"eval_dataset has the columns .* but no 'prompt'"):
            build(tiny_model, arguments={"eval_dataset": evaluated})


def test_symmetric_clipping_leaves_the_configuration_alone(tiny_model):
    """A configuration may be changed, written out and read again, and used for another trainer."""
    args = CancelGRPOConfig(output_dir="unused", **DEFAULTS, symmetric_clip=True)
    trainer = CancelGRPOTrainer(tiny_model, noisy_reward, args, load_prompts("train", 8))
    assert (args.delta, trainer.args.delta) == (None, 1.2)
    assert CancelGRPOConfig(output_dir="unused", **DEFAULTS, symmetric_clip=True, delta=1.2).clipping == Clipping(
        "dapo", 1.0, 0.2, 1.2
    )


def test_a_configuration_changed_after_it_was_made(tiny_model):
    """It does what it says when the trainer is built, or is refused then."""
    args = CancelGRPOConfig(output_dir="unused", **DEFAULTS)
    args.symmetric_clip, args.epsilon = True, 0.05
    trainer = CancelGRPOTrainer(tiny_model, noisy_reward, args, load_prompts("train", 8))
    assert (trainer.args.delta, trainer.epsilon_high, trainer.epsilon_low) == (1.05, 0.05, 1.0)
    args.loss_type = "cispo"
    with pytest.raises(ValueError, match="symmetric_clip=True has no meaning with loss_type='cispo'"):
        CancelGRPOTrainer(tiny_model, noisy_reward, args, load_prompts("train", 8))


def test_a_model_by_its_path(tiny_model):
    assert CancelGRPOTrainer(Path(tiny_model), noisy_reward, CancelGRPOConfig(**DEFAULTS), load_prompts("train", 8))


@pytest.mark.parametrize("settings", [{}, OFF_POLICY], ids=["on-policy", "off-policy"])
def test_notice_where_symmetric_clipping_cannot_act(tiny_model, caplog, settings):
    with caplog.at_level(logging.WARNING):
        build(tiny_model, symmetric_clip=True, **settings)
    assert ("symmetric_clip=True changes nothing here" in caplog.text) == (not settings)


def test_iterable_dataset(tiny_model):
    rows = list(load_prompts("train", 64))
    dataset = IterableDataset.from_generator(lambda: iter(rows))
    run = train(tiny_model, **OFF_POLICY, arguments={"train_dataset": dataset})
    assert len(run.logs) == OFF_POLICY["max_steps"] + 1


def test_failing_reward_leaves_a_checkpoint_that_resumes(tiny_model, tmp_path):
    calls = []

    def failing_reward(completion_ids, **kwargs):
        calls.append(len(completion_ids))
        if len(calls) == 4:
            raise RuntimeError("the grader is down")
        return noisy_reward(completion_ids)

    settings = {"output_dir": str(tmp_path), "max_steps": 6, "save_strategy": "steps", "save_steps": 500}
    with pytest.raises(RuntimeError, match="the grader is down") as raised:
        train(tiny_model, **settings, arguments={"reward_funcs": failing_reward})
    assert raised.value.__notes__[0] == "Raised by the reward function 'failing_reward'."
    assert "progress up to step 3 is saved" in raised.value.__notes__[1]
    resumed = train(tiny_model, **settings, resume=True)
    assert resumed.trainer.state.global_step == 6
    assert [entry["step"] for entry in resumed.logs] == [1, 2, 3, 4, 5, 6, 6]


def test_failure_before_the_first_step_saves_nothing(tiny_model, tmp_path):
    def failing_reward(**kwargs):
        raise RuntimeError("the grader is down")

    with pytest.raises(RuntimeError):
        train(tiny_model, output_dir=str(tmp_path), save_strategy="steps", arguments={"reward_funcs": failing_reward})
    assert not list(tmp_path.glob("checkpoint-*"))


def test_failure_to_save_does_not_hide_the_reason(tiny_model, tmp_path, monkeypatch):
    trainer = build(tiny_model, output_dir=str(tmp_path), save_strategy="steps")
    trainer.add_callback(Raising("on_step_end", 1, RuntimeError("the reason")))
    monkeypatch.setattr(
        trainer, "_save_checkpoint", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(RuntimeError, match="the reason") as raised:
        trainer.train()
    assert raised.value.__notes__ == ["The progress could not be saved: disk full"]


class Raising(TrainerCallback):
    """Raises an error in an event after so many optimizer steps."""

    def __init__(self, event, step, error):
        def raising(args, state, control, **kwargs):
            if state.global_step == step:
                raise error

        setattr(self, event, raising)


@pytest.mark.parametrize(
    ("event", "error", "settings", "saved"),
    [
        ("on_optimizer_step", RuntimeError(), {}, False),  # of step 3: it would be made twice
        ("on_optimizer_step", KeyboardInterrupt(), {}, False),
        ("on_step_begin", RuntimeError(), {}, True),
        ("on_step_end", RuntimeError(), {}, True),
        ("on_step_begin", KeyboardInterrupt(), {}, True),
        ("on_step_begin", KeyboardInterrupt(), {"save_on_signal": False}, False),  # left to Python
    ],
)
def test_progress_is_saved_between_optimizer_steps(tiny_model, tmp_path, event, error, settings, saved):
    trainer = build(tiny_model, output_dir=str(tmp_path), save_strategy="steps", **settings)
    trainer.add_callback(Raising(event, 2, error))
    with pytest.raises(type(error)):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"] * saved
    assert bool(getattr(error, "__notes__", [])) == saved


def test_failure_to_resume_saves_nothing(tiny_model, tmp_path, monkeypatch):
    """The weights are loaded by then, but nothing else is."""
    settings = {"save_strategy": "steps", "save_steps": 2}
    train(tiny_model, output_dir=str(tmp_path / "first"), **settings, max_steps=2)
    trainer = build(tiny_model, output_dir=str(tmp_path / "second"), **settings)

    def refused(checkpoint):
        if checkpoint is not None:
            raise RuntimeError("not this optimizer's")

    monkeypatch.setattr(trainer, "_load_optimizer_and_scheduler", refused)
    with pytest.raises(RuntimeError) as raised:
        trainer.train(resume_from_checkpoint=str(tmp_path / "first/checkpoint-2"))
    assert not list((tmp_path / "second").glob("checkpoint-*"))
    assert not hasattr(raised.value, "__notes__")


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_a_group_sum_to_zero(tiny_model, aggregation, scale):
    """Also with several rewards that are None here and there: what makes shared tokens cancel in the first place."""

    def sometimes(completion_ids, **kwargs):
        return [None if sum(ids) % 3 == 0 else float(sum(ids) % 7) for ids in completion_ids]

    def other_times(completion_ids, **kwargs):
        return [None if sum(ids) % 5 == 0 else float(ids[0] % 4) for ids in completion_ids]

    class Watch:
        scope = "group"

        def coefficients(self, rollouts):
            self.rollouts = rollouts
            return torch.ones_like(rollouts.mask)

    watch = Watch()
    train(
        tiny_model,
        per_device_train_batch_size=64,
        multi_objective_aggregation=aggregation,
        scale_rewards=scale,
        max_steps=1,
        arguments={"reward_funcs": [sometimes, other_times], "credits": [watch]},
    )
    rewards, advantages = watch.rollouts.rewards, watch.rollouts.by_group(watch.rollouts.advantages)
    assert rewards.isnan().any(1).sum() > rewards.isnan().all(1).sum() > 0
    assert advantages.sum(1).abs().max() < 1e-5
    assert advantages.abs().max() > 0.5


def test_model_card_names_the_package(tiny_model, tmp_path):
    run = train(tiny_model, output_dir=str(tmp_path), max_steps=1)
    run.trainer.create_model_card("a-model")
    card = (tmp_path / "README.md").read_text()
    assert "trl-cancel" in card
    assert "2605.08666" not in card  # on policy, query_preserved changes nothing


def test_images_stay_with_their_rollouts(tiny_model):
    """Rows of pixels vary in number by rollout; the new cut must keep them together as TRL's own does."""
    trainer = build(tiny_model, steps_per_generation=4)
    num_images = [1, 0, 2, 1] * 4
    grids = [torch.tensor([[1, 2, rollout + 1]]).repeat(images, 1) for rollout, images in enumerate(num_images)]
    pixels = [torch.full((int(grid.prod(1).sum()), 3), float(rollout)) for rollout, grid in enumerate(grids)]
    batch = {
        "prompt_ids": torch.arange(16).unsqueeze(1),
        "advantages": torch.arange(16.0),
        "num_items_in_batch": torch.tensor(99),
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.cat(grids),
        "num_images": num_images,
    }
    parts = whole_group_batches(batch, trainer.args)
    assert len(parts) == 4
    for part in parts:
        rollouts = part["prompt_ids"].flatten().tolist()
        assert rollouts == list(range(rollouts[0], rollouts[0] + 4))
        assert part["num_images"] == [num_images[rollout] for rollout in rollouts]
        assert torch.equal(part["pixel_values"], torch.cat([pixels[rollout] for rollout in rollouts]))
        assert torch.equal(part["image_grid_thw"], torch.cat([grids[rollout] for rollout in rollouts]))
        assert part["num_items_in_batch"] == 99


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
    ],
    ids=["checkpointing", "reentrant", "bf16"],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_metrics_under_checkpointing_and_mixed_precision(tiny_model, settings):
    settings = {**OFF_POLICY, "symmetric_clip": True, **settings}
    logs = train(tiny_model, **settings).logs[:-1]
    assert max(entry.get("cancel/shared_prefix_residual", 0) for entry in logs) < 1e-2
    assert_same_weights(
        train(tiny_model, **settings, cancellation_metrics=False).weights, train(tiny_model, **settings).weights
    )


def test_tool_results_are_context_but_not_pushed(tiny_model):
    """Tokens that a tool wrote are part of the prefix; the loss masks them, and so do the metrics and credits."""
    generate = trl.GRPOTrainer._generate_and_score_completions
    seen = []

    def with_tool_mask(self, inputs):
        batch = generate(self, inputs)
        batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
        batch["tool_mask"][:, 1] = 0
        return batch

    class Watch:
        scope = "rollout"

        def coefficients(self, rollouts):
            seen.append(rollouts)
            return torch.ones_like(rollouts.mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", with_tool_mask)
        logs = train(
            tiny_model,
            per_device_train_batch_size=16,
            max_steps=2,
            symmetric_clip=True,
            arguments={"credits": [Watch()]},
        ).logs
    assert not seen[0].mask[:, 1].any()
    assert seen[0].mask[:, 0].all()
    assert logs[0]["cancel/shared_prefix_residual"] < 1e-6


def test_a_saved_checkpoint_is_not_written_again(tiny_model, tmp_path):
    """It holds the random state of the end of the step; the state at the failure would not resume to the same run."""
    calls = []

    def failing_reward(completion_ids, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the grader is down")
        return noisy_reward(completion_ids)

    settings = {"output_dir": str(tmp_path), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(RuntimeError):
        train(tiny_model, **settings, arguments={"reward_funcs": failing_reward})
    resumed = train(tiny_model, **settings, resume=True)
    whole = train(tiny_model, **{**settings, "output_dir": str(tmp_path / "whole")})
    assert_same_weights(resumed.weights, whole.weights)


def test_same_seed_same_run(tiny_model):
    first, second = train(tiny_model, **OFF_POLICY), train(tiny_model, **OFF_POLICY)
    assert_same_weights(first.weights, second.weights)
    assert first.logs == second.logs
    assert any(math.isfinite(entry.get("loss", math.nan)) for entry in first.logs)


def test_refusals_of_transformers_come_through(monkeypatch):
    """Also where the sizes that would be checked beside them are not known yet."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match="Your setup doesn't support bf16/gpu"):
        CancelGRPOConfig("x", num_generations=8, per_device_train_batch_size=8, steps_per_generation=16)


class FailsInStep(TrainerCallback):
    """Once, between two micro-batches of an optimizer step."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 4, "num_iterations": 2}], ids=["on", "off policy"])
def test_the_same_trainer_goes_on_where_a_step_failed(tiny_model, tmp_path, settings):
    """As another one would: with a generation batch from its beginning, and nothing of the step that failed."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 4, "max_steps": 7}
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 100, **sizes, **settings}
    trainer = build(tiny_model, **settings, arguments={"callbacks": [FailsInStep(4)]})
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    checkpoint = str(tmp_path / "checkpoint-4")
    other = train(tiny_model, **settings, resume=checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert_same_weights(weights_of(trainer.model), other.weights)
    assert [repeatable(entry) for entry in trainer.state.log_history] == other.logs


@pytest.mark.parametrize("step", [2, 5], ids=["earlier", "last"])
def test_the_same_trainer_goes_on_after_a_signal(tiny_model, tmp_path, step):
    """As another one would, from any checkpoint; this stops in the middle of the second generation batch."""

    class Interrupts(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4 and not interrupted:
                interrupted.append(True)
                signal.raise_signal(signal.SIGINT)

    interrupted: list = []
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "max_steps": 7}
    settings |= {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}
    trainer = build(tiny_model, **settings, arguments={"callbacks": [Interrupts()]})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    checkpoint = str(tmp_path / f"checkpoint-{step}")
    trainer.train(resume_from_checkpoint=checkpoint)
    other = train(tiny_model, **{**settings, "save_strategy": "no"}, resume=checkpoint)
    assert_same_weights(weights_of(trainer.model), other.weights)


def test_equal_rewards_have_no_sign(tiny_model):
    """TRL subtracts their mean, from which they differ by rounding; methods and metrics are not to believe that."""

    class Seen:
        scope = "batch"

        def coefficients(self, rollouts):
            self.advantages = rollouts.advantages
            return torch.ones(len(rollouts.mask), 1)

    def tenths(completion_ids, **kwargs):
        return [0.1] * len(completion_ids)

    equal = torch.full((8,), 0.1)
    assert (equal - equal.mean()).any(), "rounding"
    seen = Seen()
    trainer = build(
        tiny_model,
        per_device_train_batch_size=8,
        num_generations=8,
        max_steps=1,
        arguments={"reward_funcs": tenths, "credits": [seen]},
    )
    trainer.train()
    assert not seen.advantages.any()
    log = trainer.state.log_history[0]
    assert (log["cancel/positive_fraction"], log["cancel/negative_fraction"]) == (0, 0)
    assert "cancel/shared_prefix_residual" not in log


@pytest.mark.parametrize("reward", [0.1, 10.1])
@pytest.mark.parametrize(
    "settings",
    [
        {"advantage_sign": "positive"},
        {"advantage_sign": "negative"},
        *({"group_weights": name, "importance_sampling_level": "sequence"} for name in TRANSFORMATIONS),
        {"nthr": True},
        {"delta_credit": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_equal_rewards_move_nothing(tiny_model, settings, reward):
    """However large they are, and so the rounding of their mean."""

    def constant(completion_ids, **kwargs):
        return [reward] * len(completion_ids)

    sizes = {"per_device_train_batch_size": 8, "num_generations": 8, "steps_per_generation": 2, "max_steps": 2}
    before = weights_of(load(tiny_model))
    after = train(tiny_model, **sizes, **settings, arguments={"reward_funcs": constant}).weights
    assert_same_weights(after, {name: before[name] for name in after})
