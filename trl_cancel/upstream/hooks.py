"""
Hooks of a trainer that subclasses override: what the outermost override returns is what counts.

People subclass this package's trainer as they subclass TRL's. An override of theirs stands before this package's own in
the order of resolution, so what this package did within a hook, they would not see or would undo. It therefore stands
around the call: the hook of the instance is exchanged while TRL calls it, and reaches all overrides by itself.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any


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


def _is_own(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def is_overridden(trainer: Any, hook: str, base: type) -> bool:
    """
    Whether a hook of an object is another than that of a class, in its own class or in the object itself.

    Args:
        trainer (`Any`):
            The object.
        hook (`str`):
            Name of a method.
        base (`type`):
            The class.
    """
    method = getattr(trainer, hook)
    while isinstance(method, _Around):
        method = method.args[0]
    return getattr(method, "__func__", method) is not getattr(base, hook)


def is_of(trainer: Any, hook: str, after: type, owner: type) -> bool:
    """
    Whether the hook that `super()` reaches from a class is that of another.

    Args:
        trainer (`Any`):
            The object.
        hook (`str`):
            Name of a method.
        after (`type`):
            Class from which it is called.
        owner (`type`):
            Class, or one that it derives from, whose hook is expected; classes of this package may pass it on.
    """
    bases = type(trainer).__mro__
    between = bases[bases.index(after) + 1 : bases.index(owner)]
    return not any(
        hook in vars(cls) for cls in between if cls.__module__.partition(".")[0] != __name__.partition(".")[0]
    )


def left_out(trainer_class: type, hook: str, base: type) -> str | None:
    """
    The name of the class whose override of a hook does not go on to the hook of `base`, judged by the names in its code
    and in that of the methods that it calls; `None` if there is none.

    Args:
        trainer_class (`type`):
            A class derived from `base`.
        hook (`str`):
            Name of a method.
        base (`type`):
            Class whose hook is to be reached.
    """
    own = trainer_class.__mro__[: trainer_class.__mro__.index(base)]
    for cls in own:
        if hook in vars(cls) and not _reaches(vars(cls)[hook], hook, own):
            return cls.__name__
    return None


def _reaches(function: Any, hook: str, classes: Sequence[type], seen: frozenset[str] = frozenset()) -> bool:
    """Whether a method, or one of the same classes that it calls, speaks of a hook. What holds no code is believed to."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return True
    names = _names(code)
    called = [
        (name, vars(cls)[name]) for cls in classes for name in names - seen if name != hook and name in vars(cls)
    ]
    return hook in names or any(_reaches(method, hook, classes, seen | {name}) for name, method in called)


def _names(code: Any) -> set[str]:
    """All names that code and what is defined in it looks up, and its strings, which `getattr` may look up."""
    inner = [constant for constant in code.co_consts if inspect.iscode(constant)]
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    return (set(code.co_names) | strings).union(*map(_names, inner))
