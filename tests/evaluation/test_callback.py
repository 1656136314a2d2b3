"""Evaluation during training: what it logs, and that the training does not notice."""

import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    TrainerCallback,
)

from tests.runs import assert_same_weights, build, repeatable, weights_of
from trl_cancel.evaluation import EvaluationCallback, EvaluationSettings, TransformersEngine, evaluate
from trl_cancel.playground.data import load_prompts


SETTINGS = EvaluationSettings(num_samples=2, max_completion_length=6, score_truncated=True)
METRICS = {"greedy", "avg@2", "pass@1", "pass@2", "truncated"}
# The trainer's own evaluation and a checkpoint at each step.
AT_EACH_STEP = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "num_generations_eval": 2,
    "per_device_eval_batch_size": 4,
}


def even(completion_ids, **_):
    # A reward function may be random; the training's random numbers are not its own.
    random.random(), np.random.random(), torch.rand(1)
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def train(model, callback=None, *, arguments=None, **settings):
    trainer = build(model, arguments=arguments, **settings)
    if callback is not None:
        callback.setdefault("name", "set")
        problems = callback.pop("problems", None) or load_prompts("test", 5)
        trainer.add_callback(EvaluationCallback(trainer, problems, even, SETTINGS, **callback))
    random.seed(0)
    trainer.train()
    return trainer


def steps_of(trainer):
    return [evaluation.step for evaluation in trainer.evaluations]


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True, "steps_per_generation": 2}])
def test_training_does_not_notice(tiny_model, settings):
    plain = train(tiny_model, **settings)
    state = random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()
    watched = train(tiny_model, {"steps": 1}, **settings)
    assert (random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()) == state
    assert_same_weights(weights_of(plain.model), weights_of(watched.model))
    logs = [repeatable(entry) for entry in watched.state.log_history if "eval_set_greedy" not in entry]
    assert logs == [repeatable(entry) for entry in plain.state.log_history]


def test_what_is_logged(tiny_model):
    trainer = train(tiny_model, {"steps": 2})
    assert steps_of(trainer) == [0, 2, 3]
    logged = [entry for entry in trainer.state.log_history if "eval_set_greedy" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 3]
    for entry, evaluation in zip(logged, trainer.evaluations, strict=True):
        assert set(evaluation.metrics) == METRICS
        assert {f"eval_set_{name}": mean for name, (mean, _, _) in evaluation.metrics.items()}.items() <= entry.items()
    # The last one is of the weights that the training ends with.
    engine = TransformersEngine(trainer.model, trainer.processing_class)
    assert evaluate(engine, load_prompts("test", 5), even, SETTINGS, name="set", step=3) == trainer.evaluations[-1]
    assert trainer.evaluations[-1].metrics != trainer.evaluations[0].metrics


def test_with_the_trainers_own_evaluation(tiny_model, tmp_path):
    """At its steps, and its metrics choose the best checkpoint."""
    trainer = train(
        tiny_model,
        {"at_start": False},
        arguments={"eval_dataset": load_prompts("tune", 4)},
        **AT_EACH_STEP,
        metric_for_best_model="eval_set_avg@2",
        greater_is_better=True,
        output_dir=str(tmp_path),
    )
    assert steps_of(trainer) == [1, 2, 3]
    averages = [evaluation.metrics["avg@2"][0] for evaluation in trainer.evaluations]
    assert trainer.state.best_metric == max(averages)
    metrics = trainer.evaluate()  # by hand, of weights that need not be those of the last step
    assert steps_of(trainer) == [1, 2, 3, 3]
    assert metrics["eval_set_avg@2"] == averages[-1]
    resumed = build(tiny_model, output_dir=str(tmp_path), max_steps=4, save_strategy="no")
    resumed.add_callback(EvaluationCallback(resumed, load_prompts("test", 5), even, SETTINGS, name="set"))
    resumed.train(resume_from_checkpoint=True)
    assert steps_of(resumed) == [4]  # not at its start, which is not the training's


def test_no_step_is_evaluated_twice(tiny_model):
    """Before the first step and after the last, and by the trainer at its start and at the end of the epoch."""
    arguments = {"train_dataset": load_prompts("train", 2), "eval_dataset": load_prompts("tune", 4)}
    trainer = train(
        tiny_model,
        {},
        arguments=arguments,
        eval_strategy="epoch",
        eval_on_start=True,
        max_steps=2,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
    )
    assert steps_of(trainer) == [0, 2]


