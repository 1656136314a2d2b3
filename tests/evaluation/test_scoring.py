"""Sampling and scoring answers."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.runs import build, load
from trl_cancel.batch.states import LMHead
from trl_cancel.diagnostics import sample_rollouts
from trl_cancel.evaluation import mean_with_interval, prompt_token_ids, score_samples
from trl_cancel.playground import CHECKPOINT
from trl_cancel.playground.data import load_prompts
from trl_cancel.playground.reward import answer_reward


@pytest.fixture(scope="module")
def playground():
    return load(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT)


def score(playground, dataset=None, reward=answer_reward, **settings):
    dataset = load_prompts("test", 12) if dataset is None else dataset
    return score_samples(*playground, dataset, reward, max_completion_length=64, **settings)


def test_greedy_answers_are_the_models_own(playground):
    """Batches of any size, whose padding differs, give the answers of one prompt at a time."""
    model, tokenizer = playground
    expected = []
    for row in load_prompts("test", 12):
        text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answer = tokenizer.decode(output[0, inputs["input_ids"].size(1) :], skip_special_tokens=True)
        expected += answer_reward([[{"role": "assistant", "content": answer}]], [row["solution"]])
    for batch_size in (5, 256):
        assert score(playground, temperature=0.0, batch_size=batch_size).flatten().tolist() == expected
    assert 0 < sum(expected) < 12


def test_rows_are_prompts(playground):
    _, tokenizer = playground
    seen = []

    def watch(prompts, completions, completion_ids, solution, **columns):
        seen.extend(zip(prompts, solution, strict=True))
        for completion, ids in zip(completions, completion_ids, strict=True):
            assert tokenizer.decode(ids, skip_special_tokens=True) == completion[0]["content"]
            assert ids[-1] == tokenizer.eos_token_id
            assert ids.count(tokenizer.eos_token_id) == 1
        return [1.0] * len(prompts)

    assert score(playground, reward=watch, num_samples=3, batch_size=7).shape == (12, 3)
    rows = [(row["prompt"], row["solution"]) for row in load_prompts("test", 12)]
    assert seen == [row for row in rows for _ in range(3)]


def test_seed_decides_and_the_callers_state_stays(playground):
    model, _ = playground
    model.train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (score(playground, num_samples=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    model.eval()


def test_plain_text_prompts(playground):
    dataset = Dataset.from_dict({"prompt": ["Compute 1+1.\n", "Compute 2+2+2+2.\n"]})
    seen = []
    score(playground, dataset, lambda completions, **_: seen.extend(completions) or [0.0] * len(completions))
    assert all(isinstance(text, str) for text in seen)


def test_rewards_that_are_none_are_left_out(playground):
    scores = score(playground, reward=lambda prompts, **_: [None, 1.0] * (len(prompts) // 2), num_samples=2)
    assert scores[:, 0].isnan().all()
    assert mean_with_interval(scores)[0] == 1


@pytest.mark.parametrize("scores", [torch.full((3, 2), torch.nan), torch.zeros(0, 2), torch.zeros(2, 0)])
def test_no_scores_have_no_mean(scores):
    assert all(map(math.isnan, mean_with_interval(scores)))


def test_interval():
    torch.manual_seed(0)
    scores = (torch.rand(400, 4) < 0.3).float()
    mean, low, high = mean_with_interval(scores)
    assert mean == pytest.approx(scores.mean().item())
    error = scores.mean(1).std().item() / 400**0.5
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)


def test_interval_covers_the_truth():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(200):
        scores = (torch.rand(60, 2, generator=generator) < 0.4).float()
        _, low, high = mean_with_interval(scores, num_resamples=400, seed=trial)
        hits += low <= 0.4 <= high
    assert 0.88 < hits / 200 < 0.99


def test_a_4_bit_model_on_a_cpu_can_still_be_trained(tiny_model):
    """Its linear layers would pack their weights for good in evaluation mode, and pass no gradients on any more."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=quantization, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5, init_lora_weights=False))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model.train()
    score_samples(model, tokenizer, load_prompts("train", 2), lambda completion_ids, **_: [0.0] * len(completion_ids))
    LMHead.of(model)
    modes = {name: module.training for name, module in model.named_modules()}
    assert all(modes.values())
    ids = torch.arange(8).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained)


@pytest.mark.parametrize("last", ["user", "assistant", "system"])
def test_conversations_are_put_as_in_the_training(tiny_model, last):
    """Whoever speaks last, the model answers."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '+' if m['role'] == 'user' else '-' }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    prompts = [[{"role": "user", "content": "1"}, {"role": last, "content": str(number)}] for number in (2, 3)]
    trainer = build(tiny_model, arguments={"processing_class": tokenizer})
    expected = trainer._tokenize_prompts(prompts)[0]
    assert [tokenizer.decode(ids)[-1] for ids in expected] == ["=", "="]
    assert prompt_token_ids(tokenizer, prompts) == expected


def test_columns_that_only_training_has(playground):
    """A data set may hold answers of another model, which reward functions are not told of."""
    rows = load_prompts("test", 2)
    rows = rows.add_column("completion_ids", [[1], [2]]).add_column("completion", ["1", "2"])

    def length(completions, completion_ids, **columns):
        assert "completion" not in columns
        return [float(len(ids)) for ids in completion_ids]

    assert (score(playground, rows, length) > 1).all()


def test_rows_of_a_tokenizer_without_a_token_that_pads(tiny_model):
    """The model knows the one that ends an answer."""
    model, tokenizer = load(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    assert model.generation_config.eos_token_id is not None
    tokenizer.pad_token = tokenizer.eos_token = None
    rollouts = sample_rollouts(
        model, tokenizer, list(load_prompts("test", 2)), answer_reward, num_generations=2, max_completion_length=4
    )
    assert rollouts.completion_ids[~rollouts.mask.bool()].unique().tolist() in (
        [],
        [model.generation_config.eos_token_id],
    )
