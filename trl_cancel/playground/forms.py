"""
Free choices in how a response is written: words that open a line, words for "=", ways to give the answer, and filler.

None of them matters to the reward, so a token of theirs deserves no credit; but responses of one prompt part early and
in many ways, and a prompt has many right ones. These are a regular language, so the first wrong token of a response is
the first after which none of them can be reached.
"""

import random
from dataclasses import dataclass
from string import digits

import regex

from .task import Problem


PLAIN = ("", "=", "The answer is ")  # opener, verb and ending


@dataclass(frozen=True)
class Forms:
    r"""
    The ways in which a response may be written; the teacher draws one of each, with equal probability.

    Args:
        openers (`tuple[str, ...]`, *optional*, defaults to `("",)`):
            What a line may begin with.
        verbs (`tuple[str, ...]`, *optional*, defaults to `("=",)`):
            What may stand before the result of a line.
        endings (`tuple[str, ...]`, *optional*, defaults to `("The answer is ",)`):
            What may stand before the box.
        filler (`int`, *optional*, defaults to `0`):
            Number of random digits in parentheses before each line of work. They have nothing to do with the problem;
            another number of them, or none, does no harm.
    """

    openers: tuple[str, ...] = PLAIN[:1]
    verbs: tuple[str, ...] = PLAIN[1:2]
    endings: tuple[str, ...] = PLAIN[2:]
    filler: int = 0

    @property
    def words(self) -> tuple[str, ...]:
        """Words of these forms that the plain form has none of, each to be one token."""
        choices = [word for word in (*self.openers, *self.verbs, *self.endings) if word not in PLAIN]
        return tuple(dict.fromkeys([*choices, *("()" if self.filler else "")]))

    def write(self, problem: Problem, totals: list[int], rng: random.Random) -> str:
        """Writes out a response whose running totals after each step are `totals`."""
        lines, total = [], problem.start
        for (sign, operand), result in zip(problem.steps, totals, strict=True):
            if self.filler:
                lines.append(f"({''.join(rng.choices(digits, k=self.filler))})")
            lines.append(f"{_one(self.openers, rng)}{total}{sign}{operand}{_one(self.verbs, rng)}{result}")
            total = result
        return "\n".join([*lines, f"{_one(self.endings, rng)}\\boxed{{{total}}}."])

    def bare(self, response: str) -> str:
        """A response without its filler."""
        return regex.sub(r"\(\d*\)\n", "", response) if self.filler else response

    def right_responses(self, problem: Problem) -> "regex.Pattern[str]":
        """All right responses to a problem, as a regular expression."""
        filler = r"(?:\(\d*\)\n)?" if self.filler else ""
        lines, total = "", problem.start
        for (sign, operand), result in zip(problem.steps, problem.totals, strict=True):
            work = regex.escape(f"{total}{sign}{operand}")
            lines += f"{filler}{_any(self.openers)}{work}{_any(self.verbs)}{result}\\n"
            total = result
        return regex.compile(lines + _any(self.endings) + regex.escape(f"\\boxed{{{total}}}."))

    def first_wrong_token(self, problem: Problem, tokens: list[str]) -> int | None:
        """
        Index of the first token after which no right response can be reached, or `None` if the response is one.

        Args:
            problem ([`~trl_cancel.playground.task.Problem`]):
                The problem.
            tokens (`list[str]`):
                Texts of the tokens of a response, without the one that ends it.

        Returns:
            `int`, *optional*: `len(tokens)` for a response that ends too early: the wrong token is the one that ends it.
        """
        right, text = self.right_responses(problem), "".join(tokens)
        if right.fullmatch(text):
            return None
        length = 0
        for index, token in enumerate(tokens):
            length += len(token)
            if not right.fullmatch(text[:length], partial=True):
                return index
        return len(tokens)


def _one(words: tuple[str, ...], rng: random.Random) -> str:
    return rng.choice(words) if len(words) > 1 else words[0]  # no draw where there is no choice


def _any(words: tuple[str, ...]) -> str:
    return f"(?:{'|'.join(map(regex.escape, words))})"
