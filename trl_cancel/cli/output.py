"""The output folder of a run from the command line: whose it is, and what it holds already."""

from pathlib import Path

from ..running.changed_settings import changes, run_record
from ..running.checkpoints import AUTO, decided_by_main
from ..running.finished import check_replaceable, is_of_another_run, keeps_last_checkpoint, saved_step
from ..running.run_lock import check_free
from ..trainer import CancelGRPOTrainer
from . import UsageError
from .settings import Settings


def check_output(settings: Settings, checkpoint: str | bool | None) -> None:
    """Refuses an output folder of another run, one that goes on or one that has finished, before anything is loaded."""
    folder = Path(str(settings.training.output_dir))
    if settings.training.process_index > 0:
        return
    try:
        if settings.training.save_strategy != "no":
            check_free(folder)
        if not settings.run.overwrite_output_dir and not _may_be_done(settings, checkpoint):
            check_replaceable(folder, _path(checkpoint), settings.training)
    except ValueError as error:
        raise UsageError(str(error)) from error


def says_finished(settings: Settings, trainer: CancelGRPOTrainer, checkpoint: str | bool | None) -> str | None:
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
    folder, last = Path(str(trainer.args.output_dir)), _path(checkpoint)
    changed = changes(folder, run_record(trainer))
    differs = f" It was trained with other settings: {'; '.join(changed)}." if changed else ""
    is_other = last is not None and is_of_another_run(folder, last) and saved_step(folder, last) is None
    other = f" {last} is of another run, and is left alone." if is_other else ""
    push = f" To push it: trl-cancel push {folder}." if trainer.args.push_to_hub else ""
    return f"Already finished at step {done}; nothing to do.{differs}{other}{push}"


def _done(settings: Settings, trainer: CancelGRPOTrainer, checkpoint: str | bool | None) -> int | None:
    folder = Path(str(trainer.args.output_dir))
    step = trainer.finished_at(checkpoint)

    def saved() -> int | None:
        last, overwrites = _path(checkpoint), settings.run.overwrite_output_dir
        if last is not None and step is not None and saved_step(folder, last) == step:
            return step
        done = saved_step(folder) if _is_searched(settings) and _counts_alone(folder, last, overwrites) else None
        if done is not None and done >= trainer.planned_steps():
            return done
        if not overwrites:
            check_replaceable(folder, last, trainer.args)
        return None

    return decided_by_main(trainer.accelerator, saved)


def _counts_alone(folder: Path, last: Path | None, overwrites: bool) -> bool:
    """
    Whether a result counts that is not that of the last checkpoint: of a run without any, or beside one of another run.
    What may be overwritten can be what was there when that other run was started, but not if its own checkpoint is.
    """
    if last is None:
        return True
    return is_of_another_run(folder, last) and (not overwrites or keeps_last_checkpoint(folder))


def _path(checkpoint: str | bool | None) -> Path | None:
    return Path(checkpoint) if isinstance(checkpoint, str) else None


def _may_be_done(settings: Settings, checkpoint: str | bool | None) -> bool:
    """Whether there may be nothing left to do, which the trainer tells, since it knows how many steps there are."""
    last = _path(checkpoint)
    is_end = last is not None and saved_step(Path(str(settings.training.output_dir)), last) is not None
    return is_end or _is_searched(settings)


def _is_searched(settings: Settings) -> bool:
    """Whether the run goes on from whatever its output folder holds, and not from a checkpoint that is named."""
    return str(settings.training.resume_from_checkpoint).lower() in (AUTO, "true")
