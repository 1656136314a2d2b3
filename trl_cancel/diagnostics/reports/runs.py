"""Reading what training runs have logged."""

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


STATE = "trainer_state.json"


@dataclass(frozen=True)
class Series:
    """
    One metric of one run.

    Args:
        steps (`list[int]`):
            Optimizer steps at which it was logged.
        values (`list[float]`):
            Its values.
        tokens (`list[float]`, *optional*):
            Tokens that the run had seen by then, of prompts and of completions (`num_tokens`).
    """

    steps: list[int]
    values: list[float]
    tokens: list[float] | None


@dataclass(frozen=True)
class Run:
    """
    The logs of one run.

    Args:
        source (`Path`):
            File that they come from.
        steps (`int`):
            Optimizer steps of the run.
        logs (`list[dict]`):
            What was logged, in order.
        results (`dict`):
            What `trl-cancel train` wrote at the end, empty for other runs.
    """

    source: Path
    steps: int
    logs: list[dict[str, Any]]
    results: dict[str, Any]

    def metrics(self) -> set[str]:
        """Names of all metrics that have a value."""
        return {name for entry in self.logs for name, value in entry.items() if _is_number(value)} - {"step"}

    def series(self, metric: str) -> Series | None:
        """The finite values of a metric, or `None` if there are none."""
        entries = {entry["step"]: entry for entry in self.logs if _is_number(entry.get(metric))}
        entries = dict(sorted(entries.items()))
        if not entries:
            return None
        tokens = [entry["num_tokens"] for entry in entries.values() if _is_number(entry.get("num_tokens"))]
        return Series(
            steps=list(entries),
            values=[float(entry[metric]) for entry in entries.values()],
            tokens=tokens if len(tokens) == len(entries) else None,
        )

    @property
    def tokens(self) -> float | None:
        """Tokens of prompts and completions that the run has seen."""
        return self._last("num_tokens")

    @property
    def seconds(self) -> float | None:
        """Time of the training, if the run came to its end."""
        seconds = self.results.get("seconds")
        return seconds if _is_number(seconds) else self._last("train_runtime")

    def score(self, how: str) -> tuple[float, float, float] | None:
        """The score on the test problems after the training (`greedy` or `sampled`), with its interval."""
        after = self.results.get("after")
        score = after.get(how) if isinstance(after, dict) else None
        return tuple(score) if isinstance(score, list) and len(score) == 3 and all(map(_is_number, score)) else None

    def _last(self, metric: str) -> float | None:
        series = self.series(metric)
        return series.values[-1] if series else None


def find_state(path: Path) -> Path:
    """
    The file with the logs of a run.

    Args:
        path (`Path`):
            Output folder of a run, a checkpoint of it, or the file itself. Of an output folder that holds only
            checkpoints, the latest one is taken.

    Returns:
        `Path`: The file.

    Raises:
        `ValueError`: If there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such file or folder.")
    if (path / STATE).is_file():
        return path / STATE
    states = {int(match[1]): file for file in path.glob(f"*/{STATE}") if (match := _checkpoint(file))}
    if states:
        return states[max(states)]
    inside = [str(file.parent) for file in sorted(path.glob(f"*/{STATE}"))[:3]]
    hint = f"; did you mean {', '.join(inside)}?" if inside else ". Give the output folder of a training run."
    raise ValueError(f"{path}: the folder holds neither {STATE} nor a checkpoint{hint}")


def read_run(path: Path) -> Run:
    """
    Reads the logs of a run.

    Args:
        path (`Path`):
            Where [`find_state`] finds them.

    Returns:
        [`Run`].

    Raises:
        `ValueError`: If there are none, or they cannot be read.
    """
    source = find_state(path)
    state = _read_json(source)
    logs = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(logs, list) or not all(
        isinstance(entry, dict) and _is_number(entry.get("step")) for entry in logs
    ):
        raise ValueError(f"{source}: is not what a transformers trainer writes (no log_history with steps in it).")
    if not logs:
        raise ValueError(f"{source}: nothing was logged; train with smaller logging_steps.")
    results_file = source.with_name("all_results.json")
    results = _read_json(results_file) if results_file.is_file() else {}
    return Run(
        source=source,
        steps=int(state.get("global_step") or logs[-1]["step"]),
        logs=logs,
        results=results if isinstance(results, dict) else {},
    )


def distinguish(paths: Sequence[Path]) -> list[str]:
    """
    Short names for runs: of each path, the part in which it differs from the others.

    Args:
        paths (`Sequence[Path]`):
            Paths of runs.

    Returns:
        `list[str]`: A name for each.
    """
    parts = [_run_folder(path).resolve().parts for path in paths]
    if len(set(parts)) < 2:
        return [part[-1] for part in parts]
    shortest = min(map(len, parts))
    head = _num_shared(parts)
    tail = _num_shared([part[head:][::-1] for part in parts])
    if head + tail >= shortest:  # one is a part of another
        head, tail = min(head, shortest - 1), 0
    return ["/".join(part[head : len(part) - tail]) for part in parts]


def _run_folder(path: Path) -> Path:
    if not path.is_file():
        return path
    return path.parent if path.name == STATE else path.with_suffix("")


def _num_shared(rows: Sequence[Sequence[str]]) -> int:
    """Number of first elements that all have in common."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def _checkpoint(state: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", state.parent.name)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}.") from error
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{file}: not valid JSON: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
