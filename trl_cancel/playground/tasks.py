"""The playground's tasks: which problems, how careless the teacher, and how freely a response is written."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from . import NAME, RICH, VARIED
from .forms import Forms
from .task import Problem, Slips, careless_totals, sample_problem, sample_problems


@dataclass(frozen=True)
class Task:
    """
    A task.

    Args:
        num_steps (`tuple[int, ...]`, *optional*, defaults to `(3, 4, 5, 6)`):
            Numbers of operations, in equal parts.
        signs (`str`, *optional*, defaults to `"+-"`):
            Operations.
        slips ([`~trl_cancel.playground.task.Slips`], *optional*):
            How often the teacher errs.
        forms ([`~trl_cancel.playground.forms.Forms`], *optional*):
            How responses may be written.
        distractors (`int`, *optional*, defaults to `0`):
            Expressions in the prompt that have nothing to do with the problem.
        architecture (`dict[str, int]`, *optional*):
            Entries of the model's configuration that differ from the playground's.
        max_completion_length (`int`, *optional*, defaults to `64`):
            Tokens that a response is given; one in a thousand takes more at most.
        warm_start_steps (`int`, *optional*, defaults to `600`):
            Optimizer steps of 32 responses after which a model imitates the teacher.
        warm_start_learning_rate (`float`, *optional*, defaults to `5e-3`):
            Highest learning rate of these steps.
    """

    num_steps: tuple[int, ...] = (3, 4, 5, 6)
    signs: str = "+-"
    slips: Slips = field(default_factory=Slips)
    forms: Forms = field(default_factory=Forms)
    distractors: int = 0
    architecture: Mapping[str, int] = field(default_factory=dict)
    max_completion_length: int = 64
    warm_start_steps: int = 600
    warm_start_learning_rate: float = 5e-3

    @property
    def words(self) -> tuple[str, ...]:
        """What the tokenizer must know beside digits, `+`, `-`, `=` and the words of the plain form."""
        multiplication = ("*", "from left to right ") if "*" in self.signs else ()
        return (*self.forms.words, *multiplication, *(("Ignore",) if self.distractors else ()))

    def problems(self, split: str, num_problems: int, seed: int = 0) -> list[Problem]:
        """Distinct problems of a split, as [`~trl_cancel.playground.task.sample_problems`] draws them."""
        return sample_problems(split, num_problems, seed, self.num_steps, self.signs)

    def prompt(self, problem: Problem) -> str:
        """What poses the problem, after the distractors, which are a function of it."""
        rng = random.Random(problem.expression)
        others = [sample_problem(rng, rng.randint(2, 4), self.signs).expression for _ in range(self.distractors)]
        return "".join(f"Ignore {other}. " for other in others) + problem.prompt

    def imitate(self, problem: Problem, rng: random.Random) -> str:
        """A response of the noisy teacher."""
        return self.forms.write(problem, careless_totals(problem, rng, self.slips), rng)


_FREE = Forms(("", "Then "), ("=", " is "), ("The answer is ", "So ", ""), filler=6)
# 38 million parameters.
_LARGE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
TASKS = {
    NAME: Task(),
    # Most of the entropy is in what has nothing to do with the problem.
    VARIED: Task(
        num_steps=(3, 4),
        slips=Slips(borrow=0.45, carry=0.35, other=0.1),
        forms=_FREE,
        max_completion_length=88,
        warm_start_steps=900,
    ),
    RICH: Task(
        num_steps=(6, 8, 10, 12),
        signs="+-*",
        slips=Slips(borrow=0.45, carry=0.1, other=0.01),
        forms=_FREE,
        distractors=2,
        architecture=_LARGE,
        max_completion_length=248,
        warm_start_steps=4000,
        warm_start_learning_rate=1e-3,
    ),
}


def task_named(name: str) -> Task:
    """
    The task of that name.

    Raises:
        `ValueError`: If there is none.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r} is not a task of the playground; use one of {', '.join(TASKS)}.")
    return TASKS[name]
