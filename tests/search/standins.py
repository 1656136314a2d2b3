"""Models, rewards, credits and engines of the search's runs."""

import math
import tempfile
from functools import cache
from typing import Any

import torch
from trl.models.utils import unwrap_model_for_generation

from trl_cancel.playground.tokenizer import build_tokenizer
from trl_cancel.playground.warm_start import build_model

from ..methods import FirstTokens
from ..runs import TINY


MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "dropout": {"attention_dropout": 0.1},
}


@cache
def model_folder(name: str) -> str:
    """Folder of a model of a few thousand random parameters, the same on all processes."""
    folder = tempfile.mkdtemp()
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Peaked enough that rollouts share prefixes; some end by themselves, some are cut off.
        build_model(tokenizer, **TINY, initializer_range=0.4, **MODELS[name]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _reward(name):
    def decorate(function):
        def reward(completion_ids, **kwargs):
            return [function(ids) for ids in completion_ids]

        reward.__name__ = name
        REWARDS[name] = reward
        return function

    return decorate


REWARDS: dict[str, Any] = {}


@_reward("tokens")
def _tokens(ids):
    return float(sum(ids) % 7)


@_reward("right_or_wrong")
def _right_or_wrong(ids):
    return float(sum(ids) % 2)


@_reward("some_unscored")
def _some_unscored(ids):
    return None if sum(ids) % 3 == 0 else float(sum(ids) % 2)


@_reward("rarely_differs")
def _rarely_differs(ids):
    """A tenth, so that the mean of equal rewards is off by rounding."""
    return 0.1 if sum(ids) % 5 else 0.7


@_reward("length")
def _length(ids):
    return -0.3 * len(ids)


class Rollouts:
    """One coefficient a rollout."""

    scope = "rollout"

    def coefficients(self, rollouts):
        return (rollouts.lengths % 3 / 2).unsqueeze(1).to(rollouts.advantages)


class Groups:
    """Tokens of wrong rollouts count less where the group has more right ones."""

    scope = "group"

    def coefficients(self, rollouts):
        share = (
            rollouts.by_group((rollouts.advantages > 0).float()).mean(1).repeat_interleave(rollouts.num_generations)
        )
        factor = torch.where(rollouts.advantages < 0, 1 - share, 1.0).unsqueeze(1)
        return torch.where(rollouts.completion_ids % 2 == 0, factor, 1.0)


class States:
    """A function of the hidden states, over the whole generation batch."""

    scope = "batch"
    needs_states = True

    def coefficients(self, rollouts):
        norms = rollouts.states[:].float().norm(dim=-1)
        total = rollouts.reduce(torch.stack([(norms * rollouts.mask).sum(), rollouts.mask.sum()]).float())
        return norms / (total[0] / total[1].clamp(min=1))


CREDITS = {"first_tokens": FirstTokens, "rollouts": Rollouts, "groups": Groups, "states": States}


class Engine:
    """
    Stands in for vLLM: samples with the model itself, and says log-probs that are a little off, as vLLM's are.

    Args:
        model:
            The policy.
        accelerator:
            Its accelerator.
        processing_class:
            Its tokenizer.
        temperature (`float`):
            Temperature.
        max_completion_length (`int`):
            Most tokens of a completion.
    """

    def __init__(self, model, accelerator, processing_class, temperature, max_completion_length, **kwargs):
        self.model, self.accelerator, self.tokenizer = model, accelerator, processing_class
        self.temperature, self.length = temperature, max_completion_length

    def sync_weights(self):
        pass

    def generate(self, prompts, images=None, num_generations=None, profiler=None):
        pad, longest = self.tokenizer.pad_token_id, max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with unwrap_model_for_generation(self.model, self.accelerator) as model, torch.no_grad():
            sampled = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                max_new_tokens=self.length,
                temperature=self.temperature,
                pad_token_id=pad,
                return_dict_in_generate=True,
                output_logits=True,
            )
        completions, logps = [], []
        for row in range(len(prompts)):
            tokens = sampled.sequences[row, longest:].tolist()
            end = (
                tokens.index(self.tokenizer.eos_token_id) + 1 if self.tokenizer.eos_token_id in tokens else len(tokens)
            )
            completions.append(tokens[:end])
            steps = [(logits[row].float() / self.temperature).log_softmax(-1) for logits in sampled.logits[:end]]
            off = [0.2 * math.sin(7 * token + place) for place, token in enumerate(tokens)]
            logps.append(
                [
                    [step[token].item() + off[i]]
                    for i, (step, token) in enumerate(zip(steps, completions[-1], strict=True))
                ]
            )
        return prompts, completions, logps, None


def environment(prompts, trainer):
    """A `rollout_func` in which every third token is an environment's, which the loss does not count."""
    tokenizer = trainer.processing_class
    ids = [
        tokenizer(prompt)["input_ids"]
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in prompts
    ]
    engine = Engine(trainer.model, trainer.accelerator, tokenizer, trainer.temperature, trainer.max_completion_length)
    _, completions, logps, _ = engine.generate(ids)
    return {
        "prompt_ids": ids,
        "completion_ids": completions,
        "logprobs": [[token[0] for token in tokens] for tokens in logps],
        "env_mask": [[int(place % 3 != 2) for place in range(len(tokens))] for tokens in completions],
    }
