"""Names inside of settings that nothing reads are spoken of once, and no others; the training goes on as TRL's does."""

import inspect
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoTokenizer, GenerationConfig

from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer
from trl_cancel.cli import main
from trl_cancel.evaluation import EvaluationCallback, EvaluationSettings
from trl_cancel.playground.data import load_prompts
from trl_cancel.playground.reward import answer_reward
from trl_cancel.running import ignored

from .runs import assert_same_weights, build, load, train


def said(caplog):
    """Remarks of this package, each line of which stands once."""
    own = [record for record in caplog.records if record.name == "trl_cancel.running.checked"]
    return [record.getMessage().partition("] ")[2] for record in own if "does not read" in record.getMessage()]


UNREAD = {
    "generation": (
        {"generation_kwargs": {"temprature": 1, "min_new_tokens": 2}},
        "generation_kwargs: generation with transformers does not read 'temprature', so it changes nothing; did you "
        "mean temperature?",
    ),
    "several": (
        {"generation_kwargs": {"nothing": 1, "of_the_kind": 2}},
        "generation_kwargs: generation with transformers does not read 'nothing', 'of_the_kind', so they change nothing.",
    ),
    "template": (
        {"chat_template_kwargs": {"enable_thinkng": True}},
        "chat_template_kwargs: the chat template does not read 'enable_thinkng', so it changes nothing; did you mean "
        "enable_thinking?",
    ),
    "optimizer": (
        {"optim": "sgd", "optim_args": "momentumm=1, weight_decay=0"},
        "optim_args: optim='sgd' does not read 'momentumm', so it changes nothing; did you mean momentum?",
    ),
    "Adam": (
        {"optim": "adamw_torch", "optim_args": "beta1=0.9"},
        "optim_args: optim='adamw_torch' does not read 'beta1', so it changes nothing. Its own settings are adam_beta1, "
        "adam_beta2, adam_epsilon and weight_decay.",
    ),
    "schedule": (
        {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"num_cycles": 2}},
        "lr_scheduler_kwargs: lr_scheduler_type='constant_with_warmup' does not read 'num_cycles', so it changes nothing.",
    ),
    "FSDP": (
        {"fsdp_config": {"min_num_paramss": 1, "fsdp_version": 2}},
        "fsdp_config: transformers does not read 'min_num_paramss', so it changes nothing; did you mean min_num_params?",
    ),
}  # fmt: skip


def thinking(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = tokenizer.chat_template + "{{ '!' if enable_thinking else '' }}"
    return tokenizer


@pytest.mark.parametrize("kind", UNREAD)
def test_names_that_nothing_reads(kind, tiny_model, caplog):
    """With stock TRL too: what it trains with it says nothing of is trained with here."""
    settings, remark = UNREAD[kind]
    runs = []
    for trainer in (trl.GRPOTrainer, CancelGRPOTrainer):
        arguments = {"processing_class": thinking(tiny_model)}
        runs.append(train(tiny_model, trainer, arguments=arguments, max_steps=1, **settings))
    assert said(caplog) == [remark]
    assert_same_weights(runs[0].weights, runs[1].weights)


def with_field(model):
    """A model whose own code reads a field of its generation config."""
    model = load(model)
    model.generation_config.own_setting = 1
    return model


class OwnOptimizer(CancelGRPOTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=float(self.args.optim_args.split("=")[1]))
        return self.optimizer


class OwnGeneration(CancelGRPOTrainer):
    def _generate_single_turn(self, *args, **kwargs):
        return super()._generate_single_turn(*args, **kwargs)


USUAL = {name: value for name, value in GenerationConfig().to_dict().items() if name != "disable_compile"}  # TRL's
READ = {
    "all of transformers": lambda model: build(model, generation_kwargs=USUAL),
    "field of a model": lambda model: build(with_field(model), generation_kwargs={"own_setting": 2}),
    "own generation": lambda model: build(model, OwnGeneration, generation_kwargs={"own": 2}),
    "own optimizer": lambda model: build(model, OwnOptimizer, optim_args="rate=1"),
    "given optimizer": lambda model: build(
        model,
        optim_args="rate=1,",
        arguments={"optimizers": (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), None)},
    ),
    "optimizer": lambda model: build(model, optim="rmsprop", optim_args="alpha=0.9, centered=true"),
    "schedule": lambda model: build(model, lr_scheduler_type="cosine", lr_scheduler_kwargs={"num_cycles": 2}),
    "template": lambda model: build(
        model,
        chat_template_kwargs={"enable_thinking": False, "continue_final_message": False},
        arguments={"processing_class": thinking(model)},
    ),
    "texts": lambda model: build(
        model, chat_template_kwargs={"any": 1}, arguments={"train_dataset": Dataset.from_dict({"prompt": ["1"] * 9})}
    ),
    "FSDP": lambda model: build(model, fsdp_config={"fsdp_" + name: 0 for name in ("xla", "version")}),
}


