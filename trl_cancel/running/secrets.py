"""
Tokens, keys and passwords among settings and in texts, which must not be written anywhere.

A secret is told by its name, word by word (`openai_key`, `my_pat` and `apiKey`, but not `tokenizer`, `eos_token` or
`path`), by its looks (`hf_...`), or by its place: user and password, or a parameter, of an address.
"""

import copy
import copyreg
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


HIDDEN = "***"
# Words that make any name one of a secret.
SECRETS = _words(
    """
    password passwords passwd pwd passphrase passcode secret secrets credential credentials authorization bearer
    pat pats apikey apikeys apitoken accesskey accesstoken authtoken hftoken secretkey privatekey jwt
    """
)
# What tokens and keys open. `access_key_id` is one too.
OPENERS = _words(
    """
    access api auth authentication bearer bot client github gitlab hf hub huggingface jwt login oauth openai
    personal private push refresh secret security service session user wandb write read
    """
)
# Words before `token` and `key` that make them parts of a vocabulary, of data or of attention.
TOKENS_OF_TEXT = _words(
    """
    additional answer asr assistant audio begin blank bog boi bos boundary box cached call cls code completion
    content context control decoder document encoder end eog eoi eos eot extra fake fill filler first forced
    frame function generated human image img inner input instruction language last latent layout line mask max
    message min modality new newline next no non num number numeric object output pad padding patch per
    placeholder pool predicted prefix previous prompt query reasoning register response reward role row section
    sep separator sequence short special speech start step stop suffix system tab target task text think thinking
    thought timestamp tool transcribe turn unk unknown video vision visual vocab word
    """
)
KEYS_OF_DATA = _words(
    """
    answer attention batch by cache chat column config content cross data dataset dict feature field file foreign
    group hash id image index input item join label layer lookup map message messages metadata metric model name
    num option output param parameter partition primary problem prompt public q qk query question registry
    response reward role row sample self setting shard solution sort state target task text unique value video
    weight
    """
)
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# What opens something wherever it stands.
TOKEN = re.compile(
    r"(?<=Bearer )[^\s'\"]+|\bhf_\w+|\bgithub_pat_\w{20,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bglpat-[\w-]{16,}"
    r"|\bsk-(?:[A-Za-z]+-)*[A-Za-z0-9]{16,}|\bxox[abeprs]-[\w-]{10,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
)
# As values of settings: `hf_` alone may start a name.
VALUE = re.compile(TOKEN.pattern.replace(r"\bhf_\w+", r"\bhf_[A-Za-z0-9]{12,}"))
# `user:password@` or `token@`, before a host; a password may hold a slash or an @ that were not encoded.
# Of two slashes a `Path` keeps one.
USER = re.compile(r"((?<=\w:)//|(?<=\w\w:)/)(?:[^\s/?#'\"]*@|[^\s/?#:@'\"]*:(?!\d+(?:[/?#]|$))[^\s'\"]*@)")
HOST = r"(?:localhost|\d+(?:\.\d+){3}|[\w.-]+\.[a-z]\w+|[\w.-]+(?=:\d))(?::\d+)?"
USER_WITHOUT_SCHEME = re.compile(rf"(?<![^\s'\"(=])[^\s:@/'\"(=]+:(?!//)[^\s@'\"]+(?=@{HOST})")
PARAMETER = re.compile(r"([?&#;])([\w.~%-]+)=([^&#;\s'\"]+)")
PARAMETERS = _words(
    """
    key sig signature auth sas
    """
)
# `name=value`, and `"name": "value"` as in JSON.
ASSIGNED = re.compile(
    r"""\b([A-Za-z][\w-]*)(=)('[^']*'|"[^"]*"|[^\s,;&'")\]}]+)|(?<=["'])([\w-]+)(["']\s*:\s*)("[^"]*"|'[^']*')"""
)
NO_SECRETS = ("", "None", "null", "True", "False", "true", "false", HIDDEN)


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
    if isinstance(settings, str):
        return _without_secrets_in(settings)
    if isinstance(settings, Mapping):
        cleaned = {name: _cleaned(name, value, instead) for name, value in settings.items()}
        return settings if _same(cleaned.values(), settings.values()) else _like(settings, cleaned)
    if isinstance(settings, list | tuple | set | frozenset):
        values = [without_secrets(value, instead) for value in settings]
        return settings if _same(values, settings) else _like(settings, values)
    if is_dataclass(settings) and not isinstance(settings, type):
        own = {
            field.name: getattr(settings, field.name) for field in fields(settings) if hasattr(settings, field.name)
        }
        changed = {
            name: cleaned for name, value in own.items() if (cleaned := _cleaned(name, value, instead)) is not value
        }
        return _with_fields(settings, changed) if changed else settings
    return settings


def without_tokens(text: str) -> str:
    """
    A text, such as a message, with its secrets masked: those of addresses, of `name=value`, and what looks like one.

    Args:
        text (`str`):
            The text.
    """
    return ASSIGNED.sub(_masked_assignment, TOKEN.sub(HIDDEN, _without_secrets_in(text)))


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


def is_secret(name: Any) -> bool:
    """
    Whether a name is that of a secret.

    Args:
        name (`Any`):
            The name; what is no text is none.
    """
    if not isinstance(name, str):
        return False
    words = [word.lower() for word in WORDS.findall(name)]
    if not words or SECRETS.intersection(words):
        return bool(words)
    *before, last = words
    if any(first in OPENERS and second in ("key", "token") for first, second in pairwise(words)):
        return last not in ("file", "path", "name", "type", "url", "len", "length")
    if last in ("tokens", "keys"):
        return bool(before) and before[-1] in OPENERS
    if last == "token":
        return not before or not TOKENS_OF_TEXT.intersection(before)
    return last == "key" and bool(before) and not KEYS_OF_DATA.intersection(before)


def _cleaned(name: Any, value: Any, instead: str | None) -> Any:
    # Numbers and switches open nothing, nor do special tokens of a chat (and what TRL writes in place of a token).
    if not is_secret(name) or isinstance(value, bool | int | float) or _is_special_token(name, value):
        return without_secrets(value, instead)
    return instead if value else None


def _is_special_token(name: str, value: Any) -> bool:
    return name.lower().endswith("token") and isinstance(value, str) and bool(re.fullmatch(r"[<[].*[]>]", value))


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


def _without_secrets_in(text: str) -> str:
    text = USER_WITHOUT_SCHEME.sub(HIDDEN, USER.sub(rf"\1{HIDDEN}@", text))
    text = PARAMETER.sub(_masked_parameter, text)
    return VALUE.sub(HIDDEN, text)


def _masked_parameter(match: re.Match[str]) -> str:
    name = match[2]
    secret = is_secret(name) or PARAMETERS.intersection(word.lower() for word in WORDS.findall(name)[-1:])
    return f"{match[1]}{name}={HIDDEN}" if secret else match[0]


def _masked_assignment(match: re.Match[str]) -> str:
    name, sign, value = match.groups()[:3] if match[1] else match.groups()[3:]
    if not is_secret(name) or value.strip("'\"") in NO_SECRETS or value.replace(".", "").isdigit():
        return match[0]
    quote = value[0] if value[0] in "'\"" else ""
    return f"{name}{sign}{quote}{HIDDEN}{quote}"
