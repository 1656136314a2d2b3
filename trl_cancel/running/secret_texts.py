"""
Texts without their secrets: what looks like one (`hf_...`), and what stands in the place of one, such as user and
password, a parameter or the path of a webhook's address, an option of a command, the line of a header.
"""

import re

from .secret_names import (
    HIDDEN,
    NOTHING,
    PLACEHOLDER,
    WORDS,
    has_odd_words,
    is_doubtful,
    is_made_up,
    is_secret,
    is_secret_beside,
    may_be_number,
)


# What opens something wherever it stands. Folders are called `hf_runs` and `hf_experiments2`.
TOKEN = re.compile(
    r"\bhf_(?![a-z]+\d*(?![A-Za-z0-9]))[A-Za-z0-9]{12,}|\bgithub_pat_\w{20,}|\bgh[pousr]_[A-Za-z0-9]{16,}"
    r"|\bglpat-[\w-]{16,}|\bxox[abeprs]-[\w-]{10,}|\bA[KS]IA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}"
    r"|\b[sr]k_(?:live|test)_\w{16,}|\bgsk_\w{20,}|\bnpm_\w{30,}|\bpypi-[\w-]{40,}|\b\d{6,12}:[\w-]{35}\b"
    r"|(?:(?<=PRIVATE KEY-----)|(?<=PRIVATE KEY BLOCK-----))(?:(?!-----END)[\s\S])+"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
)
# What does so if the rest looks made up: a run may be called `sk-learn-...`.
PREFIXED = re.compile(
    r"\b(?:sk-|csk-|r8_|dapi|xai-|nvapi-|pplx-|tvly-|SG\.|ya29\.|hvs\.|lsv2_|dop_v1_|tgp_v1_|wandb_v1_)"
    r"(?=[\w.-]{16})([\w-]+(?:\.[\w-]+)*)"
)
BEARER = re.compile(r"""((?<![\w-])(?i:bearer)[^\S\n]+)([^\s'"]+)""")
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
# Elsewhere what follows such a part of the path must look like a token, too; `hooks` stands behind the host. In
# `s3://bucket/key/...` it is a file.
ADDRESSES = re.compile(r"(?i:https?)://[^\s?#'\"]+")
HOOKS = frozenset({"webhook", "webhooks", "web_hook", "web_hooks", "webhookb2", "key", "token", "secret"})
LIKE_TOKEN = re.compile(r"(?=\w*\d)\w{16,}|[\da-f]{8}-[\da-f-]{27}|(?=.*\d)(?=.*[A-Z])[\w-]{20,}")
PARAMETER = re.compile(r"([?&#;])([\w.~%-]+)=([^&#;\s'\"]+)")
PARAMETERS = frozenset({"key", "sig", "signature", "auth", "sas"})
QUOTED = r"""'[^']*'|"[^"]*\""""
NAME = r"[^\W\d][\w.-]*"
# As an option of a command, a setting among others, or a part of a connection string. Of `a= b=1` the first is empty.
OPTION = re.compile(
    rf"""(^|[\s,;(\[{{])(-{{0,2}}{NAME}[^\S\n]*=(?:[^\S\n]+(?![\w.-]+=[^\s=]))?|--{NAME}\s+)({QUOTED}|[^\s,;&'"]+)"""
)
CODE = re.compile(r"=|[\w.]+[(\[]")
# As a part of a path, of which the rest can be told; data are stored by `key=...`.
PART = re.compile(rf"""(?<=/)((?!key=){NAME})=([^\s/,;&'"]+)""")
# A user with the password, as curl takes them.
USER_OPTION = re.compile(r"-[uU]|--(?:proxy-)?user")
USER_GIVEN = re.compile(
    rf"""((?:^|[\s'"\[(,])(?:{USER_OPTION.pattern})["']?(?:=|\s+|\s*,\s*)["']?)([^\s:'"]+:[^\s'"]+)"""
)
USER_AND_PASSWORD = re.compile(r"[^\s:/=,]+:(?!//)\S+")
NUMBERED = re.compile(r"(?:\d+|localhost|[\w-]+(?:\.[\w-]+)+):\d{1,5}")  # group or port
# The line of a header: of HTTP's own wherever it stands, of others at the start of a line or a quotation.
OF_HTTP = r"(?:set-)?cookie2?|(?:proxy-)?authorization|x-[\w-]+"
HEADER = re.compile(rf"""(?i)(?<![\w/-])({OF_HTTP})(\s*:\s*)([^\s'"][^\n'"]*)""")
SCHEME = r"(?:basic|bearer|digest|token)\s+"
SCHEMED = re.compile(rf"""(?i)(?<![\w/-])((?:proxy-)?(authorization)["']?[=,]?\s*["']?)({SCHEME}[^\s'",;)\]}}]+)""")
LINE = re.compile(rf"""(?m)((?:^|['"])[^\S\n]*)(?!(?i:{OF_HTTP}):)({NAME})(:[^\S\n]*)(?!//)([^\s'"][^\n'"]*)""")
# `name=value`, and `"name": "value"` as in JSON.
ANY = rf"""{QUOTED}|\([^()]*\)|\[[^][]*\]|\{{[^{{}}]*\}}"""
ASSIGNED = re.compile(r"""(?<![\w/])(?<!\w-)([^\W\d][\w-]*)=|(?<=["'])([\w-]+)["']\s*:\s*""")
ASSIGNED_VALUE = re.compile(rf"""{ANY}|[^\s,;&'")\]}}]+""")
VALUE_OF_JSON = re.compile(rf"{ANY}|\d+")
SCHEMA = re.compile(r"""\{\s*["'](?:type|\$ref|anyOf|enum|description)["']\s*:(?!.*["']default["'])""", re.DOTALL)
IN_JSON = re.compile(rf"""(?<=["'])([\w-]+)(["']\s*:\s*)({QUOTED}|\d+)""")
NAMED_IN_JSON = re.compile(
    rf"""(["'](?:name|key|header)["']\s*:\s*["']([\w-]+)["']\s*,\s*["']value["']\s*:\s*)({QUOTED}|\d+)"""
)


