"""
Checkpoints that are whole, or known not to be.

While a checkpoint is written, an empty file `checkpoint-N.incomplete` lies beside its folder; it is taken away when
every file of every process is on the disk. A process that is killed leaves it behind. A folder that is renamed when it
is finished would say the same, but not every file system of a cluster or a cloud can rename folders, and processes on
several nodes would have to agree on who does it.
"""

import errno
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import Trainer

from .changed_settings import changes, is_of_length, is_same_run, run_of, saved_record, settings_of, tells_run
from .damage import STATE, cut_off, read_object, why_not_whole
from .storage import READ_ONLY, free_bytes, is_storage_error, readable, what_happened


logger = logging.getLogger(__name__)  # accelerate's is not ready before a configuration is made

T = TypeVar("T")
AUTO = "auto"
MARKER = ".incomplete"
# What transformers leaves inside a checkpoint that it could not finish on SIGTERM (`enable_jit_checkpoint`).
MARKER_OF_TRANSFORMERS = "checkpoint-is-incomplete.txt"


class SavingError(RuntimeError):
    """Something could not be saved for want of space, or because the disk refused it; says what is kept."""


def why_broken(checkpoint: str | os.PathLike) -> str | None:
    """
    What is wrong with a checkpoint, or `None` if it is whole. Checkpoints written by TRL's own trainer are judged by
    their files.

    Args:
        checkpoint (`str` or `os.PathLike`):
            Folder of the checkpoint.
    """
    link, checkpoint = Path(checkpoint).absolute(), Path(checkpoint).resolve()
    if not checkpoint.is_dir():
        return "there is no such folder"
    if _marker(link).exists() or _marker(checkpoint).exists() or (checkpoint / MARKER_OF_TRANSFORMERS).exists():
        return "it was not written to the end"
    return why_not_whole(checkpoint)


