"""A run that has finished is loaded, not trained on, and what it has left stays as it is."""

import hashlib
import json

import pytest
from safetensors.torch import save_file
from transformers import TrainerCallback

from trl_cancel import CancelGRPOConfig
from trl_cancel.playground.data import load_prompts
from trl_cancel.running.changed_settings import SAVED_AS
from trl_cancel.running.finished import check_replaceable, is_of_another_run, left_by, saved_step

from .runs import DEFAULTS, assert_same_weights, build, load, train, weights_of


SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
# Two optimizer steps an epoch.
EPOCHS = {"max_steps": -1, "num_train_epochs": 1.5, "save_strategy": "steps", "save_steps": 1}
PROMPTS = {"train_dataset": load_prompts("train", 2)}


def files(folder):
    """Contents and times of all that is in a folder, and of the folder."""
    return {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


def rewarding_none(**kwargs):
    raise AssertionError("something is generated")


@pytest.mark.parametrize(
    ("settings", "changed"),
    [(SAVED, {}), (SAVED, {"max_steps": 3}), (EPOCHS, {}), (EPOCHS, {"num_train_epochs": 0.5})],
    ids=["max_steps", "fewer steps", "epochs", "fewer epochs"],
)
def test_a_finished_run_is_loaded_and_left_alone(tiny_model, tmp_path, caplog, settings, changed):
    first = train(tiny_model, **settings, output_dir=str(tmp_path), arguments=PROMPTS)
    steps = first.trainer.state.global_step
    before, events = files(tmp_path), []
    callback = TrainerCallback()
    callback.on_log = callback.on_train_begin = lambda *args, **kwargs: events.append(args)
    arguments = {**PROMPTS, "reward_funcs": rewarding_none, "callbacks": [callback]}
    for resume in (True, "auto"):
        settings = {**settings, **changed, "learning_rate": 1.0, "report_to": "none", "output_dir": str(tmp_path)}
        again = build(tiny_model, **settings, arguments=arguments)
        result = again.train(resume_from_checkpoint=resume)
        assert (result.global_step, again.state.global_step) == (steps, steps)
        assert {"train_runtime", "train_loss"} <= result.metrics.keys()
        assert_same_weights(weights_of(again.model), first.weights)
        assert again.optimizer.state_dict()["state"], "the states are loaded as well"
    assert files(tmp_path) == before
    assert not events
    assert f"Already finished at step {steps}; nothing to do" in caplog.text
    again.save_model(str(tmp_path / "saved"))
    assert_same_weights(weights_of(load(str(tmp_path / "saved"))), first.weights)


def test_counting_the_steps_of_epochs_leaves_no_trace(tiny_model, tmp_path):
    """In a run that goes on, from within its first epoch."""
    settings = {**EPOCHS, "num_train_epochs": 1, "output_dir": str(tmp_path)}
    whole = train(tiny_model, **settings, arguments=PROMPTS)
    assert whole.trainer.state.global_step == 2
    resumed = train(tiny_model, **settings, resume=str(tmp_path / "checkpoint-1"), arguments=PROMPTS)
    assert_same_weights(resumed.weights, whole.weights)


def test_of_a_finished_run_the_best_is_loaded(tiny_model, tmp_path):
    settings = {
        **SAVED,
        "save_total_limit": None,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "output_dir": str(tmp_path),
    }
    settings |= {
        "metric_for_best_model": "eval_runtime",
        "load_best_model_at_end": True,
        "per_device_eval_batch_size": 4,
    }
    arguments = {"eval_dataset": load_prompts("test", 4)}
    train(tiny_model, **settings, arguments=arguments)
    state = tmp_path / "checkpoint-4/trainer_state.json"
    best = str(tmp_path / "checkpoint-2")
    state.write_text(json.dumps({**json.loads(state.read_text()), "best_model_checkpoint": best}))
    again = train(tiny_model, **settings, resume=True, arguments=arguments)
    assert_same_weights(again.weights, weights_of(load(best)))


def write(folder, run=None, step=4, logs=(), **results):
    """A model or a checkpoint, as far as it is looked at here."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({}, folder / "model.safetensors")
    record = {SAVED_AS: {"attributes": {"run": run}}} if run else {}
    state = {"global_step": step, "train_batch_size": 4, "log_history": list(logs), "stateful_callbacks": record}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if results:
        (folder / "all_results.json").write_text(json.dumps(results))


LOG = {"loss": float("nan"), "step": 1}
OTHER_LOG = {"loss": 1.0, "step": 1}


@pytest.mark.parametrize(
    ("model", "checkpoint", "refused"),
    [
        ({"run": "a"}, {"run": "a"}, None),
        ({"run": "a"}, {"run": "b"}, "is of another run"),
        ({"run": "a"}, {"logs": [OTHER_LOG]}, "is of another run"),
        ({"logs": [LOG, OTHER_LOG]}, {"logs": [LOG]}, None),
        ({"logs": [LOG]}, {"run": "a", "logs": [LOG, OTHER_LOG]}, None),
        ({"logs": [LOG]}, {}, "does not tell of which run it is"),
        (None, {"run": "a"}, None),
        ({}, {"run": "a"}, None),
    ],
    ids=["same", "other", "TRL's, other", "TRL's", "went on from TRL's", "untold", "killed", "killed, of TRL"],
)
def test_whose_model_a_checkpoint_may_replace(tmp_path, model, checkpoint, refused):
    """That of its own run, or one that was saved by a run that was killed before it told which it is."""
    write(tmp_path, **(model or {}))
    write(tmp_path / "checkpoint-3", **checkpoint, step=3)
    if model is None:
        (tmp_path / "trainer_state.json").write_text("{")
    args = CancelGRPOConfig(str(tmp_path), **DEFAULTS)
    assert is_of_another_run(tmp_path, tmp_path / "checkpoint-3") == bool(refused)
    if not refused:
        check_replaceable(tmp_path, tmp_path / "checkpoint-3", args)
        return
    with pytest.raises(
        ValueError, match=rf"It ended at step 4, and \S*checkpoint-3 {refused}\. Set another"
    ) as raised:
        check_replaceable(tmp_path, tmp_path / "checkpoint-3", args)
    assert "resume_from_checkpoint" not in str(raised.value), "it has none"


@pytest.mark.parametrize("noise", [b"", b"{}", b"[]", b"3", b"null", b"\xff", b"[" * 10**5])
def test_what_cannot_be_read_is_no_result(tmp_path, noise):
    write(tmp_path, "a", logs=[LOG], steps=4)
    write(tmp_path / "checkpoint-4", "a", logs=[LOG])
    assert saved_step(tmp_path, tmp_path / "checkpoint-4") == saved_step(tmp_path) == 4
    assert left_by(tmp_path, tmp_path / "checkpoint-4").results
    for name in ("all_results.json", "trainer_state.json"):
        (tmp_path / name).write_bytes(noise)
        assert saved_step(tmp_path, tmp_path / "checkpoint-4") is saved_step(tmp_path) is None
        left = left_by(tmp_path, tmp_path / "checkpoint-4")
        assert (len(left.logs or []), left.results) == (name == "all_results.json", False)


def test_forms_of_the_state_of_a_result(tmp_path):
    write(tmp_path / "checkpoint-4", "a", logs=[LOG])
    for state in ({"global_step": "4"}, {"global_step": True}, {"global_step": 4, "log_history": 3}):
        write(tmp_path, steps=state["global_step"])
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
        assert saved_step(tmp_path, tmp_path / "checkpoint-4") is None
        assert left_by(tmp_path, tmp_path / "checkpoint-4").logs is None
