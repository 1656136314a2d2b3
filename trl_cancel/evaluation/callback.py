"""Evaluation during training."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import EarlyStoppingCallback, ProcessorMixin, Trainer, TrainerCallback

from ..running import ignored
from ..running.inputs import check_problems
from ..texts import plain
from ..upstream.trl import unwrapped_for_generation
from .engines import TransformersEngine
from .evaluate import answer_problems, summarize
from .result import Evaluation
from .rewards import math_verify_reward
from .scoring import RewardFunction
from .settings import EvaluationSettings


logger = get_logger(__name__)


class EvaluationCallback(TrainerCallback):
    """
    Answers a set of problems during training and logs how good the answers are, as `eval_<name>_greedy`,
    `eval_<name>_avg@n`, `eval_<name>_pass@k` and `eval_<name>_truncated`. Weights, losses and random numbers of the
    training stay what they would be without it. Each result is also appended to `trainer.evaluations`, if there is
    such a list.

    Example:

    ```python
    >>> trainer.add_callback(EvaluationCallback(trainer, problems, name="aime24", steps=100))
    ```

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer that it is added to: TRL's or one of this package's.
        problems ([`~datasets.Dataset`]):
            Data set with a column `prompt` and what the reward function asks for, as of
            [`~trl_cancel.evaluation.load_problems`].
        reward (`Callable`, *optional*):
            Reward function in TRL's form; Math-Verify on the column `solution` if not given.
        settings ([`EvaluationSettings`], *optional*):
            How to answer.
        name (`str`, *optional*, defaults to `"problems"`):
            Name in the logs.
        steps (`int`, *optional*):
            Evaluates every so many optimizer steps. Otherwise it does so whenever the trainer evaluates
            (`eval_strategy`), and then its metrics can choose the best checkpoint (`metric_for_best_model`).
        at_start, at_end (`bool`, *optional*, default to `True` and `True`):
            Whether to evaluate before the first optimizer step and after the last one, too, also if that comes early;
            not after a signal that ends the training.
        batch_size (`int`, *optional*, defaults to `32`):
            Answers that a process generates at a time.

    Raises:
        `ValueError`: If `steps` makes no sense, there are no problems, these lack a prompt or what the reward function
            asks for, or the model is sharded in a way in which it cannot generate.
    """

    def __init__(
        self,
        trainer: Trainer,
        problems: Dataset,
        reward: RewardFunction = math_verify_reward,
        settings: EvaluationSettings | None = None,
        *,
        name: str = "problems",
        steps: int | None = None,
        at_start: bool = True,
        at_end: bool = True,
        batch_size: int = 32,
    ):
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"steps={steps!r} must be a whole number of at least 1, or None.")
        self.trainer, self.problems, self.reward, self.name = trainer, problems, reward, name
        if not len(problems):
            raise ValueError(f"Evaluation on {name}: the data set has no problems.")
        self.settings = settings or EvaluationSettings()
        own = self.settings.chat_template_kwargs
        if own is None:
            of_training: Any = getattr(trainer.args, "chat_template_kwargs", None)
            self.settings = replace(self.settings, chat_template_kwargs=of_training)
        self.steps, self.at_start, self.at_end = steps, at_start, at_end
        self.engine = trainer_engine(trainer, batch_size)
        check_problems(name, problems, reward, self.engine.tokenizer)
        remark = ignored.of_templates(own, [self.engine.tokenizer])
        if remark is not None:
            logger.warning(f"Evaluation on {plain(name)}: {remark}")
        self._last: int | None = None  # step of the latest evaluation of a training that goes on
        self._logged: dict[str, float] = {}  # what it logged
        self._has_warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = None
        self._go_before_early_stopping()
        if self.at_start and state.global_step == 0:
            self._evaluate(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_due = self.steps is not None and state.global_step % self.steps == 0
        is_last = self.at_end and state.global_step >= state.max_steps
        if (is_due or is_last) and not self._is_to_come(control):
            self._evaluate(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # However the training stops, it comes here, while its weights are still those of its last step.
        if self.at_end and control.should_training_stop and not self._is_to_come(control):
            self._evaluate(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.steps is None:
            logged = self._evaluate(steps_trained(self.trainer))
            if metrics is not None:
                metrics.update(logged)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        has_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if self.at_end and not has_best:  # the evaluation at the end of an epoch may have been what stopped it
            self._evaluate(state.global_step)
        self._last = None  # the weights may become others at the same step: those of the best checkpoint

    def _go_before_early_stopping(self) -> None:
        """Callbacks are called in turn, and that one is to see what this measures."""
        handler = self.trainer.callback_handler
        early = [isinstance(callback, EarlyStoppingCallback) for callback in handler.callbacks]
        if True in early and early.index(True) < handler.callbacks.index(self):
            others = [callback for callback in handler.callbacks if callback is not self]
            handler.callbacks = [*others[: early.index(True)], self, *others[early.index(True) :]]

    def _is_to_come(self, control: Any) -> bool:
        """Whether the trainer is about to evaluate, and this with it."""
        return self.steps is None and control.should_evaluate

    def _is_stopped(self) -> bool:
        """Whether a signal ends the training, and there may not be time."""
        return getattr(self.trainer, "is_stopped_by_signal", False)  # of this package's trainers

    def _evaluate(self, step: int) -> dict[str, float]:
        """What is logged of the weights as they are; nothing where a signal leaves no time."""
        if self.trainer.is_in_train:  # outside, the weights may have been replaced at the same step
            if self._last == step:
                return self._logged
            if self._is_stopped():
                return {}
        self._last = step
        with unchanged_random_state():
            samples = answer_problems(
                self.engine,
                self.problems,
                self.reward,
                self.settings,
                trainer=self.trainer,
                description=None if self.trainer.args.disable_tqdm else f"Evaluation on {self.name}",
            )
        evaluation = summarize(samples, len(self.problems), self.settings, self.name, step)
        unscored = sum(sample["reward"] is None for sample in samples)
        if unscored and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"Evaluation on {plain(self.name)}: {unscored} of {len(samples)} answers without a reward, which count as 0. "
                "Later evaluations do not repeat this."
            )
        record(self.trainer, evaluation)
        self._logged = {f"eval_{self.name}_{metric}": mean for metric, (mean, _, _) in evaluation.metrics.items()}
        is_log_due = self.trainer.control.should_log
        # Not TRL's, which would take this for a log of its own metrics, and forget them.
        Trainer.log(self.trainer, dict(self._logged))
        self.trainer.control.should_log = is_log_due  # that of the step is still to come
        return self._logged


def steps_trained(trainer: Any) -> int:
    """Optimizer steps that the trainer's weights were trained for: fewer where it went back to its best checkpoint."""
    state = trainer.state
    went_back = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return state.best_global_step if went_back and not trainer.is_in_train else state.global_step


