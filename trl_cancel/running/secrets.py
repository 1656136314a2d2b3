"""
Tokens, keys and passwords among settings, which must not be written anywhere.

A secret is told by its name (`secret_names.py`), by its looks or by its place in a text (`secret_texts.py`).
"""

import copy
import copyreg
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from inspect import isroutine
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler
from typing import Any

from .secret_names import (
    HIDDEN,
    PLAIN_WORD,
    SPECIAL,
    has_odd_words,
    is_doubtful,
    is_of_columns,
    is_plain,
    is_secret,
    is_secret_beside,
    looks_like_secret,
    may_be_number,
)
from .secret_texts import USER_OPTION, is_header, is_user, text_of_settings, without_tokens


# What `key` is beside these in one dictionary.
KEY_OF = {"q", "query", "v", "value", "values"}
# A name and its value, as a list of headers or of variables may have them.
NAMED = ("name", "key", "header", "field", "variable", "env", "param", "parameter", "option")
VALUED = ("value", "val")
BARE = re.compile(r"[\w.-]+")
JSON_TYPES = {"array", "boolean", "integer", "null", "number", "object", "string"}
# What of a schema is shown under the name of a secret: not its default or its examples.
SCHEMA = frozenset(
    [
        *("type", "title", "description", "format", "pattern", "enum", "nullable", "deprecated", "$ref", "$defs"),
        *("anyOf", "oneOf", "allOf", "not", "items", "properties", "required", "additionalProperties", "definitions"),
        *("minLength", "maxLength", "minimum", "maximum", "minItems", "maxItems", "readOnly", "writeOnly"),
    ]
)

__all__ = ["KeepsSecrets", "is_secret", "quotable", "without_secrets", "without_tokens"]


