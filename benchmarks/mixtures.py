"""The playground's problems at levels of difficulty: what a batch holds too few or too many right answers of."""

from typing import Any

from datasets import Dataset, concatenate_datasets

from trl_cancel.playground.data import load_prompts
from trl_cancel.playground.reward import answer_reward


LENGTHS = {"hopeless": (8, 9, 10), "usual": (3, 4, 5, 6), "solved": (3, 4, 5, 6)}
# Shares of the levels, in tenths.
MIXTURES = {
    "usual": {"usual": 10},
    "half hopeless": {"hopeless": 5, "usual": 5},
    "90% hopeless": {"hopeless": 9, "usual": 1},
    "90% solved": {"solved": 9, "usual": 1},
}


def load_mixture(name: str, num_problems: int = 4096) -> Dataset:
    """Problems for training, with a column `level`."""
    parts = []
    for seed, (level, tenths) in enumerate(MIXTURES[name].items()):
        count = num_problems * tenths // 10
        part = load_prompts("train", count, seed=seed, num_steps=LENGTHS[level])
        parts.append(part.add_column("level", [level] * count))
    return concatenate_datasets(parts)


def level_reward(
    completions: list[list[dict[str, str]]], solution: list[str], level: list[str], **kwargs: Any
) -> list[float]:
    """As the playground's, but that any answer to a problem of the level "solved" counts as right."""
    right = answer_reward(completions, solution)
    return [1.0 if name == "solved" else reward for name, reward in zip(level, right, strict=True)]
