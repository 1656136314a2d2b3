"""Pushing with the real client: what arrives, what is refused, what is cut off, and that a second try completes it."""

import errno
import hashlib
import logging
import re
import shlex
import time
import traceback
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.runs import build, load, weights_of
from trl_cancel import CancelGRPOTrainer
from trl_cancel.cli import main
from trl_cancel.publishing.hub import PushError, check_token, reason

from .conftest import READ_TOKEN, TOKEN, talk_to
from .server import Fault, Repo, StandIn


# The client about its own HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "someone/model"
PUSHING = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": TOKEN, "max_steps": 1}
UPLOAD = "PUT /lfs/"
RETRIES = 6  # the client tries a large file so often


def trained(model, folder, **settings):
    trainer = build(model, output_dir=str(folder), **{**PUSHING, **settings})
    trainer.train()
    return trainer


def command(folder, model, **settings):
    """A short `trl-cancel train` that pushes."""
    chosen = {
        "model_name_or_path": model,
        "dataset_name": "playground",
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "push_to_hub": True,
        "hub_model_id": REPO,
        "hub_token": TOKEN,
        **settings,
    }
    return ["train", *(part for name, value in chosen.items() for part in (f"--{name}", str(value)))]


def said(capsys, status, argv):
    """What a command prints for an error: one line."""
    assert main(argv) == status
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err
    lines = [line for line in printed.err.splitlines() if line.startswith("trl-cancel ")]
    assert len(lines) == 1
    assert "Traceback" not in printed.err
    return lines[0]


def quick_start(card):
    return re.search(r"## Quick start\n\n```python\n(.*?)```", card, re.DOTALL)[1]


# What arrives


@pytest.mark.parametrize(
    "part_size", [None, pytest.param(10_000, marks=pytest.mark.slow)], ids=["one part", "several parts"]
)
def test_full_model(hub, tiny_model, tmp_path, capsys, monkeypatch, part_size):
    hub.part_size = part_size
    trainer = trained(tiny_model, tmp_path / "out", hub_private_repo=True)
    trainer.push_to_hub()
    repo = hub.repos[REPO]
    assert repo.private
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= repo.files.keys()
    assert repo.files["README.md"].decode() == (tmp_path / "out" / "README.md").read_text()
    pushed = AutoModelForCausalLM.from_pretrained(REPO, token=TOKEN, dtype=torch.float32)
    torch.testing.assert_close(weights_of(pushed), weights_of(trainer.model))
    assert TOKEN.encode() not in hub.stored(), "training_args.bin is pickled and pushed"
    assert trainer.args.hub_token == TOKEN

    printed = capsys.readouterr()
    scope = {}
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # it is a private one
    exec(quick_start(repo.files["README.md"].decode()), scope)
    assert type(scope["model"]).__name__ == type(trainer.model).__name__
    assert TOKEN not in printed.out + printed.err


def test_adapter(hub, tiny_model, tmp_path):
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    trainer = build(tiny_model, output_dir=str(tmp_path / "out"), arguments={"peft_config": adapter}, **PUSHING)
    trainer.train()
    trainer.push_to_hub()
    files = hub.repos[REPO].files
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files.keys()
    assert "model.safetensors" not in files
    expected = {name: value for name, value in weights_of(trainer.model).items() if "lora_" in name}
    for pushed in (
        PeftModel.from_pretrained(load(tiny_model), REPO),
        AutoPeftModelForCausalLM.from_pretrained(REPO, dtype=torch.float32),
    ):
        found = weights_of(pushed)
        torch.testing.assert_close({name: found[name] for name in expected}, expected)
    scope = {}
    exec(quick_start(files["README.md"].decode()), scope)
    assert isinstance(scope["model"], PeftModel)
    assert ModelCard(files["README.md"].decode()).data.library_name == "peft"


def test_by_xet(xet_hub, tiny_model, tmp_path, capsys, monkeypatch):
    """With the connection cut at the commit, and a second try."""
    xet_hub.faults.append(Fault("/commit/main", "cut", times=10))  # a connection that was idle is opened again
    folder = tmp_path / "out"
    line = said(capsys, 1, command(folder, tiny_model))
    assert xet_hub.xet.files
    assert not xet_hub.objects
    xet_hub.faults.clear()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(shlex.split(line.partition("push it with: trl-cancel ")[2])) == 0
    assert sorted(xet_hub.uploaded) == sorted(set(xet_hub.uploaded))
    pushed = AutoModelForCausalLM.from_pretrained(REPO, dtype=torch.float32)
    torch.testing.assert_close(weights_of(pushed), weights_of(load(str(folder))))
    assert TOKEN.encode() not in xet_hub.stored()


