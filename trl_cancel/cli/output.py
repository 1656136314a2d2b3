"""The output folder of a run from the command line: whose it is, and what it holds already."""

from pathlib import Path

from ..running.changed_settings import changes, run_record
from ..running.checkpoints import AUTO, decided_by_main
from ..running.finished import check_replaceable, saved_step
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
        if not settings.run.overwrite_output_dir and not _is_auto(settings):  # which may have nothing left to do
            check_replaceable(folder, Path(checkpoint) if isinstance(checkpoint, str) else None, settings.training)
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
    folder = Path(str(trainer.args.output_dir))
    changed = changes(folder, run_record(trainer))
    differs = f" It was trained with other settings: {'; '.join(changed)}." if changed else ""
    push = f" To push it: trl-cancel push {folder}." if trainer.args.push_to_hub else ""
    return f"Already finished at step {done}; nothing to do.{differs}{push}"


def _done(settings: Settings, trainer: CancelGRPOTrainer, checkpoint: str | bool | None) -> int | None:
    folder = Path(str(trainer.args.output_dir))
    step = trainer.finished_at(checkpoint)

    def saved() -> int | None:
        if isinstance(checkpoint, str):
            return step if step is not None and saved_step(folder, Path(checkpoint)) == step else None
        done = saved_step(folder) if _is_auto(settings) else None  # of a run without checkpoints
        if done is not None and done >= trainer.planned_steps():
            return done
        if not settings.run.overwrite_output_dir:
            check_replaceable(folder, None, trainer.args)
        return None

    return decided_by_main(trainer.accelerator, saved)


def _is_auto(settings: Settings) -> bool:
    return str(settings.training.resume_from_checkpoint).lower() == AUTO
