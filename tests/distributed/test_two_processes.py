"""
One process and two, with a model each or one that is sharded, compute the same on the same rollouts; groups stay whole;
the metrics are global. A core of the scenarios is in the default suite; `pytest -m "slow or not slow"
tests/distributed/test_two_processes.py` runs all of them, and with DeepSpeed where it is installed.
"""

import json
from functools import cache

import pytest
import torch

from tests.runs import TINY, assert_same_weights
from trl_cancel.playground.tokenizer import build_tokenizer
from trl_cancel.playground.warm_start import build_model

from .engines import start
from .scenarios import SCENARIOS, SHARDED, SLOW


GLOBAL = (
    "cancel/",
    "nthr/",
    "delta/",
    "symmetric_clip/",
    "group_weights/",
    "shift/",
    "reward",
    "loss",
    "clip_ratio/region_mean",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Like `tiny_model`, with an output layer of its own."""
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, **TINY, initializer_range=0.4, tie_word_embeddings=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def marked(names):
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


@pytest.fixture(scope="module")
def results(model, tmp_path_factory, request):
    """A function: logs and weights of every scenario, by how the processes are started."""
    folder = tmp_path_factory.mktemp("results")
    all_of_them = any(item.get_closest_marker("slow") for item in request.session.items if item.path == request.path)

    @cache
    def of(how):
        out = folder / how
        names = [name for name in (SCENARIOS if how in ("one", "two") else SHARDED) if all_of_them or name not in SLOW]
        start(how, "tests.distributed.scenarios", model, out, *names)
        return {
            name: (json.loads((out / f"{name}.json").read_text()), torch.load(out / f"{name}.pt")) for name in names
        }

    return of


def assert_agree(results, name, how):
    (one, weights), (other, other_weights) = results("one")[name], results(how)[name]
    compared = 0
    for log, other_log in zip(one["logs"][:-1], other["logs"][:-1], strict=True):
        shared = {key: value for key, value in log.items() if key.startswith(GLOBAL)}
        assert {key: other_log[key] for key in shared} == pytest.approx(shared, rel=1e-4, abs=1e-5)
        compared += len(shared)
    assert compared > 10
    assert weights.keys() == other_weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(other_weights[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", marked(name for name in SCENARIOS if name != "split"))
def test_one_process_and_two_agree(results, name):
    assert_agree(results, name, "two")


@pytest.mark.slow  # FSDP on the CPU; the matrix tries every method on it
@pytest.mark.parametrize("name", marked(SHARDED))
def test_one_process_and_a_sharded_model_agree(results, name):
    assert_agree(results, name, "fsdp2")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("name", SHARDED)
def test_one_process_and_deepspeed_agree(results, name, stage):
    pytest.importorskip("deepspeed")
    assert_agree(results, name, stage)


@pytest.mark.parametrize(
    ("how", "processes", "sharded"),
    [("one", 1, False), ("two", 2, False), pytest.param("fsdp2", 2, True, marks=pytest.mark.slow)],
)
def test_processes_are_as_said(results, how, processes, sharded):
    assert {result["processes"] for result, _ in results(how).values()} == {processes}
    assert {result["sharded"] for result, _ in results(how).values()} == {sharded}


def test_the_runs_have_something_to_compare(results):
    residuals = [log["cancel/shared_prefix_residual"] for log in results("two")["stock-clip"][0]["logs"][:-1]]
    assert max(residuals) > 1e-3
    for name in ("on-policy", "straddling", "symmetric-clip"):
        residuals = [log["cancel/shared_prefix_residual"] for log in results("two")[name][0]["logs"][:-1]]
        assert max(residuals) < 1e-4
    for name in ("dfpo-spread", "dfpo-straddling-spread"):
        logs = results("two")[name][0]["logs"][:-1]
        assert max(log["group_weights/ratio_max"] for log in logs) > 1.001
        assert max(log.get("group_weights/orthogonality", 0) for log in logs) < 1e-5
    assert results("two")["delta"][0]["logs"][0]["delta/lambda_std"] > 0.02
    assert 0 < results("two")["nthr"][0]["logs"][0]["nthr/selected_fraction"] < 1
    for name in ("straddling", "dfpo-spread", "lora"):
        logs = results("two")[name][0]["logs"][:-1]
        assert min(log["shift/mean_magnitude"] for log in logs if log["step"] % 2 == 0) > 1e-4
    clipped = [log["symmetric_clip/clip_fraction"] for log in results("two")["symmetric-clip"][0]["logs"][:-1]]
    assert max(clipped) > 0


def test_groups_are_whole_on_two_processes(results):
    assert all(set(counts) == {4} for counts in results("two")["split"][0]["steps"])


def test_rounds_of_generation(model, tmp_path):
    """A resumed run equals the uninterrupted one, and a process that finds nothing does not hold up the other."""
    start("two", "tests.distributed.balance", model, tmp_path)
    logs = json.loads((tmp_path / "logs.json").read_text())
    assert max(log.get("balance/rounds", 0) for log in logs["whole"][:4]) > 1
    assert logs["resumed"][4:-1] == logs["whole"][4:-1]
    assert_same_weights(torch.load(tmp_path / "resumed.pt"), torch.load(tmp_path / "whole.pt"))
    starved = logs["starved"][0]
    assert (starved["balance/rounds"], starved["balance/satisfied"]) == (3, pytest.approx(0.5, abs=0.5))
    assert starved["balance/satisfied"] < 1
    assert starved["balance/zero_variance_fraction"] >= 0.5