@pytest.mark.parametrize("kind", READ)
def test_names_that_are_read(kind, tiny_model, caplog):
    READ[kind](tiny_model)
    assert said(caplog) == []


@pytest.mark.parametrize("text", ["betas=(0.9,0.95)", "momentum", "a==1", "momentum=0.9,"])
def test_a_text_that_cannot_be_taken_apart(text, tiny_model):
    """Where stock TRL fails at the first step, for want of values to unpack."""
    with pytest.raises(
        ValueError, match="optim_args must be settings with commas between them, name=value,name=value"
    ):
        build(tiny_model, optim="sgd", optim_args=text)
    with pytest.raises(ValueError, match="unpack"):
        train(tiny_model, trl.GRPOTrainer, optim="sgd", optim_args=text)


def test_names_of_fsdp_are_those_that_transformers_reads():
    source = inspect.getsource(sys.modules[transformers.TrainingArguments.__module__])
    read = re.findall(r"""(?<!xla_)fsdp_config(?:\.get\(|\.setdefault\(|\[)["'](\w+)["']""", source)
    assert set(read) == ignored.OF_FSDP


def test_optimizers_that_cannot_be_asked(tmp_path):
    """Those that need the model or a library that is missing are left to transformers."""
    args = CancelGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, optim="galore_adamw", optim_args="rank=1,any=2")
    assert ignored.of_optimizer(args) is None


def test_requests_to_a_server_of_vllm(monkeypatch):
    given = {"temprature": 1, "seed": 2}
    for name in ignored.REQUESTS:
        monkeypatch.setitem(sys.modules, name, None)
    assert ignored.of_vllm_server(given) is None, "without vLLM nobody knows"
    request = SimpleNamespace(CompletionRequest=SimpleNamespace(model_fields={"temperature": 0, "seed": 0}))
    monkeypatch.setitem(sys.modules, ignored.REQUESTS[-1], request)
    assert "vLLM's server does not read 'temprature'" in ignored.of_vllm_server(given)
    assert ignored.of_vllm_server({"seed": 2}) is None


def test_processors_and_templates_that_are_not_known(tiny_model):
    tokenizer, given = thinking(tiny_model), {"anything": 1}
    several = SimpleNamespace(chat_template={"default": "{{ anything }}", "tool_use": "{{ x }}"})
    assert ignored.of_templates(given, [SimpleNamespace(chat_template="x", tokenizer=tokenizer)]) is None
    assert ignored.of_templates(given, [SimpleNamespace(chat_template=None), tokenizer]) is None
    assert ignored.of_templates(given, [tokenizer, several]) is None
    assert "'anything'" in ignored.of_templates(given, [tokenizer])


def test_evaluations_speak_of_templates_too(tiny_model, caplog, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = EvaluationSettings(chat_template_kwargs={"thinkng": 1}, num_samples=0)
    EvaluationCallback(build(tiny_model), load_prompts("test", 2), answer_reward, own, name="set")
    expected = "chat_template_kwargs: the chat template does not read 'thinkng', so it changes nothing"
    assert f"Evaluation on set: {expected}" in caplog.text
    common = ["--model_name_or_path", "playground", "--dataset_name", "playground", "--max_completion_length", "8"]
    common += ["--chat_template_kwargs", '{"thinkng": 1}']
    assert main(["eval", *common, "--num_problems", "1", "--num_samples", "0"]) == 0
    assert capfd.readouterr().out.count(expected) == 1
