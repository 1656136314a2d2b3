"""`trl-cancel train` and its output folder: finished runs, results of others, and runs at the same time."""

import json
import os
import shutil

import pytest

from tests.test_checkpoints import of_another_run
from tests.test_finished import files
from tests.test_run_lock import another_run_in
from trl_cancel import CancelGRPOTrainer
from trl_cancel.cli import main
from trl_cancel.playground import reward as graded

from .test_stopping import train


SHORT = {"max_steps": 2, "save_steps": 1}
KEPT = ("trainer_state.json", "all_results.json", "train_results.json", "README.md")


def equal_reward(completions, **kwargs):
    return [0.0 for _ in completions]


def must_not_generate(monkeypatch):
    def reward(**kwargs):
        raise AssertionError("something is generated")

    reward.__name__ = "answer_reward"
    monkeypatch.setattr(graded, "answer_reward", reward)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({**SHORT, "save_total_limit": 1}, {}),
        (SHORT, {"max_steps": 1, "eval_problems": 2}),
        ({"max_steps": 2, "save_strategy": "no"}, {}),
    ],
    ids=["as before", "fewer steps", "no checkpoints"],
)
def test_a_finished_run_is_left_alone(tmp_path, monkeypatch, capfd, settings, changed):
    assert train(tmp_path, **settings) == 0
    before = files(tmp_path)
    must_not_generate(monkeypatch)
    for resume in ("auto", *(["true"] if "save_steps" in settings else [])):
        capfd.readouterr()
        assert train(tmp_path, **{**settings, **changed}, resume_from_checkpoint=resume) == 0
        assert "Already finished at step 2; nothing to do." in capfd.readouterr().out
        assert files(tmp_path) == before
    assert train(tmp_path, **settings, learning_rate=0.5, resume_from_checkpoint="auto") == 0
    assert "nothing to do. It was trained with other settings: learning_rate: 0.001 -> 0.5." in capfd.readouterr().out
    assert files(tmp_path) == before


def test_what_a_finished_run_did_not_come_to_save_is_saved(tmp_path, monkeypatch, capfd, caplog):
    """Without another step: it was killed after its last checkpoint, beside the results of another run or none."""
    assert train(tmp_path / "run", **SHORT) == 0
    assert train(tmp_path / "other", **SHORT, seed=1) == 0
    model = (tmp_path / "run/model.safetensors").read_bytes()
    must_not_generate(monkeypatch)
    (tmp_path / "other/all_results.json").write_text('{"steps": 2, "after": {}}')
    before = files(tmp_path / "run")
    (tmp_path / "run/model.safetensors").unlink()
    assert train(tmp_path / "run", **SHORT, resume_from_checkpoint="auto", eval_problems=2) == 0, "not evaluated again"
    out, after = capfd.readouterr().out, files(tmp_path / "run")
    assert f"Already finished at step 2: nothing was trained, and the model was saved again from {tmp_path}" in out
    kept = [path for path in before if "checkpoint-" in str(path) or path.name in KEPT]
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    assert (tmp_path / "run/model.safetensors").read_bytes() == model
    damages = {
        "none": lambda: [path.unlink() for path in (tmp_path / "run").iterdir() if path.is_file()],
        "half": lambda: os.truncate(tmp_path / "run/model.safetensors", 1000),
        "unscored": lambda: (tmp_path / "run/all_results.json").unlink(),
        "another": lambda: shutil.copytree(
            tmp_path / "other", tmp_path / "run", dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*")
        ),
    }
    for name, damage in damages.items():
        damage()
        overwrites = {"overwrite_output_dir": "true"} if name == "another" else {}
        if overwrites:
            before = files(tmp_path / "run")
            assert train(tmp_path / "run", **SHORT, resume_from_checkpoint="auto") == 2
            assert "trained with other settings: seed: 1 -> 42. It ended at step 2, and" in capfd.readouterr().err
            assert files(tmp_path / "run") == before, "what is not to be overwritten"
        assert train(tmp_path / "run", **SHORT, **overwrites, resume_from_checkpoint="auto") == 0, name
        captured = capfd.readouterr()
        assert "Model saved to" in captured.out
        assert "the model was saved again from" in captured.out
        assert "nothing to do" not in captured.out + caplog.text
        assert (tmp_path / "run/model.safetensors").read_bytes() == model
        results = json.loads((tmp_path / "run/all_results.json").read_text())
        assert results["steps"] == 2
        assert None not in results.values()
        assert "after" not in results, "which is of the other run"

    (tmp_path / "run/model.safetensors").unlink()
    before = files(tmp_path / "run")
    for settings, said in (
        (
            {"resume_from_checkpoint": "auto", "seed": 7},
            "with the run's own settings; they differ: seed: 42 -> 7. Set",
        ),
        ({}, "holds the results of a finished run (all_results.json), whose model is missing. Set another output_dir"),
    ):
        assert train(tmp_path / "run", **SHORT, **settings) == 2
        assert said in capfd.readouterr().err
        assert files(tmp_path / "run") == before

    elsewhere = {**SHORT, "resume_from_checkpoint": tmp_path / "run/checkpoint-2"}
    for said in ("the model was saved again from", "Already finished at step 2; nothing to do."):
        assert train(tmp_path / "new", **elsewhere) == 0
        assert said in capfd.readouterr().out
        assert None not in json.loads((tmp_path / "new/all_results.json").read_text()).values()


