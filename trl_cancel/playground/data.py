"""The playground's problems as data sets for TRL."""

import random

from datasets import Dataset

from .task import Slips, imitate, sample_problems, solve


def load_prompts(
    split: str = "train", num_problems: int = 4096, seed: int = 0, num_steps: tuple[int, ...] = (3, 4, 5, 6)
) -> Dataset:
    """
    Problems to answer, for reinforcement learning and evaluation.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            One of `"warm_start"`, `"train"`, `"tune"` and `"test"`; no problem is in two of them.
        num_problems (`int`, *optional*, defaults to `4096`):
            Number of problems.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        num_steps (`tuple[int, ...]`, *optional*, defaults to `(3, 4, 5, 6)`):
            Numbers of operations a problem.

    Returns:
        [`~datasets.Dataset`]: Columns `prompt` (a conversation), `solution` (the answer in a box, for math-verify) and
        `response` (the right response, for measures of token credit).
    """
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": problem.prompt}],
                "solution": f"\\boxed{{{problem.answer}}}",
                "response": solve(problem),
            }
            for problem in sample_problems(split, num_problems, seed, num_steps)
        ]
    )


def load_demonstrations(num_problems: int, seed: int = 0, slips: Slips | None = None) -> Dataset:
    """
    The noisy teacher's responses, to imitate in the warm start.

    Args:
        num_problems (`int`):
            Number of problems.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw and of the teacher's slips.
        slips ([`Slips`], *optional*):
            How often the teacher errs; about 40% of the responses are right with the defaults.

    Returns:
        [`~datasets.Dataset`]: Columns `prompt` and `completion`, both conversations.
    """
    rng, slips = random.Random(seed), slips or Slips()
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": problem.prompt}],
                "completion": [{"role": "assistant", "content": imitate(problem, rng, slips)}],
            }
            for problem in sample_problems("warm_start", num_problems, seed)
        ]
    )
