"""A run that has finished is loaded, not trained on, and what it has left stays as it is."""

import hashlib
import json

import pytest
from transformers import TrainerCallback

from trl_cancel.playground.data import load_prompts

from .runs import assert_same_weights, build, load, train, weights_of


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
