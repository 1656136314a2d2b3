"""Runs that can be stopped at any time: whole checkpoints, signals, and progress that is saved when something fails."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from trl import GRPOTrainer

from .checkpoints import (
    OwnCheckpoints,
    SavingError,
    agree_on_checkpoint,
    how_to_go_on,
    last_whole,
    rotated_when_whole,
    saved_or_said,
)
from .configs import CancelGRPOConfig
from .fit import check_fit
from .stopping import StopOnSignal


logger = get_logger(__name__)


class Resumable(GRPOTrainer):
    """
    The part of [`CancelGRPOTrainer`] that saves, stops and resumes.

    Attributes:
        own_checkpoints ([`~trl_cancel.checkpoints.OwnCheckpoints`]):
            What this run has written and goes on from, and not what another has left in its output folder.
    """

    args: CancelGRPOConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.own_checkpoints = OwnCheckpoints()
        self._signals = StopOnSignal(self.accelerator)
        self.add_callback(self._signals)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Trains as [`~transformers.Trainer.train`] does. If something fails in the middle, a reward function say, the
        progress so far is saved as a checkpoint that `resume_from_checkpoint=True` continues from (in a single
        process, unless `save_strategy="no"`, no step has been finished yet, or the optimizer was interrupted).

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint; `True` for the last whole one in `output_dir`; `"auto"` for that, or a new start where
                there is none.
            *args, **kwargs:
                Further arguments of [`~transformers.Trainer.train`].

        Raises:
            `ValueError`: If there is no whole checkpoint to go on from, or it is one of another model.
            [`~trl_cancel.checkpoints.SavingError`]: If the disk is full.
            [`~trl_cancel.rewards.RewardError`]: If a reward function returns what cannot be used.
            `SystemExit`, `KeyboardInterrupt`: If SIGTERM or SIGINT has ended the training; see `save_on_signal`.
        """
        checkpoint = agree_on_checkpoint(resume_from_checkpoint, str(self.args.output_dir), self.accelerator)
        check_fit(checkpoint, self.model)
        self.own_checkpoints = OwnCheckpoints(checkpoint)
        if checkpoint is None and self.args.save_strategy != "no" and self.is_world_process_zero():
            _warn_of_others(str(self.args.output_dir))
        with self._signals.listening(self.args.save_on_signal):
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

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        with rotated_when_whole(folder, self, self.own_checkpoints):
            super()._save_checkpoint(model, trial)

    def _finalize_training(self, trial, num_train_samples, start_time):
        # A training that is stopped goes on from its last checkpoint, of which transformers would leave only the best
        # one with save_total_limit=1; and there may be no time to load that.
        stopped = {"save_total_limit": None, "load_best_model_at_end": False} if self.is_stopped_by_signal else {}
        with self.args.set_aside(**stopped):
            return super()._finalize_training(trial, num_train_samples, start_time)

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
        if at_once or isinstance(error, SavingError):
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


def _warn_of_others(folder: str) -> None:
    """Of checkpoints that a new run does not go on from; TRL says nothing either, so it is allowed."""
    last = last_whole(folder)
    if last is not None:
        logger.warning(
            f"output_dir={folder} holds checkpoints of another run, the latest {last.name}, and this run starts anew "
            "beside them. Later, resume_from_checkpoint=True takes the checkpoint of the most steps, whichever run it "
            "is of. Set another output_dir, or resume_from_checkpoint='auto' to go on from where that run was."
        )
