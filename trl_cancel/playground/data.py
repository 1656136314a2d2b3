"""The playground's problems as data sets for TRL."""

import random
from dataclasses import replace

from datasets import Dataset

from . import NAME
from .task import solve
from .tasks import task_named


def load_prompts(
    split: str = "train",
    num_problems: int = 4096,
    seed: int = 0,
    num_steps: tuple[int, ...] | None = None,
    task: str = NAME,
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
        num_steps (`tuple[int, ...]`, *optional*):
            Numbers of operations a problem; those of the task if not given.
        task (`str`, *optional*, defaults to `"playground"`):
            Name of the task.

    Returns:
        [`~datasets.Dataset`]: Columns `prompt` (a conversation), `solution` (the answer in a box, for math-verify) and
        `response` (a right response, for measures of token credit).

    Raises:
        `ValueError`: If the split or the task is unknown, or `num_problems` is not positive.
    """
    chosen = task_named(task)
    chosen = replace(chosen, num_steps=num_steps) if num_steps else chosen
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": chosen.prompt(problem)}],
                "solution": f"\\boxed{{{problem.answer}}}",
                "response": solve(problem),
            }
            for problem in chosen.problems(split, num_problems, seed)
        ]
    )


def load_demonstrations(num_problems: int, seed: int = 0, task: str = NAME) -> Dataset:
    """
    The noisy teacher's responses, to imitate in the warm start.

    Args:
        num_problems (`int`):
            Number of problems.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw, of the teacher's slips and of how it writes.
        task (`str`, *optional*, defaults to `"playground"`):
            Name of the task.

    Returns:
        [`~datasets.Dataset`]: Columns `prompt` and `completion`, both conversations.
    """
    rng, chosen = random.Random(seed), task_named(task)
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": chosen.prompt(problem)}],
                "completion": [{"role": "assistant", "content": chosen.imitate(problem, rng)}],
            }
            for problem in chosen.problems("warm_start", num_problems, seed)
        ]
    )
