"""Tokens and keys among settings, which must not be written anywhere."""

import copy
import re
from typing import Any


# Of tokens, only those that open something: `eos_token` is no secret.
SECRET = re.compile(
    r"token|(.*[_-])?((hub|hf|auth|access|api|bearer|private|secret)[_-]?(token|key)|password|secret|authorization)",
    re.IGNORECASE,
)


class KeepsSecrets:
    """
    Settings whose secrets are left out where they are pickled, as in `training_args.bin`, which is pushed to the Hub.
    Copies have them.
    """

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


def without_secrets(settings: Any) -> Any:
    """
    A copy of settings in which secrets are `None`, in dictionaries within them too.

    Args:
        settings (`Any`):
            A dictionary, or anything else, which is returned as it is.
    """
    if not isinstance(settings, dict):
        return settings
    return {name: None if _is_secret(name) else without_secrets(value) for name, value in settings.items()}


def _is_secret(name: Any) -> bool:
    return isinstance(name, str) and SECRET.fullmatch(name) is not None
