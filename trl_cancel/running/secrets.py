"""
Tokens, keys and passwords among settings and in texts, which must not be written anywhere.

A secret is told by its name, word by word (`openai_key`, `my_pat` and `apiKey`, but not `tokenizer`, `eos_token` or
`path`), by its looks (`hf_...`), or by its place: user and password, a parameter, or the path of a webhook's address.
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


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


HIDDEN = "***"
# Words that make any name one of a secret.
SECRETS = _words(
    """
    password passwords passwd pwd passphrase passcode passkey secret secrets credential credentials cred creds
    authorization bearer cookie cookies csrf xsrf pat pats apikey apikeys apitoken accesskey accesstoken authtoken
    hftoken secretkey privatekey jwt sessionid sessid jsessionid phpsessid
    """
)
# Words that do so at the end, and in a name of two words.
LAST = _words("auth authentication oauth otp pass pin pw salt sas signature totp webhook webhooks")
ENDS = LAST | {"key", "token"}
PAIRS = {("pass", "word"), ("pass", "words"), ("pass", "phrase"), ("pass", "code"), ("session", "id")}
# Of these the value may be a number, which elsewhere opens nothing.
NUMBERS = ("otp", "pass", "passcode", "passwd", "password", "pin", "pw", "pwd")
# What tokens and keys open. `access_key_id` is one too.
OPENERS = _words(
    """
    access anthropic api auth authentication aws azure bearer bot client cohere comet deepseek discord gcp gemini
    github gitlab google gpg groq hf hub huggingface jwt langfuse langsmith login mistral neptune ngc nvidia oauth
    openai openrouter personal pgp private push refresh replicate rsa secret security serper service session slack
    ssh ssl tavily telegram tls user wandb write read xai
    """
)
# What stands before `key`, `token` or `pass` without anything between, as in `sshkey`: `monkey` is none.
GLUED = OPENERS | _words(
    "admin app basic csrf xsrf database db ftp http https mail mongo my mysql pg postgres proxy redis root smtp sql"
)
GLUE = re.compile(
    r"\w*(?:api_?keys?|passwords?|passwd|passphrase|secrets?|sessionid|sessid)"
    r"|(?:my)?(\w*?)(?:keys?|tokens?|pass|pwd?|creds?|auth|cookies?|webhooks?)"
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
    answer attention attn batch by cache chat column config content cross data dataset decoder dict encoder feature field file foreign
    group hash id image index input item join label layer lookup map message messages metadata metric model name
    num option output param parameter partition primary problem prompt public q qk query question registry
    response reward role row sample self setting shard solution sort state target task text unique value video
    weight
    """
)
PASSES_OF_DATA = _words(
    """
    all backward band by each epoch every first forward full high last low max min multi num one per second single
    test third train two
    """
)
SIGNATURES_OF_CODE = _words("call chat function input method model module output prompt task template tool type")
# What an address is called, as in `webhook_url`.
ADDRESS = _words("address addresses endpoint link uri url urls")
NO_SECRET_AFTER = {
    "key": KEYS_OF_DATA,
    "pass": PASSES_OF_DATA,
    "signature": SIGNATURES_OF_CODE,
    "token": TOKENS_OF_TEXT,
}
# What `key` is beside these in one dictionary.
KEY_OF = _words("q query v value values")
VARIANT = re.compile(r"(?<=[A-Za-z])(?:[_.-]?\d+|[_.-](?:prod|dev|staging|old|new|backup))+$")
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# What opens something wherever it stands.
TOKEN = re.compile(
    r"(?<=Bearer )[^\s'\"]+|\bhf_\w+|\bgithub_pat_\w{20,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bglpat-[\w-]{16,}"
    r"|\bsk-(?:[A-Za-z]+-)*[A-Za-z0-9]{16,}|\bxox[abeprs]-[\w-]{10,}|\bA[KS]IA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}"
    r"|\b[sr]k_(?:live|test)_\w{16,}|\bgsk_\w{20,}|\bnpm_\w{30,}|\bpypi-[\w-]{40,}|\b\d{6,12}:[\w-]{35}\b"
    r"|(?<=PRIVATE KEY-----)[^-]+"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
)
# As values of settings: `hf_` alone may start a name.
VALUE = re.compile(TOKEN.pattern.replace(r"\bhf_\w+", r"\bhf_[A-Za-z0-9]{12,}"))
# `user:password@` or `token@`, before a host; a password may hold a slash or an @ that were not encoded.
# Of two slashes a `Path` keeps one.
USER = re.compile(r"((?<=\w:)//|(?<=\w\w:)/)(?:[^\s/?#'\"]*@|[^\s/?#:@'\"]*:(?!\d+(?:[/?#]|$))[^\s'\"]*@)")
HOST = r"(?:localhost|\d+(?:\.\d+){3}|[\w.-]+\.[a-z]\w+|[\w.-]+(?=:\d))(?::\d+)?"
USER_WITHOUT_SCHEME = re.compile(rf"(?<![^\s'\"(=])[^\s:@/'\"(=]+:(?!//)[^\s@'\"]+(?=@{HOST})")
# Whoever knows the path of such an address may write there.
HOOK = re.compile(
    r"(://(?:hooks?\.[\w.-]+|[\w.-]*webhook\.office\.com|api\.telegram\.org"
    r"|[\w.-]*discord(?:app)?\.com/api/(?:v\d+/)?webhooks)(?::\d+)?/)[^\s?#'\"]+"
)
# Elsewhere what follows such a part of the path must look like a token, too; `hooks` stands behind the host.
ADDRESSES = re.compile(r"://[^\s?#'\"]+")
HOOKS = _words("webhook webhooks web_hook web_hooks webhookb2 key token secret")
LIKE_TOKEN = re.compile(r"(?=\w*\d)\w{16,}|[\da-f]{8}-[\da-f-]{27}|(?=.*\d)(?=.*[A-Z])[\w-]{20,}")
PARAMETER = re.compile(r"([?&#;])([\w.~%-]+)=([^&#;\s'\"]+)")
PARAMETERS = _words(
    """
    key sig signature auth sas
    """
)
# As an option of a command or a part of a connection string.
OPTION = re.compile(r"(^|[\s,])(-{0,2}[A-Za-z][\w.-]*)=([^\s,;&'\"]+)")
# `name=value`, and `"name": "value"` as in JSON.
ANY = r"""'[^']*'|"[^"]*"|\([^()]*\)|\[[^][]*\]|\{[^{}]*\}"""
ASSIGNED = re.compile(
    rf"""(?<!\w)(?<!\w-)([A-Za-z][\w-]*)(=)({ANY}|[^\s,;&'")\]}}]+)|(?<=["'])([\w-]+)(["']\s*:\s*)({ANY}|\d+)"""
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
        text = _without_secrets_in(settings)
        return settings if text == settings else text
    if isinstance(settings, Mapping):
        plain = _names_of_data(settings)
        cleaned = {
            name: without_secrets(value, instead) if name in plain else _cleaned(name, value, instead)
            for name, value in settings.items()
        }
        return settings if _same(cleaned.values(), settings.values()) else _like(settings, cleaned)
    if isinstance(settings, list | tuple | set | frozenset):
        values = [without_secrets(value, instead) for value in settings]
        if len(values) == 2 and isinstance(settings, list | tuple) and _is_header(*settings):
            values = [settings[0], instead]
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
    return _without_assigned(TOKEN.sub(HIDDEN, _without_secrets_in(text)))


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
    words = _words_of(name)
    if not words or SECRETS.intersection(words) or any(map(_is_glued, {*words, "".join(words)})):
        return bool(words)
    *before, last = words
    if any(first in OPENERS and second in ("key", "token") for first, second in pairwise(words)):
        return last not in ("file", "path", "name", "type", "url", "len", "length")
    if last in ("tokens", "keys"):
        return bool(before) and before[-1] in OPENERS
    if (before and (before[-1], last) in PAIRS) or ({"webhook", "webhooks"}.intersection(before) and last in ADDRESS):
        return True
    return last in ENDS and not NO_SECRET_AFTER.get(last, frozenset()).intersection(before)


def _words_of(name: str) -> list[str]:
    """The words of a name, without what tells one of several secrets from the others: `token2`, `api_key_prod`."""
    return [word.lower() for word in WORDS.findall(VARIANT.sub("", name))]


def _is_glued(word: str) -> bool:
    match = GLUE.fullmatch(word)
    return match is not None and (match[1] is None or match[1] in GLUED or (word.startswith("my") and not match[1]))


def _says_itself(name: str) -> bool:
    """Whether a name is that of a secret also where it stands in a text or a list; `key`, say, would not do."""
    return is_secret(name) and _words_of(name)[0] not in ENDS


def _is_header(name: Any, value: Any) -> bool:
    """Whether these two of a list are the name of a secret and the secret, as headers may be given."""
    texts = isinstance(name, str) and isinstance(value, str | bytes)
    return texts and _says_itself(name) and not is_secret(value)


def _names_of_data(settings: Mapping[Any, Any]) -> set[Any]:
    """Names that are none of secrets beside the others."""
    names = {name: name.lower() for name in settings if isinstance(name, str)}
    if KEY_OF.isdisjoint(names.values()):
        return set()
    return {name for name, lower in names.items() if lower == "key"}


def _cleaned(name: Any, value: Any, instead: str | None) -> Any:
    if not is_secret(name) or _opens_nothing(name, value):
        return without_secrets(value, instead)
    return instead if value else None


def _opens_nothing(name: str, value: Any) -> bool:
    """Numbers, switches and functions open nothing, nor do special tokens of a chat (or TRL's stand-in for a token)."""
    if isinstance(value, Mapping):
        return name.lower() == "key" or (bool(value) and all(_opens_nothing(name, part) for part in value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return bool(value) and all(_opens_nothing("", part) for part in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return not _may_be_number(name)
    plain = value is None or isinstance(value, bool | float | type) or isroutine(value) or hasattr(value, "dtype")
    return plain or _is_special_token(name, value)


def _may_be_number(name: str) -> bool:
    joined = "".join(_words_of(name))
    return joined != "pass" and joined.endswith(NUMBERS)


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
    text = PARAMETER.sub(_masked_parameter, ADDRESSES.sub(_masked_path, HOOK.sub(rf"\1{HIDDEN}", text)))
    text = OPTION.sub(_masked_option, text)
    return VALUE.sub(HIDDEN, text)


def _masked_path(match: re.Match[str]) -> str:
    parts = match[0].split("/")
    hooks = (place for place, part in enumerate(parts) if part.lower() in HOOKS or (part == "hooks" and place == 3))
    hook = next(hooks, len(parts))
    hidden = any(LIKE_TOKEN.match(part) for part in parts[hook + 1 :])
    return "/".join([*parts[: hook + 1], HIDDEN]) if hidden else match[0]


def _masked_parameter(match: re.Match[str]) -> str:
    name = match[2]
    secret = is_secret(name) or PARAMETERS.intersection(word.lower() for word in WORDS.findall(name)[-1:])
    return f"{match[1]}{name}={HIDDEN}" if secret else match[0]


def _masked_option(match: re.Match[str]) -> str:
    hidden = _says_itself(match[2]) and match[3] not in NO_SECRETS
    return f"{match[1]}{match[2]}={HIDDEN}" if hidden else match[0]


def _without_assigned(text: str) -> str:
    return ASSIGNED.sub(_masked_assignment, text)


def _masked_assignment(match: re.Match[str]) -> str:
    name, sign, value = match.groups()[:3] if match[1] else match.groups()[3:]
    said = value.strip("'\"")
    number = said.replace(".", "").isdigit() and not (said.isdigit() and _may_be_number(name))
    if not is_secret(name) or said in NO_SECRETS or number:
        return match[0] if value[0] not in "([{" else f"{name}{sign}{value[0]}{_without_assigned(value[1:])}"
    quote = value[0] if value[0] in "'\"" else ""
    return f"{name}{sign}{quote}{HIDDEN}{quote}"
