"""What this package logs: names of folders, checkpoints and metrics cannot play tricks on whoever reads it."""

import logging
from pathlib import Path

from .texts import plain


class PlainMessages(logging.Filter):
    """Writes what would not be seen in a message as escapes, line feeds too, so that a message is a line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = plain(record.getMessage()), None
        return True


def log_plainly(package: str, folder: Path) -> None:
    """
    Makes all modules of a package log [`PlainMessages`], also those that are yet to be imported. A filter acts on its
    own logger only and not on those below it, hence each gets one; handlers are the user's.

    Args:
        package (`str`):
            Name of the package.
        folder (`Path`):
            Its folder.
    """
    for file in folder.rglob("*.py"):
        parts = file.relative_to(folder).with_suffix("").parts
        name = ".".join([package, *parts]).removesuffix(".__init__")
        logging.getLogger(name).addFilter(PlainMessages())
