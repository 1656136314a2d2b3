"""Checkpoints of another model: refused by name, before anything is loaded, and never left aside in silence."""

import json

import pytest
import torch
import trl
from peft import LoraConfig, PeftModel, get_peft_model

from trl_cancel import CancelGRPOConfig
from trl_cancel.playground.tokenizer import build_tokenizer
from trl_cancel.playground.warm_start import build_model
from trl_cancel.running.changed_settings import SAVED_AS
from trl_cancel.running.fit import check_fit, why_unfit

from .runs import DEFAULTS, TINY, build, load


def model(**sizes):
    return build_model(build_tokenizer(), **{**TINY, **sizes})


def adapter(**settings):
    return get_peft_model(model(), LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings}))


@pytest.mark.parametrize(
    ("saved", "present", "said"),
    [
        (model, model, None),
        (model, lambda: model(hidden_size=32), "it has hidden_size=16, and this one 32"),
        (model, lambda: model(num_hidden_layers=3), "it has num_hidden_layers=2, and this one 3"),
        (model, adapter, "it holds a whole model, and this run trains an adapter (use_peft, peft_config)"),
        (adapter, model, "it holds an adapter, and this run trains the whole model (no use_peft, no peft_config)"),
        (adapter, adapter, None),
        (adapter, lambda: adapter(target_modules=["v_proj", "q_proj"], lora_dropout=0.5), None),
        (adapter, lambda: adapter(target_modules=r".*\.(q|v)_proj"), None),
        (adapter, lambda: adapter(r=4), "it has r=2, and this one 4"),
        (
            adapter,
            lambda: adapter(target_modules=["q_proj"]),
            "it has target_modules=['q_proj', 'v_proj'], and this one ['q_proj']",
        ),
        (lambda: adapter(target_modules="all-linear"), lambda: adapter(target_modules="all-linear"), None),
    ],
)
def test_why_unfit(tmp_path, saved, present, said):
    saved().save_pretrained(tmp_path)
    assert why_unfit(tmp_path, present()) == said


def test_another_kind_of_model(tmp_path):
    model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"model_type": "qwen3"', '"model_type": "llama"'))
    assert why_unfit(tmp_path, model()) == "it has model_type='llama', and this one 'qwen3'"


@pytest.mark.parametrize(
    ("saved", "file", "damage"),
    [(model, "config.json", {"hidden_size": "x"}), (adapter, "adapter_config.json", {"peft_type": "of tomorrow"})],
)
def test_a_configuration_that_cannot_be_read_is_one_line(tmp_path, saved, file, damage):
    saved().save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps({**json.loads((tmp_path / file).read_text()), **damage}))
    assert f"its {file} cannot be read (" in why_unfit(tmp_path, saved())
    assert "\n" not in why_unfit(tmp_path, saved())


def test_an_optimizer_without_a_name_in_the_record_passes(tmp_path):
    (tmp_path / "optimizer.pt").touch()
    record = {"attributes": {"settings": {"optim": ["sgd"]}}}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {SAVED_AS: record}}))
    check_fit(str(tmp_path), model(), CancelGRPOConfig("run", **DEFAULTS))


def test_what_holds_no_configuration_passes(tmp_path):
    check_fit(str(tmp_path), model())
    check_fit(None, model())


def test_a_whole_model_is_not_taken_for_an_adapter(tiny_model, tmp_path):
    """Without states to compare, transformers would go on from the base model and a fresh adapter."""
    run = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    build(tiny_model, max_steps=1, **run).train()
    resumed = build(load(tiny_model), arguments={"peft_config": LoraConfig(r=2)}, **run)
    with pytest.raises(ValueError, match=r"checkpoint-1 does not fit the model: it holds a whole model.*output_dir\."):
        resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 0


SAVED = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("then", "now", "fits"),
    [
        ("sgd", "adamw_torch", False),
        ("adamw_torch", "sgd", False),
        ("adafactor", "adamw_torch", False),
        ("rmsprop", "adagrad", False),
        ("adamw_torch", "adamw_torch_fused", True),
        ("sgd", "sgd", True),
    ],
)
def test_another_optimizer_is_refused_in_one_line(tiny_model, tmp_path, then, now, fits):
    build(tiny_model, **SAVED, optim=then, output_dir=str(tmp_path)).train()
    resumed = build(tiny_model, **{**SAVED, "max_steps": 2}, optim=now, output_dir=str(tmp_path))
    if fits:
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 2
        return
    message = (
        f"checkpoint-1 holds the state of another optimizer (optim='{then}') than this run's (optim='{now}'). Use"
    )
    with pytest.raises(ValueError, match="another optimizer") as raised:
        resumed.train(resume_from_checkpoint=True)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_another_optimizer_that_has_no_name_is_refused(tiny_model, tmp_path):
    """One that is given; its own still fits."""

    def given(groups=2):
        network = load(tiny_model)
        kinds = [[weight for weight in network.parameters() if (weight.dim() > 1) == large] for large in (True, False)]
        weights = [{"params": part} for part in (kinds if groups == 2 else [kinds[0] + kinds[1]])]
        return network, {"optimizers": (torch.optim.SGD(weights, 1e-2, momentum=0.5), None)}

    first, arguments = given()
    build(first, **SAVED, output_dir=str(tmp_path), arguments=arguments).train()
    more = {**SAVED, "max_steps": 2, "output_dir": str(tmp_path)}
    with pytest.raises(
        ValueError, match=r"checkpoint-1 holds a state that does not fit .* or start anew from its weights"
    ):
        build(tiny_model, **more).train(resume_from_checkpoint=True)
    other, arguments = given(groups=1)
    with pytest.raises(
        ValueError, match=r"checkpoint-1 holds a state that does not fit this run's optimizer \(loaded"
    ):
        build(other, **more, arguments=arguments).train(resume_from_checkpoint=True)
    again, arguments = given()
    build(again, **more, arguments=arguments).train(resume_from_checkpoint=True)


def test_another_optimizer_is_told_by_its_state(tiny_model, tmp_path):
    """Where the checkpoint does not name it, as one of TRL's trainer; it would fail at the first step."""
    build(tiny_model, trl.GRPOTrainer, **SAVED, output_dir=str(tmp_path)).train()
    resumed = build(tiny_model, **{**SAVED, "max_steps": 2}, optim="sgd", output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"another optimizer \(has betas\) than this run's \(has momentum\)"):
        resumed.train(resume_from_checkpoint=True)


def frozen():
    network = model()
    network.requires_grad_(False)
    return network


@pytest.mark.parametrize(("network", "remedy"), [("adapter", "is_trainable=True"), ("model", "requires_grad_(True)")])
def test_a_model_of_which_nothing_is_trained_is_refused(tiny_model, tmp_path, network, remedy):
    if network == "adapter":
        adapter().save_pretrained(tmp_path)
        network = PeftModel.from_pretrained(model(), tmp_path)
    else:
        network = frozen()
    with pytest.raises(ValueError, match="No parameter of the model is trainable") as raised:
        build(network, arguments={"processing_class": build_tokenizer()})
    assert remedy in str(raised.value)
