"""Kills, signals and full disks: what is left is whole or known not to be, and a resumed run ends as if undisturbed."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import TrainerCallback

from trl_cancel import CancelGRPOTrainer
from trl_cancel.evaluation import EvaluationCallback, EvaluationSettings
from trl_cancel.playground.data import load_prompts
from trl_cancel.running.changed_settings import SAVED_AS, is_same_run
from trl_cancel.running.checkpoints import (
    OwnCheckpoints,
    SavingError,
    find_checkpoint,
    how_to_go_on,
    last_whole,
    saved_or_said,
    why_broken,
    written_whole,
)
from trl_cancel.running.storage import is_storage_error, what_happened

from .kills import PLACES, killed, status_of
from .runs import OFF_POLICY, assert_same_weights, build, noisy_reward, train
from .test_finished import files


def hardly_ever(completion_ids, **kwargs):
    """A reward with which all rounds of a generation are needed."""
    return [float(sum(ids) % 23 == 0) for ids in completion_ids]


SAVING = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3}
# Several updates a generation, and rounds of generation; saved between generations.
ROUNDS = {
    **SAVING,
    "max_steps": 8,
    "save_steps": 4,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 8,
    "filter_zero_variance": True,
    "reward": hardly_ever,
}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
OF_PLACE = {
    "round": ROUNDS,
    "rotation": {**SAVING, "save_total_limit": 1},
    "evaluation": {**SAVING, **EVALUATED},
}


QUICK = ("round", "optimizer", "rotation")  # which stand for the others in the default suite


def finished(model, trainer=CancelGRPOTrainer, resume=None, **settings):
    reward = settings.pop("reward", noisy_reward)
    evaluated = {"eval_dataset": load_prompts("test", 4)} if "eval_strategy" in settings else {}
    return train(model, trainer, resume=resume, **settings, arguments={"reward_funcs": reward, **evaluated})


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory):
    """A function: the run with some settings that nothing disturbs."""
    runs = {}

    def of(settings):
        key = str(sorted(settings.items(), key=str))
        if key not in runs:
            runs[key] = finished(tiny_model, **settings, output_dir=str(tmp_path_factory.mktemp("undisturbed")))
        return runs[key]

    return of


def folders(output):
    return sorted(path.name for path in Path(output).glob("checkpoint-*"))


def assert_ends_alike(run, other):
    assert_same_weights(run.weights, other.weights)
    assert run.logs[:-1] == other.logs[:-1]  # the last one is of the time that the whole run took


@pytest.mark.parametrize(
    "place", [place if place in QUICK else pytest.param(place, marks=pytest.mark.slow) for place in PLACES]
)
def test_killed_run_resumes_as_if_undisturbed(tiny_model, tmp_path, undisturbed, place):
    settings = OF_PLACE.get(place, SAVING)
    killed(place, tiny_model, finished, **settings, output_dir=str(tmp_path))
    assert folders(tmp_path), "or there is nothing to resume from"
    resumed = finished(tiny_model, resume=True, **settings, output_dir=str(tmp_path))
    assert_ends_alike(resumed, undisturbed(settings))
    assert not list(tmp_path.glob("*.incomplete"))
    assert all(why_broken(path) is None for path in tmp_path.glob("checkpoint-*"))
    if place == "rotation":
        assert folders(tmp_path) == ["checkpoint-7"]


@pytest.mark.slow
def test_a_new_run_in_an_old_folder_is_not_mixed_with_it(tiny_model, tmp_path, undisturbed):
    """A checkpoint over an older whole one, killed before its last file: every file is there, of two runs."""
    finished(tiny_model, **{**SAVING, "max_steps": 6}, output_dir=str(tmp_path), seed=1)
    killed("before state", tiny_model, finished, **SAVING, output_dir=str(tmp_path))
    assert last_whole(tmp_path) == tmp_path / "checkpoint-3"
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "checkpoint-99.incomplete").touch()
    resumed = finished(tiny_model, resume=True, **SAVING, output_dir=str(tmp_path))
    assert_ends_alike(resumed, undisturbed(SAVING))
    assert folders(tmp_path) == ["checkpoint-3", "checkpoint-6", "checkpoint-7"], "what is broken goes"


@pytest.mark.slow
def test_checkpoints_of_trl_resume(tiny_model, tmp_path, caplog):
    """Whole ones; one that TRL was killed in is passed over by its files."""
    for place in ("model", "state"):
        killed(place, tiny_model, trl_finished, **SAVING, output_dir=str(tmp_path / place))
        assert folders(tmp_path / place) == ["checkpoint-3", "checkpoint-6"]
        resumed = finished(tiny_model, resume=True, **SAVING, output_dir=str(tmp_path / place))
        assert (
            f"checkpoint-6 is left out: trainer_state.json is {'missing' if place == 'model' else 'cut off'}"
            in caplog.text
        )
        assert resumed.trainer.state.global_step == 7


def trl_finished(model, **settings):
    return finished(model, trl.GRPOTrainer, **settings)


# Which checkpoint is taken


@pytest.fixture
def saved(tiny_model, tmp_path):
    """An output folder with checkpoints 1, 2 and 3."""
    finished(tiny_model, max_steps=3, save_strategy="steps", save_steps=1, output_dir=str(tmp_path))
    return tmp_path


def cut(path):
    os.truncate(path, path.stat().st_size - 2)


def overwrite(path, at):
    """As a disk does that fails: the file is as long as before."""
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\0" * 32)


BREAKS = {
    "it was not written to the end": lambda folder: folder.with_name(f"{folder.name}.incomplete").touch(),
    "trainer_state.json is missing": lambda folder: (folder / "trainer_state.json").unlink(),
    "trainer_state.json is cut off": lambda folder: cut(folder / "trainer_state.json"),
    "model.safetensors cut off ": lambda folder: cut(folder / "model.safetensors"),
    "optimizer.pt cut off": lambda folder: cut(folder / "optimizer.pt"),
    "the weights are missing": lambda folder: (folder / "model.safetensors").unlink(),
    "the optimizer's state is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "scheduler.pt is missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "rng_state.pth is missing": lambda folder: (folder / "rng_state.pth").unlink(),
    "trainer_state.json is damaged": lambda folder: (folder / "trainer_state.json").write_text("[]"),
    "model.safetensors cut off": lambda folder: overwrite(folder / "model.safetensors", 8),
    "rng_state.pth is damaged": lambda folder: overwrite(folder / "rng_state.pth", 300),
    "scheduler.pt is damaged": lambda folder: overwrite(folder / "scheduler.pt", 200),
    "optimizer.pt is damaged": lambda folder: overwrite(folder / "optimizer.pt", 3000),
    "training_args.bin is damaged": lambda folder: (folder / "training_args.bin").write_bytes(b""),
    "config.json cannot be read": lambda folder: cut(folder / "config.json"),
    "generation_config.json cannot be read": lambda folder: (folder / "generation_config.json").write_bytes(b"\xff"),
    "tokenizer.json cannot be read": lambda folder: cut(folder / "tokenizer.json"),
    "tokenizer_config.json is damaged": lambda folder: (folder / "tokenizer_config.json").write_text("null"),
    "merges.txt is empty": lambda folder: (folder / "merges.txt").touch(),
    "there is no such folder": shutil.rmtree,
}


def test_broken_checkpoints_are_told(saved, caplog):
    for reason, damage in BREAKS.items():
        reason = reason.strip()  # one may have several causes
        damage(saved / "checkpoint-3")
        assert why_broken(saved / "checkpoint-3") == reason
        with pytest.raises(ValueError, match=rf"checkpoint-3 is not a whole checkpoint: {reason}\. .*checkpoint-2"):
            find_checkpoint(str(saved / "checkpoint-3"), saved)
        assert find_checkpoint(True, saved) == find_checkpoint("auto", saved) == str(saved / "checkpoint-2")
        shutil.rmtree(saved / "checkpoint-3", ignore_errors=True)
        (saved / "checkpoint-3.incomplete").unlink(missing_ok=True)
        assert f"checkpoint-3 is left out: {reason}." in caplog.text or reason == "there is no such folder"
        shutil.copytree(saved / "checkpoint-2", saved / "checkpoint-3")
        assert why_broken(saved / "checkpoint-3") is None


def test_damaged_adapters_are_told(tmp_path):
    """Of one name, or of several in folders of their own."""
    layouts = ("PEFT", ""), ("PEFT, named", "mine/")
    for layout, folder in layouts:
        for name, damage in (("adapter_config.json", "cannot be read"), ("adapter_model.safetensors", "cut off")):
            checkpoint = tmp_path / f"{layout} {name}"
            write(checkpoint, ["trainer_state.json", *LAYOUTS[layout], f"{folder}adapter_config.json"])
            save_file({"weight": torch.zeros(2)}, checkpoint / folder / "adapter_model.safetensors")
            assert why_broken(checkpoint) is None
            cut(checkpoint / folder / name)
            assert why_broken(checkpoint).removeprefix(f"{folder}{name} ").removeprefix("is ") == damage


# Files of checkpoints beside `trainer_state.json`, by who writes them, and those that can be lost unnoticed.
STATES = ["scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"]
LAYOUTS = {
    "transformers": ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
    "pickled": ["pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
    "save_only_model": ["model.safetensors"],
    "PEFT": ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
    "PEFT, named": ["mine/adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
    "FSDP, whole": ["pytorch_model_fsdp.bin", "optimizer.bin", *STATES],
    "FSDP, sharded": ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", *STATES],
    "ZeRO-3": ["global_step3/mp_rank_00_model_states.pt", "rng_state_0.pth", "rng_state_1.pth"],
}


# The least that is read of such a file.
WHOLE = {
    "trainer_state.json": {"global_step": 1, "train_batch_size": 4},
    "config.json": {"model_type": "qwen3"},
    "adapter_config.json": {"peft_type": "LORA"},
}


def write(folder, files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".pt", ".pth")):
            torch.save({}, folder / name)
        elif name.endswith(".safetensors"):
            save_file({}, folder / name)
        else:
            (folder / name).write_text(json.dumps(WHOLE.get(Path(name).name, {})))


OTHER_FORMS = {
    "trainer_state.json": [
        *({"global_step": 1}, {"train_batch_size": 4}),
        *({**WHOLE["trainer_state.json"], "global_step": noise} for noise in ("1", 1.5, -1, True, None, [])),
        *({**WHOLE["trainer_state.json"], "log_history": noise} for noise in (3, {}, [3], None)),
        *({**WHOLE["trainer_state.json"], "stateful_callbacks": noise} for noise in (3, [], {"a": 3}, {"a": [3]})),
    ],
    "config.json": [{"model_type": 3}],
    "adapter_config.json": [{"peft_type": None}],
    "model.safetensors.index.json": [{"weight_map": noise} for noise in (3, {"a": 3}, {"a": []})],
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_json_of_another_form_is_damage(tmp_path, name):
    """Valid JSON, but not what is read of the file; and what is no JSON at all. The checkpoint before is taken."""
    for number in (1, 2):
        write(tmp_path / f"checkpoint-{number}", ["trainer_state.json", *LAYOUTS["transformers"]])
    forms = [json.dumps(form).encode() for form in [*OTHER_FORMS[name], {}, [], 3, None, "text"]]
    for form in [*forms, b"\xff\xfe", b"", b"[" * 10**5]:
        (tmp_path / "checkpoint-2" / name).write_bytes(form)
        assert name in why_broken(tmp_path / "checkpoint-2"), form[:80]
        assert find_checkpoint("auto", tmp_path) == str(tmp_path / "checkpoint-1")


def test_headers_of_weights_of_another_form_are_damage(tmp_path):
    """The length comes first, then JSON, which is read without what is behind it."""
    write(tmp_path, ["trainer_state.json", *LAYOUTS["transformers"]])
    for header in (
        b'{"a": {"data_offsets": [0, "x"]}}',
        b'{"a": {"data_offsets": 3}}',
        b"[]",
        b"3",
        b"null",
        b"\xff",
        b"[" * 10**5,
    ):
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        assert why_broken(tmp_path) == "model.safetensors cut off"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_of_all_engines_are_judged(tmp_path, layout):
    write(tmp_path, ["trainer_state.json", *LAYOUTS[layout]])
    assert why_broken(tmp_path) is None
    for name in LAYOUTS[layout]:
        (tmp_path / name).rename(tmp_path / "elsewhere")
        if not name.startswith("rng_state_"):  # of which there may be one a process, or a node
            assert "missing" in why_broken(tmp_path), name
        (tmp_path / "elsewhere").rename(tmp_path / name)


def test_shards_are_counted(tmp_path):
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    write(tmp_path, ["trainer_state.json", *shards])
    index = tmp_path / "model.safetensors.index.json"
    assert why_broken(tmp_path) == "the weights are missing"
    index.write_text(json.dumps({"weight_map": {"first": shards[0], "second": shards[1]}}))
    assert why_broken(tmp_path) is None
    (tmp_path / shards[1]).unlink()
    assert why_broken(tmp_path) == f"{shards[1]} is missing"
    cut(index)
    assert why_broken(tmp_path) == f"the end of {index.name} is missing"


def test_checkpoints_by_other_names(tmp_path, monkeypatch):
    """By a link, and as the folder one stands in; also where the checkpoint itself lies elsewhere."""
    for name in ("checkpoint-1", "elsewhere"):
        write(tmp_path / name, ["trainer_state.json", "model.safetensors"])
    (tmp_path / "latest").symlink_to("checkpoint-1")
    (tmp_path / "checkpoint-2").symlink_to("elsewhere")
    monkeypatch.chdir(tmp_path / "checkpoint-1")
    for name in (".", tmp_path / "latest", tmp_path / "checkpoint-2"):
        assert find_checkpoint(str(name), tmp_path) == str(name)
    for number in (1, 2):
        (tmp_path / f"checkpoint-{number}.incomplete").touch()
    for name in (".", tmp_path / "latest", tmp_path / "checkpoint-2"):
        with pytest.raises(ValueError, match=r"not written to the end\. There is no whole checkpoint beside it"):
            find_checkpoint(str(name), tmp_path)


def test_all_files_are_on_the_disk_before_the_mark_goes(tmp_path, monkeypatch):
    checkpoint, flushed = tmp_path / "checkpoint-1", set()

    def fsync(descriptor):
        assert (tmp_path / "checkpoint-1.incomplete").exists()
        flushed.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    with written_whole(checkpoint, Accelerator(cpu=True)):
        write(checkpoint, [*LAYOUTS["FSDP, sharded"], "trainer_state.json"])
    assert flushed == {path.stat().st_ino for path in [checkpoint, *checkpoint.rglob("*")]}
    assert not (tmp_path / "checkpoint-1.incomplete").exists()


def test_a_node_that_writes_nothing_has_no_folder(tmp_path):
    """Without a shared disk, of a checkpoint of the model alone."""
    with written_whole(tmp_path / "checkpoint-1", Accelerator(cpu=True)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_files_of_all_processes_are_waited_for(tmp_path, monkeypatch):
    """Those of the slowest too, before they are flushed and the mark goes."""
    checkpoint, late = tmp_path / "checkpoint-1", ["trainer_state.json", "rng_state_1.pth"]
    flushed = set()

    def waited():
        if (checkpoint / "model.safetensors").exists():
            write(checkpoint, late)

    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    processes = SimpleNamespace(
        is_main_process=True, is_local_main_process=True, num_processes=2, wait_for_everyone=waited
    )
    with written_whole(checkpoint, processes):
        write(checkpoint, ["model.safetensors"])
    assert {(checkpoint / name).stat().st_ino for name in late} <= flushed


def test_what_cannot_be_removed_stays_marked(tmp_path, monkeypatch):
    """Left by an earlier run, or by a save that fails."""
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: (path / "model.safetensors").unlink(True))
    for number in (1, 2):
        write(tmp_path / f"checkpoint-{number}", ["model.safetensors", "optimizer.pt"])
    (tmp_path / "checkpoint-1.incomplete").touch()
    with pytest.raises(RuntimeError), written_whole(tmp_path / "checkpoint-2", Accelerator(cpu=True)):
        raise RuntimeError
    for number in (1, 2):
        assert why_broken(tmp_path / f"checkpoint-{number}") == "it was not written to the end"


def test_files_of_others_are_left_alone_on_a_full_disk(tmp_path):
    """Only what is half written now goes, not a file in PyTorch's older format that was there before."""
    older, model = tmp_path / "older.pt", tmp_path / "model.safetensors"
    torch.save({}, older, _use_new_zipfile_serialization=False)
    save_file({"weight": torch.zeros(2)}, model)

    def save():
        with saved_or_said(tmp_path):
            cut(model)
            (tmp_path / "half.pt").write_bytes(b"PK")
            raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(SavingError):
        save()
    assert [path.name for path in tmp_path.iterdir()] == ["older.pt"]