def last_whole(folder: str | os.PathLike, state: dict[str, Any] | None = None) -> Path | None:
    """
    The latest whole checkpoint in a folder; newer ones that are not whole are named in a warning.

    Args:
        folder (`str` or `os.PathLike`):
            Output folder of a run.
        state (`dict`, *optional*):
            What a `trainer_state.json` holds, to look only at the checkpoints of its run.
    """
    for checkpoint in reversed(_checkpoints(Path(folder))):
        if state is not None and not is_same_run(state, read_object(checkpoint / STATE)):
            continue
        reason = why_broken(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning(f"{checkpoint} is left out: {reason}.")
    return None


def last_of_runs(folder: str | os.PathLike) -> list[Path]:
    """
    The latest whole checkpoint of each run that has left any in a folder, from the one of the most steps. What does not
    tell of which run it is counts as of the same as the others.

    Args:
        folder (`str` or `os.PathLike`):
            Output folder of the runs.
    """
    found: list[tuple[Path, dict[str, Any]]] = []
    for checkpoint in reversed(_checkpoints(Path(folder))):
        state = read_object(checkpoint / STATE)
        if any(not (tells_run(state) and tells_run(other)) or is_same_run(state, other) for _, other in found):
            continue
        reason = why_broken(checkpoint)
        if reason is None:
            found.append((checkpoint, state))
        else:
            logger.warning(f"{checkpoint} is left out: {reason}.")
    return [checkpoint for checkpoint, _ in found]


def later_of_others(folder: str | os.PathLike, step: int) -> list[Path]:
    """
    The latest whole checkpoints, of more steps than a result that a folder holds, of other runs than that of the result.

    Args:
        folder (`str` or `os.PathLike`):
            Output folder.
        step (`int`):
            Steps of the result.
    """
    state = read_object(Path(folder, STATE))
    later = (last for last in last_of_runs(folder) if _steps(last) > step)
    return [last for last in later if not is_same_run(state, read_object(last / STATE))]


def last_of_run(folder: str | os.PathLike, record: dict[str, Any] | None) -> Path | None:
    """
    The latest whole checkpoint in a folder, of the run with these settings where there are several runs: of those the
    one whose model the folder holds, or else the one of the most steps. Another length will do where none has the same.

    Args:
        folder (`str` or `os.PathLike`):
            Output folder of the runs.
        record (`dict`, *optional*):
            The [`~trl_cancel.running.changed_settings.run_record`] of the run, or what is known of it yet.

    Raises:
        `ValueError`: If there are several runs, and none has these settings.
    """
    lasts = last_of_runs(folder)
    if len(lasts) < 2:
        return lasts[0] if lasts else None
    differ = {last: _differences(last, record) for last in lasts}
    same = [last for last in lasts if not differ[last]] or [
        last for last in lasts if all(map(is_of_length, differ[last]))
    ]
    if not same:
        others = ", ".join(f"{last.name} ({'; '.join(changed)})" for last, changed in differ.items())
        raise ValueError(
            f"output_dir={folder} holds checkpoints of several runs, and none has the settings of this one: {others}. "
            f"Set resume_from_checkpoint={lasts[0]}, say, to go on from that, or another output_dir."
        )
    state = read_object(Path(folder, STATE))
    return next((last for last in same if is_same_run(state, read_object(last / STATE))), same[0])


def find_checkpoint(
    resume: str | bool | None, folder: str | os.PathLike, record: dict[str, Any] | None = None
) -> str | None:
    """
    The checkpoint to go on from.

    Args:
        resume (`str` or `bool`, *optional*):
            A checkpoint; `True` for the last whole one; `"auto"` for that, or a new start where there is none.
        folder (`str` or `os.PathLike`):
            Output folder of the run.
        record (`dict`, *optional*):
            The [`~trl_cancel.running.changed_settings.run_record`] of the run, or what is known of it yet, by which its
            checkpoints are told from those of other runs.

    Raises:
        `ValueError`: If there is none, it cannot be told which is meant, or the one that is named is not whole.
    """
    if resume is None or resume is False:
        return None
    if resume is True or resume == AUTO:
        last = last_of_run(folder, record)
        if last is None and resume is True:
            raise ValueError(
                f"resume_from_checkpoint={resume}: output_dir={folder} holds no whole checkpoint. Leave it out to start "
                "anew, or set it to 'auto', which starts anew where there is none."
            )
        return None if last is None else str(last)
    reason = why_broken(resume)
    if reason is not None:
        last = last_whole(Path(resume).resolve().parent)
        instead = f"The last whole checkpoint there is {last}." if last else "There is no whole checkpoint beside it."
        raise ValueError(f"resume_from_checkpoint={resume} is not a whole checkpoint: {reason}. {instead}")
    return str(resume)


class OwnCheckpoints:
    """
    The checkpoints of one run, beside which its output folder may hold those of others.

    Args:
        resumed (`str`, *optional*):
            The one that the run goes on from.
    """

    def __init__(self, resumed: str | None = None):
        self._resumed = Path(resumed).absolute() if resumed else None
        self._state = read_object(self._resumed / STATE) if self._resumed else {}
        self._paths = [self._resumed] if self._resumed else []
        self._new_name = uuid.uuid4().hex

    def add(self, checkpoint: Path) -> None:
        """Notes one that is written."""
        self._paths.append(checkpoint.absolute())

    def holds(self, checkpoint: Path) -> bool:
        """Whether the run has written a checkpoint, or goes on from it, and it is whole."""
        return checkpoint.absolute() in self._paths and why_broken(checkpoint) is None

    def name_in(self, folder: Path) -> str:
        """
        Name of the run: that of the run it goes on, unless it does so in another folder.

        Args:
            folder (`Path`):
                Output folder.
        """
        goes_on = self._resumed is not None and self._resumed.parent.resolve() == folder.resolve()
        return (run_of(self._state.get("stateful_callbacks")) if goes_on else None) or self._new_name

    def by_age(self, folder: Path) -> list[Path]:
        """
        Those in a folder, from the oldest: what the run that it goes on had left after the checkpoint that it goes on
        from, then by steps; clocks may go back. Whatever cannot be told to be of this run is not among them.

        Args:
            folder (`Path`):
                Output folder.
        """
        return sorted((path for path in _checkpoints(folder) if self._is_own(path)), key=self._age)

    def others_ahead(self, folder: Path, end: float = math.inf) -> list[Path]:
        """
        Whole ones of other runs in a folder that a run may come to replace: of more steps than what it goes on from.

        Args:
            folder (`Path`):
                Output folder.
            end (`float`, *optional*, defaults to `inf`):
                Step at which the run ends.
        """
        done = _steps(self._resumed) if self._resumed is not None else 0
        others = (path for path in _checkpoints(folder) if done < _steps(path) <= end and not self._is_own(path))
        return [path for path in others if why_broken(path) is None]

    def last(self) -> Path | None:
        """The latest that is whole."""
        return next((checkpoint for checkpoint in reversed(self._paths) if why_broken(checkpoint) is None), None)

    def _is_own(self, checkpoint: Path) -> bool:
        if checkpoint.absolute() in self._paths:
            return True
        if self._resumed is None or self._resumed.parent.resolve() != checkpoint.parent.resolve():
            return False
        return is_same_run(self._state, read_object(checkpoint / STATE))

    def _age(self, checkpoint: Path) -> tuple[bool, int]:
        is_earlier = self._resumed is not None and _steps(checkpoint) <= _steps(self._resumed)
        return is_earlier or checkpoint.absolute() in self._paths, _steps(checkpoint)


def how_to_go_on(checkpoint: Path) -> str:
    """
    How to go on from a checkpoint with the same settings: `True` may take another one that its folder holds.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
    """
    try:
        last = last_of_run(checkpoint.parent, saved_record(checkpoint))
    except ValueError:  # of several runs whose settings are not known
        last = None
    if last is not None and last.absolute() == checkpoint.absolute():
        return "continue with resume_from_checkpoint=True"
    is_same = last is not None and is_same_run(*(read_object(path / STATE) for path in (last, checkpoint)))
    taken = f", for True takes {last}{'' if is_same else ', of another run'}" if last else ""
    return f"continue with resume_from_checkpoint={str(checkpoint)!r}{taken}"


def decided_by_main(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """
    What a function returns on the main process, or refuses there, for all processes.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The processes, which must all call this.
        decide (`Callable`):
            The function.

    Raises:
        `ValueError`, [`SavingError`]: If it does on the main process.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = decide()
        except (ValueError, SavingError) as error:
            answer[1] = error
    decision, mistake = broadcast_object_list(answer)
    if mistake is not None:
        raise mistake
    return decision


@contextmanager
def written_whole(checkpoint: Path, accelerator: Accelerator, own: OwnCheckpoints | None = None) -> Iterator[None]:
    """
    Marks a checkpoint as incomplete until all that is written meanwhile, by all processes, is on the disk. Removes
    what earlier attempts, or another run, have left in its place, and this one if it fails.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
        accelerator ([`~accelerate.Accelerator`]):
            Processes that write to it.
        own ([`OwnCheckpoints`], *optional*):
            The checkpoints of the run, of which an error tells the last one.

    Raises:
        [`SavingError`]: If the disk is full or refuses to be written.
    """
    try:
        if accelerator.is_main_process:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            _remove_broken(checkpoint.parent)
            _marker(checkpoint).touch()
            if checkpoint.exists():  # of another run, some of whose files might stay
                _removed(checkpoint)
        accelerator.wait_for_everyone()
        yield
        accelerator.wait_for_everyone()  # for the files of all
        if accelerator.is_local_main_process:
            _flush(checkpoint)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _marker(checkpoint).unlink(missing_ok=True)
    except Exception as error:
        if accelerator.is_main_process:
            _give_up(checkpoint, error, alone=accelerator.num_processes == 1)
        if is_storage_error(error):
            raise SavingError(_what_is_kept(checkpoint, error, own)) from error
        raise


@contextmanager
def rotated_when_whole(checkpoint: Path, trainer: Trainer, own: OwnCheckpoints) -> Iterator[None]:
    """
    As [`written_whole`]; and the run's older checkpoints beyond `save_total_limit` go when this one is whole, not before.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
        trainer ([`~transformers.Trainer`]):
            The trainer, which writes it meanwhile.
        own ([`OwnCheckpoints`]):
            The checkpoints of the run, of which it becomes one.
    """
    args: Any = trainer.args
    with args.set_aside(save_total_limit=None), written_whole(checkpoint, trainer.accelerator, own):
        yield
    own.add(checkpoint)
    if args.should_save:
        best = trainer.state.best_model_checkpoint
        _rotate(checkpoint, args.save_total_limit, own, Path(best) if best else None)


def keep_only(best: Path, folder: Path, own: OwnCheckpoints) -> None:
    """
    Removes all checkpoints of a run but the best one, as transformers does at the end with `save_total_limit=1`, and
    leaves those of other runs alone.

    Args:
        best (`Path`):
            The best one; nothing is removed if there is no such folder.
        folder (`Path`):
            Output folder of the run.
        own ([`OwnCheckpoints`]):
            The checkpoints of the run.
    """
    for checkpoint in own.by_age(folder) if best.is_dir() else []:
        if not checkpoint.samefile(best):
            shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def saved_or_said(folder: Path, own: OwnCheckpoints | None = None) -> Iterator[None]:
    """
    Where a model is saved by itself: what is left half written is removed, and the error says what is kept.

    Args:
        folder (`Path`):
            Folder of the model.
        own ([`OwnCheckpoints`], *optional*):
            The checkpoints of the run, of which an error tells the last one.

    Raises:
        [`SavingError`]: If the disk is full or refuses to be written.
    """
    with said(folder, own), no_halves(folder):
        yield


@contextmanager
def said(folder: Path, own: OwnCheckpoints | None = None) -> Iterator[None]:
    """
    Lets an error of the disk say what is kept.

    Args:
        folder (`Path`):
            Folder that is written to.
        own ([`OwnCheckpoints`], *optional*):
            The checkpoints of the run, of which an error tells the last one.

    Raises:
        [`SavingError`]: If the disk is full or refuses to be written.
    """
    try:
        yield
    except SavingError:
        raise
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise SavingError(_what_is_kept(folder, error, own)) from error


@contextmanager
def no_halves(folder: Path) -> Iterator[None]:
    """
    Removes what is left half written in a folder if the disk is full.

    Args:
        folder (`Path`):
            Folder of the model.
    """
    before = {file: _version(file) for file in cut_off(folder)}  # files that are none of ours
    try:
        yield
    except Exception as error:
        if is_storage_error(error):
            for file in cut_off(folder):
                with suppress(OSError):  # of a disk that is read-only by now
                    if _version(file) != before.get(file):
                        file.unlink(missing_ok=True)
        raise


def _differences(checkpoint: Path, record: dict[str, Any] | None) -> list[str]:
    if record is None or not record["attributes"] or not settings_of(checkpoint):
        return ["its settings are not known"]
    return changes(checkpoint, record)


def _marker(checkpoint: Path) -> Path:
    return Path(f"{checkpoint}{MARKER}")


def _checkpoints(folder: Path) -> list[Path]:
    """By their steps."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=_steps)


def _steps(checkpoint: Path) -> int:
    """By its name; 0 if that tells none, as that of a link."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else 0


def _rotate(newest: Path, limit: int | None, own: OwnCheckpoints, best: Path | None) -> None:
    """Removes the run's oldest checkpoints beyond a limit, but neither the newest nor the best one."""
    if limit is None or limit <= 0:
        return
    spared = {path.absolute() for path in (newest, best) if path is not None}
    others = [path for path in own.by_age(newest.parent) if path.absolute() not in spared]
    spared_here = sum(path.is_dir() and path.parent == newest.absolute().parent for path in spared)
    excess = max(0, len(others) + spared_here - max(limit, spared_here))
    for checkpoint in others[:excess]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def _version(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _remove_broken(folder: Path) -> None:
    for marker in folder.glob(f"checkpoint-*{MARKER}"):
        if _removed(marker.with_name(marker.name.removesuffix(MARKER))):
            marker.unlink(missing_ok=True)


def _removed(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _flush(folder: Path) -> None:
    """Waits until the files are on the disk; a full one may tell only now."""
    if os.name == "nt":  # where only what is open for writing can be waited for
        return
    if not folder.exists():  # on a further node, which writes nothing if save_only_model is set
        return
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (
                errno.EINVAL,
                errno.ENOTSUP,
                errno.ENOSYS,
            ):  # a file system that knows no such thing
                raise
        finally:
            os.close(descriptor)


def _give_up(checkpoint: Path, error: BaseException, alone: bool) -> None:
    """Removes a half; what only could not be pushed is kept."""
    is_half = is_storage_error(error) or why_not_whole(checkpoint) is not None
    is_settled = not is_half or _removed(checkpoint)
    if is_settled and alone:  # others may still be writing
        with suppress(OSError):  # of a disk that is read-only by now
            _marker(checkpoint).unlink(missing_ok=True)


def _what_is_kept(folder: Path, error: BaseException, own: OwnCheckpoints | None) -> str:
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", folder.name) is not None
    last = last_whole(folder.parent if is_checkpoint else folder) if own is None else own.last()
    reason = what_happened(error, folder)
    what = f"{folder} could not be saved: {reason}; {readable(free_bytes(folder))} free on the disk"
    if last is None:
        return f"{what}. There is no earlier checkpoint{'' if own is None else ' of this run'}."
    size = sum(file.stat().st_size for file in last.rglob("*") if file.is_file())
    remedy = "make room (save_total_limit keeps fewer checkpoints)"
    remedy = "let it be written again" if reason.startswith(READ_ONLY) else remedy
    return f"{what}, {last.name} takes {readable(size)}. {last} is whole: {remedy}, then {how_to_go_on(last)}."
