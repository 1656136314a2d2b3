"""Weights that are not finite: one error about them, wherever they make sampling or a loss fail."""

import math

import pytest
import torch
from transformers import AutoTokenizer, TrainerCallback

from tests.runs import OFF_POLICY, build, load, noisy_reward
from trl_cancel.diagnostics import sample_rollouts
from trl_cancel.playground.data import load_prompts
from trl_cancel.running.weights import WeightsError, check_weights, weights_looked_at


BLAMED = r"The weights of Qwen3ForCausalLM are not finite: model.layers.1.mlp.up_proj.weight holds nan"


def spoil(model, value=math.nan):
    torch.nn.init.constant_(model.get_submodule("model.layers.1.mlp.up_proj").weight[0, :1], value)


class Spoils(TrainerCallback):
    """After the first step."""

    def on_step_end(self, args, state, control, model, **kwargs):
        spoil(model)


def environment(prompts, trainer):
    """Samples what no weights have a say in."""
    count = len(prompts)
    return {"prompt_ids": [[5, 6]] * count, "completion_ids": [[7, 8, i % 3] for i in range(count)], "logprobs": None}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {**OFF_POLICY, "importance_sampling_level": "sequence", "group_weights": "min"},
        {"nthr": True, "filter_zero_variance": True},
        {"rollout_func": environment, "beta": 0.1},
        {"rollout_func": environment, "cancellation_metrics": False, "query_preserved": False},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_weights_that_become_nan_end_the_training_and_are_not_saved(tiny_model, tmp_path, settings):
    settings = dict(settings)
    arguments = {"callbacks": [Spoils()]}
    if "rollout_func" in settings:
        arguments["rollout_func"] = settings.pop("rollout_func")
    trainer = build(
        tiny_model, arguments=arguments, output_dir=str(tmp_path), save_strategy="steps", save_steps=50, **settings
    )
    with pytest.raises(ValueError, match=BLAMED) as raised:
        trainer.train()
    assert isinstance(raised.value, WeightsError)
    assert not [*tmp_path.glob("checkpoint-*")]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_are_blamed_by_a_probe_and_in_an_evaluation_too(tiny_model, value):
    model, tokenizer = load(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    spoil(model, value)
    with pytest.raises(WeightsError, match=BLAMED):
        sample_rollouts(model, tokenizer, [*load_prompts("test", 1)], noisy_reward, max_completion_length=2)
    trainer = build(model, arguments={"processing_class": tokenizer, "eval_dataset": load_prompts("test", 4)})
    with pytest.raises(WeightsError, match=BLAMED):
        trainer.evaluate()


def test_weights_that_are_finite_are_not_blamed(tiny_model):
    model = load(tiny_model).to(torch.bfloat16)
    check_weights(model)
    for message in ("probability tensor contains either `inf`, `nan` or element < 0", "device-side assert triggered"):
        with pytest.raises(RuntimeError, match=message[:20]) as raised, weights_looked_at(model):
            raise RuntimeError(message)
        assert not isinstance(raised.value, WeightsError)
    assert "weights of the model" in raised.value.__notes__[0]
    spoil(model)
    with pytest.raises(RuntimeError, match="of something else"), weights_looked_at(model):
        raise RuntimeError("of something else")
