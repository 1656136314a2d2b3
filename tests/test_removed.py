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
