"""The embedded model, its data sets and its reward."""

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cancel.evaluation import score_samples
from trl_cancel.playground import CHECKPOINTS, NAME, VARIED
from trl_cancel.playground.__main__ import write_playground
from trl_cancel.playground.data import load_demonstrations, load_prompts
from trl_cancel.playground.reward import answer_reward
from trl_cancel.playground.tasks import TASKS
from trl_cancel.playground.tokenizer import build_tokenizer
from trl_cancel.playground.warm_start import FILES, warm_start


def says(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("8-4=4\nThe answer is \\boxed{7}.", 1.0),
        ("\\boxed{7}", 1.0),
        ("The answer is \\boxed{8}.", 0.0),
        ("The answer is \\boxed{5+2}.", 0.0),  # math-verify alone accepts it
        ("The answer is 7.", 0.0),
        ("\\boxed{7} and more", 0.0),
        ("", 0.0),
    ],
)
def test_reward(text, reward):
    assert answer_reward([says(text)], ["\\boxed{7}"]) == [reward]


def test_datasets():
    prompts = load_prompts("test", 10)
    assert prompts.column_names == ["prompt", "solution", "response"]
    assert {row["response"].count("=") for row in load_prompts("test", 4, num_steps=(2,))} == {2}
    row = prompts[0]
    assert row["prompt"][0]["content"].startswith("Compute ")
    assert answer_reward([says(row["response"])], [row["solution"]]) == [1.0]
    demonstrations = load_demonstrations(20, seed=1)
    assert demonstrations.column_names == ["prompt", "completion"]
    assert demonstrations[:] == load_demonstrations(20, seed=1)[:]


@pytest.mark.parametrize("task", CHECKPOINTS)
def test_checkpoint_is_what_the_package_says(task):
    tokenizer, built = AutoTokenizer.from_pretrained(CHECKPOINTS[task]), build_tokenizer(TASKS[task].words)
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS[task])
    assert 300_000 < model.num_parameters() < 1_500_000
    assert sum(file.stat().st_size for file in CHECKPOINTS[task].iterdir()) < 2_000_000


@pytest.mark.slow
@pytest.mark.parametrize(("task", "share"), [(NAME, 0.4), (VARIED, 0.4)])
def test_groups_are_mixed(task, share):
    """Most groups of eight hold right and wrong answers: there is something to learn from."""
    model, tokenizer = (auto.from_pretrained(CHECKPOINTS[task]) for auto in (AutoModelForCausalLM, AutoTokenizer))
    scores = score_samples(
        model,
        tokenizer,
        load_prompts("test", 128, task=task),
        answer_reward,
        num_samples=8,
        max_completion_length=TASKS[task].max_completion_length,
    )
    mixed = (scores.mean(1) > 0) & (scores.mean(1) < 1)
    assert scores.mean().item() == pytest.approx(share, abs=0.1)
    assert mixed.float().mean() > 0.7


def test_warm_start_command(tmp_path):
    """The command that made the checkpoint, for two steps."""
    warm_start(tmp_path, seed=1, steps=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(FILES)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("task", CHECKPOINTS)
def test_warm_start_repeats_the_checkpoint(tmp_path, task):
    """The shipped weights are what the command makes (to rounding: processors differ)."""
    warm_start(tmp_path, task=task)
    ours = AutoModelForCausalLM.from_pretrained(CHECKPOINTS[task]).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
        torch.testing.assert_close(value, ours[name], rtol=0.05, atol=0.05)


def test_written_playground(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_playground(tmp_path, num_train=8, num_test=4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").num_parameters() > 1e5
    data = datasets.load_dataset(str(tmp_path / "data"))
    assert {name: len(split) for name, split in data.items()} == {"train": 8, "test": 4}
    for row in data["train"]:
        work, answer = row["answer"].split("#### ")
        assert row["prompt"] == [{"role": "user", "content": row["question"]}]
        assert row["solution"] == f"\\boxed{{{answer}}}"
        assert work.splitlines()[-1].endswith(f"={answer}")