class KeepsSecrets:
    """
    Settings whose secrets are left out where they are pickled into a file, as in `training_args.bin`, which is pushed to
    the Hub, and where they are printed. Copies have them, and so have processes that are started with these settings.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:  # or `dataclass` makes one that prints everything
            setattr(cls, "__repr__", KeepsSecrets.__repr__)  # noqa: B010  (mypy)
        ForkingPickler.register(cls, KeepsSecrets._for_process)  # what `multiprocessing` sends to other processes

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return super(KeepsSecrets, self._with(without_secrets(self.__dict__, HIDDEN))).__str__()

    def __getstate__(self) -> dict[str, Any]:
        return without_secrets(dict(self.__dict__))

    def __copy__(self) -> Any:
        return self._with(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._with(copy.deepcopy(self.__dict__, memo))

    def _for_process(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self),), dict(self.__dict__)  # type: ignore[attr-defined]

    def _with(self, settings: dict[str, Any]) -> Any:
        other = object.__new__(type(self))
        other.__dict__.update(settings)
        return other


def without_secrets(settings: Any, instead: str | None = None) -> Any:
    """
    Settings without their secrets, at any depth. What holds none is returned as it is, anything else is copied.

    Args:
        settings (`Any`):
            A mapping, a list, tuple or set, a dataclass, a text, or anything else, which is returned as it is.
        instead (`str`, *optional*):
            What stands for a secret that is set. In texts it is always `"***"`, since the rest of an address is kept.
    """
    if isinstance(settings, str | bytes):
        text = settings if isinstance(settings, str) else settings.decode("latin-1")
        cleaned = text_of_settings(text)
        if cleaned == text:
            return settings
        return cleaned if isinstance(settings, str) else cleaned.encode("latin-1")
    if isinstance(settings, Mapping):
        return _cleaned_mapping(settings, instead)
    if isinstance(settings, list | tuple | set | frozenset):
        return _cleaned_list(settings, instead)
    if is_dataclass(settings) and not isinstance(settings, type):
        own = {
            field.name: getattr(settings, field.name) for field in fields(settings) if hasattr(settings, field.name)
        }
        parts = _cleaned_parts(own, instead)
        changed = {name: parts[name] for name in own if parts[name] is not own[name]}
        return _with_fields(settings, changed) if changed else settings
    return settings


def quotable(error: BaseException) -> BaseException | None:
    """
    An error as the cause of another, `None` if the traceback would show a secret.

    Args:
        error (`BaseException`):
            The error.
    """
    part: BaseException | None = error
    while part is not None:
        text = " ".join([str(part), *getattr(part, "__notes__", [])])
        if without_tokens(text) != text:
            return None
        part = part.__cause__ or part.__context__
    return error


def _cleaned_list(settings: Any, instead: str | None) -> Any:
    values = [without_secrets(value, instead) for value in settings]
    if isinstance(settings, list | tuple):
        for place, (name, value) in enumerate(pairwise(settings), 1):
            alone = len(settings) == 2 and _is_pair(settings) and _is_beside(name, value, alone=True)
            if alone or _is_argument(name, value):
                values[place] = instead
        if all(map(_is_pair, settings)):
            for place, pair in enumerate(settings):
                if _is_beside(*pair):
                    values[place] = _like(pair, [pair[0], instead])
    return settings if _same(values, settings) else _like(settings, values)


def _is_pair(values: Any) -> bool:
    """Whether these are two, the first a bare name, as those of headers; `"Password:"` is none."""
    if not isinstance(values, list | tuple) or len(values) != 2:
        return False
    name, value = values
    return isinstance(name, str) and isinstance(value, str | bytes) and BARE.fullmatch(name) is not None


def _is_argument(option: Any, value: Any) -> bool:
    """Whether the second is the secret of an option of a command."""
    if not (isinstance(option, str) and option.startswith("-") and isinstance(value, str | bytes)):
        return False
    text = _text(value)
    user = USER_OPTION.fullmatch(option) is not None and is_user(text)
    return user or (not text.startswith("--") and _is_beside(option, value))


def _is_beside(name: str, value: str | bytes, alone: bool = False) -> bool:
    """Whether a text is the secret of the name before it. A pair by itself may be any two words, stop strings say."""
    text = _text(value)
    if (BARE.fullmatch(text) and is_secret(text)) or not is_secret_beside(name, text):
        return False
    made_up = has_odd_words(text) or len(text.split()) > 1 or (text.isdigit() and may_be_number(name))
    return not alone or (made_up and is_header(name, text))


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def _cleaned_mapping(settings: Mapping[Any, Any], instead: str | None, columns: bool = False) -> Mapping[Any, Any]:
    """Also its keys, which may be addresses; where two become the same, both are kept."""
    parts = _cleaned_parts(settings, instead, columns)
    names = [without_secrets(name) if isinstance(name, str | bytes | tuple) else name for name in parts]
    if _same(names, parts) and _same(parts.values(), settings.values()):
        return settings
    cleaned: dict[Any, Any] = {}
    for name, value in zip(names, parts.values(), strict=True):
        while name in cleaned:
            name = f"{name}'"
        cleaned[name] = value
    return _like(settings, cleaned)


def _cleaned_parts(settings: Mapping[Any, Any], instead: str | None, columns: bool = False) -> dict[Any, Any]:
    lower = {name: name.lower() for name in settings if isinstance(name, str)}
    of_data = {"key"} if KEY_OF.intersection(lower.values()) else set()
    if columns:
        of_data |= {
            lower[name] for name in lower if isinstance(settings[name], str) and is_plain(settings[name], PLAIN_WORD)
        }
    said = next((value for name, value in settings.items() if lower.get(name) in NAMED and isinstance(value, str)), "")
    cleaned = {}
    for name, value in settings.items():
        if lower.get(name) in VALUED and said:
            cleaned[name] = _cleaned_beside(said, value, instead)
        elif lower.get(name) in of_data:
            cleaned[name] = without_secrets(value, instead)
        else:
            cleaned[name] = _cleaned(name, value, instead)
    return cleaned


def _cleaned_beside(name: str, value: Any, instead: str | None) -> Any:
    kept = isinstance(value, str) and not is_secret_beside(name, value)
    return without_secrets(value, instead) if kept else _cleaned(name, value, instead)


def _cleaned(name: Any, value: Any, instead: str | None) -> Any:
    if isinstance(value, Mapping) and is_of_columns(name):
        return _cleaned_mapping(value, instead, columns=True)
    if is_secret(name) and not _opens_nothing(name, value):
        if _is_schema(value):
            parts = {key: _cleaned(key if key in SCHEMA else name, part, instead) for key, part in value.items()}
            return value if _same(parts.values(), value.values()) else _like(value, parts)
        return instead if value else None
    return without_secrets(_without_odd(name, value, instead) if is_doubtful(name) else value, instead)


def _is_schema(value: Any) -> bool:
    """Whether a value says what a parameter of a tool or a field of an answer may be, in the terms of JSON Schema."""
    if not isinstance(value, Mapping):
        return False
    kinds = value.get("type")
    kinds = kinds if isinstance(kinds, list | tuple) else [kinds]
    return (
        all(isinstance(kind, str) and kind in JSON_TYPES for kind in kinds)
        or any(isinstance(value.get(name), list | tuple) for name in ("anyOf", "oneOf", "allOf", "enum"))
        or any(isinstance(value.get(name), str) for name in ("$ref", "description"))
    )


def _without_odd(name: str, value: Any, instead: str | None) -> Any:
    """A value without the texts, at any depth, that look like secrets."""
    if isinstance(value, str):
        return instead if looks_like_secret(name, value) else value
    if isinstance(value, Mapping):
        parts = {key: _without_odd(name, part, instead) for key, part in value.items()}
        return value if _same(parts.values(), value.values()) else _like(value, parts)
    if isinstance(value, list | tuple | set | frozenset):
        values = [_without_odd(name, part, instead) for part in value]
        return value if _same(values, value) else _like(value, values)
    return value


def _opens_nothing(name: str, value: Any) -> bool:
    """Numbers, switches and functions open nothing, nor do special tokens of a chat (or TRL's stand-in for a token)."""
    if isinstance(value, Mapping):
        return name.lower() == "key" or (bool(value) and all(_opens_nothing(name, part) for part in value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return bool(value) and all(_opens_nothing(name, part) for part in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return not may_be_number(name)
    plain = value is None or isinstance(value, bool | float | type) or isroutine(value) or hasattr(value, "dtype")
    return plain or _is_special_token(name, value)


def _is_special_token(name: str, value: Any) -> bool:
    return name.lower().endswith("token") and isinstance(value, str) and bool(SPECIAL.fullmatch(value))


def _same(cleaned: Any, values: Any) -> bool:
    return all(one is other for one, other in zip(cleaned, values, strict=True))


def _like(original: Any, content: Any) -> Any:
    """A container of the original's kind, or a plain one where that cannot be made."""
    if hasattr(original, "_fields"):
        return type(original)(*content)
    plain = dict if isinstance(original, Mapping) else list
    try:
        if (
            isinstance(original, dict) and type(original) is not dict
        ):  # which may have a default, or an order of its own
            other = copy.copy(original)
            if list(other) != list(content):
                other.clear()
            other.update(content)
            return other
        return type(original)(content)
    except TypeError:
        return plain(content)


def _with_fields(settings: Any, changed: dict[str, Any]) -> Any:
    other = copy.copy(settings)
    for name, value in changed.items():
        object.__setattr__(other, name, value)  # also where it is frozen
    return other
