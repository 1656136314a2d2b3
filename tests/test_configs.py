"""The recipes: each parses, says what it claims, and those of the playground run. What values settings may have."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from trl import GRPOConfig

from trl_cancel import DelTAConfig, DFPOConfig, GRPOFixConfig, NTHRConfig, explain
from trl_cancel.batching import BatchLayout
from trl_cancel.cli import UsageError
from trl_cancel.cli.demo import SETTINGS
from trl_cancel.cli.settings import Parser
from trl_cancel.config import _OWN_FIELDS, CancelGRPOConfig
from trl_cancel.value_rules import RANGES, types_of


CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_parses(recipe):
    settings = Parser("test", "").read(["--config", str(recipe)])
    written = yaml.safe_load(recipe.read_text())
    for name in _OWN_FIELDS & written.keys():
        assert getattr(settings.training, name) == written[name]
    assert "Torn" not in explain(settings.training)
    assert settings.training.learning_rate == float(written["learning_rate"])
    assert settings.training.output_dir == f"runs/{recipe.stem}"
    assert f"configs/{recipe.name}" in recipe.read_text(), "the comment says how to run it"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_train_weights_that_their_steps_can_move(recipe):
    """A step of AdamW moves a weight by about the learning rate; in bfloat16 one of 0.02 would not move at all."""
    settings = Parser("test", "").read(["--config", str(recipe)])
    if not settings.model.use_peft:
        weight = torch.tensor(0.02, dtype=getattr(torch, settings.model.dtype))
        assert weight - settings.training.learning_rate != weight


def test_paper_recipes_have_the_papers_sizes():
    layout = Parser("test", "").read(["--config", str(CONFIGS / "query_preserved.yaml")]).training.layout
    assert (layout.prompts_per_generation, layout.updates_per_generation, layout.num_generations) == (128, 4, 8)
    grpo_fix = Parser("test", "").read(["--config", str(CONFIGS / "grpo_fix.yaml")]).training
    assert grpo_fix.layout.rollouts_together == grpo_fix.num_generations == 32
    assert not grpo_fix.layout.is_on_policy
    delta = Parser("test", "").read(["--config", str(CONFIGS / "delta.yaml")]).training
    assert (delta.layout.prompts_per_generation, delta.layout.updates_per_generation) == (128, 4)
    assert delta.layout.rollouts_together == 32 * delta.num_generations == 512


@pytest.mark.parametrize(
    ("given", "meant"), [("side", "side"), (True, "batch"), (False, "none"), ("true", "batch"), ("False", "none")]
)
def test_former_values_of_delta_normalize_are_understood(given, meant):
    assert CancelGRPOConfig(bf16=False, delta_normalize=given).delta_normalize == meant
    arguments = ["--bf16", "false", "--output_dir", "x", "--delta_normalize", str(given)]
    assert Parser("test", "").read(arguments).training.delta_normalize == meant


def test_groups_that_straddle_processes_are_refused(monkeypatch):
    """Two processes with two rollouts each of a group of four, in several optimizer steps."""
    straddling = BatchLayout(
        num_generations=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        steps_per_generation=2,
        num_processes=2,
    )
    monkeypatch.setattr(BatchLayout, "of", lambda args: straddling)
    with pytest.raises(ValueError, match=r"rollouts a process is not a multiple of .* straddle the 2 processes"):
        CancelGRPOConfig(bf16=False, query_preserved=True)
    for setting in (False, "auto"):
        config = CancelGRPOConfig(bf16=False, query_preserved=setting)
        assert config.tears_groups
        assert not config.layout.groups_are_local


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"symmetric_clip": "false"}, "symmetric_clip='false' must be True or False"),
        ({"delta_normalize": "sides"}, "delta_normalize='sides' is not one of 'batch', 'side', 'none'"),
        ({"query_preserved": None}, "query_preserved=None is not one of True, False, 'auto'"),
        ({"epsilon": -0.3}, "epsilon=-0.3 must be a positive number"),
        ({"epsilon": None}, "epsilon=None must be a positive number"),
        ({"epsilon_high": "0.3"}, "epsilon_high='0.3' must be a positive number"),
        ({"loss_type": "foo"}, "loss_type='foo' is not one of 'grpo'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word' is not one of 'token', 'sequence'"),
        ({"num_generations": 0}, "num_generations=0 must be a whole number of at least 2"),
        ({"num_generations": 1}, "num_generations=1 must be a whole number of at least 2"),
        (
            {"num_generations": 5},
            "= 8 rollouts a generation, which is not a multiple of num_generations=5. Set one of",
        ),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"max_completion_length": 0}, "max_completion_length=0 must be a whole number of at least 1"),
        ({"num_iterations": 0}, "num_iterations=0 must be a whole number of at least 1"),
        ({"group_weights_scale": "1"}, "group_weights_scale='1' must be positive"),
    ],
)
def test_impossible_values_are_refused(settings, message):
    also = (
        {"group_weights": "min", "importance_sampling_level": "sequence"} if "group_weights_scale" in settings else {}
    )
    with pytest.raises(ValueError, match=message):
        CancelGRPOConfig(bf16=False, **also, **settings)


NUMBERS = sorted(
    name
    for name, types in types_of(CancelGRPOConfig).items()
    if types & {int, float} and (name in RANGES or name in _OWN_FIELDS or name in GRPOConfig.__annotations__)
)
DICTIONARIES = ("lr_scheduler_kwargs", "generation_kwargs", "model_init_kwargs", "gradient_checkpointing_kwargs")


@pytest.mark.parametrize("name", [*NUMBERS, "reward_weights"])
def test_what_is_no_number_is_refused_as_one(name):
    """In every field that takes one, whether what it belongs to is on or off."""
    for value in ("many", math.nan, [0.5], {}, *([None] if name in ("beta", "max_steps", "nthr_beta") else [])):
        given = [1.0, value] if name == "reward_weights" else value
        with pytest.raises(ValueError, match=rf"{name}=.* must (be|hold)|{name} must"):
            CancelGRPOConfig(bf16=False, **{name: given})


@pytest.mark.parametrize("value", ["x", "{x}", 3, [1]])
def test_what_is_no_dictionary_is_refused(value):
    for name in DICTIONARIES:
        said = name if value == "{x}" else f"{name}=.*"
        with pytest.raises(ValueError, match=rf"{said} must be a dictionary"):
            CancelGRPOConfig(bf16=False, **{name: value})


@pytest.mark.parametrize("config", [CancelGRPOConfig, DFPOConfig, GRPOFixConfig, NTHRConfig, DelTAConfig])
def test_default_settings_are_json(config):
    """As trackers and the readers of a checkpoint's trainer_state.json want it, which know no infinity."""
    json.dumps(config("unused", bf16=False).to_dict(), allow_nan=False)


