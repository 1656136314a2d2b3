"""Results of finished runs: whether an output folder holds one, and what may replace it."""

import json
from pathlib import Path
from typing import Any

from .changed_settings import changes, run_of, settings_record
from .damage import STATE, weights_at, why_unusable


RESULTS = "all_results.json"  # the last that a run from the command line saves


def saved_step(folder: Path, checkpoint: Path | None = None) -> int | None:
    """
    The step at which a run ended whose results a folder holds, all of them; `None` if it does not.

    Args:
        folder (`Path`):
            Output folder of a run from the command line.
        checkpoint (`Path`, *optional*):
            Last checkpoint of the run; the results of another run, by its name or logs, do not count.
    """
    state, results = _read(folder / STATE), _read(folder / RESULTS)
    step = state.get("global_step")
    if why_unusable(folder) is not None or step is None or results.get("steps") != step:
        return None
    if checkpoint is not None:
        before = _read(checkpoint / STATE)
        runs = [run_of(each.get("stateful_callbacks")) for each in (before, state)]
        logs = before.get("log_history", [])
        if runs[0] != runs[1] or state.get("log_history", [])[: len(logs)] != logs:
            return None
    return step


def check_replaceable(folder: Path, checkpoint: Path | None, args: Any) -> None:
    """
    Refuses a folder that holds a model, unless a run goes on in it that has saved it.

    Args:
        folder (`Path`):
            Output folder, which need not exist.
        checkpoint (`Path`, *optional*):
            The checkpoint that the run goes on from.
        args ([`~trl_cancel.CancelGRPOConfig`]):
            Settings of the run.

    Raises:
        `ValueError`: If it does; the message says in what that run differed.
    """
    weights = weights_at(folder)
    if weights is None or (checkpoint is not None and checkpoint.resolve().parent == folder.resolve()):
        return
    changed = changes(folder, settings_record(args))
    differs = f" It was trained with other settings: {'; '.join(changed)}." if changed else ""
    raise ValueError(
        f"output_dir={folder} holds the model of a finished run ({weights}).{differs} Set another output_dir, "
        "overwrite_output_dir=true to replace it, or resume_from_checkpoint=auto to go on from its last checkpoint."
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
