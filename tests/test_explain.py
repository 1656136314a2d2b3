"""What a configuration does, in words."""

import pytest

from trl_cancel import CancelGRPOConfig, explain

from .methods import FirstTokens
from .runs import DEFAULTS, train


DFPO = {"group_weights": "min", "importance_sampling_level": "sequence", "num_iterations": 2}
SPREAD = {"steps_per_generation": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def told(**settings):
    text = explain(CancelGRPOConfig(output_dir="unused", **{**DEFAULTS, **settings}))
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
