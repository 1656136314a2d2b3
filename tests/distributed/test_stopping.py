"""Several processes stop together, and a checkpoint that one of them did not finish is not whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import assert_same_weights
from tests.test_finished import files
from tests.test_run_lock import another_run_in
from trl_cancel.running.checkpoints import last_whole, why_broken


ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/accelerate/multi_cpu.yaml"


def launch(model, output, action):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    command += ["--main_process_port", "0", "-m", "tests.distributed.stopping", model, str(output), action]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "CI": "1"}, capture_output=True, text=True)


@pytest.mark.slow
def test_processes_stop_together(tiny_model, tmp_path):
    whole = launch(tiny_model, tmp_path / "whole", "none")
    assert whole.returncode == 0, whole.stderr[-3000:]

    stopped = launch(tiny_model, tmp_path / "stopped", "signal")  # which one of two processes gets
    assert stopped.returncode != 0
    assert stopped.stderr.count("Stopped by SIGTERM after step 3") == 1, stopped.stderr[-3000:]
    assert "exitcode  : 143" in stopped.stderr
    assert last_whole(tmp_path / "stopped").name == "checkpoint-3"

    killed = launch(tiny_model, tmp_path / "killed", "kill")
    assert killed.returncode != 0
    state = tmp_path / "killed/checkpoint-4/trainer_state.json"
    assert why_broken(tmp_path / "killed/checkpoint-4") == "it was not written to the end", state.exists()
    assert last_whole(tmp_path / "killed").name == "checkpoint-2"

    for name in ("stopped", "killed"):
        resumed = launch(tiny_model, tmp_path / name, "none")
        assert resumed.returncode == 0, resumed.stderr[-3000:]
        weights = [torch.load(tmp_path / folder / "weights.pt") for folder in ("whole", name)]
        assert_same_weights(*weights)
        assert not list((tmp_path / name).glob("*.incomplete"))

    before = files(tmp_path / "whole" / "checkpoint-6")
    finished = launch(tiny_model, tmp_path / "whole", "none")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stderr.count("Already finished at step 6; nothing to do") == 1
    assert files(tmp_path / "whole" / "checkpoint-6") == before
    assert_same_weights(*(torch.load(tmp_path / name / "weights.pt") for name in ("whole", "stopped")))

    with another_run_in(tmp_path / "new") as other:
        refused = launch(tiny_model, tmp_path / "new", "none")
    assert refused.returncode != 0
    assert f"in use by process {other}" in refused.stderr
