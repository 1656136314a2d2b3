"""
Which names are those of secrets, word by word: `openai_key`, `my_pat` and `apiKey`, but not `tokenizer`, `eos_token` or
`path`. Where a name is doubtful its value tells.
"""

import re
import unicodedata
from itertools import pairwise
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


HIDDEN = "***"
# Words that make any name one of a secret.
SECRETS = _words(
    """
    password passwords passwd pwd passphrase passcode passkey secret secrets credential credentials cred creds
    authorization bearer cookie cookies csrf xsrf pat pats apikey apikeys apitoken accesskey accesstoken authtoken
    hftoken secretkey privatekey jwt sessionid sessid jsessionid phpsessid pincode mnemonic
    passwort kennwort motdepasse contrasena senha wachtwoord losenord
    """
)
# Words that do so at the end, and in a name of two words.
LAST = _words(
    "auth authentication fernet login oauth otp pass pfx pin pkcs pw salt sas sid sig signature tkn totp webhook webhooks"
)
ENDS = LAST | {"key", "token"}
CODES = _words("access auth backup invitation invite join otp pin recovery scratch security verification")
PAIRS = {
    *(("pass", other) for other in ("word", "words", "phrase", "code")),
    *((first, last) for first in CODES for last in ("code", "codes")),
    *((first, last) for first in ("seed", "recovery") for last in ("phrase", "phrases")),
    *((first, "seed") for first in ("mfa", "otp", "totp", "wallet")),
    *((first, "private") for first in ("gpg", "pgp", "rsa", "ssh", "ssl", "tls")),
    *(("pin", "number"), ("session", "id"), ("private", "pem")),
}
# Under these, texts that look like a secret are some; settings, columns and vocabularies are called so as well.
DOUBTFUL = _words("hmac keys session sessions tokens")
# Of these the value may be a number, which elsewhere opens nothing.
NUMBERS = ("code", "codes", "otp", "pass", "passwd", "password", "pin", "pinnumber", "pw", "pwd")
# What tokens and keys open. `access_key_id` is one too.
OPENERS = _words(
    """
    access anthropic api auth authentication aws azure bearer bot client cohere comet deepseek discord gcp gemini
    github gitlab google gpg groq hf hub huggingface jwt langfuse langsmith login mistral neptune ngc nvidia oauth
    openai openrouter personal pgp private push refresh replicate rsa secret security serper service session slack
    ssh ssl tavily telegram tls user wandb write read xai
    """
)
# What is done by such a key; it is a column or a field more often than a secret.
SORTING = _words("bucketing grouping hashing ordering partitioning routing sharding")
# A name that ends so tells about a secret.
ABOUT = _words("length pattern policy regex required reward rewards score strength threshold weight weights")
# Under these, names stand beside names.
COLUMNS = _words("column columns features")
# After what opens something, these are doubtful, too.
SHORT = _words("access tok")
# What stands before `key`, `token` or `pass` without anything between, as in `sshkey`: `monkey` is none.
GLUED = OPENERS | _words(
    "admin app basic csrf xsrf database db ftp http https mail mongo my mysql pg postgres proxy redis root smtp sql"
)
GLUE = re.compile(
    r"\w*(?:api_?keys?|passwords?|passwd|passphrase|secrets?|sessionid|sessid"
    r"|passwort|kennwort|motdepasse|contrasena)"
    r"|(?:my)?(\w*?)(?:keys?|tokens?|tkn|pass|pwd?|creds?|auth|cookies?|webhooks?)"
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
    answer attention attn batch by cache chat column config content cross data dataset decoder dict encoder feature
    field file foreign group hash id image index input item join label layer lookup map message messages metadata metric model name
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
    "keys": KEYS_OF_DATA,
    "pass": PASSES_OF_DATA,
    "sig": SIGNATURES_OF_CODE,
    "signature": SIGNATURES_OF_CODE,
    "tkn": TOKENS_OF_TEXT,
    "token": TOKENS_OF_TEXT,
    "tokens": TOKENS_OF_TEXT,
}
VARIANT = re.compile(r"(?<=[A-Za-z])(?:[_.-]?\d+|[_.-](?:prod|dev|staging|old|new|backup))+$")
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# A part of a name, a column or a token of a vocabulary: a word with numbers before or after it, or as `word2vec`.
WORD = r"[A-Z]?[a-z]{1,20}|[A-Z]?[a-z]{2,20}(?:[A-Z][a-z]{2,20})+"
PLAIN = re.compile(rf"\d*(?:(?:{WORD})(?:[24][a-z]{{1,20}})?)?\d{{0,5}}|\d+|\w{{1,3}}")
PLAIN_WORD = re.compile(rf"{WORD}|v\d+[a-z]{{0,9}}|\d+|\w{{1,3}}")  # `v2run`, but not `hunter2`
# Words, of any length, and their numbers, as they stand in names of folders and runs.
NAMED_SO = re.compile(r"\d*(?:[a-z]+[24])?[a-z]*(?:[A-Z][a-z]{2,})*\d{0,8}|\d+")
SPECIAL = re.compile(r"[<\[].*[>\]]", re.DOTALL)
PLACEHOLDER = re.compile(r"<[\w -]+>|\$?\{\w+\}|\$[A-Z][A-Z_]+")  # for a secret
FOUR_DIGITS = re.compile(r"\d{4,}")
NOTHING = ("", "None", "null", "True", "False", "true", "false", HIDDEN)


