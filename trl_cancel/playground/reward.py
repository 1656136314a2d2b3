"""The playground's reward: is the boxed answer right?"""

import re
from typing import Any

from trl.rewards import accuracy_reward


_FINAL_ANSWER = re.compile(r"\\boxed\{\d+\}\.?\s*$")


def answer_reward(completions: list[list[dict[str, str]]], solution: list[str], **kwargs: Any) -> list[float]:
    """
    1 for a response that ends in the right number in a box, else 0. Math-verify compares the answers.

    Math-verify would also accept `\\boxed{5+2}` for 7, an answer that has not been worked out, so the box must hold a
    number.

    Args:
        completions (`list[list[dict[str, str]]]`):
            The responses, each a list of one message.
        solution (`list[str]`):
            The right answers.
        **kwargs:
            Further columns of the data set; not used.

    Returns:
        `list[float]`: The rewards.
    """
    rewards = accuracy_reward(completions, solution)
    return [
        float(bool(reward) and _FINAL_ANSWER.search(completion[0]["content"]) is not None)
        for reward, completion in zip(rewards, completions, strict=True)
    ]
