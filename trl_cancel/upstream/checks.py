"""Compares what is installed with what `names.py` declares, by features and not by numbers of versions."""

import dis
import inspect
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from .names import ATTRIBUTES, FUNCTIONS, METHODS, RETURNS


VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def differences(trainer: type, functions: dict[str, Callable[..., Any]]) -> Iterator[str]:
    """
    What is not as declared, each as the beginning of a sentence.

    Args:
        trainer (`type`):
            [`~trl.GRPOTrainer`].
        functions (`dict[str, Callable]`):
            TRL's functions that are used, by name.
    """
    for name, expected in METHODS.items():
        method = getattr(trainer, name, None)
        if method is None:
            yield f"GRPOTrainer.{name} is gone"
        elif not _takes(method, expected):
            found = list(inspect.signature(method).parameters)[: len(expected)] if callable(method) else "no arguments"
            yield f"GRPOTrainer.{name} takes {found}, expected {expected}"
    for name, arity in RETURNS.items():
        annotation = inspect.signature(getattr(trainer, name, lambda: None)).return_annotation
        if (
            not (annotation is inspect.Signature.empty or isinstance(annotation, str))
            and len(getattr(annotation, "__args__", ())) != arity
        ):
            yield f"GRPOTrainer.{name} returns {annotation}, expected {arity} values"
    for name, (given, named) in FUNCTIONS.items():
        try:
            inspect.signature(functions[name]).bind(*[None] * given, **dict.fromkeys(named))
        except TypeError as error:
            yield f"{name}() is called otherwise ({error})"
    lacking = ATTRIBUTES.keys() - _names_of(trainer)
    if lacking:
        yield f"GRPOTrainer has no {', '.join(sorted(lacking))}"


def names_in_both(own: type, trainer: type) -> list[str]:
    """
    Names that classes of this package have given to something of their own, and that TRL's trainer has too by now.

    Args:
        own (`type`):
            The trainer of this package.
        trainer (`type`):
            [`~trl.GRPOTrainer`].
    """
    classes = own.__mro__[: own.__mro__.index(trainer)]
    package = __name__.partition(".")[0]
    ours = [cls for cls in classes if cls.__module__.partition(".")[0] == package]
    defined = {name for cls in ours for name in vars(cls) if not name.startswith("__")}
    overridden = {name for name in defined if any("super" in _code_names(vars(cls).get(name)) for cls in ours)}
    stored = {name for cls in ours for name in set_by(cls)}
    return sorted(((defined - overridden) | stored) & _names_of(trainer) - {*METHODS, *ATTRIBUTES})


def set_by(cls: type) -> set[str]:
    """
    Names of the attributes that the methods of a class set on their object.

    Args:
        cls (`type`):
            The class.
    """
    names = set()
    for value in vars(cls).values():
        value = value.fset if isinstance(value, property) else value
        code = getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
        if not inspect.iscode(code) or not code.co_varnames:
            continue
        for before, step in pairwise(dis.get_instructions(code)):
            if step.opname == "STORE_ATTR" and code.co_varnames[0] in _as_names(before.argval):
                names.add(step.argval)
    return names


def _as_names(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _names_of(trainer: type) -> set[str]:
    """All that a class has, or sets on its objects."""
    return set(dir(trainer)).union(*map(set_by, trainer.__mro__))


def _takes(method: Any, expected: list[str]) -> bool:
    """Whether a method takes these parameters in this order; what it only hands on, it takes."""
    if not callable(method):  # a property, say
        return False
    parameters = list(inspect.signature(method).parameters.values())
    named = [parameter.name for parameter in parameters if parameter.kind not in VARIADIC]
    hands_on = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    return named[: len(expected)] == expected or (hands_on and expected[:1] == named[:1])


def _code_names(value: Any) -> tuple[str, ...]:
    code = _code(value)
    return () if code is None else code.co_names


def _code(value: Any) -> Any:
    value = value.fget if isinstance(value, property) else value
    return getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
