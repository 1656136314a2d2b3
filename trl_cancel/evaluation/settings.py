"""How an evaluation answers its problems."""

import math
from dataclasses import dataclass
from typing import Any

from ..arguments import is_number


@dataclass(frozen=True)
class EvaluationSettings:
    """
    How problems are answered and what counts as right.

    Args:
        num_samples (`int`, *optional*, defaults to `8`):
            Sampled answers a problem, n of avg@n and pass@k; `0` for greedy answers alone.
        greedy (`bool`, *optional*, defaults to `True`):
            Whether to give each problem one greedy answer too.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the sampled answers.
        top_p (`float`, *optional*, defaults to `1.0`):
            Tokens are drawn from the fewest whose probabilities reach this sum.
        top_k (`int`, *optional*, defaults to `0`):
            Tokens are drawn from this many of the most likely ones; `0` for all.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Longest answer, in tokens.
        score_truncated (`bool`, *optional*, defaults to `False`):
            Whether answers that were cut off at this length are scored like the others. Otherwise they are wrong and
            get 0, or their reward if that is less.
        pass_at_k (`tuple[int, ...]`, *optional*):
            Numbers of tries k of pass@k; 1, 2, 4, ... and `num_samples` if not given.
        pass_threshold (`float`, *optional*, defaults to `1.0`):
            An answer is correct, for pass@k, from this reward on. One without a reward never is.
        chat_template_kwargs (`dict`, *optional*):
            Arguments for the chat template, such as `{"enable_thinking": False}`. [`EvaluationCallback`] takes those of
            the training if not given.
        seed (`int`, *optional*, defaults to `0`):
            Each answer has a seed of its own, made of this one, its problem and its number.

    Raises:
        `ValueError`: If a value makes no sense.
    """

    num_samples: int = 8
    greedy: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_completion_length: int = 256
    score_truncated: bool = False
    pass_at_k: tuple[int, ...] | None = None
    pass_threshold: float = 1.0
    seed: int = 0
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "top_k", "max_completion_length", "seed"):
            _check_whole(name, getattr(self, name))
        for name, least in (("num_samples", 0), ("top_k", 0), ("max_completion_length", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}.")
        if not self.num_samples and not self.greedy:
            raise ValueError("num_samples=0 with greedy=False: there would be nothing to evaluate.")
        if not (is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise ValueError(
                f"temperature={self.temperature!r}: must be positive. For greedy answers alone set num_samples=0."
            )
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p={self.top_p!r}: must be above 0 and at most 1.")
        if not (is_number(self.pass_threshold) and math.isfinite(self.pass_threshold)):
            raise ValueError(f"pass_threshold={self.pass_threshold!r}: must be a finite number.")
        if not isinstance(self.chat_template_kwargs, dict | None):
            raise ValueError(
                f"chat_template_kwargs={self.chat_template_kwargs!r}: must be a dictionary, such as "
                '{"enable_thinking": False}.'
            )
        for k in self.pass_at_k or ():
            _check_whole("pass_at_k", k)
            if not 1 <= k <= self.num_samples:
                raise ValueError(f"pass_at_k={k}: must be between 1 and num_samples={self.num_samples}.")

    @property
    def tries(self) -> list[int]:
        """The numbers of tries k that pass@k is estimated for."""
        if self.pass_at_k is not None:
            return sorted(set(self.pass_at_k))
        powers = [2**power for power in range(self.num_samples.bit_length())]
        return sorted({*powers, self.num_samples}) if self.num_samples else []


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r}: must be a whole number.")
