"""Every method of the table: neutral elements, training, save and resume, LoRA, refusals."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM

from trl_cancel import CancelGRPOConfig, methods
from trl_cancel.config import _OWN_FIELDS

from .methods import METHODS, settings_of
from .runs import DEFAULTS, assert_same_weights, build, train, trained_by_trl


def of_trl(settings):
    """The settings that TRL knows too."""
    return {name: value for name, value in settings.items() if name not in _OWN_FIELDS}


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.switch)
def test_each_method_has_a_row(method):
    """With its metrics, and with a name for `--method` that turns it on."""
    rows = [row for row in METHODS.values() if method.is_on(CancelGRPOConfig(**{**DEFAULTS, **settings_of(row)}))]
    metrics = {metric for row in rows for metric in row.metrics}
    assert rows
    assert all(any(metric.startswith(prefix) for metric in metrics) for prefix in method.logs)
    named = [
        name
        for name, named in methods.NAMED.items()
        if method.is_on(CancelGRPOConfig(**{**DEFAULTS, **named.settings}))
    ]
    assert set(named) & set(method.named)


@pytest.fixture(params=METHODS, ids=str)
def row(request):
    return METHODS[request.param]


def test_neutral_setting_is_trl(tiny_model, row):
    settings = settings_of(row, **row.neutral)
    theirs = trained_by_trl(tiny_model, **of_trl(settings))
    ours = train(tiny_model, **settings, arguments={"credits": row.neutral_credits()})
    for log, expected in zip(ours.logs, theirs.logs, strict=True):
        ours_of_trl = {name: log[name] for name in expected}
        assert ours_of_trl == (expected if row.exact else pytest.approx(expected, rel=1e-4, abs=1e-6))
    if row.exact:
        assert_same_weights(ours.weights, theirs.weights)
    for name, value in theirs.weights.items():
        torch.testing.assert_close(ours.weights[name], value, rtol=1e-4, atol=1e-6)


def test_trains_and_acts(tiny_model, row):
    run = train(tiny_model, **settings_of(row), arguments={"credits": row.credits()})
    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert any((run.weights[name] != value).any() for name, value in before.items())
    assert all(torch.isfinite(value).all() for value in run.weights.values())
    logged = {name for entry in run.logs for name in entry}
    assert logged >= set(row.metrics)
    assert run.trainer.explain()
    # Turned on, it must compute something else than TRL does on the same data.
    theirs = trained_by_trl(tiny_model, **of_trl(settings_of(row)))
    assert any((run.weights[name] != value).any() for name, value in theirs.weights.items())


def test_resumed_run_equals_the_uninterrupted_one(tiny_model, row, tmp_path):
    settings = settings_of(row, output_dir=str(tmp_path), save_strategy="steps", save_steps=8, max_steps=12)
    whole = train(tiny_model, **settings, arguments={"credits": row.credits()})
    assert (tmp_path / "checkpoint-8").is_dir()
    resumed = train(
        tiny_model, **settings, arguments={"credits": row.credits()}, resume=str(tmp_path / "checkpoint-8")
    )
    assert_same_weights(resumed.weights, whole.weights)
    assert resumed.logs[8:-1] == whole.logs[8:-1]


def test_lora(tiny_model, row, tmp_path):
    arguments = {"peft_config": LoraConfig(r=2, target_modules="all-linear"), "credits": row.credits()}
    run = train(tiny_model, **settings_of(row, output_dir=str(tmp_path)), arguments=arguments)
    run.trainer.save_model()
    trained = {name: value for name, value in run.weights.items() if "lora_B" in name}
    assert all(value.any() for value in trained.values())
    saved = AutoPeftModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in trained.items():
        assert torch.equal(saved[name], value)


REFUSALS = [(name, changes, message) for name, row in METHODS.items() for changes, message in row.refused]


@pytest.mark.parametrize(
    ("name", "changes", "message"), REFUSALS, ids=[f"{name}-{change}" for name, change, _ in REFUSALS]
)
def test_refusals(tiny_model, name, changes, message):
    row = METHODS[name]
    with pytest.raises(ValueError, match=message):
        build(tiny_model, **settings_of(row, **changes), arguments={"credits": row.credits()})
