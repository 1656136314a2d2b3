"""Every method with rollouts from vLLM: it samples with the weights that are trained, and the method acts as it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.scenarios import SCENARIOS


pytest.importorskip("vllm", reason="runs in an environment of its own: tests/vllm/run")
DIFFERENCE = "sampling/sampling_logp_difference/mean"


@pytest.fixture(scope="module")
def logs_of(tmp_path_factory):
    """The logs of a scenario, each run once."""
    made = {}

    def logs(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("vllm")
            command = [sys.executable, Path(__file__).parent / "scenarios.py", name, folder]
            run = subprocess.run(command, capture_output=True, text=True, timeout=600)
            assert run.returncode == 0, run.stderr[-3000:]
            made[name] = [entry for entry in json.loads((folder / "logs.json").read_text()) if "loss" in entry]
        return made[name]

    return logs


def logged(logs, name):
    return [entry[name] for entry in logs if name in entry]


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "no sync"])
def test_samples_with_the_trained_weights(name, logs_of):
    """Two generations, the second after four optimizer steps: vLLM and the model agree on each token's probability."""
    logs = logs_of(name)
    assert len(logs) == 8
    differences = logged(logs, DIFFERENCE)
    assert len(differences) >= 2
    assert max(differences) < 1e-4


def test_stale_weights_would_show(logs_of):
    assert max(logged(logs_of("no sync"), DIFFERENCE)) > 0.01


def test_shared_tokens_cancel(logs_of):
    """On policy in the first step of each generation, and not at all with clipping that knows no sign."""
    for name in ("grpo", "query-preserved"):
        residuals = logged(logs_of(name), "cancel/shared_prefix_residual")
        assert min(residuals) < 1e-4


def test_balance(logs_of):
    for name in ("balance", "credits"):
        logs = logs_of(name)
        assert max(logged(logs, "balance/rounds")) > 1
        for entry in logs:
            if entry.get("balance/satisfied") == 1:
                assert min(entry["balance/positive_fraction"], entry["balance/negative_fraction"]) >= 0.25


def test_token_credit(logs_of):
    logs = logs_of("credits")
    assert 0 < max(logged(logs, "nthr/selected_fraction")) < 1
    assert 0 < max(logged(logs_of("nthr-random"), "nthr/selected_fraction")) < 1
    for name in ("delta-random", "delta-top-fraction"):
        assert max(logged(logs_of(name), "delta/lambda_std")) > 0.01
    assert min(logged(logs, "delta/lambda_std")) > 0.01


def test_group_weights(logs_of):
    """vLLM's own correction of sequences is part of the weights, which cancel within groups."""
    for name in ("dfpo", "dfpo-orth", "dfpo-positive-orth", "dfpo-rebalance"):
        logs = logs_of(name)
        assert max(logged(logs, "group_weights/ratio_max")) > 1.001
        assert max(logged(logs, "group_weights/orthogonality")) < 1e-3


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    command = [sys.executable, "-m", "tests.vllm.evaluation", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / "answers.json").read_text())


@pytest.mark.parametrize("name", ["model", "adapter"])
def test_evaluation_answers_as_transformers_does(name, answers):
    """Greedily, with the adapter in its place; sampled answers are as many, and the seed decides them."""

    def of(engine, greedy):
        return [sample for sample in answers[f"{engine} {name}"] if (sample["sample"] is None) == greedy]

    expected = of("transformers", True)
    assert of("vllm", True) == expected
    assert len({sample["completion"] for sample in expected}) > 3
    sampled = of("vllm", False)
    assert [(sample["problem"], sample["seed"]) for sample in sampled] == [
        (sample["problem"], sample["seed"]) for sample in of("transformers", False)
    ]
    assert len({sample["completion"] for sample in sampled}) > len(sampled) / 2
    assert answers[f"vllm {name} again"] == answers[f"vllm {name}"]


def test_adapters_answer_differently(answers):
    assert answers["vllm model"] != answers["vllm adapter"]
    assert {sample["finish_reason"] for sample in answers["vllm model"]} == {"stop", "length"}
