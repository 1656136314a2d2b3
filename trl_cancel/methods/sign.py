"""Controls: credits whose only purpose is to show what the others owe to something simpler."""

import torch

from ..arguments import one_of
from ..batch.protocol import Scope
from ..batch.rollouts import Rollouts


SIGNS = ("both", "positive", "negative")


class SignControl:
    """
    Keeps the rollouts of one sign of advantage and silences the others: "positive-only" and "negative-only" of
    [2605.08666](https://huggingface.co/papers/2605.08666) (Appendix E.1).

    Nothing cancels then, which is what makes it a control.

    Args:
        sign (`str`):
            `"positive"`, `"negative"` or `"both"`.

    Raises:
        `ValueError`: If it is none of these.
    """

    scope: Scope = "rollout"

    def __init__(self, sign: str):
        one_of("sign", sign, SIGNS)
        self.sign = sign

    def coefficients(self, rollouts: Rollouts) -> torch.Tensor:
        """Coefficients of shape `(B, 1)`: 1 for the sign that is kept and for advantage 0, else 0."""
        silenced = {
            "both": torch.zeros_like(rollouts.advantages, dtype=torch.bool),
            "positive": rollouts.advantages < 0,
            "negative": rollouts.advantages > 0,
        }[self.sign]
        return (~silenced).to(rollouts.advantages.dtype).unsqueeze(1)
