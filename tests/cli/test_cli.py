"""The command line: what it makes, and one line with exit status 2 for every mistake."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from io import StringIO

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cancel.cli import COMMANDS, Failure, UsageError, main
from trl_cancel.cli.demo import SETTINGS
from trl_cancel.cli.settings import Parser
from trl_cancel.cli.training import Results, run_training
from trl_cancel.evaluation import TransformersEngine
from trl_cancel.methods import NAMED
from trl_cancel.running.precision import best_precision


QUICK = {**SETTINGS, "max_steps": 4, "logging_steps": 1, "eval_problems": 4, "eval_samples": 2}


def flags(**settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def test_help_and_version(capsys):
    for argument in ([], ["--help"], ["-h"]):
        assert main(argument) == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("trl-cancel ")


@pytest.mark.parametrize(("argument", "status"), [("--version", 0), ("versio", 2)])
def test_one_of_several_processes_ends_before_the_interpreter_does(argument, status):
    """What is registered with `atexit` still runs; what comes after that, where gloo's threads abort, does not."""
    code = """if True:
        import atexit, os, runpy, sys
        class Late:
            def __del__(self, abort=os.abort):
                abort()
        sys.late = Late()
        import trl_cancel.cli
        main = trl_cancel.cli.main
        def registering(*arguments):
            atexit.register(print, "registered by a library")
            return main(*arguments)
        trl_cancel.cli.main = registering
        runpy.run_module("trl_cancel", alter_sys=True, run_name="__main__")
    """
    command = [sys.executable, "-c", code, argument]
    alone, several = (
        subprocess.run(command, env={**os.environ, "WORLD_SIZE": size}, capture_output=True, text=True)
        for size in ("1", "2")
    )
    assert several.returncode == status, several.stderr
    assert several.stdout.endswith("registered by a library\n")
    assert alone.returncode == -signal.SIGABRT


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands(command, capsys):
    with pytest.raises(SystemExit) as exited:
        main([command, "--help"])
    assert exited.value.code == 0
    assert f"trl-cancel {command}" in capsys.readouterr().out


