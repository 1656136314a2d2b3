"""The command line. One module a command, imported when it is called, so that `--help` does not wait for PyTorch."""

import sys
import traceback
from importlib import import_module
from typing import NoReturn

from ..running.secrets import quotable, without_tokens
from ..texts import one_line, plain
from ..version import __version__


COMMANDS = {
    "demo": "train the embedded model for a minute, offline, and see what it learned",
    "train": "train a model: TRL's settings and data sets, this package's methods",
    "eval": "answer problems and say how sure the scores are: avg@k, pass@k, greedy",
    "probe": "measure what one update does to each token",
    "explain": "say what a configuration does, without training",
    "compare": "curves and a table of several training runs, from their logs",
    "doctor": "say what is installed, and try whether TRL does what this package builds on",
    "push": "push what a run has left on disk to the Hub, for instance after an upload that failed",
}


class UsageError(Exception):
    """A mistake of the user's: printed as one line, without a traceback, with exit status 2."""


class Failure(Exception):
    """What ends a run without being a mistake of the user's, a full disk say: one line, exit status 1."""


class OneLineErrors:
    """Makes a parser report mistakes as [`UsageError`], without printing how it is used."""

    def error(self, message: str) -> NoReturn:
        what, unrecognized, given = message.partition("unrecognized arguments: ")
        flags = [word.split("=")[0] for word in given.split() if word.startswith("-")]
        # Without values, of which one may be a secret.
        raise UsageError(without_tokens(f"{what}{unrecognized}{' '.join(flags)}" if flags else message))


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv (`list[str]`, *optional*):
            Arguments without the program's name; those of the process if not given.

    Returns:
        `int`: Exit status: 0; 1 for something outside that failed, the network or a disk say; 2 for a mistake of the
        user's; 130 after Ctrl-C.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"trl-cancel {__version__}")
        return 0
    if name not in COMMANDS:
        word = without_tokens(repr(name))  # which escapes what would not be seen
        print(f"trl-cancel: {word} is not a command; use one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        return import_module(f".{name}", __package__).run(arguments)
    except (UsageError, Failure) as error:
        print(f"trl-cancel {name}: {plain(without_tokens(_one_line(str(error), arguments)))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print(f"trl-cancel {name}: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        shown = plain(without_tokens(traceback.format_exc()), lines=True)
        if quotable(error) is not None and shown == traceback.format_exc():
            raise
        print(shown, file=sys.stderr, end="")
        return 1


def _one_line(text: str, arguments: list[str]) -> str:
    """A message in one line, in which line feeds and tabs of what was given can be seen, and spaces are as given."""
    given = {
        part for argument in arguments for part in (argument, argument.partition("=")[2]) if not part.isprintable()
    }
    for part in sorted(given, key=len, reverse=True):
        text = text.replace(part, plain(part))
    return one_line(text)


def _help() -> str:
    commands = "\n".join(f"  {name:<10}{summary}" for name, summary in COMMANDS.items())
    return f"usage: trl-cancel COMMAND [options]\n\n{commands}\n\nOptions of a command: trl-cancel COMMAND --help"
