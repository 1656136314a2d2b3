"""Runs that can be stopped at any time: whole checkpoints, signals, and progress that is saved when something fails."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers.trainer_utils import TrainOutput, speed_metrics
from trl import GRPOTrainer

from .changed_settings import SAVED_AS, changes, held_by_optimizer, run_record
from .checkpoints import (
    OwnCheckpoints,
    SavingError,
    decided_by_main,
    find_checkpoint,
    how_to_go_on,
    keep_only,
    rotated_when_whole,
    said,
    saved_or_said,
)
from .damage import STATE, is_count, read_object, weights_at
from .finished import is_of_another_run
from .fit import check_fit, check_kind, check_trainable, fitting_states, kind_of
from .outcome import remark_on
from .run_lock import alone_in
from .stopping import StopOnSignal
from .weights import WeightsError


logger = get_logger(__name__)


class Resumable(GRPOTrainer):
    """
    The part of [`CancelGRPOTrainer`] that saves, stops and resumes.

    Attributes:
        own_checkpoints ([`~trl_cancel.running.checkpoints.OwnCheckpoints`]):
            What this run has written and goes on from, and not what another has left in its output folder.
    """

    args: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_trainable(self.model)
        self.own_checkpoints = OwnCheckpoints()
        self._held = ExitStack()  # what a training lets go of at its end
        self._says_finished = True
        self._signals = StopOnSignal(self.accelerator)
        self.add_callback(self._signals)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Trains as [`~transformers.Trainer.train`] does. If something fails in the middle, a reward function say, the
        progress so far is saved as a checkpoint that `resume_from_checkpoint=True` continues from (in a single
        process, unless `save_strategy="no"`, no step has been finished yet, or the optimizer was interrupted).

        A checkpoint of the last step or a later one is only loaded: the run has finished already, and nothing is
        trained, logged or written.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint; `True` for the last whole one in `output_dir`, of the run with the same settings where
                several runs have left some; `"auto"` for that, or a new start where there is none.
            *args, **kwargs:
                Further arguments of [`~transformers.Trainer.train`].

        Raises:
            `ValueError`: If there is no whole checkpoint to go on from, or it cannot be told which is meant, or it is one
                of another model or another optimizer, or if another process trains into the same folder.
            [`~trl_cancel.running.checkpoints.SavingError`]: If the disk is full or read-only.
            [`~trl_cancel.running.rewards.RewardError`]: If a reward function returns what cannot be used.
            [`~trl_cancel.running.weights.WeightsError`]: If the weights hold `nan` or infinite values; they are not saved.
            `SystemExit`, `KeyboardInterrupt`: If SIGTERM or SIGINT has ended the training; see `save_on_signal`.
        """
        checkpoint = self.find_checkpoint(resume_from_checkpoint)
        check_fit(checkpoint, self.model, self.args if self.optimizer is None else None)
        self.own_checkpoints = OwnCheckpoints(checkpoint)
        with ExitStack() as self._held, self._signals.listening(self.args.save_on_signal, self._saves):
            try:
                result = super().train(checkpoint, *args, **kwargs)
            except (Exception, KeyboardInterrupt) as error:
                self._save_progress(error)
                self.is_in_train = False  # as transformers leaves it after a training without an error
                self._forget_generation()
                raise
        if self.is_stopped_by_signal:
            self._forget_generation()
        self._signals.end(self.args, self.state.global_step, self.own_checkpoints)
        return result

    def find_checkpoint(self, resume: str | bool | None) -> str | None:
        """
        The checkpoint to go on from, the same for all processes, of which the main one looks for it: another node may
        see the folder otherwise. All must ask.

        Args:
            resume (`str` or `bool`, *optional*):
                As for [`train`].
        """
        folder = str(self.args.output_dir)
        return decided_by_main(self.accelerator, lambda: find_checkpoint(resume, folder, run_record(self)))

    def finished_at(self, checkpoint: str | bool | None) -> int | None:
        """
        The step of a checkpoint from which nothing is left to train, `None` if something is. All processes must ask.

        Args:
            checkpoint (`str` or `bool`, *optional*):
                A checkpoint, as for [`train`].
        """
        found = self.find_checkpoint(checkpoint)
        if found is None:
            return None
        planned = self.planned_steps()
        done = decided_by_main(self.accelerator, lambda: _steps_done(Path(found)))
        return done if done >= planned else None

    def load_finished(self, checkpoint: str | bool | None) -> None:
        """
        Loads a checkpoint from which nothing is left to train, as [`train`] does, without saying that nothing is to be
        done: for whoever has something to do with it.

        Args:
            checkpoint (`str` or `bool`, *optional*):
                The checkpoint, as for [`train`].
        """
        self._says_finished = False
        try:
            self.train(resume_from_checkpoint=checkpoint)
        finally:
            self._says_finished = True

    def planned_steps(self) -> int:
        """Optimizer steps of a whole run: `max_steps`, or those of `num_train_epochs`."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    @contextmanager
    def holding_output_dir(self, trial: Any = None) -> Iterator[None]:
        """
        Keeps other processes from training into the output folder meanwhile, unless `save_strategy="no"`. All processes
        of the run must call it.

        Args:
            trial (`Any`, *optional*):
                Trial of a hyperparameter search, which has a folder of its own.

        Raises:
            `ValueError`: If another process trains into it already.
            [`~trl_cancel.running.checkpoints.SavingError`]: If it cannot be written.
        """
        folder = Path(self._get_output_dir(trial=trial))
        with ExitStack() as held:

            def hold() -> None:
                with said(folder, self.own_checkpoints):
                    held.enter_context(alone_in(folder))

            if self._saves:
                decided_by_main(self.accelerator, hold)
            yield

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As [`~trl.GRPOTrainer.log`], which writes tables of completions; says what is kept if the disk is full."""
        with said(Path(str(self.args.output_dir)), self.own_checkpoints):
            super().log(logs, *args, **kwargs)

    @property
    def _saves(self) -> bool:
        return self.args.save_strategy != "no"

    @property
    def is_stopped_by_signal(self) -> bool:
        """Whether the training ends at this step because of a signal: there may be no time for more than saving."""
        return self._signals.received is not None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`]; says what is kept if the disk is full."""
        folder = Path(output_dir or str(self.args.output_dir))
        with (
            nullcontext() if _internal_call else saved_or_said(folder, self.own_checkpoints)
        ):  # within a checkpoint, that is what failed
            super().save_model(output_dir, _internal_call)

    def _inner_training_loop(
        self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None
    ):
        finished = self.finished_at(resume_from_checkpoint)
        if finished is not None:
            if self.is_world_process_zero():
                self._say_what_differs(resume_from_checkpoint)
            return self._as_finished(resume_from_checkpoint, finished, trial)
        self._held.enter_context(self.holding_output_dir(trial))
        if self.is_world_process_zero():
            self._say_what_differs(resume_from_checkpoint)
            self._say_what_is_beside(resume_from_checkpoint, Path(self._get_output_dir(trial=trial)))
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _as_finished(self, checkpoint: str, step: int, trial: Any) -> TrainOutput:
        """What a training leaves that ends where it begins: weights and states of the checkpoint, and no trace."""
        started = time.time()
        self.accelerator.free_memory()  # as where a training begins
        dataloader = self.get_train_dataloader()
        epochs, steps_of_epoch, *_, planned = self.set_initial_training_values(self.args, dataloader)
        self._init_training_state(planned, steps_of_epoch, epochs, checkpoint, trial)
        self._prepare_for_training(planned, dataloader, checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        if self._says_finished:
            logger.warning(
                f"Already finished at step {step}; nothing to do. {checkpoint} is loaded, and the run has {planned} "
                "steps (max_steps, num_train_epochs)."
            )
        metrics = speed_metrics("train", started, num_samples=0, num_steps=0)
        metrics |= {"total_flos": self.state.total_flos, "train_loss": 0.0}
        self._memory_tracker.stop_and_update_metrics(metrics)
        self.is_in_train = False
        return TrainOutput(step, 0.0, metrics)

    def _say_what_differs(self, checkpoint: str | None) -> None:
        """Between this run and what it goes on from."""
        changed = changes(Path(checkpoint), run_record(self)) if checkpoint is not None else []
        if changed:
            held = held_by_optimizer(changed) if Path(str(checkpoint), "optimizer.pt").exists() else []
            but = f" The optimizer's state keeps what was then for {', '.join(held)}." if held else ""
            logger.warning(f"{checkpoint} was saved with other settings: {'; '.join(changed)}.{but}")

    def _say_what_is_beside(self, checkpoint: str | None, folder: Path) -> None:
        """What other runs have left where this one saves; TRL says nothing either, so it is allowed."""
        end = math.inf if checkpoint is None else self.planned_steps()
        others = self.own_checkpoints.others_ahead(folder, end) if self._saves else []
        weights = weights_at(folder)
        if checkpoint is not None and not is_of_another_run(folder, Path(checkpoint)):
            weights = None
        if not others and weights is None:
            return
        said = [_beside_checkpoints(folder, others[-1], checkpoint)] if others else []
        if weights is not None:
            said.append(_beside_model(folder, weights))
        changed = changes(others[-1] if others else folder, run_record(self))
        if changed:
            said.append(f"It differs from this one: {'; '.join(changed)}.")
        logger.warning(" ".join(said))

    def _load_optimizer_and_scheduler(self, checkpoint):
        before = kind_of(self.optimizer)
        with fitting_states(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            check_kind(checkpoint, before, kind_of(self.optimizer))

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        self._note_run(folder.parent)
        with rotated_when_whole(folder, self, self.own_checkpoints):
            super()._save_checkpoint(model, trial)

    def _finalize_training(self, trial, num_train_samples, start_time):
        folder, best_only = Path(self._get_output_dir(trial=trial)), self.args.save_total_limit == 1
        is_stopped = self.is_stopped_by_signal
        # Where transformers leaves only the best checkpoint, those of other runs would go too. A training that is
        # stopped goes on from its last one; and there may be no time to load the best.
        aside = {"save_total_limit": None, **({"load_best_model_at_end": False} if is_stopped else {})}
        self._note_run(folder)
        with self.args.set_aside(**aside):
            result = super()._finalize_training(trial, num_train_samples, start_time)
        best = self.state.best_model_checkpoint
        if best_only and best is not None and self.args.should_save and not is_stopped:
            keep_only(Path(best), folder, self.own_checkpoints)
        remark = None if is_stopped else remark_on(self.state.log_history, self.args)
        if remark is not None:
            logger.warning(remark)
        return result

    def _note_run(self, folder: Path) -> None:
        """For `trainer_state.json`."""
        states: Any = self.state.stateful_callbacks
        states[SAVED_AS] = run_record(self, self.own_checkpoints.name_in(folder))

    def _save_progress(self, error: BaseException) -> None:
        step = self.state.global_step
        checkpoint = Path(str(self.args.output_dir), f"checkpoint-{step}")
        # With several processes, the others would not take part in saving.
        if self.args.save_strategy == "no" or self.accelerator.num_processes > 1:
            return
        if not self._signals.is_between_steps(step):
            return
        # A second signal, or one that is left to Python.
        at_once = isinstance(error, KeyboardInterrupt) and (self._signals.noted or not self.args.save_on_signal)
        if at_once or isinstance(error, (SavingError, WeightsError)):
            return
        try:
            if not self.own_checkpoints.holds(checkpoint):
                self._save_checkpoint(self.model, trial=None)
        except Exception as saving:
            error.add_note(f"The progress could not be saved: {saving}")
        else:
            error.add_note(f"The progress up to step {step} is saved as {checkpoint}; {how_to_go_on(checkpoint)}.")

    def _forget_generation(self) -> None:
        """Makes the next training of this trainer begin as another one's: with a generation batch, and no metrics."""
        self._step, self._buffered_inputs = 0, None
        self._current_train_step_time = 0.0
        for collected in (self._metrics["train"], self._pending_metrics, self._pending_extra_logs):
            collected.clear()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # PEFT loads adapters in float32, also those of a 4-bit model, which TRL trains in bfloat16.
        types = {name: weight.dtype for name, weight in self.model.named_parameters() if weight.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, weight in self.model.named_parameters():
            if weight.dtype != types.get(name, weight.dtype):
                weight.data = weight.data.to(types[name])


def _steps_done(checkpoint: Path) -> int:
    step: Any = read_object(checkpoint / STATE).get("global_step")
    return step if is_count(step) else 0


def _beside_checkpoints(folder: Path, last: Path, resumed: str | None) -> str:
    starts = ", and this run starts anew beside them" if resumed is None else ""
    going_on = "" if resumed is not None else f", or resume_from_checkpoint={last} to go on from there"
    return (
        f"output_dir={folder} holds checkpoints of another run, the latest {last.name}{starts}. They stay, but for those "
        "of steps at which this run saves too. Later, resume_from_checkpoint=True takes the latest of the run with the "
        f"same settings. Set another output_dir to keep them apart{going_on}."
    )


def _beside_model(folder: Path, weights: str) -> str:
    return (
        f"output_dir={folder} holds the model of another run ({weights}), which saving this run's model there replaces; another "
        "output_dir keeps both."
    )
