"""`trl-cancel doctor`: what is installed, and whether TRL does what this package builds on."""

import io
import logging
import tempfile
import time
import traceback
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ..texts import plain
from . import OneLineErrors
from ._quiet import quiet


class _Parser(OneLineErrors, ArgumentParser):
    pass


def run(arguments: list[str]) -> int:
    parser = _Parser(
        "trl-cancel doctor", description="Say what is installed, and try whether TRL does what is built on."
    )
    parser.add_argument("--versions", action="store_true", help="only say what is installed")
    only_versions = parser.parse_args(arguments).versions
    with quiet():
        from ..running.installed import report  # works with any TRL

        for topic, text in report():
            print(plain(f"{topic:<17}{text}"))
        return 0 if only_versions else _checked()


def _checked() -> int:
    """Makes all checks, says which do not hold, and returns the exit status."""
    started, number, broken = time.perf_counter(), 0, 0
    for says, found in _found():
        number += 1
        if found is not None:
            broken += 1
            print(plain(f"\nDoes not hold: {says}.\n  Found: {found}.", lines=True))
    seconds = time.perf_counter() - started
    if broken:
        print(f"\n{broken} of {number} assumptions do not hold ({seconds:.0f} s). Do not train with these versions.")
        return 1
    print(f"\nAll {number} assumptions hold ({seconds:.0f} s).")
    return 0


def _found() -> Iterator[tuple[str, str | None]]:
    """What each check says, and what it found instead, if anything."""
    try:
        from .. import trainer  # noqa: F401  (compares what is declared)
    except ImportError as error:
        yield "TRL has the names that are built on, and they are used as before", str(error).rstrip(".")
        return
    yield "TRL has the names that are built on, and they are used as before", None
    from accelerate.state import AcceleratorState, GradientState
    from tqdm.auto import tqdm

    from ..doctor import CHECKS
    from ..doctor.check import Broken
    from ..doctor.runs import tiny_model

    with tempfile.TemporaryDirectory() as folder, patch.object(tempfile, "tempdir", folder):
        model = tiny_model(Path(tempfile.mkdtemp()))
        for check in tqdm(CHECKS, desc="Checking", initial=1, total=len(CHECKS) + 1, unit="assumption", leave=False):
            found: str | None = None
            try:
                with _silence():
                    check.tries(model)
            except Broken as broken:
                found = str(broken)
            except Exception as error:
                found = f"{_said(error)} (it could not be tried to the end)"
            yield check.says, found
            AcceleratorState._reset_state(reset_partial_state=True)  # which accelerate keeps in classes
            GradientState._reset_state()


@contextmanager
def _silence() -> Iterator[None]:
    """Hides what a training says on the way."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _said(error: Exception) -> str:
    last: Any = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} in {last.name}, line {last.lineno} of {last.filename}"
