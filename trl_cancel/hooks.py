"""
Hooks of a trainer that subclasses override: what the outermost override returns is what counts.

People subclass this package's trainer as they subclass TRL's. An override of theirs stands before this package's own in
the order of resolution, so what this package did within a hook, they would not see or would undo. It therefore stands
around the call: the hook of the instance is exchanged while TRL calls it, and reaches all overrides by itself.
"""

import inspect
from collections.abc import Callable, Iterator
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
    return getattr(method, "__func__", None) is not getattr(base, hook)


def left_out(trainer_class: type, hook: str, base: type) -> str | None:
    """
    The name of the class whose override of a hook does not go on to the hook of `base`, judged by the names in its code;
    `None` if there is none.

    Args:
        trainer_class (`type`):
            A class derived from `base`.
        hook (`str`):
            Name of a method.
        base (`type`):
            Class whose hook is to be reached.
    """
    for cls in trainer_class.__mro__[: trainer_class.__mro__.index(base)]:
        code = getattr(inspect.unwrap(vars(cls)[hook]), "__code__", None) if hook in vars(cls) else None
        if code is not None and hook not in _names(code):
            return cls.__name__
    return None


def _names(code: Any) -> set[str]:
    """All names that code and what is defined in it looks up."""
    inner = [constant for constant in code.co_consts if inspect.iscode(constant)]
    return set(code.co_names).union(*map(_names, inner))
