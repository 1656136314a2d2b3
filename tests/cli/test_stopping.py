"""`trl-cancel train` that is stopped, killed or out of space: exit status, one line, and what it goes on from."""

import os
import shutil
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.kills import status_of
from tests.runs import DEFAULTS
from trl_cancel import CancelGRPOConfig
from trl_cancel.cli import UsageError, main
from trl_cancel.cli.output import check_output
from trl_cancel.playground import reward as graded
from trl_cancel.running.checkpoints import last_whole


SETTINGS = {
    "model_name_or_path": "playground",
    "dataset_name": "playground",
    "max_steps": 6,
    "save_steps": 2,
    "max_completion_length": 8,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "report_to": "none",
    "use_cpu": "true",
    "bf16": "false",
    "learning_rate": 1e-3,
}


def train(output, **settings):
    settings = {**SETTINGS, "output_dir": output, **settings}
    return main(["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])


def spoil(monkeypatch, at, action):
    """Lets the playground's reward function act at a call."""
    calls, reward = [], graded.answer_reward

    def acting(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            return action(*args, **kwargs)
        return reward(*args, **kwargs)

    acting.__name__ = reward.__name__
    monkeypatch.setattr(graded, "answer_reward", acting)


def signalled(number, at, monkeypatch):
    reward = graded.answer_reward

    def action(*args, **kwargs):
        os.kill(os.getpid(), number)
        return reward(*args, **kwargs)

    spoil(monkeypatch, at, action)


@pytest.mark.slow
def test_stopped_and_taken_up_by_the_same_command(tmp_path, monkeypatch, capfd):
    """As a job that a scheduler ends and queues again: SIGTERM, status 143; then Ctrl-C, 130; then it runs out."""
    assert train(tmp_path / "whole") == 0
    again = {"output": tmp_path / "run", "resume_from_checkpoint": "auto"}
    with monkeypatch.context() as patch:
        signalled(signal.SIGTERM, 3, patch)
        with pytest.raises(SystemExit) as ended:
            train(**again)
    assert ended.value.code == 143
    assert last_whole(tmp_path / "run").name == "checkpoint-3"
    with monkeypatch.context() as patch:
        signalled(signal.SIGINT, 2, patch)
        assert train(**again) == 130
    out, err = capfd.readouterr()
    assert "Starting anew: there is no whole checkpoint." in out
    assert f"Going on from {tmp_path / 'run' / 'checkpoint-3'}." in out
    assert "SIGTERM: stopping after this optimizer step" in err
    assert "Traceback" not in err
    assert last_whole(tmp_path / "run").name == "checkpoint-5"
    assert train(**again) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_broken_checkpoint_by_name(tmp_path, capfd):
    assert train(tmp_path, max_steps=2, save_steps=1) == 0
    (tmp_path / "checkpoint-2.incomplete").touch()
    capfd.readouterr()
    assert train(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-2") == 2
    assert (
        f"checkpoint-2 is not a whole checkpoint: it was not written to the end. The last whole checkpoint there is {tmp_path}/checkpoint-1"
        in capfd.readouterr().err
    )
    assert train(tmp_path / "empty", resume_from_checkpoint="true") == 2
    assert "set it to 'auto', which starts anew" in capfd.readouterr().err


def test_only_the_main_process_looks_for_a_checkpoint(tmp_path, monkeypatch):
    """Another node may see the folder otherwise, and must not refuse or choose for itself."""
    training = CancelGRPOConfig(str(tmp_path), **DEFAULTS, resume_from_checkpoint=str(tmp_path / "none"))
    settings = SimpleNamespace(training=training, run=SimpleNamespace(overwrite_output_dir=False))
    with pytest.raises(UsageError, match="there is no such folder"):
        check_output(settings)
    monkeypatch.setattr(CancelGRPOConfig, "process_index", 1)
    check_output(settings)


def test_a_spoiled_reward_is_one_line(tmp_path, monkeypatch, capfd):
    spoil(monkeypatch, 2, lambda completion_ids, **kwargs: [float("nan")] * len(completion_ids))
    assert train(tmp_path) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("trl-cancel train: The reward function 'answer_reward' returned nan for completion 0 of 8")
    assert "progress up to step 1 is saved" in last


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 12 MiB: room for two checkpoints of the playground's model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("filler", [0.0, 0.1, 0.4, 0.6, 0.9])
def test_full_disk_is_one_line(small_disk, capfd, filler):
    """A real one, full at several places of a checkpoint; what was saved before is whole, and the run goes on."""
    assert train(small_disk, max_steps=2) == 0
    checkpoint = sum(file.stat().st_size for file in (small_disk / "checkpoint-2").rglob("*"))
    free = shutil.disk_usage(small_disk).free
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(int(free - filler * checkpoint)))
    capfd.readouterr()
    assert train(small_disk, resume_from_checkpoint="true") == 1
    err = capfd.readouterr().err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("trl-cancel train:")]
    assert f"{small_disk}/checkpoint-4 could not be saved" in line
    assert f"{small_disk}/checkpoint-2 is whole" in line
    assert sorted(path.name for path in small_disk.glob("checkpoint-*")) == ["checkpoint-2"]
    ballast.unlink()
    assert train(small_disk, resume_from_checkpoint="true", save_total_limit=1) == 0


@pytest.mark.slow
def test_full_disk_at_the_end(small_disk, capfd):
    assert train(small_disk, max_steps=2) == 0
    for name in ("model.safetensors", "tokenizer.json"):
        (small_disk / name).unlink()
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 10_000))
    capfd.readouterr()
    assert train(small_disk, max_steps=2, save_strategy="no", resume_from_checkpoint="true") == 1
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert f"{small_disk} could not be saved" in err
    assert "checkpoint-2 is whole" in err
    assert not (small_disk / "model.safetensors").exists()


@pytest.mark.slow
def test_killed_and_taken_up_by_the_same_command(tmp_path, monkeypatch):
    assert train(tmp_path / "whole") == 0
    for at in (4, 2, 1):
        with monkeypatch.context() as patch:
            signalled(signal.SIGKILL, at, patch)
            assert status_of(lambda: train(tmp_path / "run", resume_from_checkpoint="auto")) == -signal.SIGKILL
    assert train(tmp_path / "run", resume_from_checkpoint="auto") == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)
