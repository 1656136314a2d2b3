"""The example scripts, as they stand there and with one line changed: with TRL's import and with this package's."""

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import datasets
import pytest
import torch
import trl
from packaging.version import Version
from safetensors.torch import load_file

from trl_cancel.playground.__main__ import write_playground

from .runs import assert_same_weights, repeatable, without


ROOT = Path(__file__).parents[1]
README = (ROOT / "examples" / "README.md").read_text()
THEIRS, OURS = re.findall(r"^[-+](from .*)$", README, re.MULTILINE)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
OFFLINE = {
    Path(words[1]).stem: words[2:]
    for words in map(shlex.split, COMMANDS)
    if any("playground-files/" in word for word in words)
}
SHORT = ("--max_steps", "2")
ONLY_OURS = ("cancel/", "eval_cancel/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the playground and, as a link, the examples, so that the commands of the page work in it."""
    folder = tmp_path_factory.mktemp("examples")
    write_playground(folder / "playground-files", num_train=64, num_test=16)
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Runs an example by the command on its page, with one of the two imports; gives what it logged and saved."""
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")

    @cache
    def run(name, line, *flags):
        script = (ROOT / "examples" / f"{name}.py").read_text()
        assert script.splitlines().count(THEIRS) == 1
        output = folder / "runs" / f"{name}-{line.split()[1]}-{len(flags)}"
        arguments = [f"examples/{name}.py", *OFFLINE[name], *flags, "--output_dir", str(output)]
        patch.setattr(sys, "argv", arguments)
        exec(compile(script.replace(THEIRS, line), arguments[0], "exec"), {"__name__": "__main__"})
        logs = json.loads((output / "trainer_state.json").read_text())["log_history"]
        saved = next(path for path in output.glob("*.safetensors"))
        return [repeatable(entry) for entry in logs], load_file(saved)

    yield run
    patch.undo()


def residuals(logs):
    return [entry["cancel/shared_prefix_residual"] for entry in logs if "cancel/shared_prefix_residual" in entry]


def same_but_for_our_metrics(ours, theirs):
    return [without(entry, ONLY_OURS) for entry in ours] == theirs and ours != theirs


def learned(logs):
    return all(entry["grad_norm"] > 0 for entry in logs if "grad_norm" in entry)


@pytest.mark.parametrize("name", ["plain", "conversational"])
def test_whole_generations_give_the_same_weights(name, run):
    """No generation is split over optimizer steps, so nothing of this package acts; it only measures."""
    logs, weights = run(name, THEIRS, *SHORT)
    own_logs, own_weights = run(name, OURS, *SHORT)
    assert_same_weights(own_weights, weights)
    assert same_but_for_our_metrics(own_logs, logs)
    assert learned(logs)
    assert len(residuals(own_logs)) == 2
    assert residuals(own_logs)[0] < 1e-5, "the first update is on-policy"
    assert not residuals(logs)


def test_conversational_rewards(run):
    logs, _ = run("conversational", OURS, *SHORT)
    first, evaluation = logs[0], next(entry for entry in logs if "eval_reward" in entry)
    names = ("accuracy_reward", "boxed_format_reward", "work_reward")
    means = [first[f"rewards/{name}/mean"] for name in names]
    weighted = sum(weight * mean for weight, mean in zip((1.0, 0.2, 0.3), means, strict=True))
    assert first["reward"] == pytest.approx(weighted, abs=1e-5)
    assert all(0 < mean <= 1 for mean in means)
    assert first["problems_without_work"] == 0
    assert all(f"eval_rewards/{name}/mean" in evaluation for name in names)


@pytest.mark.skipif(Version(trl.__version__) < Version("1.15"), reason="adapters begin at random, without the seed")
def test_split_generations_keep_their_groups(run):
    """Here a generation is split; without whole groups, the weights are TRL's again."""
    logs, weights = run("lora", THEIRS)
    own_logs, own_weights = run("lora", OURS)
    off_logs, off_weights = run("lora", OURS, "--query_preserved", "false")
    assert any(not torch.equal(weights[name], own_weights[name]) for name in weights)
    assert_same_weights(off_weights, weights)
    assert same_but_for_our_metrics(off_logs, logs)
    assert own_logs[0]["reward"] == logs[0]["reward"], "the same rollouts, dealt out otherwise"
    assert max(residuals(own_logs)) < 0.01 < 0.1 < min(residuals(off_logs))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, folder):
    """Those of the page, as they stand there; of those that need a GPU and the Hub, the settings are read."""
    words = shlex.split(command)
    flags = [] if "playground" in command else ["--help"]
    done = subprocess.run([sys.executable, *words[1:], *flags], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
