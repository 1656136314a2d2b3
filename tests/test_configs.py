"""The recipes: each parses, says what it claims, and those of the playground run."""

from pathlib import Path

import pytest
import torch
import yaml

from trl_cancel import DFPOConfig, GRPOFixConfig, explain
from trl_cancel.batching import BatchLayout
from trl_cancel.cli.demo import SETTINGS
from trl_cancel.cli.settings import Parser
from trl_cancel.config import _OWN_FIELDS, CancelGRPOConfig


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
        CancelGRPOConfig(bf16=False)
    assert not CancelGRPOConfig(bf16=False, query_preserved=False).layout.groups_are_local


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"symmetric_clip": "false"}, "symmetric_clip='false' must be True or False"),
        ({"delta_normalize": "sides"}, "delta_normalize='sides' is not one of 'batch', 'side', 'none'"),
        ({"query_preserved": None}, "query_preserved=None must be True or False"),
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