def is_secret(name: Any) -> bool:
    """
    Whether a name is that of a secret.

    Args:
        name (`Any`):
            The name; what is no text is none.
    """
    if not isinstance(name, str):
        return False
    words = words_of(name)
    if not words or words[-1] in ABOUT:
        return False
    if SECRETS.intersection(words) or any(map(_is_glued, {*words, "".join(words)})):
        return True
    *before, last = words
    if any(first in OPENERS and second in ("key", "token") for first, second in pairwise(words)):
        return last not in ("file", "path", "name", "type", "url", "len", "length")
    if last in ("tokens", "keys"):
        return bool(before) and before[-1] in OPENERS
    if (before and (before[-1], last) in PAIRS) or ({"webhook", "webhooks"}.intersection(before) and last in ADDRESS):
        return True
    if last == "key" and SORTING.intersection(before):
        return False
    return last in ENDS and not NO_SECRET_AFTER.get(last, frozenset()).intersection(before)


def is_doubtful(name: Any) -> bool:
    """
    Whether what is under a name is a secret if it looks like one: `tokens` or `my_keys`, say, but not those of a text,
    nor what takes more words.

    Args:
        name (`Any`):
            The name; what is no text is none.
    """
    *before, last = (words_of(name) if isinstance(name, str) else []) or [""]
    of_data = NO_SECRET_AFTER.get(last, frozenset())
    if before and ((before[-1] in OPENERS and last in SHORT) or (before[-1] in SORTING and last == "key")):
        return True
    return last in DOUBTFUL and len(before) < 2 and not any(word in of_data or word[:-1] in of_data for word in before)


def is_secret_beside(name: str, value: str) -> bool:
    """
    Whether a text is a secret that stands beside a name in a text, a list or a pair, where `token` and `key` name much
    else: a token of a vocabulary, a column, a switch. So these hide what is neither a number nor made of plain words.

    Args:
        name (`str`):
            The name.
        value (`str`):
            The text.
    """
    if value in NOTHING or PLACEHOLDER.fullmatch(value):
        return False
    if is_secret(name):
        number = FOUR_DIGITS.fullmatch(value) and may_be_number(name)
        return words_of(name)[0] not in ENDS or bool(number) or not is_plain(value, PLAIN_WORD)
    return is_doubtful(name) and looks_like_secret(name, value)


def is_of_columns(name: Any) -> bool:
    """Whether a mapping under a name says how columns are called."""
    return isinstance(name, str) and not COLUMNS.isdisjoint(words_of(name))


def looks_like_secret(name: str, value: str) -> bool:
    """Whether a text under a doubtful name is a secret. Words in capitals are none where there are several."""
    shouted = value.isupper() and words_of(name)[-1] in ("keys", "tokens")
    return not is_plain(value.lower() if shouted else value)


def is_plain(text: str, word: re.Pattern[str] = PLAIN) -> bool:
    """Whether a text is a sentence, words, numbers or a special token of a chat, and not made up by chance."""
    if not text.isascii() or SPECIAL.fullmatch(text) or len(text.split()) > 1:
        return True
    return all(word.fullmatch(part) for part in re.split(r"[\W_]+", text) if part)


def has_odd_words(text: str) -> bool:
    """Whether a part of a text is made up by chance; `hunter2` is, too."""
    return not all(is_plain(word, PLAIN_WORD) for word in text.split())


def is_made_up(text: str) -> bool:
    """Whether a long part of a name mixes digits and letters, or capitals and others, as nobody calls a folder."""
    return any(len(part) >= 12 and not NAMED_SO.fullmatch(part) for part in re.split(r"[\W_]+", text))


def may_be_number(name: str) -> bool:
    """Whether a number under the name of a secret is one: a PIN, but not a bare `pass`."""
    joined = "".join(words_of(name))
    return joined != "pass" and joined.endswith(NUMBERS)


def words_of(name: str) -> list[str]:
    """The words of a name, without what tells one of several secrets from the others: `token2`, `api_key_prod`."""
    letters = name if name.isascii() else _without_accents(name)
    return [word.lower() for word in WORDS.findall(VARIANT.sub("", letters))]


def _without_accents(name: str) -> str:
    return "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))


def _is_glued(word: str) -> bool:
    match = GLUE.fullmatch(word)
    return match is not None and (match[1] is None or match[1] in GLUED or (word.startswith("my") and not match[1]))
