"""Checkpoints of another model: refused by name, before anything is loaded, and never left aside in silence."""

import pytest
from peft import LoraConfig, get_peft_model

from trl_cancel.fit import check_fit, why_unfit
from trl_cancel.playground.tokenizer import build_tokenizer
from trl_cancel.playground.warm_start import build_model

from .runs import TINY, build, load


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
