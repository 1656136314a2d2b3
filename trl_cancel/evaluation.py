"""Sampling answers from a model and scoring them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import apply_chat_template
from trl.data_utils import is_conversational


RewardFunction = Callable[..., list[float | None]]


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
    """
    rows = [row for row in dataset for _ in range(num_samples)]
    rewards: list[float | None] = []
    with _sampling(model, seed), tqdm(total=len(rows), desc=description, disable=description is None) as progress:
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            answers, ids = _generate(model, tokenizer, batch, temperature, max_completion_length)
            columns = {name: [row[name] for row in batch] for name in batch[0]}
            rewards += reward(prompts=columns.pop("prompt"), completions=answers, completion_ids=ids, **columns)
            progress.update(len(batch))
    scores = torch.tensor([float("nan") if value is None else value for value in rewards])
    return scores.view(-1, num_samples)


def mean_with_interval(
    scores: torch.Tensor, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """
    The mean score over prompts, with a bootstrap interval over prompts.

    Args:
        scores (`torch.Tensor` of shape `(P, k)`):
            Scores of k answers to each of P prompts; `nan` values are left out.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the interval.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        `tuple[float, float, float]`: Mean, lower and upper end.
    """
    by_prompt = scores.double().nanmean(1)
    by_prompt = by_prompt[~by_prompt.isnan()]
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(by_prompt), (num_resamples, len(by_prompt)), generator=generator)
    tail = (1 - confidence) / 2
    low, high = by_prompt[index].mean(1).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return by_prompt.mean().item(), low, high


@contextmanager
def _sampling(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients and a seed of its own, all undone at the end."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    temperature: float,
    max_completion_length: int,
) -> tuple[list[Any], list[list[int]]]:
    """Answers to the prompts of some rows, in the prompts' form, and their token ids without padding."""
    conversational = is_conversational(rows[0])
    texts = [
        apply_chat_template({"prompt": row["prompt"]}, tokenizer)["prompt"] if conversational else row["prompt"]
        for row in rows
    ]
    # The chat template has written the special tokens of a conversation already.
    inputs = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not conversational
    ).to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    end = _end_tokens(model, tokenizer)
    generate: Any = model.generate
    output = generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_completion_length,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end[0],
        eos_token_id=end,
        **(sampling if temperature else {"do_sample": False}),
    )
    ids = [_until_end(row, end) for row in output[:, inputs["input_ids"].size(1) :].tolist()]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    answers = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
    return answers, ids


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the model's, which may be several, and the tokenizer's."""
    declared = model.generation_config.eos_token_id if model.generation_config else None
    declared = declared if isinstance(declared, list) else [declared]
    return [token for token in dict.fromkeys([tokenizer.eos_token_id, *declared]) if token is not None]


def _until_end(ids: list[int], end: list[int]) -> list[int]:
    stop = next((index for index, token in enumerate(ids) if token in end), len(ids))
    return ids[: stop + 1]
