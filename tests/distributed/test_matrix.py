"""
Every method of the table × {full, LoRA, 4-bit} × {one process, two}: trains, saves, loads, resumes; and one process and
two compute the same.

A core of it is in the default suite. The whole takes about a quarter of an hour on two cores; the engines that shard
the model are tried on two rows, DeepSpeed where it is installed:
`pytest -n0 -m "slow or not slow" tests/distributed/test_matrix.py`. What they cannot do is in `docs/scaling.md`.
"""

import json
from functools import cache

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from tests.methods import METHODS
from tests.runs import assert_same_weights
from trl_cancel.playground.tokenizer import build_tokenizer
from trl_cancel.playground.warm_start import build_model

from .engines import start
from .matrix import KINDS
from .test_two_processes import GLOBAL


# Group weights and hidden states, with adapters on 4 bits: the most that can go wrong at once.
CORE = ("nf4-dfpo-nthr-delta",)
CASES = [
    pytest.param(kind, name, id=f"{kind}-{name}", marks=() if f"{kind}-{name}" in CORE else pytest.mark.slow)
    for kind in KINDS
    for name in METHODS
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with an output layer of its own, and of sizes that 4 bits can have on a CPU: multiples of 64."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = build_model(tokenizer, **sizes, head_dim=64, initializer_range=0.2, tie_word_embeddings=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory, request):
    """A function: the folder of the runs of one kind, made together, as starting processes takes longest."""
    folder = tmp_path_factory.mktemp("runs")
    # Those that this session is to look at, so that the core does not run the whole matrix.
    wanted = {item.callspec.id for item in request.session.items if item.path == request.path}

    @cache
    def of(how, kind):
        rows = [name for name in METHODS if f"{kind}-{name}" in wanted]
        start(how, "tests.distributed.matrix", kind, model, folder / how / kind, *rows)
        return folder / how / kind

    return of


class Found:
    """What a run has left behind."""

    def __init__(self, folder):
        errors = [error.read_text() for error in folder.glob("error-*.txt")]
        assert not errors, errors[0]
        self.saved = folder / "saved"
        self.weights, self.resumed_weights = torch.load(folder / "weights.pt").values()
        vars(self).update(json.loads((folder / "found.json").read_text()))


def assert_trained_and_resumed(found, model, kind, row):
    trained = {name: value for name, value in found.weights.items() if kind == "full" or "lora_" in name}
    assert all(value.isfinite().all() for value in trained.values())
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    # Adapters start at 0 in their second part.
    moved = [name for name, value in trained.items() if (value != before.get(name, 0)).any()]
    assert moved
    assert found.is_4bit == (kind == "nf4")
    assert {name for log in found.logs for name in log} >= set(row.metrics)
    assert_same_weights(found.resumed_weights, found.weights)
    half = len(found.logs) // 2
    assert found.resumed_logs[half:-1] == found.logs[half:-1]


def assert_loads(found, model, kind):
    if kind == "full":
        assert_same_weights(AutoModelForCausalLM.from_pretrained(found.saved).state_dict(), found.weights)
        return
    adapter = {name: value for name, value in found.weights.items() if "lora_" in name}
    for loaded in (
        AutoPeftModelForCausalLM.from_pretrained(found.saved),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), found.saved),
    ):
        state = loaded.state_dict()
        # PEFT loads adapters in float32, whatever they were trained in.
        assert_same_weights({name: state[name] for name in adapter}, {name: w.float() for name, w in adapter.items()})


def assert_equal_but_for_rounding(one, two, kind):
    """To the rounding of the weights that are trained: float32, or bfloat16 for adapters on 4 bits, as TRL has them."""
    relative, absolute = (2e-2, 2e-3) if one.is_4bit else (1e-4, 1e-5)
    compared = 0
    for log, other in zip(one.logs[:-1], two.logs[:-1], strict=True):
        shared = {key: value for key, value in log.items() if key.startswith(GLOBAL)}
        assert {key: other[key] for key in shared} == pytest.approx(shared, rel=relative, abs=absolute)
        compared += len(shared)
    assert compared > 10
    trained, others = (
        {name: value for name, value in found.weights.items() if kind == "full" or "lora_" in name}
        for found in (one, two)
    )
    assert trained.keys() == others.keys()
    for name, value in trained.items():
        if "lora_B" in name:  # which start at 0, so that this is the whole update
            assert (others[name] - value).float().norm() <= 10 * relative * value.float().norm()
        torch.testing.assert_close(others[name], value, rtol=relative, atol=absolute)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_matrix(runs, model, kind, name):
    row = METHODS[name]
    one, two = (Found(runs(how, kind) / name) for how in ("one", "two"))
    assert (one.processes, two.processes) == (1, 2)
    for found in (one, two):
        assert_trained_and_resumed(found, model, kind, row)
        assert_loads(found, model, kind)
    if not row.depends_on_processes:
        assert_equal_but_for_rounding(one, two, kind)


# A whole file of the model, or parts of the processes; states and weights of groups, and passes of its own.
SHARDED = [
    pytest.param(how, kind, id=f"{how}-{kind}")
    for how in ("fsdp2", "fsdp2-sharded", "zero2", "zero3")
    for kind in KINDS
    if (how, kind) != ("fsdp2", "nf4")  # which cannot be resumed, see docs/scaling.md
]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "kind"), SHARDED)
def test_sharded(model, tmp_path, how, kind):
    names = ("nthr-delta-sequence", "token-shifts")
    if "zero" in how:
        pytest.importorskip("deepspeed")
        start("one", "tests.distributed.matrix", kind, model, tmp_path / "one", *names)
    start(how, "tests.distributed.matrix", kind, model, tmp_path / how, *names)
    for name in names:
        found = Found(tmp_path / how / name)
        assert (found.processes, found.sharded) == (2, True)
        assert_trained_and_resumed(found, model, kind, METHODS[name])
        if how == "fsdp2-sharded":
            assert not list(found.saved.glob("*.safetensors"))  # transformers saves no model then
        else:
            assert_loads(found, model, kind)
        if "zero" in how:
            assert_equal_but_for_rounding(Found(tmp_path / "one" / name), found, kind)