def test_none_is_told_or_passed_over(tiny_model, tmp_path):
    assert find_checkpoint("auto", tmp_path / "nothing") is None
    assert find_checkpoint(False, tmp_path) is find_checkpoint(None, tmp_path) is None
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        build(tiny_model, output_dir=str(tmp_path)).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_search_for_the_best_keeps_the_best(tiny_model, tmp_path):
    """Rotation waits for the new checkpoint, and spares the best one, as transformers' own."""
    settings = {**SAVING, **EVALUATED, "eval_steps": 2, "save_steps": 2, "save_total_limit": 2}
    settings |= {"metric_for_best_model": "reward", "greater_is_better": True, "load_best_model_at_end": True}
    ours = finished(tiny_model, **settings, output_dir=str(tmp_path / "ours"))
    trls = trl_finished(tiny_model, **settings, output_dir=str(tmp_path / "trl"))
    assert folders(tmp_path / "ours") == folders(tmp_path / "trl")
    best = [Path(run.trainer.state.best_model_checkpoint).name for run in (ours, trls)]
    assert best[0] == best[1] in folders(tmp_path / "ours")
    assert ours.trainer.args.save_total_limit == 2
    assert_same_weights(ours.weights, trls.weights)


@pytest.mark.parametrize("ahead", [300, -300], ids=["ahead", "behind"])
def test_rotation_goes_by_steps_whatever_the_clock(tiny_model, tmp_path, ahead):
    """Checkpoints of an earlier start are five minutes ahead, and one of another run has more steps than all."""
    saving = {**SAVING, "save_steps": 1, "save_total_limit": 2, "output_dir": str(tmp_path)}
    finished(tiny_model, **{**saving, "max_steps": 2})
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-99")
    for path in tmp_path.glob("checkpoint-*"):
        os.utime(path, (path.stat().st_mtime + ahead,) * 2)
    kept = []
    callback = TrainerCallback()
    callback.on_save = lambda args, *_, **__: kept.append(folders(args.output_dir))
    arguments = {"reward_funcs": noisy_reward, "callbacks": [callback]}
    train(tiny_model, **{**saving, "max_steps": 4}, resume=str(tmp_path / "checkpoint-2"), arguments=arguments)
    assert kept == [["checkpoint-2", "checkpoint-3"], ["checkpoint-3", "checkpoint-4"]]


