"""Rollouts to measure on, and the values of their tokens."""

import asyncio
from decimal import Decimal

import pytest
import torch
from transformers import AutoTokenizer

from tests.runs import load
from trl_cancel.diagnostics import counterfactual_value, sample_rollouts, token_values
from trl_cancel.diagnostics.probing import values
from trl_cancel.playground.data import load_prompts


@pytest.fixture
def parts(tiny_model):
    return load(tiny_model), AutoTokenizer.from_pretrained(tiny_model), list(load_prompts("train", 3))


def parity(prompts, completions, completion_ids, **columns):
    return [None if len(ids) == 1 else float(sum(ids) % 2) for ids in completion_ids]


def test_rollouts(parts):
    model, tokenizer, rows = parts
    model.train()
    state = torch.get_rng_state()
    rollouts = sample_rollouts(
        model, tokenizer, rows, parity, num_generations=4, max_completion_length=6, batch_size=5, seed=3
    )
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert rollouts.group_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [example["prompt"] for example in rollouts.examples[::4]] == [row["prompt"] for row in rows]
    for index in range(12):
        ids = rollouts.completion_ids[index][rollouts.mask[index].bool()].tolist()
        assert 1 <= len(ids) <= 6
        assert tokenizer.eos_token_id not in ids[:-1]
        expected = parity(None, None, [ids])[0]
        found = rollouts.rewards[index, 0].item()
        assert found == expected or (expected is None and found != found)
        prompt = tokenizer.decode(rollouts.prompt_ids[index][rollouts.prompt_mask[index].bool()])
        assert rows[index // 4]["prompt"][0]["content"] in prompt
    for first in range(0, 12, 4):
        rewards = [0.0 if value != value else value for value in rollouts.rewards[first : first + 4, 0].tolist()]
        mean = sum(rewards) / 4
        deviation = (sum((reward - mean) ** 2 for reward in rewards) / 3) ** 0.5
        expected = [(reward - mean) / (deviation + 1e-4) for reward in rewards]
        assert rollouts.advantages[first : first + 4].tolist() == pytest.approx(expected, abs=1e-5)
    again = sample_rollouts(
        model, tokenizer, rows, parity, num_generations=4, max_completion_length=6, batch_size=5, seed=3
    )
    assert torch.equal(again.completion_ids, rollouts.completion_ids)


@pytest.mark.parametrize("kind", [int, bool, Decimal, lambda value: torch.tensor([float(value)])])
def test_rewards_of_any_number_type(parts, kind):
    def reward(prompts, completions, completion_ids, **columns):
        return [kind(sum(ids) % 2) for ids in completion_ids]

    rollouts = sample_rollouts(*parts, reward, num_generations=4, max_completion_length=6)
    assert rollouts.rewards.dtype == torch.float32
    assert set(rollouts.rewards.flatten().tolist()) == {0.0, 1.0}


def test_rewards_that_wait(parts):
    async def patient(prompts, completions, completion_ids, **columns):
        await asyncio.sleep(0)
        return [float(sum(ids) % 2) for ids in completion_ids]

    async def in_a_notebook():  # where a loop runs already
        return sample_rollouts(*parts, patient, num_generations=4, max_completion_length=6)

    assert set(asyncio.run(in_a_notebook()).rewards.flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completion_ids, **columns: [1.0], "returned 1 rewards for 12 completions"),
        (lambda completion_ids, **columns: None, "returned NoneType for 12"),
        (lambda completion_ids, **columns: torch.tensor(1.0), "returned Tensor for 12"),
        (lambda completion_ids, **columns: ["1.0"] * 12, "returned what is no number: a str is not a number"),
    ],
)
def test_rewards_that_are_none(parts, reward, message):
    with pytest.raises(ValueError, match=message):
        sample_rollouts(*parts, reward, num_generations=4, max_completion_length=6)


@pytest.mark.parametrize(("setting", "value"), [("num_generations", 1), ("temperature", 0.0)])
def test_what_makes_no_groups_is_refused(parts, setting, value):
    with pytest.raises(ValueError, match=f"{setting}={value}"):
        sample_rollouts(*parts, parity, **{setting: value})


def test_values_of_tokens(parts, monkeypatch):
    """With continuations that are known, the estimates are means that can be counted by hand."""
    model, tokenizer, rows = parts
    rollouts = sample_rollouts(model, tokenizer, rows, parity, num_generations=4, max_completion_length=6)
    end, asked = tokenizer.eos_token_id, []

    def scripted(model, tokenizer, prefixes, longest, temperature):
        asked.extend(prefixes)
        assert longest > 0
        return [[9, end] if len(prefix) % 2 else [8, 8, 8, end] for prefix in prefixes]

    def reward(prompts, completions, completion_ids, **columns):
        assert all(len(ids) <= 6 for ids in completion_ids)
        return [float(sum(ids)) for ids in completion_ids]

    monkeypatch.setattr(values, "continuations", scripted)
    lengths = rollouts.mask.sum(1)
    places = torch.tensor([[0, 0], [1, int(lengths[1]) - 1], [5, 0]])
    probabilities = torch.tensor([0.5, 0.25, 0.0])
    found = token_values(
        model,
        tokenizer,
        rollouts,
        places,
        reward,
        probabilities,
        num_continuations=3,
        max_completion_length=6,
        batch_size=4,
    )
    for index, (row, position) in enumerate(places.tolist()):
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row].bool()].tolist()

        def expected(length, row=row, prompt=prompt):
            ids = rollouts.completion_ids[row, :length].tolist()
            if end in ids or length >= 6:
                return float(sum(ids))
            tail = [9, end] if len(prompt + ids) % 2 else [8, 8, 8, end]
            return float(sum((ids + tail)[:6]))

        forced, free = expected(position + 1), expected(position)
        assert found.forced[index].item() == forced
        assert found.free[index].item() == free
        value = (forced - free) / (1 - probabilities[index].item())
        assert found.values[index].item() == pytest.approx(value)
    assert not any(end in prefix[-1:] for prefix in asked)


def test_counterfactual_value():
    """Continuations from the state take the token with its probability, which the value makes up for."""
    with_token, without, probability = torch.tensor(0.9), torch.tensor(0.3), torch.tensor(0.6)
    free = probability * with_token + (1 - probability) * without
    assert counterfactual_value(with_token, free, probability).item() == pytest.approx(0.6)
