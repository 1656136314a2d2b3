"""What a configuration does, in words."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trl_cancel import CancelGRPOConfig, explain

from .methods import FirstTokens
from .runs import DEFAULTS, build, train


DFPO = {"group_weights": "min", "importance_sampling_level": "sequence", "num_iterations": 2}
SPREAD = {"steps_per_generation": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def told(**settings):
    return topics(explain(CancelGRPOConfig(output_dir="unused", **{**DEFAULTS, **settings})))


def topics(text):
    lines, topic = {}, ""
    for line in text.splitlines():
        assert len(line) <= 100
        topic = line[:16].strip() or topic
        lines[topic] = f"{lines.get(topic, '')} {line[16:].strip()}".strip()
    return lines


def test_sizes():
    lines = told(
        per_device_train_batch_size=16,
        num_generations=8,
        gradient_accumulation_steps=2,
        steps_per_generation=8,
        num_iterations=2,
    )
    assert lines["Generation"] == "16 prompts x 8 rollouts = 128 rollouts."
    assert lines["Optimizer step"] == "32 rollouts (4 prompts), as 2 x 16."
    assert told()["Generation"] == "1 prompt x 4 rollouts = 4 rollouts."
    assert lines["Off-policy"].startswith("8 optimizer steps with each generation batch")


class Steps:
    """The rollouts and prompts of each optimizer step, by the index arithmetic of TRL's `_prepare_inputs`."""

    def __init__(self, config, processes=1, count=120):
        size, every = config.per_device_train_batch_size, config.steps_per_generation * config.num_iterations
        self.used, self.generations, buffered = [], [], None
        for micro_step in range(count * config.gradient_accumulation_steps):
            if micro_step % every == 0:
                rows = [(micro_step // every, row) for row in range(config.steps_per_generation * size * processes)]
                buffered = [rows[first : first + size * processes] for first in range(0, len(rows), size * processes)]
            if micro_step % config.gradient_accumulation_steps == 0:
                self.used.append([])
            self.used[-1] += buffered[micro_step % config.steps_per_generation]
        self.rollouts = {len({*step}) for step in self.used}
        self.prompts = {number / config.num_generations for number in self.rollouts}
        self.times = {step.count(rollout) for step in self.used for rollout in step}
        by_generation = {}
        for index, step in enumerate(self.used):
            for generation, _ in step:
                by_generation.setdefault(generation, set()).add(index)
        del by_generation[max(by_generation)]  # it may go on
        self.updates = {len(steps) for steps in by_generation.values()}


def in_words(numbers, noun):
    low, high = min(numbers), max(numbers)
    return f"{low:g} to {high:g} {noun}s" if low < high else f"{low:g} {noun}{'s' * (high != 1)}"


USED_AGAIN = {
    "per_device_train_batch_size": 2,
    "num_generations": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 1,
    "num_iterations": 2,
}


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ({}, "2 rollouts (1 prompt), each used 2 times, as 2 x 2."),
        ({"num_iterations": 3}, "2 to 4 rollouts (1 to 2 prompts), each used 1 to 2 times, as 2 x 2."),
        ({"gradient_accumulation_steps": 4}, "4 rollouts (2 prompts), each used 2 times, as 4 x 2."),
        ({"num_iterations": 1, "gradient_accumulation_steps": 4}, "8 rollouts (4 prompts), as 4 x 2."),
        ({"gradient_accumulation_steps": 3, "steps_per_generation": 2, "num_iterations": 1}, "6 rollouts (3 prompts), as 3 x 2."),
        ({"gradient_accumulation_steps": 3, "steps_per_generation": 2}, "4 to 6 rollouts (2 to 3 prompts), each used 1 to 2 times, as 3 x 2."),
        (
            {"num_generations": 4, "steps_per_generation": 4, "num_iterations": 1, "query_preserved": False},
            "4 rollouts (of up to 2 prompts), as 2 x 2.",
        ),
    ],
)  # fmt: skip
def test_batches_that_are_used_again_within_a_step(sizes, line):
    settings = {**USED_AGAIN, **sizes}
    assert told(**settings)["Optimizer step"] == line
    seen = Steps(CancelGRPOConfig(output_dir="unused", **{**DEFAULTS, **settings}))
    assert line.startswith(in_words(seen.rollouts, "rollout"))


