"""Answering a set of problems, scoring the answers, and what they come to."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from ..intervals import mean_with_interval
from ..running.inputs import check_problems
from ..texts import plain
from ..upstream.trl import get_callable_name
from .engines import Answer, Engine, Request, seed_of
from .metrics import avg_at_k, pass_at_k
from .result import Estimate, Evaluation
from .samples import Sample, SampleLog, key_of
from .scoring import RewardFunction, prompt_token_ids, rewards_of
from .settings import EvaluationSettings


@dataclass(frozen=True)
class Task:
    """One answer to be made: which problem's, and its number, `None` for the greedy one."""

    problem: int
    sample: int | None


def evaluate(
    engine: Engine,
    problems: Dataset,
    reward: RewardFunction,
    settings: EvaluationSettings,
    *,
    name: str,
    step: int | None = None,
    description: str | None = None,
    trainer: Any = None,
) -> Evaluation:
    """
    Answers problems, scores the answers and estimates how good the model is.

    Args:
        engine ([`Engine`]):
            What answers.
        problems ([`~datasets.Dataset`]):
            Data set with a column `prompt`, text or conversations; further columns are passed to `reward`.
        reward (`Callable`):
            Reward function in TRL's form.
        settings ([`EvaluationSettings`]):
            How to answer.
        name (`str`):
            Name of the data set.
        step (`int`, *optional*):
            Optimizer steps that the model had been trained for.
        description (`str`, *optional*):
            Label of the progress bar; no bar without one.
        trainer ([`~transformers.Trainer`], *optional*):
            The trainer that the model is of, for reward functions that ask for its state.

    Returns:
        [`Evaluation`]: The estimates, the same on all processes.
    """
    samples = answer_problems(engine, problems, reward, settings, description=description, trainer=trainer)
    return summarize(samples, len(problems), settings, name, step)


def answer_problems(
    engine: Engine,
    problems: Dataset,
    reward: RewardFunction,
    settings: EvaluationSettings,
    *,
    log: SampleLog | None = None,
    description: str | None = None,
    trainer: Any = None,
) -> list[Sample]:
    """
    Answers problems and scores the answers, batch by batch. Several processes take turns in the batches.

    The batches are always the same, whatever is there already: an interrupted evaluation makes those that lack an
    answer once more, and so ends with the file of an uninterrupted one.

    Args:
        engine ([`Engine`]):
            What answers.
        problems ([`~datasets.Dataset`]):
            Data set with a column `prompt`; further columns are passed to `reward`.
        reward (`Callable`):
            Reward function in TRL's form.
        settings ([`EvaluationSettings`]):
            How to answer.
        log ([`SampleLog`], *optional*):
            Where to write the samples, and what an earlier run has left; on the first process alone.
        description (`str`, *optional*):
            Label of the progress bar; no bar without one.
        trainer ([`~transformers.Trainer`], *optional*):
            The trainer that the model is of, for reward functions that ask for its state.

    Returns:
        `list[dict]`: The samples of all processes, by problem and number.

    Raises:
        `ValueError`: If there are no problems, or they lack a prompt or what the reward function asks for; if that
            raises, or does not return one number or `None` for each answer.
    """
    state = PartialState()
    rows = list(problems)
    if not rows:
        raise ValueError("There are no problems to answer: the data set is empty.")
    check_problems("the data set", rows, reward, engine.tokenizer)
    prompt_ids = prompt_token_ids(engine.tokenizer, [row["prompt"] for row in rows], settings.chat_template_kwargs)
    earlier = gather_object([log.samples if log else []])[0]  # the first process's
    done = {key_of(sample): sample for sample in earlier}
    batches = _batches(prompt_ids, settings, engine.batch_size)
    pending = [batch for batch in batches if any((task.problem, task.sample) not in done for task in batch)]
    with tqdm(
        total=sum(map(len, batches)),
        initial=len(done),
        desc=description and plain(description),
        unit="answer",
        disable=description is None or not state.is_main_process,
    ) as progress:
        for turn in _chunks(pending, state.num_processes):
            # Whoever has no batch of its own joins in another one: a sharded model needs all processes.
            tasks = turn[state.process_index % len(turn)]
            made = _answer(engine, tasks, rows, prompt_ids, reward, settings, trainer)
            everyone = gather_object([made])[: len(turn)]
            new = [sample for samples in everyone for sample in samples if key_of(sample) not in done]
            done |= {key_of(sample): sample for sample in new}
            if log:
                log.append(new)
            progress.update(len(new))
    return sorted(
        done.values(), key=lambda sample: (sample["problem"], sample["sample"] is not None, sample["sample"])
    )


