"""Sampling answers from a model and scoring them."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import isawaitable
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_mistral_common import MistralCommonBackend
from trl.data_utils import is_conversational

from ..batch.states import without_dropout
from ..intervals import mean_with_interval as mean_with_interval
from ..running.inputs import check_problems
from ..running.rewards import listed, number_of
from ..running.weights import weights_looked_at
from ..upstream.trl import get_callable_name


Scores = list[float | None]
RewardFunction = Callable[..., Scores | Awaitable[Scores]]


def score_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward: RewardFunction,
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    max_completion_length: int = 256,
    batch_size: int = 256,
    seed: int = 0,
    description: str | None = None,
) -> torch.Tensor:
    """
    Samples answers to every prompt and scores them. The caller's random state is left as it was.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to evaluate.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        dataset ([`~datasets.Dataset`]):
            Data set with a column `prompt`, text or conversations; further columns are passed to `reward`.
        reward (`Callable`):
            Reward function in TRL's form.
        num_samples (`int`, *optional*, defaults to `1`):
            Answers a prompt.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; `0` decodes greedily.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Longest answer, in tokens.
        batch_size (`int`, *optional*, defaults to `256`):
            Answers generated at a time.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        description (`str`, *optional*):
            Label of the progress bar; no bar without one.

    Returns:
        `torch.Tensor` of shape `(P, num_samples)`: The rewards; `nan` where the reward function returned `None`.

    Raises:
        `ValueError`: If the rows lack a prompt or what the reward function asks for, or it does not return one number
            or `None` for each answer.
    """
    problems = list(dataset)
    if problems:
        check_problems("the data set", problems, reward, tokenizer)
    rows = [row for row in problems for _ in range(num_samples)]
    rewards: list[float | None] = []
    with sampling(model, seed), tqdm(total=len(rows), desc=description, disable=description is None) as progress:
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            prefixes = prompt_token_ids(tokenizer, [row["prompt"] for row in batch])
            ids = continuations(model, tokenizer, prefixes, max_completion_length, temperature)
            rewards += rewards_of(reward, tokenizer, batch, ids)
            progress.update(len(batch))
    scores = torch.tensor([float("nan") if value is None else value for value in rewards])
    return scores.view(-1, num_samples)


def rewards_of(
    reward: RewardFunction,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    ids: list[list[int]],
    trainer: Any = None,
) -> list[float | None]:
    """
    What a reward function says of some completions. It is called as TRL calls it in training, but what it logs
    (`log_extra`, `log_metric`) goes nowhere.

    Args:
        reward (`Callable`):
            Reward function in TRL's form.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        rows (`list[dict]`):
            The data set's row behind each completion; columns other than `prompt`, `completion` and `completion_ids`
            are passed on.
        ids (`list[list[int]]`):
            Token ids of the completions, without padding.
        trainer ([`~transformers.Trainer`], *optional*):
            The trainer that the model is of: its `state` is the reward function's `trainer_state`, `None` without one.

    Raises:
        `ValueError`: If it does not return one reward for each.
    """
    prompts = [row["prompt"] for row in rows]
    own = rows[0].keys() - {"prompt", "completion", "completion_ids"}
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0] if name in own}
    answers = as_answers(tokenizer, ids, prompts)
    columns |= {"trainer_state": getattr(trainer, "state", None), "log_extra": _nowhere, "log_metric": _nowhere}
    scores: Any = awaited(reward(prompts=prompts, completions=answers, completion_ids=ids, **columns), trainer)
    name = get_callable_name(reward)
    rewards = listed(scores)
    if rewards is None or len(rewards) != len(ids):
        found = type(scores).__name__ if rewards is None else f"{len(rewards)} rewards"
        raise ValueError(
            f"The reward function {name} returned {found} for {len(ids)} completions; it must return a list with one "
            "number or None for each."
        )
    try:
        return [None if score is None else number_of(score) for score in rewards]
    except ValueError as error:
        raise ValueError(f"The reward function {name} returned what is no number: {error}.") from error


def _nowhere(name: str, value: Any) -> None:
    """In the place of a trainer's logs."""


