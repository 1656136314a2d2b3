"""`trl-cancel compare`: curves and a table of several runs, from what they have logged."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..diagnostics.reports.comparison import Comparison, compare
from ..diagnostics.reports.runs import Run, distinguish, read_run
from ..texts import plain
from . import OneLineErrors, UsageError
from ._console import plain_console
from ._page import load_pages


EPILOG = """\
A RUN is the output folder of a training run (of trl-cancel, TRL or transformers), a checkpoint of it, or a
trainer_state.json. NAME=RUN gives it a name; runs with the same NAME are seeds of one method."""


class CompareParser(OneLineErrors, argparse.ArgumentParser):
    """The options of the comparison."""


def run(arguments: list[str]) -> int:
    parser = CompareParser(prog="trl-cancel compare", description=__doc__, epilog=EPILOG)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="RUN or NAME=RUN")
    parser.add_argument("--output", default="trl-cancel-compare", help="folder to write to (default: %(default)s)")
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="also compare this metric; may be repeated"
    )
    parser.add_argument(
        "--threshold", type=float, help="reward to reach (default: nine tenths of the way from the start to the end)"
    )
    parser.add_argument(
        "--smooth", type=int, metavar="N", help="logs in a moving average (default: a tenth of the shortest run)"
    )
    options = parser.parse_args(arguments)
    if options.smooth is not None and options.smooth < 1:
        raise UsageError(f"--smooth {options.smooth}: must be at least 1.")
    if options.threshold is not None and not math.isfinite(options.threshold):
        raise UsageError(f"--threshold {options.threshold}: must be a finite number.")
    return _compare(options)


def _compare(options: argparse.Namespace) -> int:
    try:
        methods = _read(options.runs)
        comparison = compare(methods, options.metric, options.smooth, options.threshold)
    except ValueError as error:
        raise UsageError(str(error)) from error
    folder = Path(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "compare.json").write_text(json.dumps(comparison.as_dict(), indent=1, allow_nan=False))
        curves = _write_page(comparison, folder)
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot write there: {error.strerror}.") from error

    console = plain_console()
    _print(*comparison.table(), console)
    for note in comparison.notes():
        console.print(note, markup=False)
    console.print(curves, markup=False)
    return 0


def _write_page(comparison: Comparison, folder: Path) -> str:
    """Writes the page where its optional libraries are, and says where it is, or how to get it."""
    try:
        load_pages()
    except UsageError as error:
        return f"Numbers: {folder / 'compare.json'}. No page of curves: {error}"
    from ..diagnostics.reports.comparison_page import comparison_page

    return f"Curves: {comparison_page(comparison).write(folder)}"


def _read(arguments: Sequence[str]) -> dict[str, list[Run]]:
    """Runs by name."""
    methods: dict[str, list[Run]] = {}
    sources: set[Path] = set()
    for name, path in named_paths(arguments):
        run = read_run(path)
        if run.source.resolve() in sources:
            raise UsageError(f"{path}: this run is given twice.")
        sources.add(run.source.resolve())
        methods.setdefault(name, []).append(run)
    return methods


def named_paths(arguments: Sequence[str]) -> list[tuple[str, Path]]:
    """
    Names and paths of runs.

    Args:
        arguments (`Sequence[str]`):
            `NAME=PATH`, or a path: what exists as one is one, whatever `=` is in it, and no name holds a `/`.

    Returns:
        `list[tuple[str, Path]]`: Name and path of each.

    Raises:
        `UsageError`: If a name is empty, or both given and made.
    """
    split = [_split(argument) for argument in arguments]
    given = {name for name, _ in split if name is not None}
    made = iter(plain(name) for name in distinguish([path for name, path in split if name is None]))
    named = [(next(made) if name is None else name, path) for name, path in split]
    for (name, path), (own, _) in zip(named, split, strict=True):
        if own is None and name in given:
            raise UsageError(f"{path}: would be called {name}, as another run is; give it a name with NAME={path}.")
    return named


def _split(argument: str) -> tuple[str | None, Path]:
    name, equals, path = argument.partition("=")
    if not equals or "/" in name or Path(argument).expanduser().exists():
        return None, Path(argument).expanduser()
    if not name.strip() or not path.strip():
        raise UsageError(f"RUN {argument!r}: write NAME=PATH, or the path alone.")
    return plain(name.strip()), Path(path.strip()).expanduser()


def _print(header: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """The table, with intervals below their means where it would be too wide otherwise."""
    rows = [[plain(cell) for cell in row] for row in rows]
    table = _table(header, rows)
    unlimited = console.options.update(max_width=10**6)
    if console.measure(table, options=unlimited).maximum > console.width:
        table = _table(header, [[cell.replace(" [", "\n[") for cell in row] for row in rows])
    console.print(table)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title="Comparison")
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
