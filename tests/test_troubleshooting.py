"""The page of troubles: each message on it is provoked, each command on it is run and says what the page quotes."""

import json
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from filelock import FileLock
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer
from transformers.utils import logging
from trl.rewards import accuracy_reward

from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer
from trl_cancel.cli import main
from trl_cancel.playground.data import load_prompts
from trl_cancel.running.changed_settings import SAVED_AS, settings_record
from trl_cancel.running.fit import check_fit
from trl_cancel.running.run_lock import LOCK, alone_in
from trl_cancel.upstream import trl as upstream
from trl_cancel.upstream.versions import check_trl_version

from .contract.test_upstream import UnslothGRPOTrainer, trainer_with
from .runs import DEFAULTS, build, load, noisy_reward


PAGE = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text()
ROWS = load_prompts("train", 16)
LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)\n```", PAGE, re.DOTALL)


def commands():
    """Each command of the page with the lines that are quoted of what it prints."""
    return [
        pytest.param(command, lines, id=command)
        for block in blocks("console")
        for command, *lines in (part.splitlines() for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:])
    ]


@pytest.mark.parametrize(("command", "lines"), commands())
def test_explain_says_what_is_quoted(command, lines, capsys):
    program, *arguments = shlex.split(command)
    assert program == "trl-cancel"
    status = main(arguments)
    printed = capsys.readouterr()
    assert lines, "something is to be quoted"
    assert status == (2 if lines[0].startswith("trl-cancel") else 0)
    said = (printed.err if status else printed.out).splitlines()
    first = [said.index(line) for line in lines]
    assert first == sorted(first), "in another order"


def my_reward(completions):
    return [1.0 for _ in completions]


def one_reward(completions, **kwargs):
    return [1.0]


def no_reward(completions, **kwargs):
    return [None for _ in completions]


one_reward.__name__ = no_reward.__name__ = "my_reward"


def theirs(model, arguments=None, **settings):
    """A step of TRL's own trainer."""
    build(model, trl.GRPOTrainer, arguments=arguments, **{"max_steps": 1, **settings}).train()


def ours(model, arguments=None, **settings):
    build(model, CancelGRPOTrainer, arguments=arguments, **settings)


def several_gpus(model, tmp_path):
    args = trl.GRPOConfig(output_dir=str(tmp_path), **DEFAULTS)
    args._n_gpu = 2
    trl.GRPOTrainer(model, noisy_reward, args, ROWS)


def without_template(model, run):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    run(model, {"processing_class": tokenizer})


def without_tokens(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token = None
    ours(model, {"processing_class": tokenizer})


def without_weights(path, **settings):
    model = load(path)
    torch.nn.init.constant_(model.get_input_embeddings().weight, float("nan"))
    return build(model, arguments={"processing_class": AutoTokenizer.from_pretrained(path)}, **settings)


def sharded_by_first_fsdp(model, monkeypatch):
    trainer = build(model, CancelGRPOTrainer, nthr=True)
    trainer.is_fsdp_enabled = True
    monkeypatch.setattr(type(trainer.accelerator), "is_fsdp2", False)
    trainer._check_sharding()


def scaled_float16():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(torch.optim.SGD([weight], lr=1.0))


def no_bf16(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    trl.GRPOConfig(output_dir=str(tmp_path))


def frozen_adapter(model, tmp_path):
    get_peft_model(load(model), LoraConfig(**LORA)).save_pretrained(tmp_path)
    ours(PeftModel.from_pretrained(load(model), tmp_path), {"processing_class": AutoTokenizer.from_pretrained(model)})


def another_optimizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = Path("run/checkpoint-8")
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").touch()
    record = settings_record(CancelGRPOConfig("run", **DEFAULTS, optim="sgd"))
    (checkpoint / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {SAVED_AS: record}}))
    check_fit(str(checkpoint), None, CancelGRPOConfig("run", **DEFAULTS, optim="adamw_torch"))


def folder_in_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    with FileLock(Path("run", LOCK)):
        Path("run", LOCK).write_text("4711\nnode-3\n")
        with alone_in(Path("run")):
            pass


def stream():
    return IterableDataset.from_generator(lambda: iter(list(ROWS)))


def newer_trl(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.18.0")
    with warnings.catch_warnings(action="error"):
        upstream.check_installation()


def changed_trl(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.18.0")
    upstream.check_installation(trainer_with(_calculate_rewards=None))


ERRORS = {
    "generation batch": lambda model, **_: theirs(
        model, num_generations=8, per_device_train_batch_size=6, gradient_accumulation_steps=2
    ),
    "columns": lambda model, **_: ours(model, {"train_dataset": ROWS.rename_column("prompt", "question")}),
    "splits": lambda model, **_: ours(model, {"train_dataset": {"train": ROWS}}),
    "prompt": lambda model, **_: ours(model, {"train_dataset": Dataset.from_dict({"prompt": ["1+1=", None] * 2})}),
    "size": lambda model, **_: ours(model, {"train_dataset": ROWS.select([0])}, steps_per_generation=4),
    "number of rewards": lambda model, **_: theirs(model, {"reward_funcs": one_reward}),
    "signature": lambda model, **_: theirs(model, {"reward_funcs": my_reward}),
    "solution": lambda model, **_: theirs(
        model, {"reward_funcs": accuracy_reward, "train_dataset": ROWS.remove_columns("solution")}
    ),
    "signature, before": lambda model, **_: ours(model, {"reward_funcs": my_reward}),
    "solution, before": lambda model, **_: ours(
        model, {"reward_funcs": accuracy_reward, "train_dataset": ROWS.remove_columns("solution")}
    ),
    "strings": lambda model, **_: theirs(
        model,
        {
            "reward_funcs": accuracy_reward,
            "train_dataset": Dataset.from_list([{"prompt": "Compute 1+1.", "solution": "2"}] * 4),
        },
    ),
    "reward weights": lambda model, **_: theirs(model, reward_weights=[1.0, 2.0]),
    "chat template": lambda model, **_: without_template(model, theirs),
    "chat template, before": lambda model, **_: without_template(model, ours),
    "renamed argument": lambda model, **_: ours(model, {"tokenizer": None}),
    "no tokens": lambda model, **_: without_tokens(model),
    "weights that are nan, before": lambda model, **_: without_weights(model, nthr=True),
    "weights that are nan": lambda model, **_: without_weights(model).train(),
    "version": lambda **_: check_trl_version("1.12.0"),
    "changed version": lambda monkeypatch, **_: changed_trl(monkeypatch),
    "newer version": lambda monkeypatch, **_: newer_trl(monkeypatch),
    "Unsloth": lambda **_: upstream.check_installation(UnslothGRPOTrainer),
    "two adapters": lambda model, **_: theirs(
        get_peft_model(load(model), LoraConfig(**LORA)), {"peft_config": LoraConfig(**LORA)}
    ),
    "adapter on the output layer": lambda model, **_: theirs(
        model, {"peft_config": LoraConfig(**{**LORA, "target_modules": ["q_proj", "lm_head"]})}
    ),
    "nothing to train": lambda model, tmp_path, **_: frozen_adapter(model, tmp_path),
    "another optimizer": lambda tmp_path, monkeypatch, **_: another_optimizer(tmp_path, monkeypatch),
    "folder in use": lambda tmp_path, monkeypatch, **_: folder_in_use(tmp_path, monkeypatch),
    "bf16": lambda monkeypatch, tmp_path, **_: no_bf16(monkeypatch, tmp_path),
    "fp16": lambda **_: scaled_float16(),
    "several GPUs": lambda model, tmp_path, **_: several_gpus(model, tmp_path),
    "FSDP1": lambda model, monkeypatch, **_: sharded_by_first_fsdp(model, monkeypatch),
    "length of a stream": lambda model, **_: theirs(model, {"train_dataset": stream()}, max_steps=-1),
    "dispatched stream": lambda model, **_: theirs(
        model, {"train_dataset": stream()}, accelerator_config={"dispatch_batches": True}
    ),
}  # fmt: skip


def cached_pass(model):
    model = load(model)
    model.gradient_checkpointing_enable()
    model.train()(torch.ones(1, 2, dtype=torch.long), use_cache=True)


LOGGED = {
    "None": lambda model: theirs(model, {"reward_funcs": no_reward}),
    "nothing to clip": lambda model: ours(model, symmetric_clip=True),
    "cache": cached_pass,
}


def on_page(message):
    """Whether a block of the page is this message."""
    return " ".join(message.split()) in {" ".join(block.split()) for block in blocks("text")}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("trouble", ERRORS)
def test_error_is_on_the_page(trouble, tiny_model, tmp_path, monkeypatch):
    with pytest.raises(Exception) as raised:  # noqa: PT011  (the whole message is compared)
        ERRORS[trouble](model=tiny_model, tmp_path=tmp_path, monkeypatch=monkeypatch)
    assert on_page(str(raised.value)), f"not on the page: {raised.value}"


@pytest.mark.parametrize("trouble", LOGGED)
def test_warning_is_on_the_page(trouble, tiny_model, caplog):
    logging.warning_once.cache_clear()
    LOGGED[trouble](tiny_model)
    logged = [re.sub(r"^\[RANK \d+\] ", "", record.getMessage()) for record in caplog.records]
    assert any(on_page(message.splitlines()[0]) for message in logged), logged


def test_every_message_is_provoked():
    assert len(blocks("text")) == len(set(blocks("text"))) == len(ERRORS) + len(LOGGED)


def test_answers_are_read_from_boxes():
    """As the page says under "Right answers earn 0"."""
    answers = ["\\boxed{42}", "42", "$42$", "\\boxed{42}"]
    rewards = accuracy_reward([[{"content": answer}] for answer in answers], ["42", "42", "42", "no number"])
    assert rewards == [1.0, 0.0, 0.0, None]


def test_contents_lead_to_entries():
    titles = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    linked = set(re.findall(r"\]\(#([^)]*)\)", PAGE))
    contents = set(re.findall(r"\]\(#([^)]*)\)", PAGE.split("\n## ")[0]))
    assert linked <= anchors
    assert contents == anchors


def test_every_entry_says_what_explain_knows_and_what_to_do():
    for entry in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        title, _, text = entry.partition("\n")
        assert "**Fix" in text, title
        assert "explain" in text, title
