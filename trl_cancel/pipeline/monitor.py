"""What one optimizer step does, collected over its micro-batches and turned into metrics at its end."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from ..batch.metrics import Guard, StepMetrics
from ..batch.rollouts import Rollouts, Rows
from ..diagnostics.energy import asymmetry_by_group
from ..diagnostics.pushes import policy_pushes
from ..diagnostics.residual import same_prompt, shared_contexts, shared_prefix_residual


class UpdateMonitor:
    """
    Follows the rollouts of one optimizer step through its micro-batches. What cannot be followed is left out, but as all
    processes exchange the same metrics, one that leaves them out still takes part with nothing.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Gathers over processes.
        groups_are_local (`bool`):
            Whether each group lies on one process; otherwise what belongs to a group is gathered first.
        owner (`str`, *optional*, defaults to `"the trainer"`):
            Name of the trainer's class.
    """

    def __init__(self, accelerator: Accelerator, groups_are_local: bool, owner: str = "the trainer"):
        self.accelerator, self.groups_are_local = accelerator, groups_are_local
        self.metrics = StepMetrics()
        self.guard = Guard("cancel/*", f"the loss of {owner}")
        # Told the pushes (B, T) of each micro-batch, as `policy_pushes` reads them, and the micro-batch.
        self.observers: list[Callable[[torch.Tensor, Rows], None]] = []
        self._shared: list[tuple[torch.Tensor, ...]] = []
        self._coefficients: list[tuple[torch.Tensor, ...]] = []

    def mark_shared(self, batch: Rows, rollouts: Rollouts, pad_token_id: int) -> Rows:
        """
        The contexts that good and bad rollouts of a group share, as rows to be carried along with the rollouts.

        Args:
            batch (`dict`):
                The scored generation batch.
            rollouts ([`~trl_cancel.batch.rollouts.Rollouts`]):
                The same, as the methods see it.
            pad_token_id (`int`):
                Token that pads the completions.
        """
        with self.guard():
            ids = batch["completion_ids"]
            # A completion that is masked for being truncated is missing from the update but not from its group.
            present = (ids != pad_token_id) | batch["completion_mask"].bool()
            prompts = same_prompt(rollouts.group_ids, rollouts.prompt_ids, rollouts.prompt_mask)
            ids_of_all, present, *of_all = self.whole_groups(ids, present.long(), prompts, rollouts.advantages)
            marks = shared_contexts(ids_of_all, present.bool(), *of_all)
            contexts, deserved = (self.own_rows(mark)[:, : ids.size(1)] for mark in marks)
            return {"shared_contexts": contexts * rollouts.mask, "deserved": deserved}
        return {}

    def watch_loss(self, loss: torch.Tensor, logps: torch.Tensor, advantages: torch.Tensor, inputs: Rows) -> None:
        """Reads off the loss of a micro-batch what it does to each token."""
        pushes: torch.Tensor | None = None
        if self.observers or not self.guard.is_off:
            with self.guard():
                pushes = policy_pushes(loss, logps, advantages if advantages.requires_grad else None)
        if pushes is not None:
            for observe in self.observers:
                observe(pushes, inputs)
        if pushes is None or self.guard.is_off:
            self.watch_nothing(logps)
            return
        with self.guard():
            contexts, deserved = inputs["shared_contexts"], inputs["deserved"]
            if contexts.shape != pushes.shape:
                raise ValueError(f"{tuple(pushes.shape)} tokens of {tuple(contexts.shape)} that were scored")
            counted = inputs["completion_mask"].any(1).float()
            sign = advantages.detach() if advantages.dim() == 1 else advantages.detach().sum(1)
            sign = sign * inputs["rollout_advantages"].abs()  # 0 where rewards are equal but for rounding
            self.metrics.add("cancel/positive_fraction", (sign > 0).float(), counted)
            self.metrics.add("cancel/negative_fraction", (sign < 0).float(), counted)
            self._shared.append((pushes.flatten(), contexts.flatten(), deserved.flatten()))
        if self.guard.is_off:
            self.watch_nothing(logps)

    def watch_nothing(self, like: torch.Tensor) -> None:
        """Takes part with no rollouts, on the device of a tensor, and withdraws those of this step."""
        nothing = like.new_zeros(0)
        self.metrics.void("cancel/")
        self.metrics.add("cancel/positive_fraction", nothing)
        self.metrics.add("cancel/negative_fraction", nothing)
        self._shared = [(nothing, nothing.long(), nothing.float())]

    def watch_weights(self, weights: torch.Tensor | None, inputs: Rows, mask: torch.Tensor) -> None:
        """
        Notes how heavily the rollouts of a micro-batch weigh.

        Args:
            weights (`torch.Tensor` of shape `(B, T)` or `(B, 1)`, *optional*):
                Weights; those of tokens are averaged over each rollout. `None` where the loss has none.
            inputs (`dict`):
                The micro-batch.
            mask (`torch.Tensor` of shape `(B, T)`):
                1 for the tokens that the loss counts.
        """
        if weights is None:
            return
        with self.guard():
            weight = (weights.detach() * mask).sum(1) / mask.sum(1).clamp(min=1)
            self._coefficients.append((weight * inputs["rollout_advantages"], inputs["group_ids"]))
        if self.guard.is_off:
            nothing = weights.new_zeros(0)
            self._coefficients = [(nothing, nothing.long())]

    def end_step(self) -> dict[str, float]:
        """The metrics of the optimizer step, the same on all processes."""
        with self.guard():
            self._add_joined()
        self._shared.clear()
        self._coefficients.clear()
        if self.guard.is_off:
            self.metrics.void("cancel/")
        return self.metrics.flush(self.accelerator.gather)

    def _add_joined(self) -> None:
        """Adds the metrics of whole groups."""
        if self._shared:
            residual, count = shared_prefix_residual(*self.whole_groups(*_joined(self._shared)))
            self.metrics.add("cancel/shared_prefix_residual", residual, count.float())
        if self._coefficients:
            asymmetries = asymmetry_by_group(*self.whole_groups(*_joined(self._coefficients)))
            self.metrics.add("cancel/asymmetry", asymmetries)

    def forget_step(self) -> None:
        """Drops what there is of an optimizer step that failed."""
        self.metrics = StepMetrics()
        self._shared.clear()
        self._coefficients.clear()

    def whole_groups(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The rows of all processes where groups straddle them, otherwise those of this one."""
        return list(tensors) if self.groups_are_local else [self._gather(tensor) for tensor in tensors]

    def own_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of this process out of what [`UpdateMonitor.whole_groups`] made of them, if all hold equally many."""
        if self.groups_are_local:
            return tensor
        rows = tensor.size(0) // self.accelerator.num_processes
        return tensor.narrow(0, self.accelerator.process_index * rows, rows)

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of all processes; rows and columns that some of them lack are 0."""
        for dim in range(tensor.dim()):
            tensor = self.accelerator.pad_across_processes(tensor, dim=dim)
        return self.accelerator.gather(tensor)


def _joined(rows: list[tuple[Any, ...]]) -> list[torch.Tensor]:
    return [torch.cat(column) for column in zip(*rows, strict=True)]
