"""Results of finished runs: whether an output folder holds one, and what may replace it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .changed_settings import changes, is_same_run, logs_of, run_of, settings_record, tells_run
from .checkpoints import last_of_runs, last_whole
from .damage import STATE, is_count, read_object, weights_at, why_unusable


RESULTS = "all_results.json"  # the last that a run from the command line saves
CARD = "README.md"


@dataclass(frozen=True)
class Left:
    """
    What a finished run has left in its output folder beside the model.

    Args:
        logs (`list[dict]`, *optional*):
            Its logs up to its end; `None` if they are not there.
        results (`bool`):
            Whether its results are there.
    """

    logs: list[dict[str, Any]] | None = None
    results: bool = False


def saved_step(folder: Path, checkpoint: Path | None = None) -> int | None:
    """
    The step at which a run ended whose results a folder holds, all of them; `None` if it does not.

    Args:
        folder (`Path`):
            Output folder of a run from the command line.
        checkpoint (`Path`, *optional*):
            Last checkpoint of the run; the results of another run, by its name or logs, do not count.
    """
    state = read_object(folder / STATE)
    if why_unusable(folder) is not None or not _has_results(folder, state):
        return None
    if checkpoint is not None and not _has_gone_on(read_object(checkpoint / STATE), state):
        return None
    return state["global_step"]


def left_by(folder: Path, checkpoint: Path) -> Left:
    """
    What a run has left that ended with a checkpoint, and whose model may be lost.

    Args:
        folder (`Path`):
            Output folder of a run from the command line.
        checkpoint (`Path`):
            Last checkpoint of the run.
    """
    before, state = read_object(checkpoint / STATE), read_object(folder / STATE)
    if state.get("global_step") != before.get("global_step") or not _has_gone_on(before, state):
        return Left()
    return Left(state.get("log_history"), _has_results(folder, state))


def is_of_another_run(folder: Path, checkpoint: Path) -> bool:
    """
    Whether a folder holds the model, or the results, of another run than that of a checkpoint. A model beside its
    checkpoint that does not tell of which run it is, since the run was killed before it could save that, counts as that
    of the checkpoint.

    Args:
        folder (`Path`):
            Output folder.
        checkpoint (`Path`):
            A checkpoint.
    """
    if _held(folder) is None:
        return False
    state = read_object(folder / STATE)
    is_inside = checkpoint.resolve().parent == folder.resolve()
    return not is_inside or (tells_run(state) and not is_same_run(state, read_object(checkpoint / STATE)))


def discard(folder: Path) -> None:
    """
    Takes away what says of which run a model is, and how it did, where another run begins to replace it: whatever ends
    that run early, nothing of the two is taken for one. The model and its checkpoints stay until they are replaced.

    Args:
        folder (`Path`):
            Output folder.
    """
    for name in (RESULTS, "train_results.json", STATE, CARD):
        (folder / name).unlink(missing_ok=True)


def check_replaceable(folder: Path, checkpoint: Path | None, args: Any) -> None:
    """
    Refuses a folder that holds a model, or the results of one that is lost, unless a run goes on in it that has saved it.

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
    held = _held(folder)
    if held is None or (checkpoint is not None and not is_of_another_run(folder, checkpoint)):
        return
    changed = changes(folder, settings_record(args))
    differs = f" It was trained with other settings: {'; '.join(changed)}." if changed else ""
    other = "" if checkpoint is None else _says_whose(folder, checkpoint)
    choices = ["Set another output_dir", "overwrite_output_dir=true to replace it", *_ways_to_go_on(folder)]
    raise ValueError(f"output_dir={folder} holds {held}.{differs}{other} {', '.join(choices[:-1])}, or {choices[-1]}.")


def _has_results(folder: Path, state: dict[str, Any]) -> bool:
    step = state.get("global_step")
    return is_count(step) and read_object(folder / RESULTS).get("steps") == step


def _has_gone_on(before: dict[str, Any], state: dict[str, Any]) -> bool:
    """Whether a state is a later one, or the same, of a run, and not that of another one that left the same checkpoint."""
    runs = [run_of(each.get("stateful_callbacks")) for each in (before, state)]
    logs = logs_of(before)
    return runs[0] == runs[1] and logs_of(state)[: len(logs)] == logs


def _held(folder: Path) -> str | None:
    """What is there of a finished run."""
    weights = weights_at(folder)
    if weights is not None:
        return f"the model of a finished run ({weights})"
    has_results = _has_results(folder, read_object(folder / STATE))
    return f"the results of a finished run ({RESULTS}), whose model is missing" if has_results else None


def _says_whose(folder: Path, checkpoint: Path) -> str:
    state, before = read_object(folder / STATE), read_object(checkpoint / STATE)
    if is_same_run(state, before):  # in another folder
        return ""
    ended = f"It ended at step {state['global_step']}, and " if is_count(state.get("global_step")) else ""
    whose = "is of another run" if tells_run(before) else "does not tell of which run it is"
    return f" {ended}{checkpoint} {whose}."


def _ways_to_go_on(folder: Path) -> list[str]:
    """From the last checkpoint of the run whose model it is, as far as that is known."""
    state, runs = read_object(folder / STATE), last_of_runs(folder)
    own = last_whole(folder, state) if tells_run(state) else next(iter(runs), None)
    if own is None:
        return []
    named = "auto" if runs == [own] else own
    return [f"resume_from_checkpoint={named} to go on from its last checkpoint"]
