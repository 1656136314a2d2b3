"""
The value of a token: how much better it is to take it than to sample another in its place
([2605.08666](https://huggingface.co/papers/2605.08666), Appendix E.2).
"""

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...arguments import finite, floats, shaped, single, stretch, uncertain, whole, whole_numbers, within
from ...batch.rollouts import Rollouts
from ...evaluation import RewardFunction, continuations, end_tokens, rewards_of, sampling


@dataclass(frozen=True)
class TokenValues:
    r"""
    Monte-Carlo values of some tokens, each a `torch.Tensor` of shape `(K,)`.

    Args:
        forced (`torch.Tensor`):
            \\( \hat Q(s,a) \\): mean reward of continuations behind the token.
        free (`torch.Tensor`):
            \\( \hat V(s) \\): mean reward of continuations from the state before it.
        values (`torch.Tensor`):
            See [`counterfactual_value`].
    """

    forced: torch.Tensor
    free: torch.Tensor
    values: torch.Tensor


def counterfactual_value(forced: torch.Tensor, free: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
    r"""
    \\( (\hat Q(s,a) - \hat V(s)) / (1 - \pi(a|s)) \\) (Eq. 20): the reward that taking a token gains over sampling an
    alternative to it. Continuations from the state take the token themselves with probability \\( \pi \\), which the
    denominator makes up for.

    Args:
        forced (`torch.Tensor`):
            \\( \hat Q \\).
        free (`torch.Tensor`):
            \\( \hat V \\).
        probability (`torch.Tensor`):
            \\( \pi(a|s) \\), below 1: a certain token has no alternative.

    Returns:
        `torch.Tensor`: In float32 or better.

    Raises:
        `ValueError`: If the shapes do not broadcast, an estimate is not finite, or a probability is not between 0 and
            1, or is 1.
    """
    forced, free, probability = single(*floats(forced=forced, free=free, probability=probability))
    stretch(forced=forced, free=free, probability=probability)
    finite(forced=forced, free=free)
    uncertain(probability=probability)
    return (forced - free) / (1 - probability)


def token_values(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Rollouts,
    places: torch.Tensor,
    reward: RewardFunction,
    probabilities: torch.Tensor,
    *,
    num_continuations: int = 16,
    max_completion_length: int = 256,
    batch_size: int = 256,
    seed: int = 0,
    description: str | None = None,
) -> TokenValues:
    """
    Estimates the values of some tokens by sampling continuations with the token and without it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to sample from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        rollouts ([`~trl_cancel.batch.rollouts.Rollouts`]):
            The rollouts that hold the tokens.
        places (`torch.Tensor` of shape `(K, 2)`):
            Rollout and position of each token.
        reward (`Callable`):
            Reward function in TRL's form; `None` counts as 0.
        probabilities (`torch.Tensor` of shape `(K,)`):
            Probabilities of the tokens.
        num_continuations (`int`, *optional*, defaults to `16`):
            Continuations for either estimate.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Longest completion, the tokens before the place included.
        batch_size (`int`, *optional*, defaults to `256`):
            Continuations generated at a time.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        description (`str`, *optional*):
            Label of the progress bar; no bar without one.

    Raises:
        `ValueError`: If the shapes do not fit, a place is outside the rollouts, a probability is not between 0 and 1 or
            is 1, or a number is not positive.
    """
    (places,), (probabilities,) = whole_numbers(places=places), floats(probabilities=probabilities)
    shaped(places=(places, "K 2"), probabilities=(probabilities, "K"))
    for axis, size in enumerate(rollouts.completion_ids.shape):
        within(size, places=places[:, axis])
    uncertain(probabilities=probabilities)
    whole("num_continuations", num_continuations, 1)
    whole("max_completion_length", max_completion_length, 1)
    whole("batch_size", batch_size, 1)
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(rollouts.prompt_ids, rollouts.prompt_mask, strict=True)]
    jobs = [
        (place, row, rollouts.completion_ids[row, :length].tolist())
        for place, (row, position) in enumerate(places.tolist())
        for length in (position + 1, position)  # with the token, and without it
        for _ in range(num_continuations)
    ]
    order = sorted(range(len(jobs)), key=lambda job: len(jobs[job][2]))  # of like lengths together
    scores = torch.zeros(len(jobs))
    end = end_tokens(model, tokenizer)
    with sampling(model, seed), tqdm(total=len(jobs), desc=description, disable=description is None) as progress:
        for first in range(0, len(jobs), batch_size):
            batch = order[first : first + batch_size]
            completed = {job: jobs[job][2] for job in batch}
            open_ended = [job for job in batch if not set(end).intersection(completed[job][-1:])]
            room = [max_completion_length - len(completed[job]) for job in open_ended]
            if max(room, default=0) > 0:
                prefixes = [prompts[jobs[job][1]] + completed[job] for job in open_ended]
                added = continuations(model, tokenizer, prefixes, max(room), rollouts.temperature)
                for job, tail in zip(open_ended, added, strict=True):
                    completed[job] = (completed[job] + tail)[:max_completion_length]
            examples = [rollouts.examples[jobs[job][1]] for job in batch]
            rewards = rewards_of(reward, tokenizer, examples, [completed[job] for job in batch])
            scores[batch] = torch.tensor([0.0 if value is None else float(value) for value in rewards])
            progress.update(len(batch))
    forced, free = scores.view(len(places), 2, num_continuations).mean(2).unbind(1)
    return TokenValues(forced, free, counterfactual_value(forced, free, probabilities.cpu()))