def a_later_checkpoint_of_another_run_replaces_nothing(run, capfd):
    """Nor if the model is lost: that of the run is saved again."""
    later = run / "checkpoint-4"
    of_another_run(run / "checkpoint-2", later, step=4)
    model = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    assert train(run, **SHORT, resume_from_checkpoint="auto") == 0
    assert f"the model was saved again from {run}/checkpoint-2" in capfd.readouterr().out
    assert (run / "model.safetensors").read_bytes() == model
    before = files(run)
    for settings in ({}, {"overwrite_output_dir": "true"}):
        assert train(run, **SHORT, **settings, resume_from_checkpoint="auto") == 0
        said = f"Already finished at step 2; nothing to do. {later} is of another run, and is left alone."
        assert said in capfd.readouterr().out
    assert train(run, **SHORT, resume_from_checkpoint=later) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert f"It ended at step 2, and {later} is of another run. Set another output_dir, " in error
    assert error.endswith(f"or resume_from_checkpoint={run}/checkpoint-2 to go on from its last checkpoint.")
    assert train(run, **SHORT, seed=7, resume_from_checkpoint="auto") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "several runs, and none has the settings of this one: checkpoint-4 (seed: 42 -> 7), checkpoint-2 (" in error
    assert files(run) == before
    shutil.rmtree(later)


def test_a_finished_result_is_replaced_only_on_demand(tmp_path, capfd):
    assert train(tmp_path / "run", **SHORT) == 0
    assert train(tmp_path / "bare", max_steps=2, save_strategy="no") == 0
    before = files(tmp_path)
    shorter = {**SHORT, "max_steps": 1, "num_generations": 2}
    elsewhere = tmp_path / "run/checkpoint-1"
    for folder, settings in (
        ("run", {}),
        ("run", {"resume_from_checkpoint": "false"}),
        ("bare", {"resume_from_checkpoint": "auto", "max_steps": 3}),
        ("bare", {"resume_from_checkpoint": elsewhere}),
    ):
        capfd.readouterr()
        assert train(tmp_path / folder, **{**shorter, **settings}) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert f"output_dir={tmp_path / folder} holds the model of a finished run (model.safetensors). It was" in error
        assert "num_generations: 4 -> 2" in error
        assert "overwrite_output_dir" in error
        assert files(tmp_path) == before
    a_later_checkpoint_of_another_run_replaces_nothing(tmp_path / "run", capfd)
    for flag in ("--overwrite_output_dir", "--overwrite-output-dir=true"):
        settings = {**shorter, "model_name_or_path": "playground", "dataset_name": "playground", "report_to": "none"}
        settings |= {"use_cpu": "true", "bf16": "false", "per_device_train_batch_size": 8, "max_completion_length": 8}
        words = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        assert main(["train", *words, "--output_dir", str(tmp_path / "run"), flag]) == 0
    assert json.loads((tmp_path / "run/trainer_state.json").read_text())["global_step"] == 1


