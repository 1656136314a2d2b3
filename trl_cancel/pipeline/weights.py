"""
Update-time weights: what multiplies the advantages because of how far the policy has moved since it sampled.

Known only once a forward pass has given the current log-probs, unlike token credit, which is settled when the rollouts
are scored.
"""

from collections.abc import Callable
from typing import Any

import torch
from trl import GRPOTrainer

from ..batch.clipping import CLIPPED_LOSSES
from ..batch.groups import GroupRatios, GroupWeigher
from ..batch.ratios import sequence_ratios, token_ratios
from ..batch.rollouts import Rows, loss_mask
from .forward import Passes
from .monitor import UpdateMonitor
from .overrides import WAY_TO_LOSS, blamed
from .token_credits import TokenCredits


# Entries of a micro-batch that the weights of its groups are made of.
NEEDED_FOR_GROUPS = {
    *("advantages", "rollout_advantages", "group_ids", "importance_sampling_ratio"),
    *("completion_mask", "tool_mask"),
}
OF_GROUPS = "weights_of_groups"  # entry of a micro-batch whose groups were weighed ahead of its loss


class TornGroups(RuntimeError):
    """Groups that are to be weighed are not whole."""


class UpdateWeights:
    """
    The weights of a micro-batch's tokens or rollouts, given its log-probs.

    Shapes: B rollouts, T completion tokens; P groups of G rollouts.

    Args:
        args ([`~trl_cancel.CancelGRPOConfig`]):
            Configuration.
        monitor ([`~trl_cancel.pipeline.monitor.UpdateMonitor`]):
            Takes the metrics, and completes groups that straddle processes.
        off_policy_mask (`Callable`, *optional*, defaults to that of [`~trl.GRPOTrainer`]):
            Which rollouts the loss keeps, with `off_policy_mask_threshold`.
    """

    def __init__(
        self,
        args: Any,
        monitor: UpdateMonitor,
        off_policy_mask: Callable[..., torch.Tensor] = GRPOTrainer.get_off_policy_mask,
    ):
        self.args, self.monitor, self.off_policy_mask = args, monitor, off_policy_mask
        self.clipping, self.group_size = args.clipping, args.layout.num_generations

    def ratios(self, rows: Rows, logps: torch.Tensor) -> torch.Tensor:
        """Importance ratios, of shape `(B, 1)` at the level of sequences and `(B, T)` at that of tokens."""
        old_logps = rows.get("old_per_token_logps")
        old_logps = logps.detach() if old_logps is None else old_logps
        if self.args.importance_sampling_level == "sequence":
            return sequence_ratios(logps, old_logps, loss_mask(rows).bool()).unsqueeze(1)
        return token_ratios(logps, old_logps)

    # Weights of whole groups

    def taking_part(self, rows: Rows, logps: torch.Tensor) -> torch.Tensor:
        """Rollouts that the loss counts, of shape `(B,)` and type `bool`: some token, and not dropped whole."""
        mask = loss_mask(rows)
        active = mask.any(1)
        if (correction := mean_correction(rows)) is not None:
            active = active & (correction.squeeze(1) != 0)
        if self.args.off_policy_mask_threshold is not None:
            old_logps: Any = rows.get("old_per_token_logps")
            old_logps = logps if old_logps is None else old_logps
            kept = self.off_policy_mask(
                advantages=rows["rollout_advantages"].unsqueeze(1),
                per_token_logps=logps,
                sampling_per_token_logps=rows.get("sampling_per_token_logps", old_logps),
                mask=mask,
                off_policy_threshold=self.args.off_policy_mask_threshold,
            )
            active = active & kept.squeeze(1).bool()
        return active

    def of_groups(self, weigher: GroupWeigher, ratios: torch.Tensor, active: torch.Tensor, rows: Rows) -> torch.Tensor:
        r"""
        Weights of the rollouts of whole groups.

        Args:
            weigher ([`~trl_cancel.batch.groups.GroupWeigher`]):
                Weighs them.
            ratios (`torch.Tensor` of shape `(B,)`):
                Sequence-level ratios. The groups may stand in any order, but must be complete over all processes.
            active (`torch.Tensor` of shape `(B,)` and type `bool`):
                Rollouts that take part.
            rows (`dict`):
                What else belongs to the rollouts: `advantages`, `rollout_advantages`, `group_ids`, the masks, and
                `importance_sampling_ratio` where sampling is corrected for.

        Returns:
            `torch.Tensor` of shape `(B,)`: The weights, 0 for rollouts that do not take part.

        Raises:
            [`TornGroups`]: If a group is not complete.
        """
        correction = mean_correction(rows) if weigher.takes_correction else None
        inside = torch.ones_like(rows["rollout_advantages"]) if correction is None else correction.squeeze(1)
        *columns, group_ids = self.monitor.whole_groups(
            ratios,
            active.to(ratios.dtype),
            rows["rollout_advantages"],
            inside,
            self._pushes(rows, weigher.takes_correction),
            rows["group_ids"],
        )
        order = in_whole_groups(group_ids, self.group_size)  # (P, G)
        ratios, active, advantages, inside, pushes = (column[order] for column in columns)
        groups = GroupRatios(ratios, active.bool(), advantages, inside, pushes)
        weights = weigher.weights(groups, self.monitor.metrics)
        back = order.flatten().argsort()
        return self.monitor.own_rows(weights.flatten()[back])

    def _pushes(self, rows: Rows, takes_correction: bool) -> torch.Tensor:
        """
        What the weight of each rollout is multiplied with, of shape `(B,)`: the mean over its tokens of its advantage
        with token credit, and with a correction that stays in the loss.
        """
        mask, pushes = loss_mask(rows), rows["advantages"].detach()
        pushes = pushes.unsqueeze(1) if pushes.dim() == 1 else pushes
        if "importance_sampling_ratio" in rows and not takes_correction:
            by_token = self.args.loss_type not in CLIPPED_LOSSES  # in the others a rollout's tokens share one ratio
            pushes = pushes * (rows["importance_sampling_ratio"] if by_token else mean_correction(rows))
        return (pushes * mask).sum(1) / mask.sum(1).clamp(min=1)


