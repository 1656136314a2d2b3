"""Callbacks that measure during training and change nothing in it."""

from typing import Any, cast

import torch
from transformers import TrainerCallback

from ..arguments import not_negative, whole
from ..batch.metrics import Guard, StepMetrics
from ..batch.rollouts import Rows, loss_mask
from ..batch.states import without_dropout
from .shifts import THRESHOLD, TokenShifts, token_shifts


class TokenShiftCallback(TrainerCallback):
    r"""
    Logs what an optimizer step does to the log-probability of each token of its rollouts, as `shift/*` (Eq. 16 of
    [2605.08666](https://huggingface.co/papers/2605.08666)).

    The step's rollouts pass through the model twice more, before it and after it, without gradients and without
    dropout. Weights, losses and random numbers stay what they would be without it. With `token_shift_steps` in its
    configuration, a trainer adds this callback by itself.

    Example:

    ```python
    >>> trainer.add_callback(TokenShiftCallback(trainer, steps=10, threshold=1e-3))
    ```

    Args:
        trainer ([`~trl_cancel.CancelGRPOTrainer`]):
            The trainer that it is added to.
        steps (`int`):
            Measures every so many optimizer steps, those whose number is a multiple of it.
        threshold (`float`, *optional*, defaults to `1e-4`):
            \\( \epsilon \\): change of the log-probability, in nats, from which on a token is boosted or suppressed.

    Raises:
        `TypeError`: If `trainer` is not one of this package's.
        `ValueError`: If it has such a callback already, or `steps` or `threshold` make no sense.
    """

    def __init__(self, trainer: Any, steps: int, threshold: float = THRESHOLD):
        if not _measures(trainer):
            raise TypeError(f"trainer is a {type(trainer).__name__}; pass a trainer of trl_cancel.")
        if any(isinstance(callback, TokenShiftCallback) for callback in trainer.callback_handler.callbacks):
            raise ValueError(
                "The trainer has a TokenShiftCallback already, and both would log shift/*. Set token_shift_steps=0, or "
                "call trainer.remove_callback(TokenShiftCallback) first."
            )
        whole("steps", steps, 1)
        not_negative("threshold", threshold, "1e-4")
        self.trainer, self.steps, self.threshold = trainer, steps, threshold
        self._metrics = StepMetrics()
        self._guard = Guard("shift/*", f"the rollouts of {type(trainer).__name__}")
        self._is_due = False
        self._measured: list[tuple[Rows, torch.Tensor]] = []  # micro-batches, with their log-probs before the step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_due = (state.global_step + 1) % self.steps == 0
        self._measured.clear()  # what a step that failed has left behind

    def on_micro_batch(self, micro_batch: Rows) -> None:
        """Called by the trainer with each micro-batch of an optimizer step, before its loss."""
        if self._is_due:
            with self._guard():
                self._measured.append((micro_batch, self._logps(micro_batch)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self._guard():
            for rows, before in self._measured:
                after, advantages = self._logps(rows), rows["rollout_advantages"]
                self._add(token_shifts(before, after, loss_mask(rows).bool(), advantages, self.threshold))
        self._measured.clear()
        if self._guard.is_off and self._is_due:  # other processes may have them, and all exchange the same
            nothing = torch.zeros(0, 0, device=self.trainer.accelerator.device)
            self._add(token_shifts(nothing, nothing, nothing, nothing.sum(1), self.threshold))
            self._metrics.void("shift/")
        # The step is logged after this.
        for name, value in self._metrics.flush(self.trainer.accelerator.gather).items():
            self.trainer._metrics["train"][name].append(value)

    def _logps(self, micro_batch: Rows) -> torch.Tensor:
        with without_dropout(cast(torch.nn.Module, self.trainer.model)):
            return self.trainer._current_logps(micro_batch)

    def _add(self, found: TokenShifts) -> None:
        """Adds those of a micro-batch; weighted by tokens, they become those of the optimizer step."""
        device = found.shifts.device

        def add(name: str, value: float, tokens: int) -> None:
            values, weights = torch.tensor([[value], [tokens]], dtype=torch.float32, device=device)
            self._metrics.add(name, values.nan_to_num(), weights)  # without tokens it is nan, and weighs nothing

        for sign, ratios in (("positive_", found.positive), ("negative_", found.negative), ("", found.all)):
            for kind in ("boosted", "suppressed", "mean"):
                add(f"shift/{sign}{kind}", getattr(ratios, kind), ratios.tokens)
        add("shift/mean_magnitude", found.all.mean_magnitude, found.all.tokens)


def _measures(trainer: Any) -> bool:
    """Whether a trainer is one of this package's, which imports this module."""
    return hasattr(trainer, "_current_logps")