@pytest.mark.slow
def test_a_run_that_replaces_another_and_is_killed(tmp_path, monkeypatch, capfd):
    """Each command then goes on with its own, and no model stands beside what was said of the other."""
    first, second = {**SHORT, "max_steps": 3}, {**SHORT, "max_steps": 3, "seed": 7}
    assert train(tmp_path / "first", **first) == 0
    assert train(tmp_path / "second", **second) == 0
    models = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")}
    again = {"resume_from_checkpoint": "auto", "overwrite_output_dir": "true"}

    def killed(run):
        shutil.rmtree(run, ignore_errors=True)
        assert train(run, **first) == 0
        with monkeypatch.context() as patch:
            patch.setattr(graded, "answer_reward", dying(graded.answer_reward, 2))
            with pytest.raises(SystemExit):
                train(run, **second, overwrite_output_dir="true")
        assert not any((run / name).exists() for name in ("all_results.json", "trainer_state.json"))

    killed(tmp_path / "run")
    assert train(tmp_path / "run", **second, **again) == 0
    assert (tmp_path / "run/model.safetensors").read_bytes() == models["second"]
    killed(tmp_path / "run")
    assert train(tmp_path / "run", **first, **again) == 0
    assert (tmp_path / "run/model.safetensors").read_bytes() == models["first"]
    assert "| seed | 7 |" not in (tmp_path / "run/README.md").read_text()
    assert "Traceback" not in capfd.readouterr().err


def dying(reward, at):
    """The reward function of a process that ends at a call."""
    calls = []

    def answer_reward(**kwargs):
        calls.append(1)
        if len(calls) > at:
            raise SystemExit(9)
        return reward(**kwargs)

    return answer_reward


def test_another_optimizer_is_one_line(tmp_path, monkeypatch, capfd):
    assert train(tmp_path, **SHORT, optim="sgd") == 0
    must_not_generate(monkeypatch)
    assert train(tmp_path, max_steps=3, optim="adamw_torch", resume_from_checkpoint="auto") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert (
        "checkpoint-2 holds the state of another optimizer (optim='sgd') than this run's (optim='adamw_torch')"
        in error
    )


def test_a_folder_in_use_is_refused_in_one_line(tmp_path, capfd, monkeypatch):
    must_not_generate(monkeypatch)
    with another_run_in(tmp_path) as other:
        before = files(tmp_path)
        assert train(tmp_path, **SHORT) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("trl-cancel train:")]
        assert f"output_dir={tmp_path} is in use by process {other} on " in line
        assert files(tmp_path) == before


def test_the_folder_is_held_until_all_is_saved(tmp_path, monkeypatch):
    held = []
    for name in ("save_model", "save_metrics", "create_model_card"):
        method = getattr(CancelGRPOTrainer, name)

        def noting(self, *args, _method=method, **kwargs):
            held.append((tmp_path / "_run.lock").exists())
            return _method(self, *args, **kwargs)

        monkeypatch.setattr(CancelGRPOTrainer, name, noting)
    assert train(tmp_path, **SHORT) == 0
    assert all(held)
    assert not (tmp_path / "_run.lock").exists()


def test_nothing_learned_is_said_at_the_end(tmp_path, capfd):
    assert train(tmp_path, **SHORT, reward_funcs="tests.cli.test_output.equal_reward") == 0
    out = capfd.readouterr().out
    assert "Training finished" in out
    assert (
        "Nothing could be learned: all rewards of a group are equal (frac_reward_zero_std is 1 in every log; " in out
    )
    assert out.index("Nothing could be learned") > out.index("optimizer steps")
    assert "docs/troubleshooting.md#all-rewards-of-a-group-are-equal" in out
