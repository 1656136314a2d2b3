"""What reward functions return, checked before TRL makes numbers of it."""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import isawaitable
from numbers import Complex, Real
from typing import Any

import numpy
import torch

from ..upstream.trl import is_async_callable


LARGEST = torch.finfo(torch.float32).max  # TRL keeps rewards in single precision


class RewardError(ValueError):
    """A reward function has returned what cannot be used."""


def checked(function: Any, name: str) -> Any:
    """
    A reward function that refuses what is not one finite number, or `None`, a completion.

    `None` says that the function does not apply to a completion, and is left to TRL: the other functions decide, and a
    completion to which none applies has no advantage. `nan` would be taken for `None` without a word, and an infinite
    reward leaves a whole group without an advantage.

    Args:
        function (`Callable` or [`~torch.nn.Module`]):
            Function, coroutine function or reward model; the latter is returned as it is, see [`check_values`].
        name (`str`):
            Its name in the logs.

    Returns:
        `Callable`: Called the same way, it returns the same values, as a list of numbers.

    Raises:
        [`RewardError`]: When called, if what is returned cannot be used; the message names function, row and value.
    """
    if isinstance(function, torch.nn.Module):
        return function
    if is_async_callable(function):

        @wraps(function)
        async def call_async(*args: Any, **kwargs: Any) -> list[float | None]:
            try:
                values = await function(*args, **kwargs)
            except Exception as error:
                _say_whose(error, name)
                raise
            return check_values(values, len(kwargs["completions"]), name)

        return call_async

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> list[float | None]:
        try:
            values = function(*args, **kwargs)
        except Exception as error:
            _say_whose(error, name)
            raise
        return check_values(values, len(kwargs["completions"]), name)

    return call


def check_values(values: Any, expected: int, name: str) -> list[float | None]:
    """
    What a reward function has returned, as a list of numbers: those that TRL would make of it.

    Args:
        values (`Any`):
            What it has returned.
        expected (`int`):
            Number of completions.
        name (`str`):
            Name of the function.

    Raises:
        [`RewardError`]: If there are too few or too many, or one of them is not a finite number or `None`.
    """
    source = f"The reward function {name!r}"
    if isawaitable(values):
        close: Callable[[], None] = getattr(values, "close", lambda: None)
        close()  # Python would warn that nobody has waited for it
        raise RewardError(f"{source} returned a coroutine: define it with `async def`, so that it is waited for.")
    if getattr(values, "ndim", 1) == 0:
        raise RewardError(f"{source} returned a single number, but {expected} were expected, one a completion.")
    rewards = listed(values)
    if rewards is None:
        raise RewardError(
            f"{source} returned {_shown(values)}, but a list of {expected} numbers was expected, one a completion."
        )
    if len(rewards) != expected:
        raise RewardError(
            f"{source} returned {len(rewards)} values, but {expected} were expected, one a completion. Return None for "
            "completions that it does not apply to."
        )
    return [None if value is None else _finite(value, row, expected, source) for row, value in enumerate(rewards)]


def listed(values: Any) -> list[Any] | None:
    """What a reward function has returned as a list, also of an array or a generator; `None` if there is no order."""
    if isinstance(values, str | bytes | dict | set) or getattr(values, "ndim", 1) == 0:
        return None
    return list(values) if hasattr(values, "__iter__") else None


def number_of(value: Any) -> float:
    """
    The number that TRL makes of one reward: of anything that Python makes a float of, and of tensors and arrays that
    hold a single element.

    Args:
        value (`Any`):
            What a reward function has returned for a completion.

    Raises:
        `ValueError`: If it is none; the message says why.
    """
    holds_one = isinstance(value, torch.Tensor | numpy.ndarray) and math.prod(value.shape) == 1
    scalar = value.item() if holds_one and not numpy.ma.is_masked(value) else value
    if isinstance(scalar, str | bytes) or (isinstance(scalar, Complex) and not isinstance(scalar, Real)):
        raise ValueError(f"a {type(value).__name__} is not a number")
    try:
        return math.nan if numpy.ma.is_masked(scalar) else float(scalar)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf
    except Exception as error:  # whatever the type's own conversion raises
        raise ValueError(f"a {type(value).__name__} is not a number") from error


def _finite(value: Any, row: int, expected: int, source: str) -> float:
    """One reward, which must be a number in single precision."""
    try:
        number = number_of(value)
        if math.isnan(number):
            raise ValueError("it is not a number")
        if abs(number) > LARGEST:
            raise ValueError("it is not finite in single precision")
    except ValueError as error:
        raise RewardError(
            f"{source} returned {_shown(value)} for completion {row} of {expected}: {error}. Return a number, or None "
            "where it does not apply."
        ) from error
    return number


def check_models(rewards: torch.Tensor, functions: Sequence[Any], names: Sequence[str]) -> None:
    """
    Refuses scores of reward models that are not finite.

    Args:
        rewards (`torch.Tensor` of shape `(B, F)`):
            Rewards of all processes.
        functions (`Sequence`):
            The F reward functions, some of them models.
        names (`Sequence[str]`):
            Their names.

    Raises:
        [`RewardError`]: If a model's score is `nan` or infinite.
    """
    for column, function, name in zip(rewards.T, functions, names, strict=True):
        if isinstance(function, torch.nn.Module) and not column.isfinite().all():
            row = int((~column.isfinite()).nonzero()[0])
            raise RewardError(
                f"The reward model {name!r} scored completion {row} of {len(column)} with {column[row].item()}, which "
                "is not a finite number. Load it in another precision, or look for inputs that are longer than it takes."
            )


def _say_whose(error: Exception, name: str) -> None:
    error.add_note(f"Raised by the reward function {name!r}.")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes out no whole numbers of thousands of digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def at_the_mean(rewards: torch.Tensor, weights: torch.Tensor, apart: bool = False) -> torch.Tensor:
    """
    The rollouts whose advantage is 0 but for rounding, which has a sign: their reward is the mean of their group's.

    Args:
        rewards (`torch.Tensor` of shape `(M, G, F)`):
            Values of F reward functions; `nan` where a function gave none.
        weights (`torch.Tensor` of shape `(F,)`):
            Weights of the functions.
        apart (`bool`, *optional*, defaults to `False`):
            Whether each function is normalised on its own.

    Returns:
        `torch.Tensor` of shape `(M, G)` and type `bool`.
    """
    exact = rewards.double()
    spread = exact - exact.nanmean(1, keepdim=True)
    largest = exact.abs().nan_to_num().amax(1, keepdim=True)  # (M, 1, F)
    if apart:
        known = (~exact.isnan()).sum(1, keepdim=True)
        deviation = (spread.square().nansum(1, keepdim=True) / (known - 1).clamp(min=1)).sqrt() + 1e-4  # as TRL's
        spread, largest = spread / deviation, largest / deviation
        sums = (spread * weights).nansum(-1)
    else:
        total = (exact * weights).nansum(-1).masked_fill(exact.isnan().all(-1), torch.nan)
        sums = total - total.nanmean(1, keepdim=True)
    rounding = 2 * torch.finfo(torch.float32).eps * (largest * weights.abs()).sum(-1)
    return sums.nan_to_num().abs() <= rounding  # a rollout without a reward has no advantage
