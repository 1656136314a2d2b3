"""Processes share the problems, also of a model that is sharded over them, and find what one process finds."""

import json

import pytest
from transformers import AutoModelForCausalLM

from .engines import start


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A function: the folder that a way of starting processes has filled."""
    made = {}

    def of(how):
        if how not in made:
            folder = made[how] = tmp_path_factory.mktemp(how)
            start(how, "tests.distributed.evaluation", tiny_model, folder)
        return made[how]

    return of


@pytest.mark.parametrize("how", ["two", "fsdp2", "zero3"])
def test_callback(run, how):
    if how == "zero3":
        pytest.importorskip("deepspeed")
    one = json.loads((run("one") / "0.json").read_text())
    results = [json.loads((run(how) / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert one["processes"] == 1
    for result in results:
        assert (result["processes"], result["sharded"]) == (2, how != "two")
        assert len(result["metrics"]) == 3
        assert result["metrics"] == one["metrics"]
    assert len(results[0]["logged"]) == 3


def test_command(run):
    """The same file and the same numbers, whichever process answered."""
    one, two = (next((run(how) / "out").glob("*/*")) for how in ("one", "two"))
    assert (one / "samples.jsonl").read_bytes() == (two / "samples.jsonl").read_bytes()
    assert (one / "results.json").read_bytes() == (two / "results.json").read_bytes()


@pytest.mark.parametrize("how", ["two", "fsdp2-sharded"])
def test_training_command_leaves_a_whole_model(how, tiny_model, tmp_path):
    """Also where checkpoints are sharded."""
    start(how, "tests.distributed.command", tiny_model, tmp_path)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert trained.keys() == before.keys()
    assert "Model Card" not in (tmp_path / "README.md").read_text()  # TRL's