@given(
    batch=st.integers(1, 4),
    group=st.integers(2, 4),
    accumulation=st.integers(1, 6),
    steps=st.integers(1, 6),
    iterations=st.integers(1, 3),
    processes=st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_sizes_against_a_simulation(batch, group, accumulation, steps, iterations, processes):
    """What an optimizer step holds and how often a generation batch is used, over all ways in which they can overlap."""
    assume(batch * steps % group == 0)
    sizes = {
        "per_device_train_batch_size": batch,
        "num_generations": group,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": steps,
        "num_iterations": iterations,
    }
    try:
        config = CancelGRPOConfig(output_dir="unused", **{**DEFAULTS, **sizes})
    except ValueError:
        config = CancelGRPOConfig(output_dir="unused", **{**DEFAULTS, **sizes, "query_preserved": False})
    with patch.object(CancelGRPOConfig, "world_size", processes):
        lines = topics(explain(config))
    seen = Steps(config, processes)
    step = lines["Optimizer step"]
    assert step.startswith(f"{in_words(seen.rollouts, 'rollout')} (")
    assert step.endswith(f", as {accumulation * processes} x {batch}.")
    assert (f"each used {in_words(seen.times, 'time')}," in step) == (seen.times != {1})
    if not config.tears_groups:
        assert f"({in_words(seen.prompts, 'prompt')})" in step
    if "No:" in lines["Off-policy"]:
        assert seen.updates == {1}
    else:
        assert lines["Off-policy"].startswith(f"{in_words(seen.updates, 'optimizer step')} with each generation batch")


@pytest.mark.parametrize(
    "sizes", [{}, {"num_iterations": 3}, {"gradient_accumulation_steps": 3, "steps_per_generation": 2}]
)
def test_what_a_step_holds_in_training(tiny_model, sizes):
    """The rollouts that reach the loss, told apart by their tokens."""
    settings = {**USED_AGAIN, **sizes, "max_steps": 6, "max_completion_length": 16}
    trainer = build(tiny_model, **settings)
    seen, loss = [], trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        step = trainer.state.global_step
        seen.extend((step, *row.tolist()) for row in torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1))
        return loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    held = [len({row for row in seen if row[0] == step}) for step in range(6)]
    assert told(**settings)["Optimizer step"].startswith(in_words(held, "rollout"))


