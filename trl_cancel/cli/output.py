"""The output folder of a run from the command line: whose it is, and what it holds already."""

from pathlib import Path
from typing import Any

from ..running.changed_settings import changes, run_record, settings_record
from ..running.checkpoints import AUTO, decided_by_main, find_checkpoint, later_of_others
from ..running.finished import check_replaceable, is_of_another_run, saved_step
from ..running.run_lock import check_free
from ..trainer import CancelGRPOTrainer
from . import UsageError
from .settings import Settings


def wanted_checkpoint(settings: Settings) -> str | bool | None:
    """What `resume_from_checkpoint` asks for, as [`CancelGRPOTrainer.train`] takes it."""
    named: Any = settings.training.resume_from_checkpoint
    return {"true": True, "false": None, "none": None, "auto": AUTO}.get(str(named).lower(), named)


def check_output(settings: Settings) -> None:
    """
    Refuses an output folder of another run, one that goes on or one that has finished, and a checkpoint that cannot be
    gone on from, before anything is loaded. Another node may see the folder otherwise, so only the main process looks.
    """
    training, wanted = settings.training, wanted_checkpoint(settings)
    if training.process_index > 0:
        return
    folder = Path(str(training.output_dir))
    try:
        found = find_checkpoint(wanted, folder, settings_record(training))
        if training.save_strategy != "no":
            check_free(folder)
        if not settings.run.overwrite_output_dir and not _may_be_done(folder, wanted, _path(found)):
            check_replaceable(folder, _path(found), training)
    except ValueError as error:
        raise UsageError(str(error)) from error


def says_finished(settings: Settings, trainer: CancelGRPOTrainer, checkpoint: str | None) -> str | None:
    """
    What is to be said of a run that is to go on but has finished already, with its results saved; `None` if something
    is left to do. All processes must ask.
    """
    try:
        done = _done(settings, trainer, checkpoint)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if done is None:
        return None
    folder = Path(str(trainer.args.output_dir))
    changed = changes(folder, run_record(trainer))
    differs = f" It was trained with other settings: {'; '.join(changed)}." if changed else ""
    other = "".join(f" {last} is of another run, and is left alone." for last in later_of_others(folder, done))
    push = f" To push it: trl-cancel push {folder}." if trainer.args.push_to_hub else ""
    return f"Already finished at step {done}; nothing to do.{differs}{other}{push}"


def _done(settings: Settings, trainer: CancelGRPOTrainer, checkpoint: str | None) -> int | None:
    folder, last = Path(str(trainer.args.output_dir)), _path(checkpoint)
    step, overwrites = trainer.finished_at(checkpoint), settings.run.overwrite_output_dir

    def saved() -> int | None:
        if last is not None and step is not None and saved_step(folder, last) == step:
            return step
        counts = _is_searched(wanted_checkpoint(settings)) and _counts_alone(folder, last, trainer)
        done = saved_step(folder) if counts else None
        if done is not None and done >= trainer.planned_steps():
            return done
        if not overwrites:
            check_replaceable(folder, last, trainer.args)
        return None

    return decided_by_main(trainer.accelerator, saved)


def _counts_alone(folder: Path, last: Path | None, trainer: CancelGRPOTrainer) -> bool:
    """
    Whether a result counts that is not that of the last checkpoint: of a run without any, or one with the settings of
    this beside a checkpoint of another run.
    """
    return last is None or (is_of_another_run(folder, last) and not changes(folder, run_record(trainer)))


def _path(checkpoint: str | None) -> Path | None:
    return None if checkpoint is None else Path(checkpoint)


def _may_be_done(folder: Path, wanted: str | bool | None, last: Path | None) -> bool:
    """Whether there may be nothing left to do, which the trainer tells, since it knows how many steps there are."""
    return _is_searched(wanted) or (last is not None and saved_step(folder, last) is not None)


def _is_searched(wanted: str | bool | None) -> bool:
    """Whether the run goes on from whatever its output folder holds, and not from a checkpoint that is named."""
    return wanted is True or wanted == AUTO
