"""The loss of a micro-batch: what is put into TRL's while it is computed, and what is read off it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from ..batch.rollouts import Rows
from ..batch.states import StateStore
from ..upstream.hooks import around, overridden
from .credit import CreditStage
from .forward import FORWARD, Forward, Passes, without_empty_images
from .monitor import UpdateMonitor
from .overrides import LOSS, TAKES, WAY_TO_LOSS, asked_for_in_generation, asked_for_in_loss, blamed
from .weights import WeightStage


@dataclass
class LossProgress:
    """
    The loss of a micro-batch while it is computed.

    Args:
        is_measured (`bool`):
            Whether metrics are taken of it.
        rows (`dict`):
            The micro-batch that it is computed from, as it was given to the innermost hook so far.
        inputs (`dict`, *optional*):
            What TRL's loss reads, while it is computed.
        logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            Log-probs of the forward pass that it is computed from.
        is_weighed (`bool`):
            Whether the update-time weights are in these inputs.
        losses, passes (`int`):
            How often TRL's loss has been computed, and forward passes with gradients outside of it; a subclass may do
            either more than once.
    """

    is_measured: bool
    rows: Rows
    inputs: Rows | None = None
    logps: torch.Tensor | None = None
    is_weighed: bool = False
    losses: int = 0
    passes: int = 0


class LossStage(TrainerCallback):
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
        self.seen = 0  # losses of this optimizer step
        own_methods = any(method.acts_in_generation or method.acts_in_loss for method in trainer.args.methods)
        self.acts = trainer.args.cancellation_metrics or own_methods or bool(credit.credits)

    def compute(self, compute_loss: Callable[[Rows], Any], inputs: Rows) -> Any:
        """
        The loss of a micro-batch. Of the hooks that compute it the outermost that is reached stands around it.

        Args:
            compute_loss (`Callable`):
                The hook, given the micro-batch.
            inputs (`dict`):
                The micro-batch.

        Raises:
            `RuntimeError`: If a subclass leaves out what a method cannot do without.
        """
        if self.progress is not None or not self.acts or not self.trainer.model.training:
            return compute_loss(inputs)
        self.seen += 1
        self._check_rows()
        measures = self._was_prepared(inputs) and self.args.cancellation_metrics
        inputs = dict(inputs)  # the micro-batch itself is used again by later iterations
        progress = self.progress = LossProgress(measures, inputs)
        try:
            with around(self.trainer, FORWARD, self._pass_of_loss):
                loss = compute_loss(inputs)
        finally:
            self.progress = None
        if (self.credit.credits.in_loss or self.weights.acts(inputs.get("advantages"))) and not progress.is_weighed:
            raise self._left_out()
        if not progress.losses:
            self._check_shape(inputs.get("advantages"))
        if measures:
            self._watch(loss, progress)
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
        inputs = dict(inputs)
        if progress.is_measured and self.trainer.beta and not inputs["advantages"].requires_grad:
            # The metrics tell the pushes of the policy from those of a KL term by their advantages.
            inputs["advantages"] = inputs["advantages"].detach().requires_grad_()
        level = self.trainer.importance_sampling_level
        progress.rows, progress.inputs, progress.is_weighed = inputs, dict(inputs), False
        try:
            return compute_loss(progress.inputs)
        finally:
            self.trainer.importance_sampling_level, progress.inputs = level, None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.seen and asked_for_in_loss(self.args, self.credit.credits):
            raise self._left_out()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.seen and self.args.cancellation_metrics:
            overriding = " and ".join(overridden(self.trainer, ("training_step", *LOSS))) or "an override"
            self.monitor.guard.cannot_read(f"{overriding} computes it without this package's")
        self.end_step()

    def end_step(self) -> None:
        """Hands the metrics of an optimizer step to TRL, which logs them."""
        self.seen = 0
        for name, value in self.monitor.end_step().items():
            self.trainer._metrics["train"][name].append(value)

    def forget_step(self) -> None:
        """Drops what there is of an optimizer step that failed."""
        self.seen = 0
        self.monitor.forget_step()

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
        logps = result[0]
        if inputs is not None:
            self._check_columns(inputs, logps)
            if waiting:
                inputs["advantages"] = self.credit.of_micro_batch(inputs, logps, result[1], states)
            self.weights.apply(inputs, logps, progress.is_measured)
            progress.logps, progress.is_weighed = logps, True
            progress.losses += 1
        elif not progress.losses and logps.requires_grad:  # of a loss that may not be TRL's
            progress.logps = logps
            progress.passes += 1
        return result

    # What subclasses leave out

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
        cutting = [method.chosen(self.args) for method in self.args.methods if method.cuts(self.args)]
        self.monitor.guard.leave_out(
            f"the micro-batches of {name} do not come from this package's _prepare_inputs", " and ".join(cutting)
        )
        return False

    def _left_out(self) -> RuntimeError:
        asked_for = asked_for_in_loss(self.args, self.credit.credits)
        return RuntimeError(
            f"{' and '.join(asked_for)} could not act: {type(self.trainer).__name__} has computed its loss "
            "without TRL's. Let your overrides of compute_loss and _compute_loss call super(), or turn it off."
        )

    def _check_rows(self) -> None:
        """Refuses hooks that were set since the rollouts were scored, where it counts which of them come here."""
        waiting = self.credit.credits.in_loss
        set_since = overridden(self.trainer, WAY_TO_LOSS) if waiting else []
        if set_since:
            raise RuntimeError(
                f"{' and '.join(set_since)} was set on the trainer while a generation batch was in use whose rollouts "
                f"{' and '.join(self.credit.credits.named(waiting))} looks at in the loss. Set it before the training."
            )

    def _check_shape(self, advantages: torch.Tensor | None) -> None:
        """Refuses a loss that is not TRL's and has not said that it takes advantages of tokens."""
        made = self.credit.credits.named(self.credit.credits.of_tokens)
        if made and not self.trainer.takes_token_advantages and advantages is not None and advantages.dim() > 1:
            raise RuntimeError(
                f"{' and '.join(made)} gives {type(self.trainer).__name__}'s loss, which is not TRL's, "
                f"inputs['advantages'] of shape {tuple(advantages.shape)}. {TAKES}"
            )

    def _check_columns(self, inputs: Rows, logps: torch.Tensor) -> None:
        """Refuses advantages of other tokens than those of the loss."""
        advantages = inputs["advantages"]
        if advantages.dim() > 1 and advantages.size(1) not in (1, logps.size(1)):
            asked_for = self.credit.credits.named(self.credit.credits.of_tokens)
            raise RuntimeError(
                f"A micro-batch has completions of {logps.size(1)} tokens but inputs['advantages'] of "
                f"{advantages.size(1)}{f', which {asked_for[0]} makes of shape (B, T)' if asked_for else ''}. "
                f"{blamed(self.trainer, WAY_TO_LOSS)}"
            )

    # Metrics, which never end a run

    def _watch(self, loss: torch.Tensor, progress: LossProgress) -> None:
        """Metrics of a loss."""
        logps, rows, problem = progress.logps, progress.rows, None
        if progress.losses > 1:
            problem = "it computes TRL's loss more than once"
        elif logps is None:
            problem = "it makes no forward pass by _get_per_token_logps_and_entropies"
        elif not progress.losses and progress.passes > 1:
            problem = "it makes several forward passes"
        elif not progress.losses and self.trainer.beta:
            problem = f"there may be a KL term in it, beta={self.trainer.beta}, and it is not TRL's"
        if problem is not None or logps is None:
            self.monitor.guard.cannot_read(str(problem))
            self.monitor.watch_nothing(loss.detach())
        else:
            self.monitor.watch_loss(loss, logps, rows["advantages"], rows)