class WeightStage:
    """
    Puts the update-time weights into the advantages of a micro-batch, where they differ from what TRL's surrogate does.

    Args:
        trainer ([`~trl_cancel.CancelGRPOTrainer`]):
            The trainer.
        credits ([`~trl_cancel.pipeline.token_credits.TokenCredits`]):
            The token credits, which a loss of one ratio a rollout would average.
        passes ([`~trl_cancel.pipeline.forward.Passes`]):
            Makes passes where groups are spread over micro-batches.
        monitor ([`~trl_cancel.pipeline.monitor.UpdateMonitor`]):
            Takes the metrics.
    """

    def __init__(self, trainer: Any, credits: TokenCredits, passes: Passes, monitor: UpdateMonitor):
        self.trainer, self.args, self.credits = trainer, trainer.args, credits
        self.passes, self.monitor = passes, monitor
        self.weigher: GroupWeigher | None = trainer.args.weigher
        self.clipping, self.methods = trainer.args.clipping, trainer.args.methods
        self.update = UpdateWeights(trainer.args, monitor, lambda **rows: trainer.get_off_policy_mask(**rows))

    def acts(self, advantages: torch.Tensor | None) -> bool:
        """Whether the update needs weights that TRL's surrogate does not give."""
        spread = self.credits.spread_over_tokens and advantages is not None and advantages.dim() > 1
        return spread or any(method.acts_in_loss for method in self.methods)

    def apply(self, inputs: Rows, logps: torch.Tensor, is_measured: bool) -> None:
        """
        Writes the weights into a micro-batch.

        Args:
            inputs (`dict`):
                The micro-batch, which TRL's loss reads after this.
            logps (`torch.Tensor` of shape `(B, T)`):
                Log-probs of the loss's forward pass.
            is_measured (`bool`):
                Whether metrics are taken.
        """
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        spreads = self.credits.spread_over_tokens and advantages.size(1) > 1
        weights: torch.Tensor | None = None
        if self.weigher is not None:
            weights = self._of_groups(self.weigher, inputs, logps)
        elif self.clipping.is_constant or spreads:
            weights = self._of_surrogate(inputs, logps, advantages)
        with self.monitor.guard():
            self._watch(inputs, logps, advantages, weights, is_measured)
        if weights is None:
            return
        if spreads:
            # Until the loss is done: the weights hold the sequence's ratio.
            self.trainer.importance_sampling_level = "token"
            if (correction := mean_correction(inputs)) is not None:  # which its tokens shared, as they did the ratio
                inputs["importance_sampling_ratio"] = correction
        self._freeze_ratios(inputs, logps, advantages * weights)

    def _of_surrogate(self, inputs: Rows, logps: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """What TRL's surrogate multiplies the advantages with, `(B, T)` or `(B, 1)`."""
        return self.clipping.weights(self.update.ratios(inputs, logps.detach()), advantages.detach())

    def _watch(
        self,
        inputs: Rows,
        logps: torch.Tensor,
        advantages: torch.Tensor,
        weights: torch.Tensor | None,
        is_measured: bool,
    ) -> None:
        """Metrics of the ratios and the weights of a micro-batch."""
        mask, ratios = loss_mask(inputs), self.update.ratios(inputs, logps.detach())
        for method in self.methods:
            method.watch_ratios(self.args, ratios, advantages.detach(), mask, self.monitor.metrics.add)
        if is_measured:
            weights = self.clipping.weights(ratios, advantages.detach()) if weights is None else weights
            self.monitor.watch_weights(weights, inputs, mask)

    def _freeze_ratios(self, inputs: Rows, logps: torch.Tensor, weighted_advantages: torch.Tensor) -> None:
        """Makes the loss's ratio 1 in value with gradient ∇log π, so that the advantages alone weigh the tokens."""
        old_logps = inputs.get("old_per_token_logps")
        # The off-policy mask would take its drift from the old log-probs; it must still see the true ones.
        inputs.setdefault("sampling_per_token_logps", logps.detach() if old_logps is None else old_logps)
        inputs["advantages"] = weighted_advantages
        # Weights that are differentiated through carry the whole gradient; the ratio then has none.
        differentiates = self.weigher is not None and self.weigher.differentiates
        inputs["old_per_token_logps"] = logps if differentiates else logps.detach()

    # Weights of whole groups

    def _of_groups(self, weigher: GroupWeigher, inputs: Rows, logps: torch.Tensor) -> torch.Tensor:
        """The weights of the rollouts of a micro-batch, of shape `(B, 1)`; what they hold is taken out of the loss."""
        if OF_GROUPS in inputs:
            weights = inputs[OF_GROUPS]
        else:
            ratios = self.update.ratios(inputs, logps if weigher.differentiates else logps.detach()).squeeze(1)
            active = self.update.taking_part(inputs, logps.detach())
            weights = self._weighed(weigher, ratios, active, inputs)
        if self.args.off_policy_mask_threshold is not None:
            # Rollouts that it drops have weight 0 already; it must not drop others for the sign of their weight.
            inputs["sampling_per_token_logps"] = logps.detach()
        correction = inputs.get("importance_sampling_ratio")
        if weigher.takes_correction and correction is not None:
            inputs["importance_sampling_ratio"] = torch.ones_like(correction)
        return weights.unsqueeze(1)

    def _weighed(self, weigher: GroupWeigher, ratios: torch.Tensor, active: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[`UpdateWeights.of_groups`]; whoever may have torn them is named."""
        try:
            return self.update.of_groups(weigher, ratios, active, rows)
        except TornGroups as error:
            hooks = ("_generate_and_score_completions", *WAY_TO_LOSS)
            chosen = " and ".join(m.chosen(self.args) for m in self.methods if m.weigher(self.args) is not None)
            raise RuntimeError(f"{chosen}: {error} {blamed(self.trainer, hooks)}") from None

    def ahead(self, micro_batches: list[Rows], is_new: bool) -> None:
        """
        The weights of groups that are spread over micro-batches, before the first of these is trained on: with one
        forward pass, or none where the weights of the model are still those that sampled.

        Args:
            micro_batches (`list[dict]`):
                Micro-batches that hold whole groups together.
            is_new (`bool`):
                Whether the model is still the one that sampled them.
        """
        assert self.weigher is not None
        update, parts = self.update, []
        logps = [self._logps_before_update(micro_batch, is_new) for micro_batch in micro_batches]
        for micro_batch, current in zip(micro_batches, logps, strict=True):
            ratios = update.ratios(micro_batch, current).squeeze(1)
            parts.append((ratios, update.taking_part(micro_batch, current)))
        ratios, active = (torch.cat(part) for part in zip(*parts, strict=True))
        names = NEEDED_FOR_GROUPS & micro_batches[0].keys()
        rows = {name: torch.cat([micro_batch[name] for micro_batch in micro_batches]) for name in names}
        weights = self._weighed(self.weigher, ratios, active, rows)
        sizes = [micro_batch["group_ids"].size(0) for micro_batch in micro_batches]
        for micro_batch, part in zip(micro_batches, weights.split(sizes), strict=True):
            micro_batch[OF_GROUPS] = part

    def _logps_before_update(self, inputs: Rows, is_new: bool) -> torch.Tensor:
        """Current log-probs, as far as the weights need them: not where the policy is still the one that sampled."""
        old_logps = inputs.get("old_per_token_logps")
        if is_new:
            if old_logps is not None:
                return old_logps
            if self.args.off_policy_mask_threshold is None or "sampling_per_token_logps" not in inputs:
                return torch.zeros_like(inputs["completion_mask"]).float()
        return self.passes.logps(inputs)


def mean_correction(rows: Rows) -> torch.Tensor | None:
    """
    What vLLM's correction multiplies each rollout with where its tokens share one ratio, of shape `(B, 1)`: its own, or
    the mean of its tokens'. `None` where sampling is not corrected for.
    """
    correction = rows.get("importance_sampling_ratio")
    if correction is None or correction.size(1) == 1:
        return correction
    mask = loss_mask(rows)
    return (correction * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def in_whole_groups(group_ids: torch.Tensor, group_size: int) -> torch.Tensor:
    """
    The rollouts by group, whatever order they stand in.

    Args:
        group_ids (`torch.Tensor` of shape `(B,)`):
            Which rollouts share a prompt.
        group_size (`int`):
            G, the rollouts of each group.

    Returns:
        `torch.Tensor` of shape `(B/G, G)`: Indices of the rollouts.

    Raises:
        [`TornGroups`]: If a group has fewer rollouts, or more.
    """
    order = group_ids.argsort(stable=True)
    sizes = group_ids.unique(return_counts=True)[1]
    if (sizes != group_size).any():
        raise TornGroups(
            f"Weights of groups of {group_size} rollouts were to be made of groups of {sizes.unique().tolist()}."
        )
    return order.view(-1, group_size)