def test_storage_that_refuses(xet_hub, tiny_model, tmp_path, capsys):
    xet_hub.faults.append(Fault("/v1/xorbs", 400, times=1000))
    line = said(capsys, 1, command(tmp_path / "out", tiny_model))
    assert "The model could not be pushed to someone/model: " in line
    assert load(str(tmp_path / "out"))
    assert not xet_hub.repos[REPO].commits


def test_overloaded_server_is_asked_again(hub, tiny_model, tmp_path):
    hub.faults += [Fault("preupload", 503, times=2), Fault(UPLOAD, 429), Fault(UPLOAD, "cut in the middle", times=2)]
    trained(tiny_model, tmp_path).push_to_hub()
    assert sorted(hub.uploaded) == sorted(set(hub.uploaded))
    assert len(hub.repos[REPO].commits) == 1


# What is refused, before anything is trained


@pytest.mark.parametrize(
    ("settings", "existing", "expected"),
    [
        ({"hub_token": "hf_Unknown"}, False, "the token was refused (401); run `hf auth login`, set HF_TOKEN"),
        pytest.param({"hub_token": READ_TOKEN}, False, "the token may not write there (403)", marks=pytest.mark.slow),
        ({"hub_token": READ_TOKEN}, True, f"no access to {REPO}: the token may not write there (403)"),
        pytest.param({"hub_model_id": "another/model"}, False, "no access to another/model", marks=pytest.mark.slow),
        ({"hub_model_id": "no name"}, False, "no access to no name: "),
    ],
    ids=["unknown token", "read token", "read token, existing repository", "another's", "no name"],
)
def test_refused_before_training(hub, tiny_model, tmp_path, capsys, settings, existing, expected):
    if existing:
        hub.repos[REPO] = Repo()
    line = said(capsys, 2, command(tmp_path / "out", tiny_model, **settings))
    assert line.startswith("trl-cancel train: push_to_hub: ")
    assert expected in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(PushError, match="push_to_hub: "):
        build(tiny_model, **{**PUSHING, **settings})
    assert not hub.uploaded


def test_without_a_token(hub, tiny_model, tmp_path, capsys):
    argv = command(tmp_path / "out", tiny_model)
    place = argv.index("--hub_token")
    line = said(capsys, 2, [*argv[:place], *argv[place + 2 :]])
    assert "there is no token; run `hf auth login`, set HF_TOKEN or pass hub_token" in line