# Several runs in one folder


def of_another_run(checkpoint, copy, has_name=True, step=2):
    """A copy of a checkpoint that another run might have left, of this package or of TRL's trainer."""
    shutil.copytree(checkpoint, copy)
    state = json.loads((copy / "trainer_state.json").read_text())
    record = state["stateful_callbacks"].pop(SAVED_AS)
    if has_name:
        record["attributes"]["run"] = "another"
        state["stateful_callbacks"][SAVED_AS] = record
    state |= {"log_history": [{"loss": float("nan"), "step": 1}] if has_name else [], "global_step": step}
    (copy / "trainer_state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("resume", "kept", "at_the_end"),
    [(None, [["1", "2", "3"], ["1", "2", "3"]], ["1", "3"]), ("checkpoint-1", [["2"], ["3"]], ["3"])],
    ids=["anew", "resumed"],
)
def test_checkpoints_of_other_runs_are_not_rotated(tiny_model, saved, resume, kept, at_the_end, caplog):
    """Nor at the end, where transformers leaves only the best one of all that are there: here the first of the run."""
    for number, has_name in ((4, True), (98, False)):
        of_another_run(saved / "checkpoint-2", saved / f"checkpoint-{number}", has_name)
    others = [saved / "checkpoint-4", saved / "checkpoint-98"]
    before, seen = [files(folder) for folder in others], []

    def first_is_best(args, state, *_, **__):
        state.best_metric = -1.0 if state.best_model_checkpoint else None

    callback = TrainerCallback()
    callback.on_step_begin = first_is_best
    callback.on_save = lambda args, *_, **__: seen.append(folders(args.output_dir))
    settings = {**SAVING, **EVALUATED, "save_steps": 1, "eval_steps": 1, "save_total_limit": 1}
    settings |= {"metric_for_best_model": "eval_runtime", "greater_is_better": False, "max_steps": 3 if resume else 2}
    arguments = {"callbacks": [callback], "eval_dataset": load_prompts("test", 4)}
    resume = resume and str(saved / resume)
    train(tiny_model, **settings, output_dir=str(saved), resume=resume, arguments=arguments)
    names = ["4", "98"]
    assert seen == [[f"checkpoint-{number}" for number in [*each, *names]] for each in kept]
    assert folders(saved) == [f"checkpoint-{number}" for number in [*at_the_end, *names]]
    assert [files(folder) for folder in others] == before
    assert ("They stay, but for those of steps at which this run saves too" in caplog.text) == (resume is None)