def text_of_settings(text: str) -> str:
    """
    A text among settings with its secrets masked.

    Args:
        text (`str`):
            The text, maybe several settings in one.
    """
    text = IN_JSON.sub(
        lambda match: f"{match[1]}{match[2]}{_masked_part(match[1], match[3])}", _masked_everywhere(text)
    )
    return LINE.sub(lambda match: f"{match[1]}{match[2]}{match[3]}{_masked(match[2], match[4])}", text)


def without_tokens(text: str) -> str:
    """
    A text, such as a message, with its secrets masked: those of addresses, of `name=value`, and what looks like one.

    Args:
        text (`str`):
            The text.
    """
    return _without_assigned(_masked_everywhere(text))


def is_header(name: str, value: str) -> bool:
    """
    Whether a text is the secret of a header. A sentence is none, nor is what stands for one (`Bearer <token>`), nor a
    cookie without a value.

    Args:
        name (`str`):
            The header's name.
        value (`str`):
            The text.
    """
    schemed = re.sub(rf"(?i)^{SCHEME}", "", value)
    odd = has_odd_words(schemed) or schemed.endswith("=")
    if not is_secret(name) or PLACEHOLDER.fullmatch(schemed) or (schemed in NOTHING):
        return False
    if "cookie" in name.lower():
        return odd or "=" in value
    return odd or not (len(schemed.split()) > 1 or is_secret(schemed))


def is_user(text: str) -> bool:
    """Whether what follows an option for a user holds the password as well: not so `1000:1000` or a host with a port."""
    return bool(USER_AND_PASSWORD.fullmatch(text)) and not NUMBERED.fullmatch(text)


def _masked_everywhere(text: str) -> str:
    text = USER_WITHOUT_SCHEME.sub(HIDDEN, USER.sub(rf"\1{HIDDEN}@", text))
    text = PARAMETER.sub(_masked_parameter, ADDRESSES.sub(_masked_path, HOOK.sub(rf"\1{HIDDEN}", text)))
    text = NAMED_IN_JSON.sub(lambda match: f"{match[1]}{_masked_part(match[2], match[3])}", text)
    text = HEADER.sub(lambda match: match[1] + match[2] + _masked_header(match[1], match[3]), text)
    text = SCHEMED.sub(lambda match: match[1] + _masked_header(match[2], match[3]), text)
    text = PART.sub(lambda match: f"{match[1]}={_masked(match[1], match[2])}", text)
    text = OPTION.sub(lambda match: match[1] + match[2] + _masked_option(match[2], match[3]), text)
    text = USER_GIVEN.sub(lambda match: match[1] + (HIDDEN if is_user(match[2]) else match[2]), text)
    text = PREFIXED.sub(lambda match: HIDDEN if is_made_up(match[1]) else match[0], TOKEN.sub(HIDDEN, text))
    return BEARER.sub(lambda match: match[1] + (HIDDEN if has_odd_words(match[2]) else match[2]), text)


def _masked(name: str, value: str) -> str:
    """What stands for a value beside a name, in the quotation marks that it had."""
    quote = value[0] if value[0] in "'\"" else ""
    return f"{quote}{HIDDEN}{quote}" if is_secret_beside(name, value.strip("'\"")) else value


def _masked_header(name: str, value: str) -> str:
    return HIDDEN if is_header(name, value) else value


def _masked_option(option: str, value: str) -> str:
    """As `_masked`. With spaces around the sign it may be code, `password == x` or `password = config.password`."""
    spaced = re.search(r"\s=|=\s", option) is not None
    code = CODE.match(value) or is_secret(value) or option.strip("= ") == "key"
    return value if spaced and code else _masked(option, value)


def _masked_part(name: str, value: str) -> str:
    """As `_masked`, of JSON, where numbers have no quotation marks."""
    return value if value.isdigit() and not may_be_number(name) else _masked(name, value)


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


def _without_assigned(text: str) -> str:
    shown, end = "", 0
    for match in ASSIGNED.finditer(text):
        name = match[1] or match[2]
        if match.start() < end or not (is_secret(name) or is_doubtful(name)):
            continue
        value = (ASSIGNED_VALUE if match[1] else VALUE_OF_JSON).match(text, match.end())
        if value is None:
            continue
        masked = _masked_assigned(name, value[0])
        if masked != value[0]:
            shown += text[end : value.start()] + masked
            end = value.end()
    return shown + text[end:]


def _masked_assigned(name: str, value: str) -> str:
    said = value.strip("'\"")
    number = said.replace(".", "").isdigit() and not (said.isdigit() and may_be_number(name))
    if value[0] in "([{" and is_doubtful(name):
        return re.sub(QUOTED, lambda part: _masked(name, part[0]), value)
    opens = is_secret(name) or is_secret_beside(name, said)
    if said in NOTHING or number or PLACEHOLDER.fullmatch(said) or SCHEMA.match(value) or not opens:
        return value
    quote = value[0] if value[0] in "'\"" else ""
    return f"{quote}{HIDDEN}{quote}"
