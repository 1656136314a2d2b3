"""Rollouts to measure on, from any causal language model."""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...arguments import is_number, whole
from ...batch.groups import without_variance
from ...batch.rollouts import Rollouts
from ...evaluation import RewardFunction, continuations, prompt_token_ids, rewards_of, sampling
from ...evaluation.scoring import filler_token
from ...running.inputs import check_problems
from ...upstream.trl import get_callable_name


def sample_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    reward: RewardFunction,
    *,
    num_generations: int = 8,
    temperature: float = 1.0,
    max_completion_length: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
    description: str | None = None,
) -> Rollouts:
    """
    Samples groups of rollouts and scores them. The caller's random state is left as it was.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to sample from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        rows (`list[dict]`):
            Rows of a data set with a column `prompt`, text or conversations; further columns are passed to `reward`.
        reward (`Callable`):
            Reward function in TRL's form.
        num_generations (`int`, *optional*, defaults to `8`):
            G, the rollouts a prompt.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature, which becomes that of the policy.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Longest completion, in tokens.
        batch_size (`int`, *optional*, defaults to `64`):
            Rollouts generated at a time.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        chat_template_kwargs (`dict`, *optional*):
            Arguments for the template of conversations.
        description (`str`, *optional*):
            Label of the progress bar; no bar without one.

    Returns:
        [`~trl_cancel.batch.rollouts.Rollouts`]: With the advantages of GRPO: rewards of each group, centred and divided by
        their standard deviation.

    Raises:
        `ValueError`: If a group would have fewer than two rollouts, the temperature is not positive, or the rows lack a
            prompt or what the reward function asks for.
    """
    if whole("num_generations", num_generations, 0) < 2:
        raise ValueError(f"num_generations={num_generations}: a group needs at least 2 rollouts to compare.")
    whole("max_completion_length", max_completion_length, 1)
    whole("batch_size", batch_size, 1)
    if not (is_number(temperature) and 0 < temperature < float("inf")):
        raise ValueError(
            f"temperature={temperature!r} must be positive: rollouts of a greedy policy are all the same."
        )
    if rows:
        check_problems("the data set", rows, reward, tokenizer)
    examples = [row for row in rows for _ in range(num_generations)]
    prompts = prompt_token_ids(tokenizer, [example["prompt"] for example in examples], chat_template_kwargs)
    ids: list[list[int]] = []
    with sampling(model, seed), tqdm(total=len(prompts), desc=description, disable=description is None) as progress:
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            ids += continuations(model, tokenizer, batch, max_completion_length, temperature)
            progress.update(len(batch))
    rewards = torch.tensor(
        [float("nan") if value is None else value for value in rewards_of(reward, tokenizer, examples, ids)],
        device=model.device,
    )
    filler = filler_token(model, tokenizer)
    prompt_ids, prompt_mask = _padded(prompts, filler, "left", model.device)
    completion_ids, mask = _padded(ids, filler, "right", model.device)
    return Rollouts(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        mask=mask,
        advantages=group_advantages(rewards.view(-1, num_generations)).flatten(),
        group_ids=torch.arange(len(rows), device=model.device).repeat_interleave(num_generations),
        rewards=rewards.unsqueeze(1),
        reward_names=[get_callable_name(reward)],
        examples=examples,
        num_generations=num_generations,
        temperature=temperature,
    )


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """
    The advantages of GRPO: rewards centred within their group and divided by its standard deviation, as TRL does. Where
    all are equal, advantages are 0; TRL's differ from it by rounding.

    Args:
        rewards (`torch.Tensor` of shape `(P, G)`):
            Rewards; `nan` where there is none, which takes no part and gets 0.

    Returns:
        `torch.Tensor` of shape `(P, G)`.
    """
    centred = rewards - rewards.nanmean(1, keepdim=True)
    known = (~rewards.isnan()).sum(1, keepdim=True)
    deviation = (centred.square().nansum(1, keepdim=True) / (known - 1).clamp(min=1)).sqrt()
    idle = without_variance(rewards.unsqueeze(-1), rewards.new_ones(1))
    return (centred / (deviation + 1e-4)).nan_to_num(nan=0.0).masked_fill(idle.unsqueeze(1), 0)


def _padded(ids: list[list[int]], filler: int, side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.tensor(row) for row in ids]
    padded = pad_sequence(rows, batch_first=True, padding_value=filler, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return padded.to(device), mask.to(device)