def test_what_tells_a_run():
    """Its name; the first log where there is none."""

    def state(run=None, *logs):
        record = {"stateful_callbacks": {SAVED_AS: {"attributes": {"run": run}}}} if run else {}
        return {**record, "log_history": [{"loss": loss} for loss in logs]}

    nan = float("nan")
    for one, other, same in (
        (state("a", 1.0), state("a", 2.0), True),
        (state("a", 1.0), state("b", 1.0), False),
        (state("a", nan), state(None, nan, 2.0), True),
        (state(None, 1.0, 2.0), state(None, 1.0, 3.0), True),
        (state(None, 1.0), state(None, 2.0), False),
        (state(), state(), False),
        ({}, state("a", 1.0), False),
        ({"log_history": 3, "stateful_callbacks": 3}, {"log_history": 3}, False),
    ):
        assert is_same_run(one, other) == is_same_run(other, one) == same


def test_a_run_that_goes_on_elsewhere_is_another(tiny_model, saved, tmp_path_factory):
    """So that two of them that start from one run leave each other's alone; one that stays is the same."""
    forks = tmp_path_factory.mktemp("forks")
    for folder, resume, step in ((forks, 1, 2), (forks, 2, 3), (forks, True, 4), (saved, 3, 4)):
        settings = {"max_steps": step, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
        train(
            tiny_model,
            **settings,
            output_dir=str(folder),
            resume=resume is True or str(saved / f"checkpoint-{resume}"),
        )
    assert folders(forks) == ["checkpoint-2", "checkpoint-4"]
    assert folders(saved) == ["checkpoint-4"]


def test_a_checkpoint_of_another_run_is_not_taken_for_progress(tiny_model, saved, caplog):
    """A fresh start in a folder with checkpoints 1 to 3 that fails after its second step, and goes on from that."""

    def failing(completion_ids, trainer_state, **kwargs):
        if trainer_state.global_step == 2:
            raise RuntimeError("the grader is down")
        return noisy_reward(completion_ids)

    failing.__name__ = "noisy_reward"
    settings = {"save_strategy": "steps", "save_steps": 500, "output_dir": str(saved), "seed": 7}
    others = (saved / "checkpoint-2/model.safetensors").read_bytes()
    with pytest.raises(RuntimeError) as raised:
        finished(tiny_model, **settings, reward=failing)
    assert f"output_dir={saved} holds checkpoints of another run, the latest checkpoint-3" in caplog.text
    named = saved / "checkpoint-2"
    note = f"step 2 is saved as {named}; continue with resume_from_checkpoint=True."
    assert raised.value.__notes__[-1].endswith(note)
    assert (named / "model.safetensors").read_bytes() != others
    caplog.clear()
    with pytest.raises(
        ValueError, match=r"several runs, and none .*: checkpoint-3 \(seed: 42 -> 8\), checkpoint-2 \("
    ):
        finished(tiny_model, resume=True, **{**settings, "seed": 8})
    resumed = finished(tiny_model, resume=True, **settings).trainer
    assert (resumed.own_checkpoints.last(), resumed.state.global_step) == (saved / "checkpoint-3", 3)
    (beside,) = [record.getMessage() for record in caplog.records if "another run" in record.getMessage()]
    assert (
        f"output_dir={saved} holds checkpoints of another run, the latest checkpoint-3. They stay, but for" in beside
    )
    assert "starts anew" not in beside
    assert beside.endswith("It differs from this one: seed: 42 -> 7.")
    assert "was saved with other settings" not in caplog.text


def test_whose_checkpoint_is_taken(tmp_path):
    """Of several runs in a folder: by the settings, then by the model that is there, then by the steps."""

    def write_one(name, run, **settings):
        write(tmp_path / name, ["trainer_state.json", "model.safetensors"])
        record = {"run": run, "settings": {"seed": 1, "max_steps": 4, **settings}} if run else {}
        callbacks = {SAVED_AS: {"attributes": record}} if run else {}
        logs = [] if run else [{"loss": 1.0}]
        state = {"global_step": 1, "train_batch_size": 1, "stateful_callbacks": callbacks, "log_history": logs}
        (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))

    def taken(**settings):
        return Path(
            find_checkpoint(True, tmp_path, {"attributes": {"settings": {"seed": 1, "max_steps": 4, **settings}}})
        ).name

    write_one("checkpoint-2", "a")
    write_one("checkpoint-3", "a")
    write_one("checkpoint-5", "b", seed=2)
    assert (taken(), taken(seed=2)) == ("checkpoint-3", "checkpoint-5")
    assert (taken(max_steps=8), taken(max_steps=8, seed=2)) == ("checkpoint-3", "checkpoint-5"), "trained on"
    for unlike in ({"seed": 3}, {"seed": 3, "max_steps": 8}):
        with pytest.raises(
            ValueError, match=rf"checkpoint-5 \(.*seed: 2 -> 3\), checkpoint-3 \(.*Set .*={tmp_path}/check"
        ):
            taken(**unlike)
    write_one("checkpoint-7", "c")
    assert taken() == "checkpoint-7", "the most steps"
    write_one(".", "a")
    assert taken() == "checkpoint-3", "of the run whose model is there"
    write_one("checkpoint-3", "a", max_steps=8)
    assert taken() == "checkpoint-7", "which has these settings, and is not trained on"
    write_one("checkpoint-9", None)
    assert taken() == "checkpoint-7", "not of one that is not known"
    for name in ("checkpoint-3", "checkpoint-2", "checkpoint-7", "checkpoint-5"):
        shutil.rmtree(tmp_path / name)
    assert taken(seed=3) == "checkpoint-9", "the only one"


