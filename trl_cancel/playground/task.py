"""
The playground's task: chains of additions and subtractions, worked out one line a step.

A problem reads `Compute 8-4+8+7-1.`; the right response is

    8-4=4
    4+8=12
    12+7=19
    19-1=18
    The answer is \\boxed{18}.

The format is fixed, so right and wrong responses of one prompt share most of their tokens, and the first wrong token
of a response is known: a ground truth for token-level credit.
"""

import hashlib
import random
import re
from dataclasses import dataclass


_PROMPT = re.compile(r"Compute (?:from left to right )?(?P<start>\d+)(?P<steps>(?:[-+*]\d+)+)\.")
_DRAWS = 20_000  # without a new problem, after which there is none
SPLITS = {"warm_start": range(50), "train": range(50, 80), "tune": range(80, 90), "test": range(90, 100)}


@dataclass(frozen=True)
class Problem:
    """
    A chain of additions and subtractions whose running total never turns negative.

    Args:
        start (`int`):
            First operand.
        steps (`tuple[tuple[str, int], ...]`):
            The operations in order, each a sign (`"+"` or `"-"`) and an operand.
    """

    start: int
    steps: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, prompt: str) -> "Problem":
        """
        The problem that a prompt poses.

        Raises:
            `ValueError`: If it poses none.
        """
        found = _PROMPT.search(prompt)
        if found is None:
            raise ValueError(f"prompt={prompt!r} poses no problem of the playground, such as 'Compute 8-4+8.'.")
        steps = re.findall(r"([-+*])(\d+)", found["steps"])
        return cls(int(found["start"]), tuple((sign, int(operand)) for sign, operand in steps))

    @property
    def expression(self) -> str:
        """As a text, to be read from left to right."""
        return str(self.start) + "".join(f"{sign}{operand}" for sign, operand in self.steps)

    @property
    def prompt(self) -> str:
        # Without multiplication the order of the operations is the usual one.
        return f"Compute {'from left to right ' if '*' in self.expression else ''}{self.expression}."

    @property
    def answer(self) -> int:
        return self.totals[-1]

    @property
    def totals(self) -> list[int]:
        """The running totals after each step."""
        totals = [self.start]
        for sign, operand in self.steps:
            totals.append(apply(totals[-1], sign, operand))
        return totals[1:]

    @property
    def split(self) -> str:
        """Name of the split that the problem belongs to: a function of its text, so that splits never overlap."""
        bucket = int.from_bytes(hashlib.sha256(self.expression.encode()).digest()[:8], "big") % 100
        return next(name for name, buckets in SPLITS.items() if bucket in buckets)


@dataclass(frozen=True)
class Slips:
    """
    How often the noisy teacher errs, each a probability per step at which the slip can happen.

    Args:
        borrow (`float`, *optional*, defaults to `0.40`):
            The borrow is forgotten: `12-5=17`.
        carry (`float`, *optional*, defaults to `0.25`):
            The carry is forgotten: `8+7=5`.
        other (`float`, *optional*, defaults to `0.08`):
            Anything else: off by one, or the other operation.
    """

    borrow: float = 0.40
    carry: float = 0.25
    other: float = 0.08


def apply(total: int, sign: str, operand: int) -> int:
    return {"+": total + operand, "-": total - operand, "*": total * operand}[sign]


def sample_problem(rng: random.Random, num_steps: int, signs: str = "+-") -> Problem:
    """Draws a problem of `num_steps` of the operations `signs` with operands from 1 to 9 and totals of two digits."""
    total = start = rng.randint(1, 9)
    steps = []
    for _ in range(num_steps):
        operand = rng.randint(1, 9)
        possible = [sign for sign in signs if 0 <= apply(total, sign, operand) < 100]
        sign = rng.choice(possible) if len(possible) > 1 else possible[0]
        total = apply(total, sign, operand)
        steps.append((sign, operand))
    return Problem(start, tuple(steps))


