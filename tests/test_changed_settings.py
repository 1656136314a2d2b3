"""Runs that go on with other settings, or beside the results of others: what differs is said."""

import json

import pytest
import trl
from datasets import Dataset

from trl_cancel import CancelGRPOConfig
from trl_cancel.playground.data import load_prompts
from trl_cancel.running.changed_settings import SAVED_AS, changes, run_record, settings_of, settings_record

from .runs import DEFAULTS, build, noisy_reward, train


SAVING = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
MORE = {"max_steps": 2, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module", params=["ours", "TRL's"])
def saved(request, tiny_model, tmp_path_factory):
    """A checkpoint of one step, by either trainer."""
    folder = tmp_path_factory.mktemp("saved")
    settings = {**SAVING, "lr_scheduler_type": "constant", "output_dir": str(folder)}
    build(tiny_model, *([trl.GRPOTrainer] if request.param == "TRL's" else []), **settings).train()
    return request.param, folder / "checkpoint-1"


def said(trainer, checkpoint, caplog):
    caplog.clear()
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]


def test_what_differs_is_said_once(tiny_model, saved, tmp_path, caplog):
    by, checkpoint = saved
    elsewhere = {"output_dir": str(tmp_path), "save_strategy": "no", "logging_steps": 2, "cancellation_metrics": False}
    assert not said(build(tiny_model, **MORE, **elsewhere), checkpoint, caplog)
    changed = {"num_generations": 2, "learning_rate": 2e-2, "lr_scheduler_type": "linear", "seed": 7, "nthr": True}
    data = {"train_dataset": load_prompts("train", 32)}
    trainer = build(tiny_model, **{**MORE, **changed, **elsewhere}, arguments=data)
    if by == "TRL's":
        assert not said(trainer, checkpoint, caplog), "it says nothing of itself"
        return
    (text,) = said(trainer, checkpoint, caplog)
    expected = [
        *("num_generations: 4 -> 2", "learning_rate: 0.01 -> 0.02", "lr_scheduler_type: constant -> linear"),
        *("seed: 42 -> 7", "nthr: False -> True", "max_steps: 1 -> 2"),
    ]
    expected += ["train_dataset: 64 rows -> 32 rows"]
    found = text.split("other settings: ")[1].split(". The optimizer's state keeps what was then for learning_rate.")[
        0
    ]
    assert sorted(found.split("; ")) == sorted(expected)
    assert trainer.state.log_history[-2]["learning_rate"] == 1e-2, "as it says"


def test_data_and_rewards_are_compared(tiny_model, tmp_path):
    train(tiny_model, **SAVING, output_dir=str(tmp_path))
    rows = load_prompts("train", 64)

    def other_reward(**kwargs):
        return noisy_reward(**kwargs)

    def unasked(batch):
        raise AssertionError("a transformation of the user's is called")

    for data, reward, expected in (
        (Dataset.from_list(list(rows)), noisy_reward, []),
        (rows.with_transform(unasked), noisy_reward, []),
        (rows.to_iterable_dataset(), noisy_reward, []),
        (rows.shuffle(seed=1), noisy_reward, ["train_dataset: 64 rows -> as many others"]),
        (rows, other_reward, ["reward functions: ['noisy_reward'] -> ['other_reward']"]),
    ):
        trainer = build(tiny_model, **SAVING, arguments={"reward_funcs": reward})
        trainer.train_dataset = data
        assert changes(tmp_path / "checkpoint-1", run_record(trainer)) == expected


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({"max_steps": 4}, {"num_train_epochs": 2.0}, ["length of the run: max_steps=4 -> num_train_epochs=2.0"]),
        ({"num_train_epochs": 2.0}, {"max_steps": 4}, ["length of the run: num_train_epochs=2.0 -> max_steps=4"]),
        ({"num_train_epochs": 2.0}, {"num_train_epochs": 3.0}, ["num_train_epochs: 2.0 -> 3.0"]),
        ({"max_steps": 4, "num_train_epochs": 2.0}, {"max_steps": 4, "num_train_epochs": 3.0}, []),
        ({"max_steps": 4}, {"num_train_epochs": 2.0, "lr_scheduler_type": "constant"}, ["lr_scheduler_type: "]),
    ],
)
def test_the_length_of_a_run_is_told_by_what_sets_it(tmp_path, then, now, said):
    of_run = [
        settings_record(CancelGRPOConfig("run", **{**DEFAULTS, "max_steps": -1, **each})) for each in (then, now)
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {SAVED_AS: of_run[0]}}))
    found = changes(tmp_path, of_run[1])
    assert [line[: len(start)] for line, start in zip(found, said, strict=True)] == said


ATTRIBUTES = [
    *({"settings": noise} for noise in (3, [], {"max_steps": "4"}, {"max_steps": [], "num_train_epochs": {}})),
    *({"train_dataset": noise} for noise in (3, [3], {"a": 3}, {"rows": "64", "digest": 3})),
]


@pytest.mark.parametrize(
    "noise",
    [
        *(b"", b"null", b"{", b"\xff", b"[" * 10**5, b'{"stateful_callbacks": []}'),
        *(b'{"stateful_callbacks": {"trl_cancel.Run": %s}}' % noise for noise in (b"3", b"[]", b'{"attributes": 3}')),
        *(json.dumps({"stateful_callbacks": {SAVED_AS: {"attributes": each}}}).encode() for each in ATTRIBUTES),
    ],
    ids=lambda noise: noise.decode("latin-1")[-40:],
)
def test_where_nothing_is_known_nothing_is_said(tiny_model, tmp_path, noise):
    (tmp_path / "trainer_state.json").write_bytes(noise)
    assert settings_of(tmp_path) == {} or b"max_steps" in noise
    assert changes(tmp_path, run_record(build(tiny_model))) == []


def test_a_run_beside_the_results_of_another_says_so(tiny_model, tmp_path, caplog):
    for settings in ({}, SAVING):
        first = build(tiny_model, **settings, output_dir=str(tmp_path), hub_token="hf_secret")
        first.train()
        first.save_model()
        first.save_state()
        assert "hf_secret" not in (tmp_path / "trainer_state.json").read_text()
        caplog.clear()
        train(tiny_model, **{**settings, "num_generations": 2}, output_dir=str(tmp_path))
        what = (
            "checkpoints of another run, the latest checkpoint-1" if settings else "model of another run (model.safe"
        )
        (text,) = [record.getMessage() for record in caplog.records if "another run" in record.getMessage()]
        assert f"output_dir={tmp_path} holds the {what}".replace("the checkpoints", "checkpoints") in text
        assert text.endswith("It differs from this one: num_generations: 4 -> 2.")
