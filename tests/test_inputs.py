"""What a trainer is given is refused before anything is generated, and nothing that TRL would train on."""

import functools
import inspect
import random
from pathlib import Path

import numpy
import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_cancel import CancelGRPOTrainer
from trl_cancel.diagnostics.probing.sampling import sample_rollouts
from trl_cancel.evaluation import EvaluationCallback, EvaluationSettings, answer_problems, score_samples
from trl_cancel.evaluation.engines import TransformersEngine
from trl_cancel.evaluation.presets import DataSource, load_problems
from trl_cancel.playground.data import load_prompts
from trl_cancel.running.inputs import check_rewards

from .runs import assert_same_weights, build, load, noisy_reward, train


ROWS = load_prompts("train", 16)
TEXTS = Dataset.from_dict({"prompt": ["1+1=", "2+2="] * 8, "answer": ["2", "4"] * 8})
BASE = {"per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 2}


@pytest.fixture
def no_generation(monkeypatch):
    """Fails whatever gets as far as to generate."""
    monkeypatch.setattr(trl.GRPOTrainer, "_generate", lambda *_: pytest.fail("it has generated"))


# Data sets: where TRL trains, this package does, to the last bit


def with_random_prompts(dataset):
    """Prompts that are made on the fly with random numbers of all kinds, one of them of the transform's own."""
    own = numpy.random.default_rng(0)

    def transform(batch):
        drawn = [random.random() + torch.rand(()).item() + numpy.random.rand() + own.random() for _ in batch["answer"]]
        return {"prompt": [f"{value:.12f}" for value in drawn], "answer": batch["answer"]}

    return dataset.remove_columns("prompt").with_transform(transform)


class OnTheFly(Dataset):
    """A data set whose rows hold what its table does not."""

    def __getitem__(self, key):
        row = super().__getitem__(key)
        return {**row, "prompt": f"{row['answer']}="} if isinstance(key, int) else row

    def __getitems__(self, keys):
        return [self[key] for key in keys]


def once(rows):
    """A stream that can be read a single time, as that of a socket."""
    source = iter(rows)

    def generate():
        yield from source

    return IterableDataset.from_generator(generate)


MADE_ON_THE_FLY = {
    "transform": lambda: with_random_prompts(TEXTS),
    "subclass": lambda: OnTheFly(TEXTS.remove_columns("prompt").data),
    "stream that is mapped": lambda: TEXTS.remove_columns("prompt").to_iterable_dataset().map(
        lambda row: {"prompt": row["answer"] + "="}
    ),
    "stream that is read once": lambda: once(list(TEXTS)),
}  # fmt: skip


def needs_answer(completion_ids, answer, **kwargs):
    assert len(answer) == len(completion_ids)
    return noisy_reward(completion_ids)


@pytest.mark.parametrize("kind", MADE_ON_THE_FLY)
def test_rows_made_on_the_fly_train_as_with_trl(tiny_model, kind):
    """No row is looked at before it is its turn: that would draw random numbers, or take it from the stream."""
    runs = []
    for trainer in (CancelGRPOTrainer, trl.GRPOTrainer):
        arguments = {"train_dataset": MADE_ON_THE_FLY[kind](), "reward_funcs": needs_answer}
        random.seed(0), numpy.random.seed(0)
        runs.append(train(tiny_model, trainer, arguments=arguments, **BASE))
    assert_same_weights(runs[0].weights, runs[1].weights)


WITHOUT_PROMPT = {
    "table": lambda: TEXTS.remove_columns("prompt"),
    "columns of the format": lambda: TEXTS.with_format("torch", columns=["answer"]),
    "transform": lambda: TEXTS.with_transform(lambda batch: {"answer": batch["answer"]}),
    "mapped stream": lambda: TEXTS.to_iterable_dataset().map(
        lambda row: {"q": row["prompt"]}, remove_columns="prompt"
    ),
}


@pytest.mark.parametrize("kind", WITHOUT_PROMPT)
def test_rows_without_a_prompt(tiny_model, no_generation, kind):
    """Before the model is loaded where the columns are known."""
    known = kind in ("table", "columns of the format")
    run = functools.partial(build, "no/model") if known else functools.partial(train, tiny_model)
    with pytest.raises(ValueError, match=r"train_dataset has the columns \['answer'.* but no 'prompt'"):
        run(arguments={"train_dataset": WITHOUT_PROMPT[kind]()}, **BASE)


def prompts_with(wrong, kind="text"):
    good = "1+1=" if kind == "text" else [{"role": "user", "content": "1+1="}]
    return Dataset.from_dict({"prompt": [good, good, wrong, good, good, good, good, good], "answer": ["2"] * 8})


WRONG_PROMPTS = {
    "None": (lambda: prompts_with(None), r"\[2\]\['prompt'\] is None"),
    "no conversation": (lambda: prompts_with(None, "chat"), r"\[2\]\['prompt'\] is None"),
    "empty conversation": (lambda: prompts_with([], "chat"), r"\[2\]\['prompt'\] is \[\]"),
    "empty text": (lambda: prompts_with("").select([3, 2, 4, 5]), r"\[1\]\['prompt'\] is '', of which the tokenizer"),
    "number": (lambda: Dataset.from_dict({"prompt": [7] * 8, "answer": ["2"] * 8}), r"\[0\]\['prompt'\] is 7"),
    "all None": (lambda: Dataset.from_dict({"prompt": [None] * 8, "answer": ["2"] * 8}), r"\[0\]\['prompt'\] is None"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_PROMPTS)
def test_prompts_that_are_none(tiny_model, no_generation, kind):
    """Named by data set and row, before the model is loaded if that does not depend on the tokenizer."""
    dataset, said = WRONG_PROMPTS[kind]
    model = tiny_model if kind == "empty text" else "no/model"
    with pytest.raises(ValueError, match=f"^train_dataset{said}"):
        build(model, arguments={"train_dataset": dataset()}, **BASE)
    evaluated = {"train_dataset": TEXTS, "eval_dataset": dataset()}
    with pytest.raises(ValueError, match=f"^eval_dataset{said}"):
        build(model, arguments=evaluated, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    made = dataset().select([int(said[2])] * 8).with_transform(lambda batch: batch)
    arguments = {"train_dataset": made, "processing_class": AutoTokenizer.from_pretrained(tiny_model)}
    with pytest.raises(ValueError, match=r"^A row of train_dataset has the prompt .*'answer': '2'"):
        train(tiny_model, arguments=arguments, **BASE)


def test_an_empty_prompt_is_one_where_the_tokenizer_begins_it(tiny_model):
    """As TRL has it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.pad_token_id)]
    )
    assert tokenizer("")["input_ids"]
    arguments = {"train_dataset": prompts_with("").select([2, 2]), "processing_class": tokenizer}
    for trainer in (trl.GRPOTrainer, CancelGRPOTrainer):
        train(tiny_model, trainer, arguments=arguments, max_steps=1)


# Reward functions


def wrapping(function):
    """A decorator that calls the function otherwise than it is called itself."""

    @functools.wraps(function)
    def wrapper(**kwargs):
        return function(kwargs["completion_ids"])

    return wrapper


def only_ids(completion_ids):
    return noisy_reward(completion_ids)


def claiming(completion_ids, **kwargs):
    return noisy_reward(completion_ids)


claiming.__signature__ = inspect.signature(only_ids)


class Grader:
    def __call__(self, completion_ids, answer, **kwargs):
        return noisy_reward(completion_ids)

    def method(self, completion_ids, answer=None, **kwargs):
        return noisy_reward(completion_ids)

    @staticmethod
    def static(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer):
        return noisy_reward(completion_ids)

    async def patient(self, completion_ids, *, answer, nowhere=1, **kwargs):
        return noisy_reward(completion_ids)


TAKEN = {
    "decorated": wrapping(only_ids),
    "other signature": claiming,
    "object": Grader(),
    "method": Grader().method,
    "every name": Grader.static,
    "coroutine": Grader().patient,
    "partial": functools.partial(lambda weight, completion_ids, **kwargs: noisy_reward(completion_ids), 2.0),
    "partial by name": functools.partial(
        lambda completion_ids, solution, **kwargs: noisy_reward(completion_ids), solution=["2"]
    ),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_reward_functions_that_can_be_called(tiny_model, kind):
    for trainer in (CancelGRPOTrainer, trl.GRPOTrainer):
        train(tiny_model, trainer, arguments={"reward_funcs": TAKEN[kind], "train_dataset": TEXTS}, max_steps=1)


def forgets_kwargs(completions, answer):
    return [1.0] * len(completions)


def wants_solution(completions, solution, **kwargs):
    return [1.0] * len(completions)


def wants_prompt(prompt, completions, **kwargs):
    return [1.0] * len(completions)


def by_place(completions, /, **kwargs):
    return [1.0] * len(completions)


REFUSED = {
    "no **kwargs": (forgets_kwargs, "'forgets_kwargs' does not take 'prompts', 'completion_ids', 'trainer_state', "),
    "column": (wants_solution, "'wants_solution' needs 'solution', but train_dataset has the columns prompt, answer"),
    "singular": (wants_prompt, "'wants_prompt' needs 'prompt', .* TRL passes 'prompts', all at once"),
    "position": (by_place, "'by_place' takes 'completions' by position only"),
    "partial": (functools.partial(forgets_kwargs, answer=[]), "'forgets_kwargs' does not take 'prompts'"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("rows", ["known", "on the fly"])
def test_reward_functions_that_cannot_be_called(tiny_model, no_generation, monkeypatch, kind, rows):
    """Before the model is loaded where the columns are known; before anything is generated where they are not."""
    function, message = REFUSED[kind]
    dataset = TEXTS if rows == "known" else TEXTS.with_transform(lambda batch: batch)
    arguments = {"reward_funcs": [noisy_reward, function], "train_dataset": dataset}
    run = functools.partial(build, "no/model") if rows == "known" else functools.partial(train, tiny_model)
    with pytest.raises(ValueError, match=f"The reward function {message}"):
        run(arguments=arguments, **BASE)
    monkeypatch.undo()
    with pytest.raises(TypeError):
        train(tiny_model, trl.GRPOTrainer, arguments=arguments, **BASE)


class AddsColumn(CancelGRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        return super()._generate_and_score_completions([{**row, "solution": row["answer"]} for row in inputs])


class AddsItLater(CancelGRPOTrainer):
    def _calculate_rewards(self, inputs, *rest):
        return super()._calculate_rewards([{**row, "solution": row["answer"]} for row in inputs], *rest)


@pytest.mark.parametrize("trainer", [AddsColumn, AddsItLater])
def test_subclasses_may_change_rows(tiny_model, trainer):
    train(tiny_model, trainer, arguments={"reward_funcs": wants_solution, "train_dataset": TEXTS}, max_steps=1)


def generated(prompts, trainer):
    ids = [trainer.processing_class.encode("2")] * len(prompts)
    logps = [[-1.0] * len(row) for row in ids]
    return {"prompt_ids": ids, "completion_ids": ids, "logprobs": logps, "solution": ["2"] * len(prompts)}


def test_what_a_function_that_generates_adds_is_waited_for(tiny_model):
    """It also writes conversations by itself."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    arguments = {"reward_funcs": wants_solution, "rollout_func": generated, "processing_class": tokenizer}
    train(tiny_model, arguments={"train_dataset": ROWS.remove_columns("solution"), **arguments}, max_steps=1)


class Room:
    """An environment that brings the prompts."""

    def reset(self, **columns):
        return "1+1="


def with_environment(completions, environments, **kwargs):
    return [1.0] * len(completions)


def test_environments_are_passed(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    arguments = {"environment_factory": Room, "processing_class": tokenizer}
    trainer = build(tiny_model, arguments={"reward_funcs": with_environment, **arguments})
    trainer._check_rows([{"environment": "any"}])  # a row without a prompt
    with pytest.raises(ValueError, match="'with_environment' needs 'environments', but train_dataset has the columns"):
        build(tiny_model, arguments={"reward_funcs": with_environment})


def test_columns_that_do_not_arrive(tiny_model, no_generation):
    """`remove_unused_columns` leaves the prompt; and TRL passes no column of the name that it uses itself."""
    with pytest.raises(ValueError, match="'needs_answer' needs 'answer', but train_dataset has the columns prompt"):
        train(
            tiny_model,
            arguments={"reward_funcs": needs_answer, "train_dataset": TEXTS},
            remove_unused_columns=True,
        )
    with pytest.raises(ValueError, match="train_dataset has a column 'completions', which is what TRL calls"):
        build(tiny_model, arguments={"train_dataset": TEXTS.rename_column("answer", "completions")})


def test_data_that_is_evaluated_on(tiny_model):
    """Only if there are evaluations."""
    arguments = {"reward_funcs": needs_answer, "train_dataset": TEXTS, "eval_dataset": TEXTS.remove_columns("answer")}
    build(tiny_model, arguments=arguments)
    with pytest.raises(ValueError, match="'needs_answer' needs 'answer', but eval_dataset has the columns prompt"):
        build(tiny_model, arguments=arguments, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)


# Tokenizers


def without_template(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("rows", ["known", "on the fly"])
def test_conversations_need_a_chat_template(tiny_model, no_generation, rows):
    dataset = ROWS if rows == "known" else ROWS.with_transform(lambda batch: batch)
    arguments = {"processing_class": without_template(tiny_model), "train_dataset": dataset}
    with pytest.raises(ValueError, match="train_dataset holds conversations, but the tokenizer has no chat template"):
        build(tiny_model, arguments=arguments) if rows == "known" else train(tiny_model, arguments=arguments)
    build(tiny_model, arguments={**arguments, "train_dataset": TEXTS})


def test_a_reward_model_needs_one_too(tiny_model):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    arguments = {"reward_funcs": model, "reward_processing_classes": without_template(tiny_model)}
    with pytest.raises(ValueError, match="conversations, but the tokenizer of a reward model has no chat template"):
        build(tiny_model, arguments=arguments)


def test_a_tokenizer_without_pad_and_end(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad_token nor an eos_token"):
        build(tiny_model, arguments={"processing_class": tokenizer})
    tokenizer.pad_token = "<|pad|>"
    with pytest.raises(ValueError, match="The tokenizer has no eos_token"):
        build(tiny_model, arguments={"processing_class": tokenizer})
    arguments = {"processing_class": tokenizer, "rollout_func": generated}
    train(tiny_model, arguments=arguments, max_steps=1)


# Evaluation


def test_evaluations_are_checked_before_they_generate(tiny_model, monkeypatch):
    model, tokenizer = load(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: pytest.fail("it has generated"))
    problems = TEXTS.with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match="'wants_solution' needs 'solution', but the data set has the columns prompt"):
        score_samples(model, tokenizer, problems, wants_solution)
    with pytest.raises(ValueError, match="'forgets_kwargs' does not take"):
        score_samples(model, tokenizer, problems, forgets_kwargs)
    with pytest.raises(ValueError, match=r"the data set has the columns \['answer'\] but no 'prompt'"):
        score_samples(model, tokenizer, TEXTS.remove_columns("prompt"), wants_solution)


def test_evaluations_during_training_are_checked_when_they_are_planned(tiny_model):
    trainer = build(tiny_model, arguments={"processing_class": without_template(tiny_model), "train_dataset": TEXTS})
    settings = EvaluationSettings(num_samples=1)
    for problems, said in (
        (TEXTS, "'math_verify_reward' needs 'solution', but problems has the columns prompt, answer"),
        (TEXTS.rename_column("prompt", "question"), "problems has the columns .* but no 'prompt'"),
        (ROWS, "problems holds conversations, but the tokenizer has no chat template"),
    ):
        with pytest.raises(ValueError, match=said):
            EvaluationCallback(trainer, problems, settings=settings)
    EvaluationCallback(trainer, TEXTS.rename_column("answer", "solution"), settings=settings)
    EvaluationCallback(trainer, with_random_prompts(TEXTS), settings=settings)


def prompts_of_kinds(*prompts):
    return [{"prompt": prompt, "answer": "2"} for prompt in prompts]


CHAT = [{"role": "user", "content": "1+1="}]
KINDS = {
    "None": (prompts_of_kinds("1", "2", None), r"\[2\]\['prompt'\] is None\."),
    "no conversation": (prompts_of_kinds(CHAT, CHAT, None), r"\[2\]\['prompt'\] is None\."),
    "empty text": (prompts_of_kinds("1", ""), r"\[1\]\['prompt'\] is '', of which the tokenizer makes no tokens"),
    "empty conversation": (prompts_of_kinds(CHAT, []), r"\[1\]\['prompt'\] is \[\]\."),
    "number": (prompts_of_kinds("1", 7), r"\[1\]\['prompt'\] is 7\. A prompt must be a text or a conversation"),
    "list": (prompts_of_kinds(["a"], ["a"]), r"\[0\]\['prompt'\] is \['a'\]"),
    "mixed": (prompts_of_kinds("1", CHAT), r"\[1\]\['prompt'\] is a conversation, but that of .*\[0\] is a text"),
    "mixed the other way": (prompts_of_kinds(CHAT, CHAT, "1"), r"\[2\]\['prompt'\] is a text, but that of"),
    "long": (prompts_of_kinds(CHAT, {"x": "y" * 999}), r"\[1\]\['prompt'\] is .{200}\.\.\.\. A prompt"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_problem_of_an_evaluation_is_looked_at(tiny_model, monkeypatch, kind):
    """Before anything is generated; where a table can hold the rows, when the evaluation is planned."""
    rows, said = KINDS[kind]
    model, tokenizer = load(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: pytest.fail("it has generated"))
    with pytest.raises(ValueError, match=f"^the data set{said}"):
        score_samples(model, tokenizer, rows, needs_answer, num_samples=2)
    with pytest.raises(ValueError, match=f"^the data set{said}"):
        answer_problems(TransformersEngine(model, tokenizer, 2), rows, needs_answer, EvaluationSettings())
    with pytest.raises(ValueError, match=f"^the data set{said}"):
        sample_rollouts(model, tokenizer, rows, needs_answer, num_generations=2)
    if "mixed" not in kind and kind not in ("number", "long"):
        with pytest.raises(ValueError, match=f"^set{said}"):
            EvaluationCallback(build(tiny_model), Dataset.from_list(rows), needs_answer, name="set")


def test_problems_behind_an_instruction_are_looked_at_first(tmp_path):
    """It would hide an empty one."""
    for rows, said in ((["1", "2", ""], r"\[2\]\['question'\] is ''"), (["1", None], r"\[1\]\['question'\] is None")):
        Dataset.from_dict({"question": rows}).to_json(tmp_path / "test.jsonl")
        source = DataSource(str(tmp_path), "test", "question", None)
        with pytest.raises(ValueError, match=f"data set .*{said}"):
            load_problems(source, instruction="Think.")


def test_functions_of_which_nothing_is_known_are_left_to_the_call():
    for function in (functools.lru_cache(only_ids), min, type("Any", (), {"__call__": max})(), "no/model"):
        check_rewards(function, ["prompt"], "data")
