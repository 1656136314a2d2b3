"""SIGTERM and SIGINT: the optimizer step is finished, a checkpoint saved, and the run ends."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import TrainerCallback

from .checkpoints import OwnCheckpoints, how_to_go_on


logger = get_logger(__name__)

# Signals, and the handler that means that nobody else has asked for them.
DEFAULTS: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


class StopOnSignal(TrainerCallback):
    """
    Ends the training at the next end of an optimizer step, with a checkpoint, once any process has got SIGTERM or
    SIGINT. An evaluation that is due at that step is left out, since there may not be time for it. A second signal
    acts at once, as it would without this.

    Signals that something else handles already (a launcher's library, `enable_jit_checkpoint`) are left to it, and so
    are all signals of a training in another thread than the main one.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Processes that must stop together.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: int | None = None  # by any process, as soon as all know
        self._own: int | None = None  # by this process
        self._stepping_from: int | None = None  # steps before the latest call of the optimizer
        self._saves = True

    def is_between_steps(self, step: int) -> bool:
        """
        Whether the training has called the optimizer, and the weights are those of a step that is done and counted.

        Args:
            step (`int`):
                Optimizer steps that are counted.
        """
        return self._stepping_from is not None and step > self._stepping_from

    @property
    def noted(self) -> bool:
        """Whether this process has got a signal."""
        return self._own is not None

    @contextmanager
    def listening(self, wanted: bool = True, saves: bool = True) -> Iterator[None]:
        """
        Handles the signals meanwhile.

        Args:
            wanted (`bool`, *optional*, defaults to `True`):
                Whether to.
            saves (`bool`, *optional*, defaults to `True`):
                Whether a checkpoint will be saved.
        """
        self.received = self._own = self._stepping_from = None
        self._saves = saves
        before = {}
        if wanted and threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in DEFAULTS}
            before = {number: handler for number, handler in before.items() if handler == DEFAULTS[number]}
        for number in before:
            signal.signal(number, self._note)
        try:
            yield
        except BaseException:
            self._forget()
            raise
        finally:
            for number, handler in before.items():
                if signal.getsignal(number) == self._note:
                    signal.signal(number, handler)

    def _forget(self) -> None:
        """A signal ends one training, and says nothing of what is done with the trainer after it."""
        self.received = self._own = None

    def _note(self, number: int, frame: Any) -> None:
        if self._own is not None:
            signal.signal(number, DEFAULTS[number])
            os.kill(os.getpid(), number)
            return
        self._own = number
        if self.accelerator.is_main_process:  # not by a logger: it may have been interrupted while it held its lock
            how = "with a checkpoint" if self._saves else 'saving nothing (save_strategy="no")'
            what = f"stopping after this optimizer step, {how}; a second signal stops at once"
            os.write(2, f"\n{signal.Signals(number).name}: {what}.\n".encode())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stepping_from = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agree()
        if self.received is not None:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
            control.should_evaluate = False

    def _agree(self) -> None:
        numbers = torch.tensor([self._own or 0], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            numbers = self.accelerator.gather(numbers)
        self.received = int(numbers.max()) or None

    def end(self, args: Any, step: int, own: OwnCheckpoints) -> None:
        """
        Says how to go on, if a signal has ended the training or come after its last step, and passes it on. All
        processes must call it.

        Args:
            args ([`~trl_cancel.CancelGRPOConfig`]):
                Configuration.
            step (`int`):
                Optimizer steps that are done.
            own ([`~trl_cancel.running.checkpoints.OwnCheckpoints`]):
                The checkpoints of the run.

        Raises:
            `SystemExit`: After SIGTERM, with the exit status that schedulers know it by, 143.
            `KeyboardInterrupt`: After SIGINT.
        """
        self._agree()
        received = self.received
        self._forget()
        if received is None:
            return
        logger.warning(
            f"Stopped by {signal.Signals(received).name} after step {step}. {_what_is_saved(args, step, own)}"
        )
        if received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + received)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received is not None:  # saved at the end of the step
            control.should_save = control.should_evaluate = False


def _what_is_saved(args: Any, step: int, own: OwnCheckpoints) -> str:
    if args.save_strategy == "no":
        return 'Nothing was saved: save_strategy="no".'
    last = own.last()
    if last is None:
        return "There is no whole checkpoint of this run."
    if last.name != f"checkpoint-{step}":  # the signal came after the last step
        return f"The last whole checkpoint of this run is {last}; {how_to_go_on(last)}."
    text = f"Saved as {last}; {how_to_go_on(last)}."
    if not args.layout.ends_generation(step):
        text += " That was within a generation batch: the resumed run generates another instead of the rest of it."
    return text
