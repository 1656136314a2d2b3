"""What a check is: an assumption about TRL in words, and a function that tries it."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch


class Broken(Exception):
    """An assumption does not hold; says what was found."""


@dataclass(frozen=True)
class Check:
    """
    An assumption that is tried.

    Args:
        says (`str`):
            The assumption, in words.
        tries (`Callable`):
            Tries it on the model whose path it is given, and raises [`Broken`] if it does not hold.
    """

    says: str
    tries: Callable[[str], None]


class Checks(list[Check]):
    """Checks in the order in which they are made."""

    def assume(self, says: str, over: Iterable[Any] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """
        Makes a function a check, or one for each variant.

        Args:
            says (`str`):
                The assumption, in words.
            over (`Iterable`, *optional*):
                Variants, each of which the function is given after the path of the model.
        """

        def register(tries: Callable[..., None]) -> Callable[..., None]:
            variants = list(over)
            for variant in variants:
                self.append(Check(f"{says} ({_name(variant)})", _with(tries, variant)))
            if not variants:
                self.append(Check(says, tries))
            return tries

        return register


class Patches(ExitStack):
    """Attributes that are exchanged for a while, as by pytest's `monkeypatch`."""

    def setattr(self, owner: Any, name: str, value: Any) -> None:
        self.enter_context(patch.object(owner, name, value))


def holds(condition: Any, found: str) -> None:
    """
    Goes on only if something holds.

    Args:
        condition (`Any`):
            What must be true.
        found (`str`):
            What is said otherwise.

    Raises:
        [`Broken`]: If it does not.
    """
    if not condition:
        raise Broken(found)


def _with(tries: Callable[..., None], variant: Any) -> Callable[[str], None]:
    return lambda model: tries(model, variant)


def _name(variant: Any) -> str:
    if isinstance(variant, dict):
        return ", ".join(f"{name}={value!r}" for name, value in variant.items())
    return ", ".join(map(str, variant)) if isinstance(variant, tuple) else str(variant)
