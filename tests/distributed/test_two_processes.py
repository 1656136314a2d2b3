"""One process and two compute the same on the same rollouts; groups stay whole; the metrics are global."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .scenarios import SCENARIOS


ROOT = Path(__file__).parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/multi_cpu.yaml")]
GLOBAL = (
    "cancel/",
    "nthr/",
    "delta/",
    "symmetric_clip/",
    "group_weights/",
    "reward",
    "loss",
    "clip_ratio/region_mean",
)


@pytest.fixture(scope="module")
def results(tiny_model, tmp_path_factory):
    """Logs and weights of every scenario, by number of processes."""
    folder = tmp_path_factory.mktemp("results")
    found = {}
    for processes, launch in ((1, []), (2, [*LAUNCH, "--main_process_port", "0"])):
        out = folder / str(processes)
        command = [sys.executable, *launch, "-m", "tests.distributed.scenarios", tiny_model, str(out)]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CI": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        found[processes] = {
            name: (json.loads((out / f"{name}.json").read_text()), torch.load(out / f"{name}.pt"))
            for name in SCENARIOS
        }
    return found


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "split"])
def test_one_process_and_two_agree(results, name):
    (one, weights), (two, weights_of_two) = results[1][name], results[2][name]
    compared = 0
    for log, log_of_two in zip(one["logs"][:-1], two["logs"][:-1], strict=True):
        shared = {key: value for key, value in log.items() if key.startswith(GLOBAL)}
        assert {key: log_of_two[key] for key in shared} == pytest.approx(shared, rel=1e-4, abs=1e-5)
        compared += len(shared)
    assert compared > 10
    for key, value in weights.items():
        torch.testing.assert_close(weights_of_two[key], value, rtol=1e-4, atol=1e-5)


def test_there_are_two_processes(results):
    for processes in (1, 2):
        assert {result["processes"] for result, _ in results[processes].values()} == {processes}


def test_the_runs_have_something_to_compare(results):
    residuals = [log["cancel/shared_prefix_residual"] for log in results[2]["stock-clip"][0]["logs"][:-1]]
    assert max(residuals) > 1e-3
    for name in ("on-policy", "straddling", "symmetric-clip"):
        residuals = [log["cancel/shared_prefix_residual"] for log in results[2][name][0]["logs"][:-1]]
        assert max(residuals) < 1e-4
    for name in ("dfpo", "dfpo-spread", "dfpo-straddling", "dfpo-straddling-spread"):
        logs = results[2][name][0]["logs"][:-1]
        assert max(log["group_weights/ratio_max"] for log in logs) > 1.001
        assert max(log.get("group_weights/orthogonality", 0) for log in logs) < 1e-5
    assert results[2]["delta"][0]["logs"][0]["delta/lambda_std"] > 0.02
    assert 0 < results[2]["nthr"][0]["logs"][0]["nthr/selected_fraction"] < 1
    clipped = [log["symmetric_clip/clip_fraction"] for log in results[2]["symmetric-clip"][0]["logs"][:-1]]
    assert max(clipped) > 0


def test_groups_are_whole_on_two_processes(results):
    assert all(set(counts) == {4} for counts in results[2]["split"][0]["steps"])
