"""
The entropy filter of GTPO ([2508.03772](https://huggingface.co/papers/2508.03772)): rollouts whose mean entropy is above
a threshold are left out.

Departs from the paper: the threshold holds whatever the entropy at the start of the training, as in the authors' code;
and entropies are those of the policy at its temperature, as TRL's are, where theirs are at temperature 1. Their penalty
on entropy, an offset of the advantage, is not part of this: TRL's `entropy_coef` acts on entropy itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import is_number
from ..batch.protocol import Scope
from ..batch.rollouts import Rollouts
from .conflict import PAPER
from .method import ActiveMethod, Config, Method, Named, Row, documented


def check_threshold(name: str, value: Any) -> None:
    """
    Refuses thresholds that are none.

    Raises:
        `ValueError`: Names the setting.
    """
    if not (is_number(value) and 0 < value < math.inf):
        raise ValueError(f"{name}={value!r} must be a positive number of nats, e.g. 0.7.")


class EntropyFilter:
    """
    Leaves out rollouts of too high an entropy.

    Args:
        max_entropy (`float`):
            Mean entropy over its tokens, in nats, above which a rollout carries no advantage.

    Raises:
        `ValueError`: If it is no positive number.
    """

    scope: Scope = "rollout"
    by_rollout = True
    needs_entropies = True

    def __init__(self, max_entropy: float):
        check_threshold("max_entropy", max_entropy)
        self.max_entropy = max_entropy

    def coefficients(self, rollouts: Rollouts) -> torch.Tensor:
        """Coefficients of shape `(B, 1)`: 1 for rollouts that are kept, else 0."""
        mask = rollouts.mask.bool()
        means = rollouts.entropies.where(mask, 0.0).sum(1) / rollouts.lengths.clamp(min=1)
        counted = mask.any(1).float()
        dropped = means > self.max_entropy
        rollouts.log("entropy_filter/entropy", means, counted)
        rollouts.log("entropy_filter/dropped_fraction", dropped.float(), counted)
        return (~dropped).to(rollouts.advantages.dtype).unsqueeze(1)


@documented
@dataclass
class Settings:
    """
    max_completion_entropy (`float`, *optional*, defaults to `0.0`):
        Mean entropy, in nats, above which a rollout is left out (GTPO's filter), or 0 for no filter; the authors take
        0.7. Source: [2508.03772](https://huggingface.co/papers/2508.03772).
    """

    max_completion_entropy: float = 0.0  # `None` could be no flag, and infinity no JSON


class Filter(Method):
    """Silences whole rollouts by their entropy."""

    Settings = Settings
    switch = "max_completion_entropy"
    neutral = {"max_completion_entropy": 1e9}
    off = 0.0
    row = Row(
        "docs/conflict.md#the-entropy-filter",
        "entropy filter",
        "rollouts whose mean entropy is above it are left out (GTPO)",
        "always",
        "not measured; takes the entropies of a pass, as NTHR takes hidden states",
        paper=PAPER.id,
    )
    named = {
        "entropy-filter": Named(
            {"max_completion_entropy": 0.7}, "rollouts of high entropy are left out, above 0.7 nats", PAPER.id
        )
    }
    logs = ("entropy_filter/",)

    def check(self, args: Config) -> None:
        if self.is_on(args):
            check_threshold("max_completion_entropy", args.max_completion_entropy)

    def active(self, args: Config) -> ActiveMethod:
        return ActiveMethod("Entropy filter", self._does(args), ("entropy-filter",), (PAPER,))

    def _does(self, args: Config) -> str:
        return f"rollouts with a mean entropy above {args.max_completion_entropy:g} are left out"

    def explain(self, args: Config) -> Iterator[tuple[str, str]]:
        if self.is_on(args):
            yield "Credit", f"{self._does(args).capitalize()}."

    def leaks(self, args: Config) -> Iterator[str]:
        if self.is_on(args):
            yield "max_completion_entropy drops members of a group after its advantages are computed."

    def credit(self, args: Config) -> EntropyFilter:
        return EntropyFilter(args.max_completion_entropy)