def test_a_signal_names_the_checkpoint_of_its_run(tiny_model, saved, caplog):
    """By its folder where another with the same settings has gone further."""
    named = saved / "checkpoint-2"
    other = f"resume_from_checkpoint='{named}', for True takes {saved}/checkpoint-3, of another run"
    for steps, how in ((7, "resume_from_checkpoint=True"), (3, other)):
        settings = {**SAVING, "max_steps": steps, "save_steps": 500, "output_dir": str(saved)}
        with pytest.raises(SystemExit):
            finished(tiny_model, **settings, reward=signalling(signal.SIGTERM, 2))
        assert f"Saved as {named}; continue with {how}." in caplog.text


def test_own_checkpoints(saved, monkeypatch):
    monkeypatch.chdir(saved)
    own = OwnCheckpoints("checkpoint-2")
    assert own.holds(saved / "checkpoint-2")
    assert not own.holds(saved / "checkpoint-1")
    assert own.last() == saved / "checkpoint-2"
    own.add(Path("checkpoint-3"))
    assert how_to_go_on(own.last()) == "continue with resume_from_checkpoint=True"
    cut(saved / "checkpoint-3/model.safetensors")
    assert own.last() == saved / "checkpoint-2", "the last that is whole"
    assert OwnCheckpoints().last() is None