def sample_problems(
    split: str, num_problems: int, seed: int = 0, num_steps: tuple[int, ...] = (3, 4, 5, 6), signs: str = "+-"
) -> list[Problem]:
    """
    Draws distinct problems of one split, in equal numbers of each length where `num_problems` allows it.

    Args:
        split (`str`):
            One of `"warm_start"`, `"train"`, `"tune"` and `"test"`.
        num_problems (`int`):
            Number of problems.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        num_steps (`tuple[int, ...]`, *optional*, defaults to `(3, 4, 5, 6)`):
            Numbers of operations to choose from.
        signs (`str`, *optional*, defaults to `"+-"`):
            Operations to choose from, of `+`, `-` and `*`.

    Raises:
        `ValueError`: If `split` is unknown, or `num_problems` is not positive or more than there are of a length.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not a playground split; use one of {', '.join(SPLITS)}.")
    if num_problems < 1:
        raise ValueError(f"num_problems={num_problems} must be at least 1.")
    rng = random.Random(f"{split}-{seed}")
    problems: dict[Problem, None] = {}  # an ordered set
    for index in range(num_problems):
        length = num_steps[index % len(num_steps)]
        draws = (sample_problem(rng, length, signs) for _ in range(_DRAWS))
        new = next((problem for problem in draws if problem.split == split and problem not in problems), None)
        if new is None:
            raise ValueError(
                f"num_problems={num_problems} is more than the {split!r} split has: {index} were found, then no further "
                f"one of {length} operations. Ask for fewer problems or allow more operations in num_steps={num_steps}."
            )
        problems[new] = None
    return list(problems)


def write_response(problem: Problem, totals: list[int]) -> str:
    """Writes out the response whose running totals after each step are `totals`."""
    lines, total = [], problem.start
    for (sign, operand), result in zip(problem.steps, totals, strict=True):
        lines.append(f"{total}{sign}{operand}={result}")
        total = result
    return "\n".join([*lines, f"The answer is \\boxed{{{total}}}."])


def solve(problem: Problem) -> str:
    """The right response."""
    return write_response(problem, problem.totals)


def imitate(problem: Problem, rng: random.Random, slips: Slips) -> str:
    """A response of the noisy teacher: slips carry through the rest of the trace."""
    return write_response(problem, careless_totals(problem, rng, slips))


def careless_totals(problem: Problem, rng: random.Random, slips: Slips) -> list[int]:
    """The noisy teacher's running totals after each step."""
    totals = [problem.start]
    for sign, operand in problem.steps:
        totals.append(_slip(totals[-1], sign, operand, rng, slips))
    return totals[1:]


def _slip(total: int, sign: str, operand: int, rng: random.Random, slips: Slips) -> int:
    right, ones = apply(total, sign, operand), total % 10
    if sign == "-" and ones < operand <= total and rng.random() < slips.borrow:
        return right + 10
    carries = sign in "+*" and apply(ones, sign, operand) >= 10
    if carries and rng.random() < slips.carry:
        return right - 10
    if rng.random() < slips.other:
        other_operation = apply(total, "-" if sign == "+" else "+", operand)
        return max(0, rng.choice([right - 1, right + 1, other_operation]))
    # After a slip the running total can be smaller than what the problem takes away.
    return max(0, right)


def first_wrong_token(response_ids: list[int], solution_ids: list[int]) -> int | None:
    """
    Index of the first token at which a response leaves the right one, or `None` if it never does.

    Args:
        response_ids (`list[int]`):
            Token ids of the response, without padding.
        solution_ids (`list[int]`):
            Token ids of the right response, ended as the response should end.
    """
    for index, (token, right) in enumerate(zip(response_ids, solution_ids, strict=False)):
        if token != right:
            return index
    return None if len(response_ids) == len(solution_ids) else min(len(response_ids), len(solution_ids))
