"""One configuration through all promises, and the smallest settings that still break one."""

import re
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from accelerate.utils import gather_object

from trl_cancel.config import _OWN_FIELDS

from ..runs import without
from .promises import OF_A_RUN, Of
from .runs import PROCESSES, Run, train


# Promises about several runs of one configuration, and about its refusal.
OFF_IS_TRL, METRICS_CHANGE_NOTHING = "off_is_trl", "metrics_change_nothing"
REFUSED_BY_NAME, TRAINS = "refused_by_name", "trains_or_is_refused_before_training"
PROMISES = (*OF_A_RUN, OFF_IS_TRL, METRICS_CHANGE_NOTHING, REFUSED_BY_NAME, TRAINS)
METRICS = ("cancel/", "shift/")


@dataclass
class Outcome:
    """
    What became of a configuration.

    Args:
        settings (`dict`):
            Its settings.
        kind (`str`):
            `"trained"`, `"refused"`, or `"as TRL"` where TRL cannot do it either.
        checks (`Counter`):
            How often each promise was checked.
        broken (`dict[str, str]`):
            Promises that were broken, with what was found.
    """

    settings: dict[str, Any]
    kind: str = "trained"
    checks: Counter[str] = field(default_factory=Counter)
    broken: dict[str, str] = field(default_factory=dict)
    refusal: str = ""

    def note(self, promise: str, problem: str | None) -> None:
        self.checks[promise] += 1
        if problem is not None:
            self.broken.setdefault(promise, problem)


def check(settings: dict[str, Any], only: str | None = None) -> Outcome:
    """
    Trains with some settings and checks all promises, or one.

    Args:
        settings (`dict`):
            Settings, as `draw` returns them; in a launch of several processes, on all of them.
        only (`str`, *optional*):
            The promise to check.
    """
    outcome = Outcome(settings)
    run = train(settings, watch=True)
    if run.error is not None:
        _judge_error(outcome, run)
    else:
        _check_run(outcome, run, only)
    if only in (None, OFF_IS_TRL):
        _compare_off_with_trl(outcome)
    _agree(outcome)
    return outcome


def _check_run(outcome: Outcome, run: Run, only: str | None) -> None:
    of = Of(outcome.settings)
    outcome.note(TRAINS, None)
    for name, promise in OF_A_RUN.items():
        if only in (None, name):
            for problem in promise(of, run):
                outcome.note(name, problem)
    _agree(outcome)  # before what is to be run next depends on it
    if "finite" in outcome.broken and not _is_finite(_of_trl(outcome.settings)):
        del outcome.broken["finite"]
    if only in (None, METRICS_CHANGE_NOTHING):
        other = {
            "cancellation_metrics": not of.cancellation_metrics,
            "token_shift_steps": int(not of.token_shift_steps),
        }
        outcome.note(METRICS_CHANGE_NOTHING, _difference(run, train({**outcome.settings, **other}), METRICS))


def _compare_off_with_trl(outcome: Outcome) -> None:
    theirs = _of_trl(outcome.settings)
    if theirs.error is not None:
        return
    off = {**_without_methods(outcome.settings), "query_preserved": False, "cancellation_metrics": False}
    outcome.note(OFF_IS_TRL, _difference(theirs, train(off), ()))


def _judge_error(outcome: Outcome, run: Run) -> None:
    error = run.error
    assert error is not None
    text = f"{type(error).__name__}: {error}"
    outcome.refusal = text
    if isinstance(error, (ValueError, NotImplementedError)) and not run.began:
        outcome.kind = "refused"
        words = set(re.findall(r"\w+", str(error)))
        named = words & (set(outcome.settings) | {"credits", "reward_funcs", "Token"})
        # TRL's own refusals may name things in its own way.
        trls = _of_trl(outcome.settings).error if not named else None
        outcome.note(REFUSED_BY_NAME, None if named or trls is not None else text)
        return
    theirs = _of_trl(outcome.settings)
    if type(theirs.error) is type(error):
        outcome.kind = "as TRL"
        return
    place = traceback.extract_tb(error.__traceback__)[-1]
    outcome.note(TRAINS, f"{text[:500]} (at {place.filename.rsplit('/', 1)[-1]}:{place.lineno})")


def _without_methods(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _OWN_FIELDS and name != "credits"}


def _of_trl(settings: dict[str, Any]) -> Run:
    return train(_without_methods(settings), trl.GRPOTrainer)


def _is_finite(run: Run) -> bool:
    problems = [run.error is not None or any(OF_A_RUN["finite"](Of({}), run))]
    return not any(gather_object(problems) if PROCESSES > 1 else problems)


def _difference(first: Run, second: Run, apart_from: tuple[str, ...]) -> str | None:
    """In what two runs differ that must be equal to the last bit."""
    if second.error is not None:
        return f"one trains, the other raises {type(second.error).__name__}: {second.error}"
    differ = [
        name
        for name, value in first.weights.items()
        if not torch.equal(value.nan_to_num(), second.weights[name].nan_to_num())
    ]
    if differ:
        most = max((first.weights[name] - second.weights[name]).abs().max().item() for name in differ)
        return f"{len(differ)} of {len(first.weights)} weights differ, by up to {most:.2g}"
    logs = [[without(entry, apart_from) for entry in run.logs] for run in (first, second)]
    if len(logs[0]) != len(logs[1]):
        return f"{len(logs[0])} logs and {len(logs[1])}"
    for one, other in zip(*logs, strict=True):
        names = sorted(name for name in one.keys() | other.keys() if repr(one.get(name)) != repr(other.get(name)))
        if names:
            return f"logs differ at step {one.get('step')}: " + ", ".join(
                f"{name} {one.get(name)} and {other.get(name)}" for name in names[:3]
            )
    return None


def _agree(outcome: Outcome) -> None:
    """Lets all processes know what each has found."""
    if PROCESSES > 1:
        for broken in gather_object([outcome.broken]):
            outcome.broken = {**broken, **outcome.broken}


def smallest(settings: dict[str, Any], promise: str) -> tuple[dict[str, Any], str]:
    """
    Settings with as many as possible set back to their defaults, that still break a promise.

    Args:
        settings (`dict`):
            Settings that break it.
        promise (`str`):
            The promise.

    Returns:
        `tuple`: The settings, and what was found with them.
    """
    found = check(settings, promise).broken.get(promise, "not found again")
    names, again = sorted(settings), True
    while again:
        again = False
        for name in names:
            if name not in settings:
                continue
            fewer = {other: value for other, value in settings.items() if other != name}
            problem = check(fewer, promise).broken.get(promise)
            if problem is not None:
                settings, found, again = fewer, problem, True
    return settings, found