def test_json_that_cannot_be_read_is_not_shown():
    """It may hold a secret, which could not be told from the rest."""
    with pytest.raises(ValueError, match="model_init_kwargs must be a dictionary; as JSON it cannot") as caught:
        CancelGRPOConfig(bf16=False, model_init_kwargs='{"openai_key": "S3CRET"')
    assert "S3CRET" not in str(caught.value)


@pytest.mark.parametrize(
    "refused",
    [
        {"reward_weights": [[math.inf], [1e39], "1", 1.0]},
        {
            "delta": [-1, 0.0],
            "beta": [-0.1, math.inf],
            "temperature": [math.inf, True],
            "learning_rate": [-1, math.inf],
        },
        {"top_p": [7, -0.1], "top_k": [-2, 0.5, True], "min_p": [1.5, -1], "repetition_penalty": [0.0, -1.0]},
        {"weight_decay": [-0.1, math.inf, None], "adam_beta1": [1.0, -0.1], "adam_beta2": [2], "adam_epsilon": [-1]},
        {"max_steps": [2.5, math.inf], "num_train_epochs": [math.inf], "warmup_steps": [-1], "seed": [-1, 2**32, 0.5]},
        {"logging_steps": [math.inf], "save_steps": [math.inf], "max_grad_norm": [None], "neftune_noise_alpha": [-1]},
        {
            "sapo_temperature_neg": [0.0],
            "sapo_temperature_pos": [-1],
            "vespo_k_pos": [math.inf],
            "entropy_coef": ["x"],
        },
        {"top_entropy_quantile": [1.5, -0.5], "ref_model_mixup_alpha": [-1, 2], "ref_model_sync_steps": [0]},
        {"pad_to_multiple_of": [0, "x", 2.5], "max_completion_length": [2.5, True], "num_generations_eval": [-1]},
        {"generation_batch_size": [0], "per_device_eval_batch_size": [0], "vllm_importance_sampling_clip_max": [0]},
        {"scale_rewards": ["groups", None], "multi_objective_aggregation": ["sum"], "use_vllm": ["false"]},
        {
            "vllm_importance_sampling_mode": ["token"],
            "group_weights_scale": ["x"],
            "per_device_train_batch_size": [True],
        },
    ],
    ids=lambda refused: "-".join(refused),
)
def test_values_out_of_range_are_refused(refused):
    for name, values in refused.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))} (must|is not one of)"):
                CancelGRPOConfig(bf16=False, **{name: value})