@pytest.mark.parametrize(
    ("settings", "topic", "expected"),
    [
        ({}, "Off-policy", "No: each generation batch is used for one optimizer step"),
        ({}, "Groups", "batches are TRL's own"),
        ({"steps_per_generation": 4}, "Groups", "Whole in every optimizer step and every micro-batch"),
        (
            {"steps_per_generation": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            "Groups",
            "but spread over its micro-batches",
        ),
        ({"steps_per_generation": 4, "query_preserved": False}, "Groups", "Torn: TRL shuffles single rollouts"),
        ({"epsilon": 0.1, "epsilon_high": 0.3}, "Clipping", "negative rollouts are cut off below 0.9, positive ones above 1.3"),
        ({"epsilon_high": 0.3, "delta": 5.0}, "Clipping", "cut off below 0.8 and above 5, positive ones above 1.3."),
        ({"epsilon_high": 0.3, "delta": 1.1}, "Clipping", "cut off below 0.8 and above 1.3, positive ones above 1.1."),
        ({"delta_credit": True, "delta_normalize": False}, "Credit", "carries 0.8 to 1.2 of it, by how well"),
        ({"delta_credit": True, "delta_normalize": "side"}, "Credit", "of it, over the mean of its side, by how well"),
        ({**DFPO, "use_vllm": True}, "Leaks", "Nothing in these settings"),
        ({**DFPO, "use_vllm": True, "group_weights_include_sampling_ratio": False}, "Leaks", "weighs rollouts or tokens apart"),
        ({"symmetric_clip": True}, "Clipping", "Symmetric: token-level ratio in [0, 1.2] for both signs"),
        ({"loss_type": "cispo"}, "Clipping", "That of loss_type='cispo'"),
        ({"advantage_sign": "positive"}, "Credit", "Rollouts of negative advantage are left out"),
        ({}, "Forward passes", "Each micro-batch's loss makes its own. This package adds none."),
        (DFPO, "Group weights", "min: the smallest of the group for all; a rollout whose gradient clipping would cut off"),
        ({**DFPO, "group_weights": "orth", "group_weights_scale": 0.5}, "Group weights", "advantages, times 0.5; a rollout"),
        ({**DFPO, "group_weights_trust_region": "group"}, "Group weights", "a group rests while one of its rollouts"),
        (DFPO, "Forward passes", "This package adds none."),
        ({**DFPO, **SPREAD}, "Forward passes", "This package adds one without gradients for each optimizer step but the first"),
        (
            {**DFPO, **SPREAD, "num_iterations": 1, "steps_per_generation": 2, "use_vllm": True,
             "vllm_importance_sampling_correction": False, "off_policy_mask_threshold": 0.1},
            "Forward passes",
            "This package adds one without gradients for each generation batch: groups are spread",
        ),
        ({**DFPO, "group_weights": "none"}, "Leaks", "Sequence-level ratios weigh the rollouts of a group differently"),
        (DFPO, "Leaks", "Nothing in these settings"),
        ({"num_iterations": 2, "beta": 0.1}, "Forward passes", "one for the old log-probs, since updates are off-policy and one for the reference"),
        ({"token_shift_steps": 1}, "Forward passes", "adds two without gradients over the rollouts of each optimizer step, before"),
        ({"token_shift_steps": 10}, "Forward passes", "one optimizer step in 10, before it and after it, for shift/*"),
        ({"num_iterations": 2, "save_strategy": "steps", "save_steps": 3}, "Checkpoints", "save_steps=3 saves within generation batches (2 optimizer steps each)"),
        ({"logging_steps": 2, "save_strategy": "steps", "save_steps": 3}, "Checkpoints", "save_steps=3 and logging_steps=2 save between two logs"),
        ({"num_iterations": 2, "save_strategy": "steps", "save_steps": 5}, "Checkpoints", "Multiples of 2, such as save_steps=4, avoid that."),
        ({}, "Leaks", "Nothing in these settings breaks cancellation."),
        ({"num_iterations": 2}, "Leaks", "loss_type='dapo' treats one ratio differently by sign"),
        ({"num_iterations": 2, "symmetric_clip": True}, "Leaks", "Nothing in these settings"),
        ({"loss_type": "grpo"}, "Leaks", "divides by each rollout's length"),
        ({"mask_truncated_completions": True}, "Leaks", "drops members of a group"),
        ({"steps_per_generation": 4, "query_preserved": False}, "Leaks", "Groups are torn"),
    ],
)  # fmt: skip
def test_lines(settings, topic, expected):
    assert expected in told(**settings)[topic]


def test_own_credits_are_named():
    config = CancelGRPOConfig(output_dir="unused", **DEFAULTS)
    assert "Times the coefficients of FirstTokens" in " ".join(explain(config, credits=[FirstTokens()]).split())


@pytest.mark.parametrize(
    ("settings", "topic", "expected"),
    [
        ({"max_completion_length": 128}, "Completions", "Cut off after 128 tokens (max_completion_length=128); one that"),
        ({"max_completion_length": None}, "Completions", "Of any length (max_completion_length=None); one that"),
        ({}, "Completions", "is rewarded for what is there and trained on like any other"),
        ({"mask_truncated_completions": True}, "Completions", "counts in its group, but pushes nothing"),
        ({"fp16": True}, "Precision", "float16, with gradients scaled up"),
        ({"use_vllm": True}, "Sampling", "vllm_importance_sampling_mode='sequence_mask' corrects for that"),
        ({"use_vllm": True, "vllm_importance_sampling_correction": False}, "Sampling", "and nothing corrects for that"),
        ({"use_vllm": True, "top_p": 0.9, "min_p": 0.1}, "Sampling", "are those of top_p=0.9 and min_p=0.1, the model's"),
        ({"use_vllm": True, "top_k": 20}, "Sampling", "are those of top_k=20, the model's are not"),
        (
            {"eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 6, "num_generations_eval": 2},
            "Evaluation",
            "3 prompts x 2 rollouts a batch.",
        ),
        ({"loss_type": "grpo"}, "Loss", "0 at every optimizer step: ratios are 1 there"),
        ({"loss_type": "dapo"}, "Loss", "0 at every optimizer step, but for the lengths of the rollouts: ratios"),
        ({"loss_type": "grpo", "num_iterations": 2}, "Loss", "0 whenever a generation batch is new: ratios are 1 there"),
        ({"loss_type": "grpo", "beta": 0.1}, "Loss", "To this comes 0.1 times the KL, which starts at 0. It does not"),
    ],
)  # fmt: skip
def test_lines_about_what_users_ask(settings, topic, expected):
    assert expected in told(**settings)[topic]


@pytest.mark.parametrize("topic", ["Sampling", "Precision", "Evaluation"])
def test_topics_without_a_line_are_left_out(topic):
    assert topic not in told()


@pytest.mark.parametrize(
    "settings",
    [
        {"advantage_sign": "positive"},
        {"delta_credit": True},
        {"entropy_coef": 0.1},
        {"mask_truncated_completions": True},
        {"loss_type": "sapo"},
        {"steps_per_generation": 4, "query_preserved": False},
        {"use_vllm": True},
        # A step holds the rest of one generation batch and the start of the next.
        {"gradient_accumulation_steps": 3, "steps_per_generation": 2},
    ],
)
def test_loss_that_is_not_zero(settings):
    assert told(**settings)["Loss"].startswith("It does not tell whether the model learns; reward does.")


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2, "max_steps": 4}, {**SPREAD, "max_steps": 4}])
def test_loss_is_zero_where_it_says_so(tiny_model, settings):
    """At each step, or at the first of each generation batch; the weights move all the same."""
    settings = {"loss_type": "grpo", "mask_truncated_completions": False, **settings}
    run = train(tiny_model, **settings)
    every = max(1, int(run.trainer.args.layout.updates_per_generation))
    assert "0 at every" in told(**settings)["Loss"] if every == 1 else "0 whenever" in told(**settings)["Loss"]
    steps = run.logs[:-1]
    assert all(abs(entry["loss"]) < 1e-6 for entry in steps[::every])
    assert all(entry["grad_norm"] > 0 for entry in steps)
    assert every == 1 or any(abs(entry["loss"]) > 1e-6 for entry in steps)


@pytest.mark.parametrize(
    "settings",
    [
        {"save_steps": 4},
        {"save_steps": 3, "num_iterations": 1},
        {"save_strategy": "no", "save_steps": 3},
        # Four optimizer steps take three generation batches: 4 % (4 / 3) is not 0 in floating point.
        {"save_steps": 4, "num_iterations": 1, "gradient_accumulation_steps": 3, "steps_per_generation": 4},
    ],
)
def test_checkpoints_between_generations_are_not_spoken_of(settings):
    assert "Checkpoints" not in told(**{"num_iterations": 2, "save_strategy": "steps", **settings})