def test_the_last_step_is_evaluated_beside_the_trainers_own_evaluation(tiny_model):
    """Which has other steps."""
    trainer = train(
        tiny_model,
        {"steps": 2},
        arguments={"eval_dataset": load_prompts("tune", 4)},
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
    )
    assert steps_of(trainer) == [0, 2, 3]


class Stop(TrainerCallback):
    """Ends the training early, as `EarlyStoppingCallback` does after an evaluation, or with a signal."""

    def __init__(self, event, step=1, signals=False):
        self.step, self.signals = step, signals
        setattr(self, event, self.stop)

    def stop(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.signals:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                control.should_training_stop = True


@pytest.mark.parametrize("event", ["on_log", "on_epoch_end"])
def test_a_training_that_stops_early_is_evaluated_at_its_end(tiny_model, event):
    data = {"train_dataset": load_prompts("train", 1)}  # an epoch a step
    trainer = train(tiny_model, {"steps": 2}, arguments={"callbacks": [Stop(event)], **data})
    assert trainer.state.global_step == 1
    assert steps_of(trainer) == [0, 1]
    assert [entry["step"] for entry in trainer.state.log_history if "eval_set_greedy" in entry] == [0, 1]


def test_the_evaluation_at_the_end_of_an_epoch_may_stop_the_training(tiny_model):
    trainer = train(
        tiny_model,
        {"steps": 2},
        arguments={
            "train_dataset": load_prompts("train", 1),
            "eval_dataset": load_prompts("tune", 4),
            "callbacks": [Stop("on_evaluate")],
        },
        eval_strategy="epoch",
        num_generations_eval=2,
        per_device_eval_batch_size=4,
    )
    assert steps_of(trainer) == [0, 1]


def test_a_signal_leaves_no_time_for_an_evaluation(tiny_model):
    trainer = build(tiny_model, arguments={"callbacks": [Stop("on_step_begin", step=2, signals=True)]})
    callback = EvaluationCallback(trainer, load_prompts("test", 2), even, SETTINGS, at_start=False)
    trainer.add_callback(callback)
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.state.global_step == 3
    assert steps_of(trainer) == []


EVALUATING = {"eval_strategy": "no", "num_generations_eval": 2, "per_device_eval_batch_size": 4}


def evaluated(tiny_model, **settings):
    """A trainer that answers when it evaluates, and only then."""
    trainer = build(tiny_model, arguments={"eval_dataset": load_prompts("tune", 4)}, **{**EVALUATING, **settings})
    problems = load_prompts("test", 5)
    trainer.add_callback(EvaluationCallback(trainer, problems, even, SETTINGS, name="set", at_start=False))
    return trainer


def test_other_weights_at_the_same_step_are_evaluated_anew(tiny_model):
    trainer = evaluated(tiny_model)
    first = trainer.evaluate()
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.neg_()
    second = trainer.evaluate()
    assert len(trainer.evaluations) == 2
    assert first["eval_set_avg@2"] == trainer.evaluations[0].metrics["avg@2"][0]
    assert second["eval_set_avg@2"] == trainer.evaluations[1].metrics["avg@2"][0]
    assert trainer.evaluations[0].metrics != trainer.evaluations[1].metrics


@pytest.mark.parametrize("twice", [False, True], ids=["once", "again while the checkpoint is saved"])
def test_a_signal_is_over_when_the_training_is(tiny_model, twice, tmp_path):
    """It leaves no time for an evaluation then, but for later ones."""

    class Signals(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

        def on_save(self, args, state, control, **kwargs):
            if twice:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = evaluated(tiny_model, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=9)
    trainer.add_callback(Signals())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert steps_of(trainer) == [1]
    assert not trainer.is_stopped_by_signal
    assert not trainer.is_in_train
    metrics = trainer.evaluate()
    assert steps_of(trainer) == [1, 2]
    assert metrics["eval_set_avg@2"] == trainer.evaluations[-1].metrics["avg@2"][0]


def test_rewards_know_how_far_the_training_is(tiny_model):
    """And they may wait, and log: TRL gives them the means."""
    steps = []

    async def judge(completions, trainer_state, log_metric, log_extra, **_):
        steps.append(trainer_state.global_step)
        log_metric("calls", len(steps))
        log_extra("text", completions)
        return [1.0] * len(completions)

    trainer = build(tiny_model)
    trainer.add_callback(EvaluationCallback(trainer, load_prompts("test", 2), judge, SETTINGS, name="set"))
    trainer.train()
    assert sorted(set(steps)) == [0, 3]
    assert not any("calls" in entry for entry in trainer.state.log_history)


def test_answers_without_a_reward_are_said_once(tiny_model, caplog):
    def none(completions, **_):
        return [None] * len(completions)

    trainer = build(tiny_model)
    settings = EvaluationSettings(num_samples=2, max_completion_length=6, score_truncated=True)
    trainer.add_callback(EvaluationCallback(trainer, load_prompts("test", 2), none, settings, name="set", steps=1))
    trainer.train()
    said = [record.message for record in caplog.records if "without a reward" in record.message]
    assert len(said) == 1
    assert "Evaluation on set: 6 of 6 answers without a reward, which count as 0" in said[0]


@pytest.mark.parametrize("quantized", [False, True])
def test_adapters(tiny_model, quantized):
    """With dropout, which evaluation leaves out; and on 4-bit weights, which must still train after it."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def run(callback):
        model = AutoModelForCausalLM.from_pretrained(
            tiny_model, dtype=torch.float32, quantization_config=config if quantized else None
        )
        lora = LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear")
        return train(model, callback, arguments={"peft_config": lora})

    plain, watched = run(None), run({"steps": 1})
    assert_same_weights(weights_of(plain.model), weights_of(watched.model))
    assert steps_of(watched) == [0, 1, 2, 3]


def test_mistakes(tiny_model, monkeypatch):
    trainer = build(tiny_model)
    with pytest.raises(ValueError, match="steps=0 must be a whole number"):
        EvaluationCallback(trainer, load_prompts("test", 2), steps=0)
    with pytest.raises(ValueError, match="Evaluation on mine: the data set has no problems"):
        EvaluationCallback(trainer, load_prompts("test", 2).select([]), name="mine")
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        EvaluationCallback(trainer, load_prompts("test", 2))


def test_problems_are_put_as_in_the_training(tiny_model, monkeypatch):
    """With the arguments of the chat template that the training has, unless the evaluation has its own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ '=' if thinking is defined and not thinking else '+' }}"
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "8-4"}]}] * 64)
    trainer = build(
        tiny_model,
        chat_template_kwargs={"thinking": False},
        arguments={"train_dataset": rows, "processing_class": tokenizer, "reward_funcs": even_answers},
    )
    assert tokenizer.decode(trainer._tokenize_prompts([rows[0]["prompt"]])[0][0]) == "8-4="
    asked = []
    generate = TransformersEngine.generate

    def watched(engine, requests, settings):
        asked.extend(tokenizer.decode(request.prompt_ids) for request in requests)
        return generate(engine, requests, settings)

    monkeypatch.setattr(TransformersEngine, "generate", watched)
    own = replace(SETTINGS, chat_template_kwargs={"thinking": True})
    for settings, expected in ((SETTINGS, "8-4="), (own, "8-4+")):
        trainer.add_callback(EvaluationCallback(trainer, rows.select([0]), even_answers, settings, at_end=False))
        trainer.train()
        assert set(asked) == {expected}
        trainer.remove_callback(EvaluationCallback)
        asked.clear()


def even_answers(completion_ids, **_):
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_sees_what_is_measured(tiny_model, tmp_path, first):
    """Also where it was given to the trainer, before there was anything to evaluate with."""
    early = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = build(
        tiny_model,
        output_dir=str(tmp_path),
        arguments={
            "eval_dataset": load_prompts("tune", 4),
            "reward_funcs": even_answers,
            "callbacks": [early] if first else [],
        },
        **AT_EACH_STEP,
        max_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="eval_set_greedy",
    )
    # No answer is ever better than the first ones.
    never = EvaluationCallback(
        trainer, load_prompts("test", 2), lambda completions, **_: [0.0] * len(completions), SETTINGS, name="set"
    )
    trainer.add_callback(never)
    if not first:
        trainer.add_callback(early)
    trainer.train()
    assert trainer.state.global_step == 3