def test_values_that_stock_trl_trains_on_are_taken():
    """As tried on TRL's trainer: those that mean 'off', 'all' or 'no bound', NumPy's numbers, and text where TRL reads it."""
    taken = {
        "top_k": [-1, 0, None, np.int64(5)],
        "top_p": [0, 1.0, None],
        "min_p": [None, 0, 1],
        "repetition_penalty": [None, 0.5],
        "max_grad_norm": [math.inf, 0, -1],
        "delta": [math.inf, 0.5, None],
        "epsilon_high": [math.inf, None, np.float32(0.3)],
        "off_policy_mask_threshold": [math.inf, -0.1, 0],
        "vllm_importance_sampling_clip_min": [-1, None],
        "max_steps": [-1, 0],
        "num_train_epochs": [-1, 0.5],
        "save_steps": [0.5, 2.0],
        "warmup_steps": [0, 0.03],
        "num_generations_eval": [0, None],
        "entropy_coef": [-0.1],
        "entropy_coef_max": [math.inf],
        "max_completion_length": [None],
        "pad_to_multiple_of": ["auto", "none", "8", None],
        "reward_weights": [[-1.0], [0, 1], (0.5,), np.ones(2), None],
        "scale_rewards": [True, False],
        "lr_scheduler_kwargs": ['{"a": 1}', {}, None],
        "nthr_beta": [-math.inf, 0],
        "delta_gamma": [math.inf, None],
    }
    for name, values in taken.items():
        for value in values:
            CancelGRPOConfig(bf16=False, **{name: value}).check()


@pytest.mark.parametrize(
    ("name", "value"), [("reward_weights", "nan"), ("top_p", "7"), ("lr_scheduler_kwargs", "x"), ("delta", "-1")]
)
def test_the_command_line_refuses_them_too(name, value):
    with pytest.raises(UsageError, match=f"{name}=.* must "):
        Parser("test", "").read(["--bf16", "false", "--output_dir", "x", f"--{name}={value}"])


def test_demo_is_the_playground_recipe():
    recipe = yaml.safe_load((CONFIGS / "playground.yaml").read_text())
    assert recipe.pop("output_dir") == "runs/playground"
    assert recipe.pop("query_preserved") is True
    assert recipe == SETTINGS


def test_every_own_field_has_help_and_is_documented():
    for name in _OWN_FIELDS:
        field = CancelGRPOConfig.__dataclass_fields__[name]
        assert field.metadata["help"]
        assert f"{name} (`" in CancelGRPOConfig.__doc__
        default = f'"{field.default}"' if isinstance(field.default, str) else field.default
        kind = str(getattr(field.type, "__name__", field.type)).removesuffix(" | None")
        given = "" if default is None else f", defaults to `{default}`"
        assert f"{name} (`{kind}`, *optional*{given})" in CancelGRPOConfig.__doc__


@pytest.mark.parametrize("config", [DFPOConfig, GRPOFixConfig])
def test_the_size_of_a_generation_may_be_given_in_rollouts(config):
    """Instead of in micro-batches, of which these have a default of their own."""
    layout = config(generation_batch_size=64, bf16=False).layout
    assert (layout.steps_per_generation, layout.prompts_per_generation) == (8, 2)