def test_nothing_of_another_run_stays_in_a_checkpoint(tmp_path):
    """Such as its optimizer, where the new one saves only the model."""
    checkpoint = tmp_path / "checkpoint-1"
    write(checkpoint, ["trainer_state.json", *LAYOUTS["transformers"]])
    with written_whole(checkpoint, Accelerator(cpu=True)):
        write(checkpoint, ["trainer_state.json", "model.safetensors"])
    assert sorted(path.name for path in checkpoint.iterdir()) == ["model.safetensors", "trainer_state.json"]


# Signals


def signalling(number, at=5):
    """A reward function that sends its own process a signal at a call, or at each of several."""
    calls, at = [], at if isinstance(at, tuple) else (at,)

    def reward(completion_ids, **kwargs):
        calls.append(1)
        if len(calls) in at:
            os.kill(os.getpid(), number)
        return noisy_reward(completion_ids)

    reward.__name__ = "noisy_reward"  # metrics bear the name
    return reward


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_signal_saves_and_ends(tiny_model, tmp_path, undisturbed, capfd, caplog, number, status):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt) as ended:
        finished(tiny_model, **SAVING, output_dir=str(tmp_path), reward=signalling(number))
    assert getattr(ended.value, "code", 130) == status
    assert f"{number.name}: stopping after this optimizer step, with a checkpoint" in capfd.readouterr().err
    assert f"Stopped by {number.name} after step 5" in caplog.text
    assert {each: signal.getsignal(each) for each in before} == before
    assert last_whole(tmp_path) == tmp_path / "checkpoint-5"
    resumed = finished(tiny_model, resume=True, **SAVING, output_dir=str(tmp_path))
    assert_ends_alike(resumed, undisturbed(SAVING))