def summarize(
    samples: Iterable[Sample],
    num_problems: int,
    settings: EvaluationSettings,
    name: str,
    step: int | None = None,
) -> Evaluation:
    """
    Estimates, with intervals over problems.

    Args:
        samples (`Iterable[dict]`):
            The samples of [`answer_problems`], in its order. A reward that is `None` counts as 0, and as wrong.
        num_problems (`int`):
            Number of problems P.
        settings ([`EvaluationSettings`]):
            How they were answered.
        name (`str`):
            Name of the data set.
        step (`int`, *optional*):
            Optimizer steps that the model had been trained for.

    Returns:
        [`Evaluation`]: `greedy`, `avg@n`, `pass@k` for each k, and `truncated`, the fraction of the answers that were
        cut off.
    """
    samples = list(samples)

    def matrix(values: Iterable[float]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.float64).view(num_problems, -1)

    def rewards_in(of: Iterable[Sample]) -> torch.Tensor:
        return matrix(sample["reward"] or 0.0 for sample in of)

    metrics: dict[str, Estimate] = {}
    if settings.greedy:
        metrics["greedy"] = mean_with_interval(rewards_in(sample for sample in samples if sample["sample"] is None))
    if settings.num_samples:
        sampled = [sample for sample in samples if sample["sample"] is not None]
        metrics[f"avg@{settings.num_samples}"] = mean_with_interval(avg_at_k(rewards_in(sampled)).unsqueeze(1))
        right = matrix(float(_is_right(sample, settings)) for sample in sampled).bool()  # (P, n)
        for k in settings.tries:
            metrics[f"pass@{k}"] = mean_with_interval(pass_at_k(right, k).unsqueeze(1))
    metrics["truncated"] = mean_with_interval(matrix(float(_is_cut_off(sample)) for sample in samples))
    return Evaluation(name, num_problems, metrics, asdict(settings), step)


def _is_cut_off(sample: Sample) -> bool:
    return sample["finish_reason"] == "length"


def _is_right(sample: Sample, settings: EvaluationSettings) -> bool:
    """Neither without a reward nor cut off, whatever the threshold is."""
    if sample["reward"] is None or (_is_cut_off(sample) and not settings.score_truncated):
        return False
    return sample["reward"] >= settings.pass_threshold


def _batches(prompt_ids: list[list[int]], settings: EvaluationSettings, size: int) -> list[list[Task]]:
    """All tasks in batches of prompts that are about equally long, the longest first: memory fails early if at all."""
    order = sorted(range(len(prompt_ids)), key=lambda problem: -len(prompt_ids[problem]))
    greedy = [Task(problem, None) for problem in order] if settings.greedy else []
    sampled = [Task(problem, sample) for problem in order for sample in range(settings.num_samples)]
    return [*_chunks(greedy, size), *_chunks(sampled, size)]


def _chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    return (items[first : first + size] for first in range(0, len(items), size))


def _answer(
    engine: Engine,
    tasks: Sequence[Task],
    rows: Sequence[dict[str, Any]],
    prompt_ids: Sequence[list[int]],
    reward: RewardFunction,
    settings: EvaluationSettings,
    trainer: Any,
) -> list[Sample]:
    """Samples of one batch."""
    seeds = [None if task.sample is None else seed_of(settings.seed, task.problem, task.sample) for task in tasks]
    requests = [Request(prompt_ids[task.problem], seed) for task, seed in zip(tasks, seeds, strict=True)]
    answers = engine.generate(requests, settings)
    own = [rows[task.problem] for task in tasks]
    rewards = _rewards(engine, reward, own, answers, settings, trainer)
    texts = engine.tokenizer.batch_decode([answer.ids for answer in answers], skip_special_tokens=True)
    return [
        {
            "problem": task.problem,
            "sample": task.sample,
            "seed": seed,
            "reward": score,
            "finish_reason": answer.finish_reason,
            "tokens": len(answer.ids),
            "prompt": row["prompt"],
            "completion": text,
        }
        for task, seed, score, answer, row, text in zip(tasks, seeds, rewards, answers, own, texts, strict=True)
    ]


def _rewards(
    engine: Engine,
    reward: RewardFunction,
    rows: list[dict[str, Any]],
    answers: list[Answer],
    settings: EvaluationSettings,
    trainer: Any,
) -> list[float | None]:
    name = get_callable_name(reward)
    try:
        rewards = rewards_of(reward, engine.tokenizer, rows, [answer.ids for answer in answers], trainer)
    except Exception as error:
        if isinstance(error, ValueError) and "The reward function" in str(error):
            raise
        raise ValueError(f"The reward function {name} raised {type(error).__name__}: {error}") from error
    for score in rewards:
        if score is not None and not math.isfinite(score):
            raise ValueError(f"The reward function {name} returned {score}; it must return finite numbers or None.")
    if settings.score_truncated:
        return rewards
    return [
        min(score or 0.0, 0.0) if answer.finish_reason == "length" else score
        for answer, score in zip(answers, rewards, strict=True)
    ]
