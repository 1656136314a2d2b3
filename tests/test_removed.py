"""What is said of settings and arguments that older versions had."""

import copy
import inspect
import pickle
from dataclasses import dataclass, fields

import pytest
import trl
from trl.scripts.grpo import GRPOScriptArguments

from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer, DFPOConfig
from trl_cancel.cli import main
from trl_cancel.running.removed import ARGUMENTS, SETTINGS

from .runs import build


KNOWN = {field.name for cls in (trl.GRPOConfig, trl.ModelConfig, GRPOScriptArguments) for field in fields(cls)}
OF_TRAINER = set(inspect.signature(trl.GRPOTrainer).parameters)


@pytest.mark.parametrize(("table", "known"), [(SETTINGS, KNOWN), (ARGUMENTS, OF_TRAINER)])
def test_what_is_gone_is_gone_and_what_replaces_it_is_there(table, known):
    assert table.keys().isdisjoint(known)
    assert {removed.replacement for removed in table.values()} - {None} <= known


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_is_gone(name, tmp_path, capsys):
    said = f"{name} is gone since {SETTINGS[name].since}: {SETTINGS[name].instead}."
    for config in (CancelGRPOConfig, DFPOConfig):
        with pytest.raises(TypeError) as raised:
            config(output_dir=str(tmp_path), **{name: 1})
        assert str(raised.value) == said
    if name == "overwrite_output_dir":
        return  # a flag of the command line
    assert main(["explain", f"--{name}", "1"]) == 2
    assert capsys.readouterr().err == f"trl-cancel explain: {said}\n"
    (tmp_path / "recipe.yaml").write_text(f"{name}: 1")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_is_gone(name):
    with pytest.raises(TypeError, match=f"{name} is gone since .*: it is {ARGUMENTS[name].replacement} now"):
        CancelGRPOTrainer("no/model", **{name: 1})


# What transformers' `TrainingArguments` have had since 3.1 and TRL's `GRPOConfig`, `ModelConfig` and `ScriptArguments`
# since 0.14 and have no more, found by comparing their fields release by release.
EVER = """
    adafactor dispatch_batches evaluate_during_training evaluation_strategy fp16_backend fp16_opt_level
    fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap gradient_checkpointing_use_reentrant group_by_length
    half_precision_backend include_inputs_for_metrics include_tokens_per_second jit_mode_eval logging_dir
    max_prompt_length model_parallel mp_parameters no_cuda overwrite_output_dir past_index per_gpu_eval_batch_size
    per_gpu_train_batch_size push_to_hub_model_id push_to_hub_organization push_to_hub_token ray_scope save_safetensors
    sharded_ddp split_batches torch_dtype torchdynamo tp_size tpu_metrics_debug tpu_num_cores use_ipex
    use_legacy_prediction_loop use_liger_loss use_mps_device vllm_device vllm_dtype vllm_enable_prefix_caching
    vllm_guided_decoding_regex vllm_max_model_len wandb_log_unique_prompts warmup_ratio xpu_backend
"""


def test_all_that_ever_was_is_known():
    assert set(EVER.split()) == SETTINGS.keys()


MISSPELT = {
    "nthr_etaa": "; did you mean nthr_eta?",
    "save_safetensor": ". save_safetensors is gone since transformers 5.0: weights are always",
    "rollout_func": " (an argument of trainers in Python).",
    "nothing_of_the_kind": ".",
}


@pytest.mark.parametrize("name", MISSPELT)
def test_settings_that_never_were(name, tmp_path, capsys):
    for config in (CancelGRPOConfig, DFPOConfig):
        with pytest.raises(TypeError) as raised:
            config(str(tmp_path), **{name: 1})
        said = f"{config.__name__}.__init__() got an unexpected keyword argument {name!r}{MISSPELT[name]}"
        assert str(raised.value).startswith(said)
    assert main(["explain", f"--{name}", "1"]) == 2
    assert f"{name}: unknown setting{MISSPELT[name]}" in capsys.readouterr().err


def test_arguments_on_the_command_line(capsys):
    assert main(["train", "--model", "x"]) == 2
    assert "(an argument of trainers in Python; here it is model_name_or_path)." in capsys.readouterr().err


ARGUMENTS_MISSPELT = {
    "reward_func": "; did you mean reward_funcs?",
    "credit": "; did you mean credits?",
    "learning_rate": " (a setting: args=CancelGRPOConfig(learning_rate=...)).",
}


@pytest.mark.parametrize("name", ARGUMENTS_MISSPELT)
def test_arguments_that_never_were(name):
    with pytest.raises(TypeError) as raised:
        CancelGRPOTrainer("no/model", **{name: 1})
    said = f"GRPOTrainer.__init__() got an unexpected keyword argument {name!r}{ARGUMENTS_MISSPELT[name]}"
    assert str(raised.value) == said


def test_arguments_of_ones_own(tiny_model):
    """Also of classes between this package's trainer and TRL's."""

    class Between(trl.GRPOTrainer):
        def __init__(self, *args, grader=None, **kwargs):
            self.grader = grader
            super().__init__(*args, **kwargs)

    class Named(trl.GRPOTrainer):
        def __init__(self, model, reward_funcs, args, train_dataset, learning_rate=0):
            self.grader = learning_rate
            super().__init__(model, reward_funcs, args, train_dataset)

    for between, name in ((Between, "grader"), (Named, "learning_rate")):
        kind = type("Mine", (CancelGRPOTrainer, between), {})
        assert build(tiny_model, kind, arguments={name: 7}).grader == 7


@pytest.mark.parametrize(("flag", "said"), [("--torch_dtype", "it is dtype now"), ("--no_cuda", "unknown setting")])
def test_a_command_speaks_of_what_it_takes(flag, said, capsys):
    assert main(["eval", flag, "x"]) == 2
    assert said in capsys.readouterr().err


def test_names_that_never_were_and_names_of_ones_own(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_prompt_lengths'"):
        CancelGRPOConfig(output_dir=str(tmp_path), max_prompt_lengths=1)

    @dataclass
    class WithField(CancelGRPOConfig):
        max_prompt_length: int = 7

    class Translates(CancelGRPOConfig):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, max_completion_length=kwargs.pop("max_prompt_length"), **kwargs)

    plain = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert WithField(**plain, max_prompt_length=5).max_prompt_length == 5
    assert Translates(**plain, max_prompt_length=5).max_completion_length == 5
    for made in (pickle.loads(pickle.dumps(CancelGRPOConfig(**plain))), copy.copy(CancelGRPOConfig(**plain))):
        assert made.use_cpu is True
    assert set(inspect.signature(CancelGRPOConfig).parameters) == {f.name for f in fields(CancelGRPOConfig) if f.init}
