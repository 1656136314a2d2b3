"""Math-Verify as the judge of answers."""

from typing import Any

from trl.rewards import accuracy_reward


def math_verify_reward(completions: list[Any], solution: list[Any], **columns: Any) -> list[float | None]:
    """
    1 for a right answer, else 0, as TRL's [`~trl.rewards.accuracy_reward`] judges it with Math-Verify. Answers may be
    texts or conversations, solutions a boxed answer or a bare one, of any type; a list of them stands for several
    values, all of which are asked for.

    Args:
        completions (`list`):
            The answers.
        solution (`list`):
            The right answers.
        **columns:
            Further columns; not used.

    Returns:
        `list[float | None]`: The rewards; `None` where the judge failed: it cannot read the solution, or raised.
    """
    return [_judge(completion, right) for completion, right in zip(completions, solution, strict=True)]


def boxed(solution: Any) -> str:
    r"""A solution as `\boxed{...}`, which Math-Verify reads whatever is in it."""
    values = [str(value).strip() for value in (solution if isinstance(solution, list) else [solution])]
    if any("\\boxed" in value for value in values):
        return " ".join(values)
    return f"\\boxed{{{', '.join(map(_without_dollars, values))}}}"


def _without_dollars(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == "$" and text.count("$") == 2 else text


def _judge(completion: Any, solution: Any) -> float | None:
    answer = completion if isinstance(completion, str) else completion[-1]["content"]
    try:
        return accuracy_reward([[{"role": "assistant", "content": answer}]], [boxed(solution)])[0]
    except Exception:  # of a parser of LaTeX and an algebra system, on text that a model made up
        return None
