"""
What arguments must be, each rule written once: the configuration, the classes and the public functions share them.

[`finite`], [`known`] and those after them look at what a tensor holds, and so does [`marks`] unless its type says it
already; for that a GPU must be waited for. The formulas that training calls at every step do without: there a number
that is not one gives results that are none.
"""

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy
import torch


# Single values


def is_number(value: Any) -> bool:
    """Whether it is a number of Python's or NumPy's, `nan` included, and no `bool`."""
    return isinstance(value, (int, float, numpy.integer, numpy.floating)) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, and no `bool`."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_factor(value: Any) -> bool:
    """Whether it is a number, or spells one, that advantages can be multiplied with."""
    try:
        return not isinstance(value, bool) and 0 <= float(value) < float("inf")
    except (TypeError, ValueError):
        return False


def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """
    Refuses what is not among the choices.

    Raises:
        `ValueError`: Names them.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")


def whole(name: str, value: Any, least: int, most: int | None = None, what: str = "") -> int:
    """
    A whole number within bounds.

    Args:
        name (`str`):
            Name of the argument.
        value (`Any`):
            Its value.
        least (`int`):
            Least that is allowed.
        most (`int`, *optional*):
            Most that is allowed.
        what (`str`, *optional*):
            What `most` is.

    Raises:
        `ValueError`: If it is none.
    """
    number = int(value) if is_whole(value) else None
    if number is None or number < least or (most is not None and number > most):
        if most is None:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")
        kind = "" if number is not None else ", and a whole number"
        raise ValueError(f"{name}={value!r} must be between {least} and {what}{most}{kind}.")
    return number


def not_negative(name: str, value: Any, example: str) -> None:
    """
    Refuses what is not a number of at least 0.

    Raises:
        `ValueError`: Gives the example.
    """
    if not (is_number(value) and value >= 0):
        raise ValueError(f"{name}={value!r} must not be negative, but a number such as {example}.")


def positive(name: str, value: Any, example: str) -> None:
    """
    Refuses what is not a positive finite number.

    Raises:
        `ValueError`: Gives the example.
    """
    if not (is_number(value) and 0 < value < float("inf")):
        raise ValueError(f"{name}={value!r} must be a positive number, e.g. {example}.")


# Tensors


def floats(**values: Any) -> list[torch.Tensor]:
    """
    Tensors of real numbers: what is one already stays as it is; whole numbers, `bool`, bare numbers and lists become
    one, in the type that the others have.

    Raises:
        `ValueError`: If one is neither.
    """
    tensors = {name: _tensor(name, value) for name, value in values.items()}
    given = [tensor.dtype for name, tensor in tensors.items() if _is_floating(values[name])]
    dtype = _common(given) if given else torch.get_default_dtype()
    return [
        tensor if _is_floating(values[name]) else _tensor(name, values[name], dtype)
        for name, tensor in tensors.items()
    ]


def doubles(**values: Any) -> list[torch.Tensor]:
    """
    Tensors of type `torch.double`.

    Raises:
        `ValueError`: If one cannot be a tensor.
    """
    return [_tensor(name, value, torch.double) for name, value in values.items()]


def marks(**values: Any) -> list[torch.Tensor]:
    """
    Tensors of type `bool`, of ones and zeros. What is of that type already is not looked at.

    Raises:
        `ValueError`: If one holds something else, such as weights.
    """
    tensors = {name: _tensor(name, value) for name, value in values.items()}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bool:
            _refuse(name, tensor, (tensor != 0) & (tensor != 1), "0 or 1")
    return [tensor.bool() for tensor in tensors.values()]


def whole_numbers(**values: Any) -> list[torch.Tensor]:
    """
    Tensors of whole numbers, such as token ids.

    Raises:
        `ValueError`: If one holds others.
    """
    tensors = []
    for name, value in values.items():
        tensor = _tensor(name, value)
        if tensor.numel() and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise ValueError(f"{name} must hold whole numbers, such as torch.long; its type is {tensor.dtype}.")
        tensors.append(tensor.long())
    return tensors


def shaped(**arguments: tuple[torch.Tensor, str]) -> None:
    """
    Refuses tensors whose shapes do not fit together, instead of stretching them.

    Args:
        **arguments (`tuple[torch.Tensor, str]`):
            Tensors and their dimensions: one letter means one size in all of them, and a leading `...` any dimensions.

    Raises:
        `ValueError`: Names both shapes.

    Example:

    ```python
    >>> shaped(hidden=(torch.zeros(4, 8), "N d"), logps=(torch.zeros(3), "N"))
    ValueError: logps of shape (3,) does not fit hidden of shape (4, 8): logps has the shape (N) and hidden (N d).
    ```
    """
    sizes: dict[str, tuple[Any, str]] = {}
    for name, (tensor, dims) in arguments.items():
        letters = dims.split()
        shape: list[Any] = list(tensor.shape)
        if letters[0] == "...":
            free = len(shape) - len(letters) + 1
            shape = [tuple(shape[:free]), *shape[free:]] if free >= 0 else []
        if len(shape) != len(letters):
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, where {_named(dims)} is expected.")
        for letter, size in zip(letters, shape, strict=True):
            known, first = sizes.setdefault(letter, (size, name))
            if known != size:
                other, of_other = arguments[first]
                raise ValueError(
                    f"{name} of shape {tuple(tensor.shape)} does not fit {first} of shape {tuple(other.shape)}: "
                    f"{name} is {_named(dims)} and {first} {_named(of_other)}."
                )


def stretch(**tensors: torch.Tensor) -> None:
    """
    Refuses tensors that do not broadcast.

    Raises:
        `ValueError`: Names the shapes.
    """
    try:
        torch.broadcast_shapes(*(tensor.shape for tensor in tensors.values()))
    except RuntimeError:
        shapes = " and ".join(f"{name} of shape {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"{shapes} do not broadcast.") from None


def finite(counted: torch.Tensor | None = None, /, **tensors: torch.Tensor) -> None:
    """
    Refuses tensors that hold `nan` or infinite numbers.

    Args:
        counted (`torch.Tensor` of type `bool`, *optional*):
            The places that count, broadcastable with the tensors; by default, all.
        **tensors (`torch.Tensor`):
            The tensors.

    Raises:
        `ValueError`: Names the first of them.
    """
    for name, tensor in tensors.items():
        wrong = ~tensor.isfinite()
        _refuse(name, tensor, wrong if counted is None else wrong & counted, "finite")


def known(**tensors: torch.Tensor) -> None:
    """
    Refuses tensors that hold `nan`.

    Raises:
        `ValueError`: Names the first of them.
    """
    for name, tensor in tensors.items():
        _refuse(name, tensor, tensor.isnan(), "a number")


def uncertain(**tensors: torch.Tensor) -> None:
    """
    Refuses probabilities of 1, and what is none.

    Raises:
        `ValueError`: Names the first of them.
    """
    for name, tensor in tensors.items():
        _refuse(name, tensor, ~((tensor >= 0) & (tensor < 1)), "at least 0 and below 1")


def shares(**tensors: torch.Tensor) -> None:
    """
    Refuses what is no share, from 0 to 1.

    Raises:
        `ValueError`: Names the first of them.
    """
    for name, tensor in tensors.items():
        _refuse(name, tensor, ~((tensor >= 0) & (tensor <= 1)), "between 0 and 1")


def log_probabilities(**tensors: torch.Tensor) -> None:
    """
    Refuses what is no log-probability: above 0 by more than rounding, or `nan`.

    Raises:
        `ValueError`: Names the first of them.
    """
    for name, tensor in tensors.items():
        _refuse(
            name,
            tensor,
            ~(tensor <= 64 * torch.finfo(tensor.dtype).eps),
            "0 or less, as logarithms of probabilities are",
        )


def within(size: int | None, **tensors: torch.Tensor) -> None:
    """
    Refuses indices from outside 0 to `size` - 1, of which negative ones would count from the end; without a size all
    that are not negative are right.

    Raises:
        `ValueError`: Names the first of them.
    """
    for name, tensor in tensors.items():
        if size is None:
            _refuse(name, tensor, tensor < 0, "0 or more")
        else:
            _refuse(name, tensor, (tensor < 0) | (tensor >= size), f"between 0 and {size - 1}")


def _refuse(name: str, tensor: torch.Tensor, wrong: torch.Tensor, wanted: str) -> None:
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        value = tensor[tuple(place)].item()
        where = f"[{', '.join(map(str, place))}]" if place else ""
        raise ValueError(f"{name}{where}={value} must be {wanted}.")


def _tensor(name: str, value: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}={_short(value)} must be a tensor of numbers.") from None
    if tensor.is_complex():
        raise ValueError(f"{name} must hold real numbers; its type is {tensor.dtype}.")
    return tensor


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    first, *others = dtypes
    for other in others:
        first = torch.promote_types(first, other)
    return first


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _named(dims: str) -> str:
    return f"({', '.join(dims.split())})"


# Precision


def single(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in one type, of 32 bits or more: half precision neither adds up nor multiplies far."""
    dtype = _common([*(tensor.dtype for tensor in tensors), torch.float32])
    return [tensor.to(dtype) for tensor in tensors]


def common(*tensors: torch.Tensor) -> torch.dtype:
    """The type in which an operation on them would give its result."""
    return _common(tensor.dtype for tensor in tensors)


def to_one(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Values brought to a magnitude of about one along a dimension, so that their squares neither overflow nor vanish. By
    a power of two, which loses no digit.

    Returns:
        `tuple`: The values, and what to multiply them with to have them back; 1 where all are 0.
    """
    if values.size(dim) == 0:
        return values, values.sum(dim, keepdim=True)
    largest = values.detach().abs().amax(dim, keepdim=True)
    furthest = -math.log2(torch.finfo(values.dtype).tiny)
    scale = largest.log2().floor().clamp(-furthest, furthest).exp2()
    return values / scale, scale.where(largest > 0, 1.0)
