"""
Hooks of a trainer that subclasses override: what the outermost override returns is what counts.

People subclass this package's trainer as they subclass TRL's. An override of theirs stands before this package's own in
the order of resolution, so what this package did within a hook, they would not see or would undo. It therefore stands
around the call: the hook of the instance is exchanged while TRL calls it, and reaches all overrides by itself.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from trl import GRPOTrainer

from .checks import set_by


# What a user's code calls of these calls no hooks of a trainer by name.
LIBRARIES = ("accelerate", "datasets", "numpy", "peft", "torch", "transformers", "trl", "trl_cancel")


class _Around(partial):
    """A call that stands around a hook, which is its first argument."""


@contextmanager
def around(trainer: Any, hook: str, call: Callable[..., Any]) -> Iterator[None]:
    """
    Stands around a hook for a while.

    Args:
        trainer (`Any`):
            Object that has the hook.
        hook (`str`):
            Name of a method.
        call (`Callable`):
            Called instead of the hook, with the hook itself, as it is for this object, before its arguments.
    """
    own = vars(trainer)
    before = {hook: own[hook]} if hook in own else {}
    own[hook] = _Around(call, getattr(trainer, hook))
    try:
        yield
    finally:
        del own[hook]
        own.update(before)


@dataclass(frozen=True)
class Override:
    """
    What a user has put in the place of a hook.

    Args:
        owner (`type`):
            The class that holds it; the trainer's own where it is set on the object.
        function (`Any`):
            The function.
    """

    owner: type
    function: Any


def overrides(trainer: Any, hook: str, after: type | None = None) -> list[Override]:
    """
    What is called before TRL's own hook is and is not of this package, from the outermost on: what is set on the object,
    and the overrides of its classes, in the order of their resolution.

    Args:
        trainer (`Any`):
            The trainer.
        hook (`str`):
            Name of a method.
        after (`type`, *optional*):
            Looks only at classes that stand behind this one.
    """
    kind = type(trainer)
    bases = kind.__mro__[: kind.__mro__.index(GRPOTrainer)]
    found = [Override(cls, vars(cls)[hook]) for cls in bases if hook in vars(cls) and not _is_own(cls)]
    if after is not None:
        return [override for override in found if override.owner in bases[bases.index(after) :]]
    own = vars(trainer).get(hook)
    while isinstance(own, _Around):
        own = own.args[0]
    is_of_class = own is None or getattr(own, "__func__", own) is getattr(kind, hook)
    return found if is_of_class else [Override(kind, own), *found]


def overridden(trainer: Any, hooks: Iterable[str]) -> list[str]:
    """Those of some hooks that are not TRL's or this package's, each as `Class.hook`."""
    return [f"{found[0].owner.__name__}.{hook}" for hook in hooks if (found := overrides(trainer, hook))]


def left_out(trainer: Any, hook: str, *inner: str) -> str | None:
    """
    The name of the class whose override of a hook does not go on to TRL's, judged by the names in its code and in that of
    what it calls; `None` if there is none, or if that cannot be told.

    Args:
        trainer (`Any`):
            The trainer.
        hook (`str`):
            Name of a method.
        *inner (`str`):
            Methods that TRL's hook calls, which may be called in its place.
    """
    for override in overrides(trainer, hook):
        names = _names(override.function, trainer, hook)
        if not names:
            return None  # it holds no code
        if names.isdisjoint({hook, *inner}):
            return override.owner.__name__
        others = {cls.__name__ for cls in type(trainer).__mro__ if cls is not override.owner}
        if "super" not in names or not names.isdisjoint(others):
            return None  # it may go past the overrides that follow
    return None


@cache
def private_names(own: type) -> frozenset[str]:
    """
    Names that begin with `_` and are no hooks: what the classes of this package define or set for themselves.

    Args:
        own (`type`):
            The trainer of this package.
    """
    ours = [cls for cls in own.__mro__[: own.__mro__.index(GRPOTrainer)] if _is_own(cls)]
    names = {name for cls in ours for name in {*vars(cls), *set_by(cls)}}
    of_trl = set(dir(GRPOTrainer)).union(*map(set_by, GRPOTrainer.__mro__))
    return frozenset(name for name in names - of_trl if name.startswith("_") and not name.startswith("__"))


def taken_names(trainer_class: type, own: type) -> dict[str, str]:
    """
    Private names of this package's that classes of the user give to something else, with the names of these classes.

    Args:
        trainer_class (`type`):
            A class derived from `own`.
        own (`type`):
            The trainer of this package.
    """
    bases = trainer_class.__mro__[: trainer_class.__mro__.index(GRPOTrainer)]
    private = private_names(own)
    return {name: cls.__name__ for cls in bases if not _is_own(cls) for name in private & {*vars(cls), *set_by(cls)}}


def _is_own(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _names(function: Any, trainer: Any, hook: str) -> set[str]:
    """
    All names that an override of a hook looks up, and what it calls: what it wraps, functions and methods that it calls by
    name. None for what holds no code.
    """
    bases = type(trainer).__mro__[: type(trainer).__mro__.index(GRPOTrainer)]
    spaces = [vars(cls) for cls in bases if not _is_own(cls)] + [vars(trainer)]
    names, known, waiting = set[str](), set[Any](), [function]
    while waiting:
        called = waiting.pop()
        if isinstance(called, partial):
            waiting += [called.func, *called.args]
        if isinstance(called, str) or inspect.ismethod(called):  # for `getattr`, or of this very trainer
            names.add(called if isinstance(called, str) else called.__name__)
        called = getattr(called, "__func__", called)
        code = getattr(called, "__code__", None)
        if code is None or code in known:
            continue
        known.add(code)
        looked_up = _names_of(code)
        names |= looked_up
        waiting += [called.__wrapped__] if hasattr(called, "__wrapped__") else []
        waiting += [_contents(cell) for cell in called.__closure__ or ()]
        globally = [called.__globals__[name] for name in looked_up if name in called.__globals__]
        modules = [vars(module) for module in globally if inspect.ismodule(module)]
        globally += [space[name] for space in modules for name in looked_up if name in space]
        waiting += [value for value in globally if not _is_library(getattr(value, "__module__", None) or "")]
        waiting += [space[name] for space in spaces for name in looked_up - {hook} if name in space]
    return names


def _names_of(code: Any) -> set[str]:
    """All names that code and what is defined in it looks up, and its strings, which `getattr` may look up."""
    inner = [constant for constant in code.co_consts if inspect.iscode(constant)]
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    return {*code.co_names, *code.co_freevars, *strings}.union(*map(_names_of, inner))


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a function that is still being defined
        return None


def _is_library(module: str) -> bool:
    """Whether a module is of Python, or of what TRL is built on."""
    package = module.partition(".")[0]
    return package in sys.stdlib_module_names or package in LIBRARIES