def test_what_is_saved_on_a_signal_is_kept_beside_the_best(tiny_model, tmp_path, caplog):
    """With `save_total_limit=1` transformers leaves only the best checkpoint at the end of a training."""
    settings = {**SAVING, **EVALUATED, "save_steps": 2, "save_total_limit": 1, "output_dir": str(tmp_path)}
    settings |= {"metric_for_best_model": "eval_runtime", "greater_is_better": False, "load_best_model_at_end": True}
    arguments = {"callbacks": [Signalling("on_step_begin", 2)], "eval_dataset": load_prompts("test", 4)}
    trainer = build(tiny_model, **settings, arguments=arguments)
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert folders(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert f"Saved as {tmp_path}/checkpoint-3; continue with resume_from_checkpoint=True" in caplog.text
    assert (trainer.args.save_total_limit, trainer.args.load_best_model_at_end) == (1, True)
    of_checkpoint = torch.load(tmp_path / "checkpoint-3/training_args.bin", weights_only=False)
    assert of_checkpoint.save_total_limit == 1


class Signalling(TrainerCallback):
    """Sends its own process SIGTERM in an event of a step."""

    def __init__(self, event, step):
        def signalled(args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        setattr(self, event, signalled)


@pytest.mark.parametrize("event", ["on_save", "on_evaluate", "on_train_end"])
def test_a_signal_after_the_last_step_is_passed_on(tiny_model, tmp_path, caplog, event):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    if event == "on_evaluate":
        settings |= EVALUATED
    arguments = {"callbacks": [Signalling(event, 2)], "eval_dataset": load_prompts("test", 4)}
    with pytest.raises(SystemExit) as ended:
        train(tiny_model, **settings, arguments=arguments)
    assert ended.value.code == 143
    assert f"Stopped by SIGTERM after step 2. Saved as {tmp_path}/checkpoint-2" in caplog.text


def test_only_what_is_saved_is_said_to_be(tiny_model, tmp_path, caplog):
    """After the last step nothing more is saved."""
    settings = {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "no"}
    arguments = {"callbacks": [Signalling("on_train_end", 2)]}
    for kept, message in ((None, "There is no whole checkpoint of"), (1, "The last whole checkpoint of this run is")):
        if kept:
            finished(tiny_model, max_steps=1, save_strategy="steps", save_steps=1, output_dir=str(tmp_path))
        with pytest.raises(SystemExit):
            train(
                tiny_model,
                max_steps=2,
                **settings,
                output_dir=str(tmp_path),
                resume=kept and True,
                arguments=arguments,
            )
        assert f"Stopped by SIGTERM after step 2. {message}" in caplog.text


@pytest.mark.parametrize("interval", ["steps", "epoch"])
def test_there_is_no_evaluation_after_a_signal(tiny_model, tmp_path, interval):
    """Neither the trainer's own, at the step or the end of the epoch, nor one that a callback makes."""
    settings = {"max_steps": 4, "eval_strategy": interval, "save_strategy": interval, "save_steps": 1, "eval_steps": 1}
    saves, events = [], ["on_save", "on_evaluate"]
    counting = TrainerCallback()
    for event in events:
        setattr(counting, event, lambda *args, event=event, **kwargs: saves.append(event))
    data = {"train_dataset": load_prompts("train", 2), "eval_dataset": load_prompts("test", 4)}
    trainer = build(
        tiny_model,
        **settings,
        per_device_eval_batch_size=4,
        output_dir=str(tmp_path),
        arguments={"callbacks": [counting], "reward_funcs": signalling(signal.SIGTERM, 2), **data},
    )
    how = EvaluationSettings(num_samples=1, max_completion_length=2)
    callback = EvaluationCallback(trainer, data["eval_dataset"], noisy_reward, how, steps=2, at_start=False)
    trainer.add_callback(callback)
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.state.global_step == 2
    assert saves == (["on_evaluate", "on_save"] if interval == "steps" else []) + ["on_save"]
    assert not trainer.evaluations


@pytest.mark.slow
def test_a_process_that_is_told_to_end_ends_with_143(tiny_model, tmp_path):
    def run():
        finished(tiny_model, **SAVING, output_dir=str(tmp_path), reward=signalling(signal.SIGTERM))

    assert status_of(run) == 143
    assert last_whole(tmp_path).name == "checkpoint-5"


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tiny_model, tmp_path):
    def twice(completion_ids, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(7)

    def run():
        finished(tiny_model, **SAVING, output_dir=str(tmp_path), reward=twice)

    assert status_of(run) == -signal.SIGTERM

    def interrupted(completion_ids, trainer_state, **kwargs):
        for _ in range(2 * (trainer_state.global_step == 4)):
            os.kill(os.getpid(), signal.SIGINT)
        return noisy_reward(completion_ids)

    with pytest.raises(KeyboardInterrupt):
        finished(tiny_model, **SAVING, output_dir=str(tmp_path), reward=interrupted)
    assert folders(tmp_path) == ["checkpoint-3"]


@pytest.mark.slow
def test_signals_are_left_to_others(tiny_model, tmp_path):
    """To a handler that is there already, to Python if asked to, and outside the main thread."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *args: seen.append(args[0]))
    try:
        for settings in ({}, {"save_on_signal": False}):
            run = finished(
                tiny_model, **SAVING, **settings, output_dir=str(tmp_path), reward=signalling(signal.SIGTERM)
            )
            assert run.trainer.state.global_step == 7
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM] * 2
    unsaved = {**SAVING, "save_on_signal": False, "save_strategy": "no"}
    with pytest.raises(KeyboardInterrupt):
        finished(tiny_model, **unsaved, output_dir=str(tmp_path), reward=signalling(signal.SIGINT))
    ended = []
    thread = threading.Thread(target=lambda: ended.append(finished(tiny_model, output_dir=str(tmp_path))))
    thread.start()
    thread.join()
    assert ended[0].trainer.state.global_step == 3


@pytest.mark.slow
def test_a_signal_within_a_generation_batch_is_said(tiny_model, tmp_path, caplog):
    settings = {**OFF_POLICY, "save_strategy": "steps", "save_steps": 8, "output_dir": str(tmp_path)}
    with pytest.raises(SystemExit):
        finished(tiny_model, **settings, reward=signalling(signal.SIGTERM, 1))
    assert "generates another instead of the rest of it" in caplog.text
    assert finished(tiny_model, resume=True, **settings).trainer.state.global_step == 8


def test_nothing_is_saved_where_nothing_is_to_be(tiny_model, tmp_path, caplog, capfd):
    with pytest.raises(SystemExit):
        finished(tiny_model, output_dir=str(tmp_path), reward=signalling(signal.SIGTERM, 1))
    assert not folders(tmp_path)
    assert 'after this optimizer step, saving nothing (save_strategy="no"); a second' in capfd.readouterr().err
    assert "Nothing was saved" in caplog.text


def test_jit_checkpoints_of_transformers_are_left_alone(tiny_model, tmp_path):
    """They take SIGTERM before; their checkpoint is whole too, and their mark of one that is not is understood."""
    before = signal.getsignal(signal.SIGTERM)
    settings = {**SAVING, "output_dir": str(tmp_path)}
    try:
        trainer = build(tiny_model, **settings, enable_jit_checkpoint=True)
        handler = signal.getsignal(signal.SIGTERM)
        assert handler != before
        with trainer._signals.listening():
            assert signal.getsignal(signal.SIGTERM) == handler
        trainer.state.global_step, trainer.state.train_batch_size = 3, 4  # as in a training
        callback = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "JITCheckpointCallback")
        trainer.create_optimizer_and_scheduler(10)
        callback.jit_manager.execute_jit_checkpoint()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert why_broken(tmp_path / "checkpoint-3") is None
    (tmp_path / "checkpoint-3/checkpoint-is-incomplete.txt").touch()
    assert why_broken(tmp_path / "checkpoint-3") == "it was not written to the end"


# Full disks


def assert_full_disk_is_told(error, output, kept="checkpoint-3"):
    text = str(error)
    assert str(output) in text
    assert "free on the disk" in text
    assert f"{kept} is whole" in text


@pytest.mark.parametrize(
    "limit", [pytest.param(2_000, marks=pytest.mark.slow, id="model"), pytest.param(30_000, id="optimizer")]
)
def test_full_disk(tiny_model, tmp_path, undisturbed, monkeypatch, limit):
    """The system refuses to write files beyond a size: one of the first, or only the largest."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    save = trl.GRPOTrainer._save_checkpoint

    def saving(trainer, *args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if trainer.state.global_step == 6 else hard, hard))
        try:
            save(trainer, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    with monkeypatch.context() as patch:
        patch.setattr(trl.GRPOTrainer, "_save_checkpoint", saving)
        with pytest.raises(SavingError) as raised:
            finished(tiny_model, **SAVING, output_dir=str(tmp_path))
    assert_full_disk_is_told(raised.value, tmp_path / "checkpoint-6")
    assert not getattr(raised.value, "__notes__", [])
    assert folders(tmp_path) == ["checkpoint-3"]
    resumed = finished(tiny_model, resume=True, **SAVING, output_dir=str(tmp_path))
    assert_ends_alike(resumed, undisturbed(SAVING))


def test_errors_of_the_disk_by_name(tmp_path, monkeypatch):
    """Whoever raises them; what PyTorch says names no cause, so the disk is asked."""
    errors = {
        "the disk is full (": [
            OSError(errno.ENOSPC, "No space left on device"),
            RuntimeError("I/O error: No space left on device (os error 28)"),
        ],
        "the disk is full up to your quota (": [OSError(errno.EDQUOT, "Disk quota exceeded")],
        "the disk is read-only (": [OSError(errno.EROFS, "Read-only file system")],
        "[Errno 13] Permission": [OSError(errno.EACCES, "Permission denied")],
        "[enforce fail": [
            RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file")
        ],
    }
    for said, raised in errors.items():
        for error in raised:
            assert is_storage_error(error)
            assert what_happened(error, tmp_path / "none").startswith(said)
    (of_pytorch,) = errors["[enforce fail"]
    named = OSError(errno.ENOSPC, "No space", "/a  b ")
    assert what_happened(named, tmp_path).endswith("No space: '/a  b ')"), "a folder's name stays as it is"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert what_happened(of_pytorch, tmp_path).startswith("the disk is full ([enforce")
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert what_happened(of_pytorch, tmp_path).startswith("the disk is read-only ([enforce")


@pytest.fixture
def disk(tmp_path):
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    yield folder
    for _ in range(2):
        subprocess.run(["umount", "-l", folder], capture_output=True)


@pytest.mark.parametrize("place", ["start", "checkpoint", "log", "model"])
def test_a_disk_that_turns_read_only(tiny_model, disk, place):
    """Wherever something is written then."""
    settings = {**SAVING, "save_steps": 1, "output_dir": str(disk), "log_completions": place == "log"}

    def turn(*args, **kwargs):
        # Over itself: a file that is open for writing, as that of the lock, would not let the disk itself be mounted anew.
        for how in (["--bind", disk], ["-o", "remount,bind,ro"]):
            subprocess.run(["mount", *how, disk], check=True)

    callback = TrainerCallback()
    if place in ("checkpoint", "log"):
        callback.on_step_begin = lambda args, state, *_, **__: turn() if state.global_step == 2 else None
    trainer = build(tiny_model, **settings, arguments={"callbacks": [callback]})
    if place == "start":
        turn()
    if place == "model":
        finished(tiny_model, **{**settings, "max_steps": 2})
        trainer = build(tiny_model, **settings)
        turn()
    with pytest.raises(SavingError, match="could not be saved: the disk is read-only") as raised:
        trainer.save_model() if place == "model" else trainer.train()
    if place in ("checkpoint", "log"):
        assert f"{disk}/checkpoint-2 is whole: let it be written again, then continue with" in str(raised.value)
