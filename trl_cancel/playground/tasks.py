"""The playground's tasks: which problems, how careless the teacher, and how freely a response is written."""

import random
from dataclasses import dataclass, field

from . import NAME, VARIED
from .forms import Forms
from .task import Problem, Slips, careless_totals, sample_problems


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
        max_completion_length (`int`, *optional*, defaults to `64`):
            Tokens that the longest response takes, at least.
        warm_start_steps (`int`, *optional*, defaults to `600`):
            Optimizer steps of 32 responses after which a model imitates the teacher.
    """

    num_steps: tuple[int, ...] = (3, 4, 5, 6)
    signs: str = "+-"
    slips: Slips = field(default_factory=Slips)
    forms: Forms = field(default_factory=Forms)
    max_completion_length: int = 64
    warm_start_steps: int = 600

    @property
    def words(self) -> tuple[str, ...]:
        """What the tokenizer must know beside digits, `+`, `-`, `=` and the words of the plain form."""
        multiplication = ("*", "from left to right ") if "*" in self.signs else ()
        return (*self.forms.words, *multiplication)

    def problems(self, split: str, num_problems: int, seed: int = 0) -> list[Problem]:
        """Distinct problems of a split, as [`~trl_cancel.playground.task.sample_problems`] draws them."""
        return sample_problems(split, num_problems, seed, self.num_steps, self.signs)

    def imitate(self, problem: Problem, rng: random.Random) -> str:
        """A response of the noisy teacher."""
        return self.forms.write(problem, careless_totals(problem, rng, self.slips), rng)


_FREE = Forms(("", "Then ", "So "), ("=", " is "), ("The answer is ", "So ", ""), aside=0.2)
TASKS = {
    NAME: Task(),
    # Slips are rare but for the borrow, which is forgotten more often than not: decoding greedily does not avoid it.
    VARIED: Task(
        (4, 5, 6, 7), slips=Slips(0.6, 0.1, 0.01), forms=_FREE, max_completion_length=104, warm_start_steps=700
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
