"""Tokens and keys reach no file and no output; nothing is unpickled or run that was not asked for."""

import copy
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import trl

from trl_cancel import CancelGRPOConfig, DFPOConfig
from trl_cancel.cli import main
from trl_cancel.secrets import quotable, without_secrets

from .runs import build


SECRETS = {"hub_token": "hf_SECRETOFTHEHUB", "model_init_kwargs": {"token": "hf_SECRETOFTHEMODEL"}}
ENVIRONMENT = {
    "HF_TOKEN": "hf_SECRETOFTHEENVIRONMENT",
    "WANDB_API_KEY": "SECRETOFWANDB" + "0" * 27,
    "OPENAI_API_KEY": "sk-SECRETOFANOTHER",
}
PACKAGE = Path(__file__).parents[1] / "trl_cancel"


def files_with(text, folder):
    return [path.name for path in Path(folder).rglob("*") if path.is_file() and text in path.read_bytes()]


def config(folder, **settings):
    return CancelGRPOConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **settings)


def test_secrets_stay_in_memory(tmp_path):
    args = config(tmp_path, **copy.deepcopy(SECRETS))
    for other in (copy.copy(args), copy.deepcopy(args)):
        assert other.hub_token == SECRETS["hub_token"]
        assert other.model_init_kwargs == SECRETS["model_init_kwargs"]
    torch.save(args, tmp_path / "training_args.bin")
    assert not files_with(b"SECRET", tmp_path)
    again = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert again.hub_token is None
    assert (again.learning_rate, again.layout) == (args.learning_rate, args.layout)
    assert "SECRET" not in args.to_json_string() + str(args.to_sanitized_dict())
    assert args.hub_token == SECRETS["hub_token"]


def test_what_is_a_secret():
    kept = {"eos_token": "a", "max_tokens": 1, "pad_token_id": 2, "tokenizer": "t", "monkey": 3}
    hidden = {"token": "a", "hub_token": "b", "api_key": "c", "openai_api_key": "d", "password": "e"}
    hidden |= {"db_passwd": "f", "credentials": {"user": "g"}, "secret": None}
    assert without_secrets({**kept, "inner": hidden}) == {**kept, "inner": dict.fromkeys(hidden)}
    assert without_secrets([1, (kept, hidden)]) == [1, (kept, dict.fromkeys(hidden))]
    assert without_secrets(hidden, "***") == {**dict.fromkeys(hidden, "***"), "secret": None}


@dataclass
class Derived(CancelGRPOConfig):
    """As a user writes it."""

    other: int = 5


@pytest.mark.parametrize("kind", [CancelGRPOConfig, DFPOConfig, Derived])
def test_secrets_are_not_printed(tmp_path, kind):
    args = kind(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **copy.deepcopy(SECRETS))
    for text in (repr(args), str(args), f"{args}"):
        assert "SECRET" not in text
        assert text.startswith(f"{kind.__name__}(")
        assert "symmetric_clip=False" in text
    assert ("other=5" in repr(args)) == (kind is Derived)
    assert args.model_init_kwargs == SECRETS["model_init_kwargs"]


def test_errors_that_quote_a_token_are_no_causes():
    inner, outer, plain = ValueError("b'Bearer hf_SECRET'"), RuntimeError("no connection"), OSError("no")
    outer.__context__ = inner
    assert quotable(outer) is quotable(inner) is None
    plain.add_note("of hf_SECRET")
    assert quotable(plain) is None
    assert isinstance(quotable(OSError("no")), OSError)


@pytest.mark.parametrize("kind", [trl.GRPOConfig, CancelGRPOConfig])
def test_a_token_that_was_read_from_a_file_is_stripped(tmp_path, kind):
    args = kind(str(tmp_path), use_cpu=True, bf16=False, hub_token="hf_token\n")
    assert CancelGRPOConfig.adopt(args).hub_token == "hf_token"


def test_a_run_writes_no_secret(tmp_path, monkeypatch, capfd, caplog):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    settings = {
        "model_name_or_path": "playground",
        "dataset_name": "playground",
        "output_dir": tmp_path / "run",
        "hub_token": SECRETS["hub_token"],
        "max_steps": 2,
        "save_steps": 1,
        "max_completion_length": 8,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": "true",
        "bf16": "false",
    }
    assert main(["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]) == 0
    written = {path.name for path in (tmp_path / "run").rglob("*")}
    assert {"training_args.bin", "trainer_state.json", "all_results.json", "README.md"} <= written
    assert not files_with(b"SECRET", tmp_path)
    assert "SECRET" not in "".join([*capfd.readouterr(), caplog.text])


MODEL_WITH_CODE = """
from pathlib import Path
from transformers import PretrainedConfig
Path(__file__).with_name("ran").touch()
(Path(r"FOLDER") / "ran").touch()
class CodedConfig(PretrainedConfig):
    model_type = "coded"
"""


def test_code_of_a_model_is_run_only_if_asked_for(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "coded"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "coded", "auto_map": {"AutoConfig": "coded.CodedConfig"}}')
    (folder / "coded.py").write_text(MODEL_WITH_CODE.replace("FOLDER", str(tmp_path)))
    command = ["train", "--model_name_or_path", str(folder), "--dataset_name", "playground", "--report_to", "none"]
    command += [
        "--output_dir",
        str(tmp_path / "run"),
        "--use_cpu",
        "true",
        "--bf16",
        "false",
        "--num_generations",
        "4",
    ]
    command += ["--per_device_train_batch_size", "4"]
    assert main(command) != 0
    assert "trust_remote_code" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()
    with suppress(Exception):  # it is no language model
        main([*command, "--trust_remote_code", "true"])
    assert (tmp_path / "ran").exists()


def test_nothing_is_unpickled_or_run():
    forbidden = re.compile(
        r"\bpickle\b|\btorch\.load\(|os\.system|shell=True|(?<![.`])\b(eval|exec)\(|weights_only=False"
    )
    found = [
        f"{path.name}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if forbidden.search(line)
    ]
    assert not found


def test_a_checkpoint_cannot_bring_code(tiny_model, tmp_path):
    """States of the optimizer are read as numbers: a pickle with something else in it is refused."""
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    build(tiny_model, **settings).train()
    torch.save({"state": Planted()}, tmp_path / "checkpoint-1/optimizer.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        build(tiny_model, **settings).train(resume_from_checkpoint=True)
    assert not Planted.called


class Planted:
    called: list[int] = []

    def __reduce__(self):
        return (plant, ())


def plant():
    Planted.called.append(1)