def awaited(scores: Scores | Awaitable[Scores], trainer: Any = None) -> Scores:
    """
    What a reward function returns; an async one is waited for.

    Args:
        scores (`list` or `Awaitable`):
            What calling it has given.
        trainer ([`~transformers.Trainer`], *optional*):
            TRL's trainer, to whose event loop its client may be bound.
    """
    if not isawaitable(scores):
        return scores
    awaitable = scores

    async def wait() -> Scores:
        return await awaitable

    loop = getattr(trainer, "async_loop", None) or _event_loop()
    return asyncio.run_coroutine_threadsafe(wait(), loop).result()


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """A loop in a thread of its own, since a notebook's thread has one that runs already."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


@contextmanager
def sampling(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """No dropout, no gradients and a seed of its own, all undone at the end."""
    devices = [model.device] if model.device.type == "cuda" else []
    with weights_looked_at(model), torch.random.fork_rng(devices), torch.no_grad(), without_dropout(model):
        torch.manual_seed(seed)
        yield


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Any], chat_template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """
    Token ids of prompts, as TRL makes them.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        prompts (`list`):
            Texts or conversations.
        chat_template_kwargs (`dict`, *optional*):
            Arguments for the template of conversations.
    """
    if not is_conversational({"prompt": prompts[0]}):
        return tokenizer(prompts)["input_ids"]
    # As ids at once: some tokenizers, Mistral's own for one, do not read back what the template writes.
    how: dict[str, Any] = {"add_generation_prompt": True, "return_dict": True, **(chat_template_kwargs or {})}
    return cast(Any, tokenizer.apply_chat_template(prompts, **how))["input_ids"]


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[list[int]]:
    """
    Continues sequences of tokens until an answer ends, in one batch.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prefixes (`list[list[int]]`):
            Token ids to continue.
        max_new_tokens (`int`):
            Longest continuation.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; `0` decodes greedily.

    Returns:
        `list[list[int]]`: The tokens that follow each prefix, the ending one included, without padding.
    """
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    return generate_batch(model, tokenizer, prefixes, max_new_tokens, **how)


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: list[list[int]],
    max_new_tokens: int,
    **how: Any,
) -> list[list[int]]:
    """
    Continues sequences of tokens until an answer ends, in one batch. Of a model's own generation config only the
    tokens that end an answer count.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prefixes (`list[list[int]]`):
            Token ids to continue.
        max_new_tokens (`int`):
            Longest continuation.
        **how:
            How tokens are chosen, for `model.generate`; greedily if not said.

    Returns:
        `list[list[int]]`: The tokens that follow each prefix, the ending one included, without padding.

    Raises:
        `ValueError`: If neither model nor tokenizer has a token that ends an answer, or pads it.
    """
    end = end_tokens(model, tokenizer)
    filler = filler_token(model, tokenizer)
    rows = [torch.tensor(prefix) for prefix in prefixes]
    ids = pad_sequence(rows, batch_first=True, padding_value=filler, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    generate: Any = model.generate
    with _without_own_settings(model):
        output = generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=filler,
            eos_token_id=end,
            **how,
        )
    return [_until_end(row, end) for row in output[:, ids.size(1) :].tolist()]


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """
    An empty generation config in the place of a model's: transformers fills in from it whatever `generate` is not
    given, penalties, forced tokens and beams for example.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model  # the one that PEFT hands on
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def chats(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer takes conversations."""
    return getattr(tokenizer, "chat_template", None) is not None or isinstance(tokenizer, MistralCommonBackend)


def as_answers(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], prompts: list[Any]) -> list[Any]:
    """Completions in the form of their prompts: texts or conversations."""
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    conversational = is_conversational({"prompt": prompts[0]})
    return [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts


def filler_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """
    The token that pads.

    Raises:
        `ValueError`: If neither model nor tokenizer has a token that pads an answer, or ends it.
    """
    filler = next((t for t in [tokenizer.pad_token_id, *end_tokens(model, tokenizer)] if t is not None), None)
    if filler is None:
        raise ValueError(
            "No token ends an answer: the tokenizer has no pad_token and no eos_token, and the model's generation "
            "config no eos_token_id. Set one of them."
        )
    return filler


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the model's, which may be several, and the tokenizer's."""
    return declared_end_tokens(model.generation_config, tokenizer)


def declared_end_tokens(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that a generation config, or a tokenizer, says ends an answer."""
    declared = config.eos_token_id if config else None
    declared = declared if isinstance(declared, list) else [declared]
    return [token for token in dict.fromkeys([tokenizer.eos_token_id, *declared]) if token is not None]


def _until_end(ids: list[int], end: list[int]) -> list[int]:
    stop = next((index for index, token in enumerate(ids) if token in end), len(ids))
    return ids[: stop + 1]
