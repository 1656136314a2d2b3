"""Tokens and keys among settings, which must not be written anywhere."""

import copy
import re
from typing import Any


# Of tokens, only those that open something: `eos_token` is no secret.
SECRET = re.compile(
    r"token|(.*[_-])?((hub|hf|auth|access|api|bearer|private|secret)[_-]?(token|key)|"
    r"passw(or)?d|credentials?|secret|authorization)",
    re.IGNORECASE,
)
# A token in a text: what a message of the Hub's client, or a word that a parser does not know, may quote.
TOKEN = re.compile(r"(?<=Bearer )[^\s'\"]+|hf_\w+")
HIDDEN = "***"


class KeepsSecrets:
    """
    Settings whose secrets are left out where they are pickled, as in `training_args.bin`, which is pushed to the Hub,
    and where they are printed. Copies have them.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:  # or `dataclass` makes one that prints everything
            setattr(cls, "__repr__", KeepsSecrets.__repr__)  # noqa: B010  (mypy)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return super(KeepsSecrets, self._with(without_secrets(self.__dict__, HIDDEN))).__str__()

    def __getstate__(self) -> dict[str, Any]:
        return without_secrets(self.__dict__)

    def __copy__(self) -> Any:
        return self._with(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._with(copy.deepcopy(self.__dict__, memo))

    def _with(self, settings: dict[str, Any]) -> Any:
        other = object.__new__(type(self))
        other.__dict__.update(settings)
        return other


def without_secrets(settings: Any, instead: str | None = None) -> Any:
    """
    A copy of settings without their secrets, in dictionaries and lists within them too.

    Args:
        settings (`Any`):
            A dictionary, a list or tuple of such, or anything else, which is returned as it is.
        instead (`str`, *optional*):
            What stands for a secret that is set.
    """
    if type(settings) in (list, tuple):
        return type(settings)(without_secrets(value, instead) for value in settings)
    if not isinstance(settings, dict):
        return settings
    return {
        name: (instead if value else None) if _is_secret(name) else without_secrets(value, instead)
        for name, value in settings.items()
    }


def without_tokens(text: str) -> str:
    """
    A text with its tokens masked.

    Args:
        text (`str`):
            The text.
    """
    return TOKEN.sub(HIDDEN, text)


def quotable(error: BaseException) -> BaseException | None:
    """
    An error as the cause of another, `None` if the traceback would show a token.

    Args:
        error (`BaseException`):
            The error.
    """
    part: BaseException | None = error
    while part is not None:
        if TOKEN.search(" ".join([str(part), *getattr(part, "__notes__", [])])):
            return None
        part = part.__cause__ or part.__context__
    return error


def _is_secret(name: Any) -> bool:
    return isinstance(name, str) and SECRET.fullmatch(name) is not None
