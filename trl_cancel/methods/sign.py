"""
Sign controls ([2605.08666](https://huggingface.co/papers/2605.08666), Appendix E.1): only rollouts of one sign of the
advantage are learned from, to show what the other methods owe to something simpler.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..arguments import one_of
from ..batch.protocol import Scope
from ..batch.rollouts import Rollouts
from ..papers import CANCELLATION
from .method import ActiveMethod, Config, Method, Named, Row, documented


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
    by_rollout = True

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


@documented
@dataclass
class Settings:
    """
    > Parameters that control credit

    advantage_sign (`str`, *optional*, defaults to `"both"`):
        Rollouts to learn from. Source: Appendix E.1 of [2605.08666](https://huggingface.co/papers/2605.08666). One of:

        - `"both"`: all of them.
        - `"positive"`: those of positive advantage, a control in which nothing cancels.
        - `"negative"`: those of negative advantage, likewise.
    """

    advantage_sign: str = "both"


class AdvantageSign(Method):
    """Leaves out the rollouts of one sign."""

    Settings = Settings
    switch = "advantage_sign"
    off = "both"
    row = Row(
        "docs/credit.md#sign-controls",
        "sign controls",
        "learns from one sign only, as a control",
        "always",
        "nothing",
        "{Pos Only}",
        CANCELLATION.id,
    )
    named = {
        "positive-only": Named({"advantage_sign": "positive"}, "control: bad rollouts left out", CANCELLATION.id),
        "negative-only": Named({"advantage_sign": "negative"}, "control: good rollouts left out", CANCELLATION.id),
    }

    def active(self, args: Config) -> ActiveMethod:
        sign = args.advantage_sign
        does = f"only rollouts with {sign} advantages are learned from"
        return ActiveMethod("One sign only", does, (f"{sign}-only",), (CANCELLATION,))

    def explain(self, args: Config) -> Iterator[tuple[str, str]]:
        yield (
            "Credit",
            {
                "both": "Every token carries the advantage of its rollout.",
                "positive": "Rollouts of negative advantage are left out, so nothing cancels.",
                "negative": "Rollouts of positive advantage are left out, so nothing cancels.",
            }[args.advantage_sign],
        )

    def leaks(self, args: Config) -> Iterator[str]:
        if self.is_on(args):
            yield f"advantage_sign={args.advantage_sign!r} leaves no opposite pushes to cancel."

    def credit(self, args: Config) -> SignControl:
        return SignControl(args.advantage_sign)