def record(trainer: Any, evaluation: Evaluation) -> None:
    """Appends an evaluation to those that a trainer of this package keeps."""
    if hasattr(trainer, "evaluations"):
        trainer.evaluations.append(evaluation)


def trainer_engine(trainer: Any, batch_size: int = 32) -> TransformersEngine:
    """
    The model that a trainer trains, as an engine.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.
        batch_size (`int`, *optional*, defaults to `32`):
            Answers that a process generates at a time.

    Raises:
        `ValueError`: If the model is sharded by FSDP1.
    """
    args, accelerator = trainer.args, trainer.accelerator
    gathers = getattr(args, "ds3_gather_for_generation", True)
    if trainer.is_fsdp_enabled and not accelerator.is_fsdp2:
        raise ValueError(
            "A model that FSDP1 shards cannot generate here. Set fsdp_version: 2 in the configuration of accelerate, or "
            "evaluate the saved checkpoints with trl-cancel eval."
        )

    def unwrap() -> Any:
        return unwrapped_for_generation(trainer.model_wrapped, accelerator, args)

    zero3 = trainer.is_deepspeed_enabled and accelerator.state.deepspeed_plugin.zero_stage == 3
    processor = trainer.processing_class
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    sharded = trainer.is_fsdp_enabled or (zero3 and not gathers)
    return TransformersEngine(None, tokenizer, batch_size, sharded, unwrap)


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Puts the random states of Python, NumPy and PyTorch back, which a reward function may use."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
