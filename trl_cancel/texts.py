"""Names and texts from outside, made fit to be printed and written: no control characters, nothing that turns them round."""

import difflib
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path


# Line feeds, tabs and the joiners of some scripts and emoji are texts; all others of these categories are not seen.
JOINERS = "\u200c\u200d"
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
LINE_FEEDS = re.compile(r" *[\t\n\v\f\r\x1c-\x1f\x85\u2028\u2029]\s*")
MARKUP = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/(?=/)|(?<=\bwww)\.")


def plain(text: object, lines: bool = False) -> str:
    """
    A text in which what would not be seen is written as an escape: control characters, marks that turn the direction of
    writing, halves of surrogate pairs.

    Args:
        text (`object`):
            The text, or what is made one.
        lines (`bool`, *optional*, defaults to `False`):
            Whether it may have several lines, and tabs.

    Example:

    ```python
    >>> plain(chr(27) + "[31mred") == r"\x1b[31mred"
    True
    ```
    """
    text = str(text)
    if text.isprintable():  # nearly always
        return text
    return "".join(
        character if (lines and character in "\n\t") or not _is_unseen(character) else _escape(character)
        for character in text
    )


def one_line(text: object) -> str:
    """
    A text in one line, in which spaces stay as they are, since names of folders may have several.

    Args:
        text (`object`):
            The text, or what is made one.
    """
    return LINE_FEEDS.sub(" ", str(text)).strip()


def markdown(text: object) -> str:
    """
    A text that Markdown shows as it is, on one line, in a table too.

    Args:
        text (`object`):
            The text.
    """
    text = plain(" ".join(str(text).split()))
    return re.sub(r"^(\s*)([#+-]|=+$)", r"\1\\\2", MARKUP.sub(r"\\\g<0>", text))


def python_string(text: str) -> str:
    """
    A literal of Python for a text, in double quotes.

    Args:
        text (`str`):
            The text.
    """
    literal = repr(text)
    if literal[0] == '"':
        return literal
    inner = literal[1:-1].replace(r"\'", "'").replace('"', r"\"")
    return f'"{inner}"'


def suggestion(name: str, known: Iterable[str]) -> str:
    """
    The end of a sentence about a name that there is not.

    Args:
        name (`str`):
            The name.
        known (`Iterable[str]`):
            Those that there are.
    """
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else "."


def write_text(path: Path, text: str) -> None:
    """
    Writes a text in UTF-8. Halves of surrogate pairs, which that does not know, become escapes, which JSON reads.

    Args:
        path (`Path`):
            The file.
        text (`str`):
            The text.
    """
    path.write_bytes(text.encode("utf-8", errors="backslashreplace"))


def _is_unseen(character: str) -> bool:
    return unicodedata.category(character) in UNSEEN and character not in JOINERS


def _escape(character: str) -> str:
    if character in ESCAPES:
        return ESCAPES[character]
    return character.encode("unicode_escape").decode("ascii")