def test_offline(hub, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = said(capsys, 2, command(tmp_path / "out", tiny_model))
    assert "offline mode is on (HF_HUB_OFFLINE=1)" in line


def test_unreachable(tiny_model, tmp_path, capsys, monkeypatch):
    with StandIn({}) as server:
        url = server.url
    talk_to(url, monkeypatch, tmp_path)
    line = said(capsys, 1, command(tmp_path / "out", tiny_model))
    assert "push_to_hub: no access to the Hub: " in line
    assert not (tmp_path / "out").exists()


# What is cut off, and the second try


@pytest.mark.parametrize(
    ("fault", "arrived"),
    [
        (Fault(UPLOAD, "cut in the middle", times=2 * RETRIES), False),
        pytest.param(Fault("preupload", "cut", times=RETRIES), False, marks=pytest.mark.slow),
        (Fault("commit", "cut in the middle", times=10), True),
    ],
    ids=["weights", "before", "commit"],
)
def test_cut_then_second_try(hub, tiny_model, tmp_path, capsys, monkeypatch, fault, arrived):
    hub.faults.append(fault)
    folder = tmp_path / "out of the run"
    line = said(capsys, 1, command(folder, tiny_model))
    match = re.fullmatch(
        r"trl-cancel train: The model could not be pushed to someone/model: (.+)\. It is saved in (.+); "
        r"push it with: trl-cancel (push .+)",
        line,
    )
    assert match[2] == str(folder)
    assert not hub.repos[REPO].commits
    kept = load(str(folder))
    assert (folder / "README.md").exists()
    assert (folder / "all_results.json").exists()

    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (weights in hub.objects) == arrived
    hub.faults.clear()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(shlex.split(match[3])) == 0
    assert f"Pushed {folder} to {hub.url}/{REPO}." in capsys.readouterr().out
    assert [oid for oid, _ in hub.uploaded].count(weights) == 1  # what had arrived is not sent again
    pushed = AutoModelForCausalLM.from_pretrained(REPO, dtype=torch.float32)
    torch.testing.assert_close(weights_of(pushed), weights_of(kept))

    assert main(shlex.split(match[3])) == 0  # nothing has changed
    assert [oid for oid, _ in hub.uploaded].count(weights) == 1
    assert len(hub.repos[REPO].commits) == 1


def test_error_in_python(hub, tiny_model, tmp_path):
    hub.faults.append(Fault("commit", 500))
    trainer = trained(tiny_model, tmp_path)
    with pytest.raises(PushError, match=r"the Hub answered 500; try again later\. It is saved in") as raised:
        trainer.push_to_hub()
    assert not raised.value.refused
    assert (tmp_path / "model.safetensors").exists()
    trainer.push_to_hub()
    assert "model.safetensors" in hub.repos[REPO].files


def test_model_is_saved_before_the_hub_is_asked(hub, tiny_model, tmp_path, monkeypatch):
    """Where nothing was asked before the training either."""
    settings = {"hub_revision": "dev", "hub_private_repo": True, "push_to_hub": False, "save_strategy": "no"}
    trainer = trained(tiny_model, tmp_path, **settings)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    command = f"trl-cancel push {tmp_path} --hub_model_id {REPO} --hub_revision dev --hub_private_repo"
    with pytest.raises(PushError, match=r"offline mode is on .* It is saved in") as raised:
        trainer.push_to_hub()
    assert (tmp_path / "model.safetensors").exists()
    assert str(raised.value).endswith(command)


def test_the_second_try_keeps_what_was_chosen(hub, tmp_path, capsys, monkeypatch):
    """A repository that was to be private above all."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({}, folder / "model.safetensors")
    chosen = ["--hub_private_repo", "--hub_revision", "dev", "--commit_message", "the last one"]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.faults.append(Fault("repos/create", 500, times=RETRIES))
    line = said(capsys, 1, ["push", str(folder), "--hub_model_id", REPO, *chosen])
    again = shlex.split(line.partition("push it with: trl-cancel ")[2])
    assert sorted(again) == sorted(["push", str(folder), "--hub_model_id", REPO, *chosen])
    hub.faults.clear()
    assert main([part for part in again if part not in ("--hub_revision", "dev")]) == 0  # the stand-in has one branch
    assert hub.repos[REPO].private


def test_tokens_are_in_no_traceback(hub, tiny_model, tmp_path):
    """Of a token that cannot be sent the client's error tells all; one with the end of its line can be."""
    secret = "hf_GoodSECRET\nx"
    with pytest.raises(PushError, match=r"Bearer \*\*\*") as raised:
        build(tiny_model, output_dir=str(tmp_path), **{**PUSHING, "hub_token": secret})
    assert "SECRET" not in "".join(traceback.format_exception(raised.value))
    with pytest.raises(PushError) as raised:
        check_token(secret)
    assert "SECRET" not in "".join(traceback.format_exception(raised.value))
    trainer = build(tiny_model, output_dir=str(tmp_path), **{**PUSHING, "hub_token": f"{TOKEN}\n"})
    assert trainer.args.hub_token == TOKEN
    with pytest.raises(PushError) as raised:
        check_token("hf_Unknown")
    assert raised.value.__cause__ is not None, "what quotes no token is told"


def test_tokens_are_in_no_message(hub, tmp_path, capsys):
    """Where the client quotes one that it cannot send, or the user takes another flag, or none."""
    assert reason(ValueError("Illegal header value b'Bearer hf_SecretOfTheTests x'")) == (
        "Illegal header value b'Bearer *** x'"
    )
    check_token(f"{TOKEN}\n")  # as read from a file
    line = said(capsys, 2, ["push", str(tmp_path), "--hub_model_id", REPO, "--token", TOKEN, f"--key={TOKEN}"])
    assert line == "trl-cancel push: unrecognized arguments: --token --key"
    said(capsys, 2, ["push", str(tmp_path), "--hub_model_id", REPO, f"--hub={TOKEN}"])
    for argv in (["push", str(tmp_path), "--hub_model_id", REPO, TOKEN], ["train", TOKEN], ["demo", TOKEN]):
        assert "***" in said(capsys, 2, argv)
    assert main([TOKEN]) == 2
    assert TOKEN not in capsys.readouterr().err


def test_error_in_saving_is_not_the_hubs(hub, tiny_model, tmp_path, monkeypatch):
    trainer = trained(tiny_model, tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "save_model", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.push_to_hub()


def test_failed_push_in_the_background_is_reported_and_stops_nothing(hub, tiny_model, tmp_path, caplog):
    hub.faults.append(Fault("preupload", 500, times=RETRIES))
    with caplog.at_level(logging.WARNING, "trl_cancel"):
        settings = {"hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 2, "max_steps": 3}
        trainer = trained(tiny_model, tmp_path, **settings)
    assert trainer.state.global_step == 3
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    reports: list[str] = []
    for _ in range(100):  # it comes from another thread
        reports = [record.message for record in caplog.records if "could not be pushed" in record.message]
        if reports:
            break
        time.sleep(0.05)
    assert len(reports) == 1
    assert re.search(r"the Hub answered 500.*push it with: trl-cancel push .*\(the training goes on\)", reports[0])
    trainer.push_to_hub()
    assert "model.safetensors" in hub.repos[REPO].files


def test_full_disk_while_a_push_is_prepared(hub, tiny_model, tmp_path, monkeypatch, caplog):
    """The copy for it is half written: it is removed, and nothing said to be saved there."""

    def half(source, target):
        content = Path(source).read_bytes()
        Path(target).write_bytes(content[: len(content) // 2])
        if Path(source).suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.trainer.shutil.copy", half)
    settings = {"hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 1}
    trainer = trained(tiny_model, tmp_path, **settings)
    assert trainer.state.global_step == 1
    (report,) = [record.message for record in caplog.records if "pushed" in record.message]
    assert f"{tmp_path}/checkpoint-1 is not pushed, for it could not be copied to {tmp_path}: " in report
    assert "No space left on device (the training goes on)" in report
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "checkpoint-1/model.safetensors").exists()


# Pushing what is on disk


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, r"it holds no weights \(\*\.safetensors\)"),
        ("pytorch_model.bin", r"it holds no weights .*"),
        ("model.safetensors", "model.safetensors cut off"),
        ("adapter_model.safetensors", "adapter_model.safetensors cut off"),
        ("model.safetensors.index.json", "model-00002.safetensors is missing"),
    ],
)
def test_weights_that_are_not_whole_are_not_pushed(hub, tmp_path, capsys, weights, expected):
    (tmp_path / "config.json").write_text("{}")
    if weights is not None:
        (tmp_path / weights).write_text('{"weight_map": {"a": "model-00002.safetensors"}}')
    line = said(capsys, 2, ["push", str(tmp_path), "--hub_model_id", REPO])
    assert re.search(rf"{re.escape(str(tmp_path))}: {expected}\. Nothing was pushed; save the model again", line)
    assert not hub.requests


@pytest.mark.parametrize(
    ("files", "expected"),
    [(None, "there is no such folder"), ([], "the folder holds no model (no config.json or adapter_config.json)")],
)
def test_nothing_to_push(hub, tmp_path, capsys, files, expected):
    folder = tmp_path / "out"
    if files is not None:
        folder.mkdir()
    assert expected in said(capsys, 2, ["push", str(folder), "--hub_model_id", REPO])
    assert not hub.requests


def test_only_the_model_and_its_results_are_pushed(hub, tmp_path, monkeypatch):
    kept = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "vocab.txt"]
    left = [
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        ".env",
        "run.log",
        "events.out.tfevents.1",
        "_tmp.json",
    ]
    for name in [*kept, *left, "checkpoint-1/optimizer.pt", "checkpoint-1/config.json", "wandb/config.json"]:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text('---\nlicense: mit\n---\nmodel_id = "another/name"\n')
    save_file({}, tmp_path / "out" / "model.safetensors")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["push", str(tmp_path / "out"), "--hub_model_id", "model", "--hub_private_repo"]) == 0
    assert sorted(hub.repos[REPO].files) == sorted(kept)
    assert hub.repos[REPO].private
    assert b'model_id = "someone/model"' in hub.repos[REPO].files["README.md"]


def test_card_that_cannot_be_written_stops_nothing(tiny_model, tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trl_cancel.publishing.published.complete_model_card", broken)
    trainer = build(tiny_model, output_dir=str(tmp_path), max_steps=1, save_strategy="steps", save_steps=1)
    assert isinstance(trainer, CancelGRPOTrainer)
    with caplog.at_level(logging.WARNING, "trl_cancel"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").exists()
    assert "The model card could not be written: OSError: [Errno 28] No space left on device" in caplog.text


def test_a_folder_that_cannot_be_written_is_pushed(hub, tiny_model, tmp_path, monkeypatch, caplog):
    """With the card as it is."""
    trained(tiny_model, tmp_path).save_model()
    (tmp_path / "README.md").write_text("---\ntags: []\n---\nmine")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("trl_cancel.publishing.hub.rename_in_card", refuse)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["push", str(tmp_path), "--hub_model_id", REPO]) == 0
    assert "model.safetensors" in hub.repos[REPO].files
    assert "cannot be written (Permission denied)" in caplog.text
