"""The loss of a micro-batch: what is put into TRL's while it is computed, and what is read off it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger

from ..batch.rollouts import Rows
from ..batch.states import StateStore
from ..upstream.hooks import around
from .credit import CreditStage
from .forward import FORWARD, Forward, Passes, without_empty_images
from .monitor import UpdateMonitor
from .overrides import asked_for_in_generation, asked_for_in_loss
from .weights import WeightStage


logger = get_logger(__name__)


@dataclass
class LossProgress:
    """
    The loss of a micro-batch while it is computed.

    Args:
        is_measured (`bool`):
            Whether metrics are taken of it.
        inputs (`dict`, *optional*):
            What TRL's loss is computed from, while it is.
        logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            Log-probs of the latest forward pass.
        is_weighed (`bool`):
            Whether the update-time weights are in these inputs.
        losses (`int`):
            How often TRL's loss has been computed; a subclass may do so more than once.
    """

    is_measured: bool
    inputs: Rows | None = None
    logps: torch.Tensor | None = None
    is_weighed: bool = False
    losses: int = 0


class LossStage:
    """
    Computes losses with credit and weights in their inputs. TRL's loss reads these only after its forward pass, around
    which this stands.

    Args:
        trainer ([`~trl_cancel.CancelGRPOTrainer`]):
            The trainer.
        credit ([`~trl_cancel.pipeline.credit.CreditStage`]):
            Applies the credits that wait for the loss.
        weights ([`~trl_cancel.pipeline.weights.WeightStage`]):
            Puts the weights into the advantages.
        passes ([`~trl_cancel.pipeline.forward.Passes`]):
            Catches hidden states.
        monitor ([`~trl_cancel.pipeline.monitor.UpdateMonitor`]):
            Reads the metrics off the loss.
    """

    def __init__(
        self, trainer: Any, credit: CreditStage, weights: WeightStage, passes: Passes, monitor: UpdateMonitor
    ):
        self.trainer, self.args = trainer, trainer.args
        self.credit, self.weights, self.passes, self.monitor = credit, weights, passes, monitor
        self.progress: LossProgress | None = None  # of the loss that is being computed
        own_methods = any(method.acts_in_generation or method.acts_in_loss for method in trainer.args.methods)
        self.acts = trainer.args.cancellation_metrics or own_methods or bool(credit.credits)

    def compute(self, compute_loss: Callable[[Rows], Any], inputs: Rows) -> Any:
        """
        The loss of a micro-batch.

        Args:
            compute_loss (`Callable`):
                TRL's `compute_loss`, given the micro-batch.
            inputs (`dict`):
                The micro-batch.

        Raises:
            `RuntimeError`: If a subclass leaves out what a method cannot do without.
        """
        measures = self._was_prepared(inputs) and self.args.cancellation_metrics
        inputs = dict(inputs)  # the micro-batch itself is used again by later iterations
        # The metrics tell the pushes of the policy from those of a KL term by their advantages.
        advantages = inputs["advantages"].detach().requires_grad_(measures and bool(self.trainer.beta))
        inputs["advantages"] = advantages
        progress = self.progress = LossProgress(measures)
        try:
            with around(self.trainer, FORWARD, self._pass_of_loss):
                loss = compute_loss(inputs)
        finally:
            self.progress = None
        if (self.credit.credits.in_loss or self.weights.acts(advantages)) and not progress.is_weighed:
            asked_for = asked_for_in_loss(self.args, self.credit.credits)
            raise RuntimeError(
                f"{' and '.join(asked_for)} could not act: {type(self.trainer).__name__} has computed its loss "
                "without TRL's. Let your overrides of compute_loss and _compute_loss call super(), or turn it off."
            )
        if measures:
            self._watch(loss, progress, advantages, inputs)
        return loss

    def of_trl(self, compute_loss: Callable[[Rows], Any], inputs: Rows) -> Any:
        """
        The loss proper, below all overrides of it.

        Args:
            compute_loss (`Callable`):
                TRL's `_compute_loss`, given the micro-batch.
            inputs (`dict`):
                The micro-batch.
        """
        progress = self.progress
        if progress is None:
            return compute_loss(inputs)
        level = self.trainer.importance_sampling_level
        progress.inputs, progress.is_weighed = dict(inputs), False
        try:
            return compute_loss(progress.inputs)
        finally:
            self.trainer.importance_sampling_level, progress.inputs = level, None

    def _pass_of_loss(
        self, forward: Forward, model: Any, input_ids: Any, mask: Any, length: int, *args: Any, **kwargs: Any
    ) -> Any:
        progress = self.progress
        assert progress is not None
        inputs = None if progress.is_weighed else progress.inputs
        waiting = bool(self.credit.credits.in_loss) and inputs is not None
        states = StateStore() if waiting and self.credit.credits.of_states else None
        kwargs |= {"compute_entropy": True} if waiting and self.credit.credits.need_entropies else {}
        with self.passes.caught(states, mask[:, -length:]):
            result = forward(model, input_ids, mask, length, *args, **without_empty_images(kwargs))
        progress.logps = result[0]
        if inputs is not None:
            if waiting:
                inputs["advantages"] = self.credit.of_micro_batch(inputs, progress.logps, result[1], states)
            self.weights.apply(inputs, progress.logps, progress.is_measured)
            progress.is_weighed = True
            progress.losses += 1
        return result

    def _was_prepared(self, inputs: Rows) -> bool:
        """Whether a micro-batch has come by way of this package; an override may have made it by itself."""
        if "group_ids" in inputs:
            return True
        name, asked_for = type(self.trainer).__name__, asked_for_in_generation(self.args, self.credit.credits)
        if asked_for:
            raise RuntimeError(
                f"{' and '.join(asked_for)} could not act: {name}'s micro-batches have no group_ids. "
                "They are added on the way from _generate_and_score_completions to _prepare_inputs: let your override "
                "of _prepare_inputs call super()._prepare_inputs, and keep all entries of what it returns."
            )
        logger.warning_once(
            f"cancel/* and query_preserved are left out: the micro-batches of {name} do not come from "
            "this package's _prepare_inputs."
        )
        return False

    def _watch(self, loss: torch.Tensor, progress: LossProgress, advantages: torch.Tensor, inputs: Rows) -> None:
        """Metrics of a loss. They never end a run."""
        problem = "it computes TRL's loss more than once" if progress.losses > 1 else None
        if progress.logps is None:
            problem = "it makes no forward pass by _get_per_token_logps_and_entropies"
        try:
            if problem is None and progress.logps is not None:
                self.monitor.watch_loss(loss, progress.logps, advantages, inputs)
        except RuntimeError as error:  # of PyTorch, for a graph that cannot be followed
            problem = str(error)
        if problem is not None:
            name = type(self.trainer).__name__
            logger.warning_once(f"cancel/* is left out: the loss of {name} cannot be read ({problem}).")