def test_help_does_not_wait_for_pytorch():
    code = "import sys; from trl_cancel.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_demo(tmp_path, capsys):
    assert main(["demo", "--steps", "8", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for expected in ("accuracy, greedy", "accuracy, sampled", "optimizer steps", "training time", "Model saved to"):
        assert expected in printed
    assert "trl-cancel demo --method grpo --output trl-cancel-demo-grpo" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained("trl_cancel/playground/checkpoint")
    assert any((model.state_dict()[name] != value).any() for name, value in before.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["steps"] == 8
    assert results["before"]["sampled"][0] == pytest.approx(0.39, abs=0.03)
    assert (tmp_path / "out" / "trainer_state.json").exists()


def test_demo_of_trls_method_suggests_ours(monkeypatch, capsys):
    monkeypatch.setattr("trl_cancel.cli.training.run_training", lambda settings: None)
    assert main(["demo", "--method", "grpo", "--output", "theirs"]) == 0
    printed = capsys.readouterr().out
    assert "trl-cancel demo --method query-preserved --output trl-cancel-demo-query-preserved" in printed
    assert "trl-cancel compare theirs trl-cancel-demo-query-preserved" in printed


@pytest.mark.parametrize(("model", "expected"), [("playground", 1), ("tiny", 2)])
def test_threads(model, expected, tiny_model, tmp_path, monkeypatch):
    """One for the playground's models; a model of the user's has those that there are."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = []
    monkeypatch.setattr("trl_cancel.cli.training.run_training", lambda settings: found.append(torch.get_num_threads()))
    name, before = tiny_model if model == "tiny" else model, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["train", *flags(**{**QUICK, "model_name_or_path": name, "output_dir": tmp_path})]) == 0
    finally:
        torch.set_num_threads(before)
    assert found == [expected]


QUICKLY_TRIED = {"grpo", "dfpo-min", "nthr-random", "conflict-tokens"}  # of the default suite


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in QUICKLY_TRIED else pytest.mark.slow) for name in NAMED]
)
def test_every_method_trains(method, tmp_path):
    settings = {**QUICK, "eval_problems": 0, "output_dir": tmp_path, "method": method}
    assert main(["train", *flags(**settings)]) == 0
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"method: [grpo]", "method=['grpo']: unknown; use one of grpo, "),
        (b"1: x", "must hold settings, one `name: value` a line"),
        (b"output_dir: caf\xe9", "not valid YAML"),
    ],
)
def test_broken_recipes(written, said, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(written)
    assert main(["explain", "--config", str(recipe)]) == 2
    assert said in capsys.readouterr().err


def test_yaml_flags_and_method_in_order(tmp_path, capsys):
    """A flag beats `--method`, that beats the file, the file beats a method it names, that beats the default."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**QUICK, "epsilon_high": 0.3, "method": "grpo-fix"}))
    assert main(["explain", "--config", str(recipe)]) == 0
    assert "Symmetric: token-level ratio in [0, 1.3]" in capsys.readouterr().out
    assert main(["explain", f"--config={recipe}", "--epsilon_high", "0.4"]) == 0
    assert "[0, 1.4]" in capsys.readouterr().out
    recipe.write_text(yaml.safe_dump({**QUICK, "symmetric_clip": False}))
    assert main(["explain", "--config", str(recipe), "--method", "grpo-fix"]) == 0
    assert "Symmetric" in capsys.readouterr().out
    assert main(["explain", "--config", str(recipe), "--method=grpo-fix", "--symmetric-clip", "false"]) == 0
    assert "Symmetric" not in capsys.readouterr().out
    recipe.write_text(yaml.safe_dump({**QUICK, "method": "grpo-fix", "symmetric_clip": False}))
    assert main(["explain", "--config", str(recipe)]) == 0
    assert "Symmetric" not in capsys.readouterr().out
    for flag in ("--no_query_preserved", "--no-query-preserved"):
        assert not Parser("test", "").read(["--method", "positive-only", flag]).training.query_preserved
    assert main(["explain", "--config", str(recipe), "--no_query_preserved"]) == 0
    assert "Torn" in capsys.readouterr().out


@pytest.mark.parametrize(
    "recipe", ["playground", "playground_grpo_fix", "playground_dfpo", "playground_nthr", "playground_delta"]
)
def test_a_method_on_the_command_line_is_that_method(recipe, capsys):
    """Whatever the recipe sets of other methods: GRPO is then TRL's, torn groups and all."""
    assert main(["explain", "--config", f"configs/{recipe}.yaml", "--method", "grpo"]) == 0
    printed = capsys.readouterr().out
    assert "Torn: TRL shuffles single rollouts" in printed
    assert "Symmetric" not in printed
    assert "Group weights" not in printed
    assert "NTHR" not in printed
    assert "DelTA" not in printed


def test_train_with_lora_and_a_reward_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_rewards.py").write_text(
        "def length(completions, **_):\n    return [len(c[0]['content']) / 10 for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    settings = {**QUICK, "output_dir": "out", "reward_funcs": "my_rewards.length", "use_peft": True, "lora_r": 2}
    assert main(["train", *flags(**settings), "--lora_target_modules", "q_proj", "v_proj"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert "accuracy, sampled" in capsys.readouterr().out


def test_train_on_a_data_set_of_ones_own(tmp_path):
    rows = {"prompt": ["Compute 1+1.", "Compute 2+3."] * 16, "solution": ["2", "5"] * 16}
    DatasetDict(train=Dataset.from_dict(rows), test=Dataset.from_dict(rows)).save_to_disk(tmp_path / "saved")
    for split in ("train", "test"):
        Dataset.from_dict(rows).to_json(tmp_path / "data" / f"{split}.jsonl")
    (tmp_path / "rewards_of_test.py").write_text(
        "def one_in_two(prompts, **_):\n    return [float(i % 2) for i in range(len(prompts))]\n"
    )
    settings = {
        **QUICK,
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "reward_funcs": "tests.cli.test_cli.one_in_two",
    }
    assert main(["train", *flags(**settings)]) == 0


def one_in_two(prompts, **_):
    return [float(index % 2) for index in range(len(prompts))]


def test_resume_from_the_command_line(tmp_path):
    settings = {**QUICK, "output_dir": tmp_path, "eval_problems": 0, "save_strategy": "steps", "save_steps": 4}
    assert main(["train", *flags(**settings)]) == 0
    settings |= {"max_steps": 8, "resume_from_checkpoint": tmp_path / "checkpoint-4"}
    assert main(["train", *flags(**settings)]) == 0
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 8


MISTAKES = {
    "unknown command": (["tain"], "'tain' is not a command; use one of demo, train, eval, probe, explain"),
    "unknown method, demo": (["demo", "--method", "gpro"], "method=gpro: unknown; use one of grpo, query-preserved"),
    "unknown method, train": (["train", "--method", "gpro"], "method=gpro: unknown"),
    "no steps": (["demo", "--steps", "0"], "--steps 0: must be at least 1"),
    "unknown flag, demo": (["demo", "--stepps", "3"], "unrecognized arguments: --stepps"),
    "unknown setting": (
        ["train", *flags(**QUICK), "--symetric_clip", "true"],
        "symetric_clip: unknown setting; did you mean symmetric_clip?",
    ),
    "model path": (
        ["train", *flags(**{**QUICK, "model_name_or_path": "no/such/model"})],
        "model_name_or_path=no/such/model: there is no such folder",
    ),
    "Hub model": (
        ["train", *flags(**{**QUICK, "model_name_or_path": "no-such/model"})],
        "model_name_or_path=no-such/model: cannot load it",
    ),
    "folder without a model": (
        ["train", *flags(**{**QUICK, "model_name_or_path": "."})],
        "model_name_or_path=.: the folder holds no model",
    ),
    "output folder without a name": (["train", *flags(**{**QUICK, "output_dir": " "})], "output_dir is empty"),
    "temperature": (["train", *flags(**{**QUICK, "temperature": 0})], "temperature=0.0 must be positive"),
    "no model": (
        ["train", *flags(**{k: v for k, v in QUICK.items() if k != "model_name_or_path"})],
        "model_name_or_path is missing",
    ),
    "no data": (
        ["train", *flags(**{k: v for k, v in QUICK.items() if k != "dataset_name"})],
        "dataset_name is missing",
    ),
    "data set": (
        ["train", *flags(**{**QUICK, "dataset_name": "no/such/data"})],
        "dataset_name=no/such/data: cannot load it",
    ),
    "split": (
        ["train", *flags(**{**QUICK, "dataset_train_split": "dev"})],
        "dataset_train_split=dev: the data set has the splits train, test",
    ),
    "reward in a file": (
        ["train", *flags(**{**QUICK, "reward_funcs": "/no/such/grader.py:length"})],
        "not the path of a file is taken, but, as by TRL's script, a dotted path: module.function, where Python finds the "
        "module from the current folder. Give grader.length, started in /no/such or with that folder in PYTHONPATH.",
    ),
    "reward in a file here": (
        ["train", *flags(**{**QUICK, "reward_funcs": "rewards/grader.py"})],
        " Give rewards.grader.FUNCTION.",
    ),
    "reward at an address": (
        ["train", *flags(**{**QUICK, "reward_funcs": "https://u:SECRET@h"})],
        "reward_funcs=https://***@h: is an address; give a function of TRL's or your own by its dotted path, module.func",
    ),
    "argument of the model": (
        ["train", *flags(**{**QUICK, "model_init_kwargs": '{"openai_key": "SECRET"}'})],
        "model_init_kwargs: unknown argument 'openai_key', which Qwen3ForCausalLM does not take.",
    ),
    "arguments that are none": (
        ["train", *flags(**{**QUICK, "model_init_kwargs": "[1]"})],
        "model_init_kwargs='[1]' must be a dictionary, e.g. {'key': 1}, or None.",
    ),
    "argument of the schedule": (
        [
            "train",
            *flags(
                **{
                    **QUICK,
                    "lr_scheduler_type": "linear",
                    "eval_problems": 0,
                    "lr_scheduler_kwargs": '{"nonsense": 1}',
                }
            ),
        ],
        "lr_scheduler_kwargs: unknown argument 'nonsense', which get_linear_schedule_with_warmup does not take.",
    ),
    "line feed": (
        ["train", *flags(**{**QUICK, "model_name_or_path": "./a\nb"})],
        "model_name_or_path=./a\\nb: there is no such folder.",
    ),
    "spaces in a folder's name": (
        ["train", *flags(**{**QUICK, "model_name_or_path": "./hf_runs/a  b "})],
        "model_name_or_path=./hf_runs/a  b : there is no such folder.",
    ),
    "address of a model": (
        ["train", *flags(**{**QUICK, "model_name_or_path": "https://huggingface.co/a/b"})],
        "it is an address; give the Hub id, a/b.",
    ),
    "reward": (
        ["train", *flags(**{**QUICK, "reward_funcs": "acuracy_reward"})],
        "reward_funcs=acuracy_reward: not found",
    ),
    "reward, a slip": (
        ["train", *flags(**{**QUICK, "reward_funcs": "acuracy_reward"})],
        "; did you mean accuracy_reward? Name one of TRL's",
    ),
    "reward, a slip in a module": (
        ["train", *flags(**{**QUICK, "reward_funcs": "trl_cancel.playground.reward.anwser_reward"})],
        "; did you mean answer_reward?",
    ),
    "reward for other columns": (
        ["train", *flags(**{**QUICK, "reward_funcs": "tests.cli.test_cli.wants_answer"})],
        "The reward function 'wants_answer' needs 'answer', but split 'test' has the columns prompt, solution",
    ),
    "4 bits without LoRA": (
        ["train", *flags(**QUICK, load_in_4bit=True)],
        "load_in_4bit: weights of 4 bits cannot be trained. Add --use_peft",
    ),
    "8 bits without LoRA": (
        ["probe", "all", *flags(**QUICK, load_in_8bit=True)],
        "load_in_8bit: weights of 8 bits cannot be trained. Add --use_peft",
    ),
    "reward module": (
        ["train", *flags(**{**QUICK, "reward_funcs": "no_such.module"})],
        "reward_funcs=no_such.module: not found",
    ),
    "reward, a relative path": (
        ["train", *flags(**{**QUICK, "reward_funcs": "..x"})],
        "reward_funcs=..x: not found (it starts with a dot)",
    ),
    "learning rate": (["train", *flags(**{**QUICK, "learning_rate": "nan"})], "learning_rate=nan must be a number"),
    "sizes of TRL": (
        ["train", *flags(**{**QUICK, "num_generations": 7})],
        "is not a multiple of num_generations=7. Set one of",
    ),
    "sizes of ours": (
        [
            *("train", "--query_preserved"),
            *flags(**{**QUICK, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}),
        ],
        "query_preserved=True cannot keep groups whole",
    ),
    "choice": (["train", *flags(**{**QUICK, "symmetric_clip_gradient": "none"})], "symmetric_clip_gradient"),
    "value": (
        ["train", *flags(**{**QUICK, "max_steps": "many"})],
        "argument --max_steps/--max-steps: invalid int value: 'many'",
    ),
    "contradiction": (
        ["train", *flags(**{**QUICK, "symmetric_clip": True, "loss_type": "cispo"})],
        "symmetric_clip=True has no meaning",
    ),
    "no such file": (["train", "--config", "no-such.yaml"], "--config no-such.yaml: No such file or directory"),
    "no file": (["train", "--config"], "--config needs a path"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, tmp_path, capsys, monkeypatch):
    """One line that says what to change, exit status 2, and nothing written."""
    arguments, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert "SECRET" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "learning_rte: unknown setting; did you mean learning_rate?"),
        ("- a\n- b", "must hold settings"),
        ("a: [", "not valid YAML"),
        ("method: gpro", "method=gpro: unknown"),
        ("advantage_sign: up\nuse_cpu: true\nbf16: false", "advantage_sign='up' is not one of"),
    ],
)
def test_mistakes_in_files(text, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert main(["train", "--config", str(recipe)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["file/out", "/proc/out"])
def test_unwritable_output(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    settings = {**QUICK, "output_dir": tmp_path / folder}
    assert main(["train", *flags(**settings)]) == 2
    assert f"output_dir={settings['output_dir']}: cannot write to" in capsys.readouterr().err


def test_data_set_without_prompts(tmp_path, capsys):
    Dataset.from_dict({"question": ["1+1"], "solution": ["2"]}).to_json(tmp_path / "data" / "train.jsonl")
    settings = {
        **QUICK,
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "reward_funcs": "accuracy_reward",
    }
    assert main(["train", *flags(**settings)]) == 2
    error = capsys.readouterr().err
    assert "split 'train' has the columns question, solution but no 'prompt'" in error
    assert not (tmp_path / "out").exists()


def test_errors_in_training_are_not_hidden(tmp_path):
    """A mistake in a reward function needs its traceback."""
    settings = {**QUICK, "output_dir": tmp_path, "eval_problems": 0, "reward_funcs": "tests.cli.test_cli.broken"}
    with pytest.raises(ZeroDivisionError):
        main(["train", *flags(**settings)])


def broken(**_):
    return [1 / 0]


def wants_answer(completions, answer, **_):
    return [1.0] * len(completions)


def good_at_first(prompts, trainer_state, **_):
    if trainer_state.global_step == SHORT["max_steps"]:
        raise ConnectionError("the judge is gone")
    return one_in_two(prompts)


async def awaited(prompts, trainer_state, log_extra, log_metric, **_):
    return one_in_two(prompts)


SHORT = {**QUICK, "max_steps": 1, "max_completion_length": 8}


def test_a_reward_that_fails_after_the_training_costs_no_model(tmp_path, capsys):
    settings = {**SHORT, "output_dir": tmp_path / "out", "reward_funcs": "tests.cli.test_cli.good_at_first"}
    assert main(["train", *flags(**settings)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        'trl-cancel train: The evaluation "After" has failed: The reward function good_at_first raised '
        f"ConnectionError: the judge is gone. The trained model is saved in {tmp_path}/out."
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name in ("trainer_state.json", "README.md"):
        assert (tmp_path / "out" / name).exists()


def test_a_reward_that_fails_before_the_training_is_one_line(tmp_path, capsys):
    settings = {**SHORT, "output_dir": tmp_path / "out", "reward_funcs": "tests.cli.test_cli.broken"}
    assert main(["train", *flags(**settings)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith('trl-cancel train: The evaluation "Before" has failed: The reward function broken raised')
    assert not (tmp_path / "out").exists()


def test_a_reward_that_waits_is_waited_for(tmp_path, capsys):
    settings = {**SHORT, "output_dir": tmp_path / "out", "reward_funcs": "tests.cli.test_cli.awaited"}
    assert main(["train", *flags(**settings)]) == 0
    assert "accuracy, greedy" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Evaluation" in card


def test_evaluations_leave_the_training_alone(tmp_path, monkeypatch):
    """Also where the reward is random: the run is the one without them."""
    weights = []
    for problems in (0, 4):
        output = tmp_path / str(problems)
        settings = {**SHORT, "max_steps": 2, "eval_problems": problems, "output_dir": output}
        assert main(["train", *flags(**settings, reward_funcs="tests.cli.test_cli.drawn")]) == 0
        weights.append((output / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def drawn(prompts, **_):
    return [random.random() for _ in prompts]


def test_a_broken_module_of_rewards(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_rewards.py").write_text("def length(:\n")
    monkeypatch.chdir(tmp_path)
    settings = {**QUICK, "output_dir": "out", "reward_funcs": "broken_rewards.length"}
    assert main(["train", *flags(**settings)]) == 2
    said = "reward_funcs=broken_rewards.length: its module cannot be read: invalid syntax (broken_rewards.py, line 1)."
    assert capsys.readouterr().err == f"trl-cancel train: {said}\n"


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize("early", [True, False])
def test_weights_that_are_cut_off(command, early, tiny_model, tmp_path, monkeypatch, capsys):
    """In a folder, which is looked at first; and in the Hub's cache, say, where they turn out when they are loaded."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    os.truncate(model / "model.safetensors", 1000)
    if not early:
        monkeypatch.setattr("trl_cancel.running.damage.weights_cut_off", lambda folder: [])
    settings = {**SHORT, "output_dir": tmp_path / "out"} if command == "train" else {"output": tmp_path / "out"}
    settings |= {"dataset_name": "playground", "model_name_or_path": model}
    assert main([command, *flags(**settings)]) == 2
    error = capsys.readouterr().err
    said = "model.safetensors cut off; copy or download" if early else "cannot load it: Error while deserializing"
    assert f"trl-cancel {command}: model_name_or_path={model}: {said}" in error
    assert "Traceback" not in error


def test_going_on_with_another_model(tmp_path, capsys):
    settings = {**SHORT, "output_dir": tmp_path, "save_strategy": "steps", "save_steps": 1, "eval_problems": 0}
    assert main(["train", *flags(**settings)]) == 0
    capsys.readouterr()
    settings |= {"max_steps": 2, "resume_from_checkpoint": "auto", "use_peft": True, "eval_problems": 4}
    assert main(["train", *flags(**settings)]) == 2
    error = capsys.readouterr().err
    assert f"trl-cancel train: resume_from_checkpoint={tmp_path}/checkpoint-1 does not fit the model" in error
    assert "Before" not in error, "it comes before the evaluation"


def test_rewards_that_are_no_shares_are_no_percentages():
    results = Results({"greedy": (-1.5, -2.0, -1.0)}, {"greedy": (0.5, 0.25, 0.75)}, {}, {}, None, 1, 1.0)
    console = Console(width=120, file=StringIO())
    console.print(results.table())
    printed = console.file.getvalue()
    assert "-1.5 [-2, -1]" in printed
    assert "50.0% [25.0%, 75.0%]" in printed


def test_resume_and_what_it_needs(tmp_path, capsys):
    settings = {**QUICK, "eval_problems": 0, "output_dir": tmp_path / "out", "save_strategy": "steps", "save_steps": 2}
    for wanted, said in (("true", "holds no whole checkpoint"), ("nowhere", "there is no such folder")):
        assert main(["train", *flags(**settings, resume_from_checkpoint=wanted)]) == 2
        assert said in capsys.readouterr().err
    assert main(["train", *flags(**settings)]) == 0
    longer = {**settings, "max_steps": 6}
    assert main(["train", *flags(**longer, resume_from_checkpoint="true")]) == 0
    steps = [entry["step"] for entry in json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]]
    assert steps == [1, 2, 3, 4, 5, 6, 6]


def test_one_reward_may_stand_without_brackets(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    settings = {**QUICK, "output_dir": str(tmp_path / "out"), "reward_funcs": "json.nothing"}
    recipe.write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(recipe)]) == 2
    assert "reward_funcs=json.nothing: not found" in capsys.readouterr().err
    for extra, said in (
        ({"reward_funcs": "os.sep"}, "reward_funcs=os.sep: is a str, not a function"),
        ({"eval_problems": -3}, "eval_problems=-3: must be at least 0"),
        ({"eval_samples": 0}, "eval_samples=0: must be at least 1"),
    ):
        recipe.write_text(yaml.safe_dump({**settings, **extra}))
        assert main(["train", "--config", str(recipe)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_evaluations_take_the_memory_there_is(tmp_path, monkeypatch):
    """Answers are those of larger batches, and rewards are asked once for each."""
    whole, sizes = TransformersEngine._answers, []

    def limited(engine, model, requests, settings):
        sizes.append(len(requests))
        if len(requests) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(engine, model, requests, settings)

    monkeypatch.setattr(TransformersEngine, "_answers", limited)
    scores = []
    for most in (100, 3):
        scored.clear()
        settings = {**QUICK, "max_steps": 1, "output_dir": tmp_path / str(most)}
        assert main(["train", *flags(**settings, reward_funcs="tests.cli.test_cli.counted")]) == 0
        assert len(scored) == 2 * (4 + 8) + 128
        scores.append(json.loads((tmp_path / str(most) / "all_results.json").read_text())["before"])
    assert scores[0] == scores[1]
    assert sizes[:2] == [4, 8]
    assert sizes[-7:] == [8, 4, 2, 2, 4, 2, 2]
    most = 0
    with pytest.raises(Failure, match='The evaluation "Before" is out of memory'):
        run_training(Parser("test", "").read(flags(**QUICK, output_dir=tmp_path / "none")))


scored: list = []


def counted(completions, **_):
    scored.extend(completions)
    return [float(len(str(completion))) for completion in completions]


def test_the_environment_of_a_recipe_comes_first(tmp_path, monkeypatch):
    """The device is looked for in it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("env: {CUDA_VISIBLE_DEVICES: 7}\nlearning_rate: 0.1\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    seen = []

    def precision(use_cpu):
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        return best_precision(use_cpu=True)

    monkeypatch.setattr("trl_cancel.cli.settings.best_precision", precision)
    Parser("test", "").read(["--config", str(recipe)])
    assert seen == ["7"]
    for wrong in ("text", "[A, B]", "{1: x}"):
        recipe.write_text(f"env: {wrong}\n")
        with pytest.raises(UsageError, match=r"env=.*: must hold names and values"):
            Parser("test", "").read(["--config", str(recipe)])
