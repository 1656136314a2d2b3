"""
Update-time weights: what multiplies the advantages because of how far the policy has moved since it sampled.

Known only once a forward pass has given the current log-probs, unlike token credit, which is settled when the rollouts
are scored.
"""

from collections.abc import Callable
from typing import Any

import torch
from trl import GRPOTrainer

from .configs import CLIPPED_LOSSES, CancelGRPOConfig
from .credit import post_clip_weights, sequence_ratios, surrogate_weight, symmetric_clip, token_ratios
from .credit.group_weights import consistent_weights, inside_trust_region
from .diagnostics.energy import gradient_asymmetry
from .monitor import UpdateMonitor
from .rollouts import Rows, loss_mask


# Entries of a micro-batch that the weights of its groups are made of.
NEEDED_FOR_GROUPS = {
    *("advantages", "rollout_advantages", "group_ids", "importance_sampling_ratio"),
    *("completion_mask", "tool_mask"),
}


class UpdateWeights:
    """
    The weights of a micro-batch's tokens or rollouts, given its log-probs.

    Shapes: B rollouts, T completion tokens; P groups of G rollouts.

    Args:
        args ([`CancelGRPOConfig`]):
            Configuration.
        monitor ([`~trl_cancel.monitor.UpdateMonitor`]):
            Takes the metrics, and completes groups that straddle processes.
        off_policy_mask (`Callable`, *optional*, defaults to that of [`~trl.GRPOTrainer`]):
            Which rollouts the loss keeps, with `off_policy_mask_threshold`.
    """

    def __init__(
        self,
        args: CancelGRPOConfig,
        monitor: UpdateMonitor,
        off_policy_mask: Callable[..., torch.Tensor] = GRPOTrainer.get_off_policy_mask,
    ):
        self.args, self.monitor, self.off_policy_mask = args, monitor, off_policy_mask
        self.epsilon_low, self.epsilon_high = args.clip_range
        # Symmetric clipping bounds the ratio of negative advantages too (Eq. 80).
        self.delta = 1 + self.epsilon_high if args.symmetric_clip else args.delta
        self.group_size = args.layout.num_generations

    def ratios(self, rows: Rows, logps: torch.Tensor) -> torch.Tensor:
        """Importance ratios, of shape `(B, 1)` at the level of sequences and `(B, T)` at that of tokens."""
        old_logps = rows.get("old_per_token_logps")
        old_logps = logps.detach() if old_logps is None else old_logps
        if self.args.importance_sampling_level == "sequence":
            return sequence_ratios(logps, old_logps, loss_mask(rows).bool()).unsqueeze(1)
        return token_ratios(logps, old_logps)

    def of_surrogate(self, rows: Rows, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor | None:
        """
        The weight with which the loss puts a token's score into the gradient; `None` for losses that have no clipped
        surrogate.

        Args:
            rows (`dict`):
                The micro-batch.
            ratios (`torch.Tensor` of shape `(B, T)` or `(B, 1)`):
                Importance ratios.
            advantages (`torch.Tensor` of shape `(B, T)` or `(B, 1)`):
                Advantages.
        """
        if self.args.loss_type == "cispo":
            return ratios.clamp(max=self.epsilon_high)
        if self.args.loss_type not in CLIPPED_LOSSES:
            return None
        if self.args.symmetric_clip and self.args.symmetric_clip_gradient == "score":
            return symmetric_clip(ratios, self.epsilon_high)
        return surrogate_weight(ratios, advantages, self.epsilon_low, self.epsilon_high, self.delta)

    def count_clipped(self, rows: Rows, ratios: torch.Tensor, advantages: torch.Tensor) -> None:
        """Metrics of symmetric clipping; TRL's own `clip_ratio/*` reads 0, taking it for two-sided clipping."""
        mask = loss_mask(rows)
        counted = mask.any(1, keepdim=True).float() if ratios.size(1) == 1 else mask.float()
        clipped = (ratios > 1 + self.epsilon_high).float()
        sign = advantages if ratios.size(1) > 1 else advantages.sum(1, keepdim=True)
        self.monitor.metrics.add("symmetric_clip/clip_fraction", clipped, counted)
        self.monitor.metrics.add("symmetric_clip/clip_fraction_positive", clipped, counted * (sign > 0))
        self.monitor.metrics.add("symmetric_clip/clip_fraction_negative", clipped, counted * (sign < 0))

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

    def of_groups(self, ratios: torch.Tensor, active: torch.Tensor, rows: Rows) -> torch.Tensor:
        r"""
        Weights of the rollouts of whole groups (DFPO, section 4 of
        [2604.13088](https://huggingface.co/papers/2604.13088)): each ratio is clipped as the loss would, multiplied
        with the correction for the sampling engine, and made consistent within its group.

        Args:
            ratios (`torch.Tensor` of shape `(B,)`):
                Sequence-level ratios \\( s_i \\). The groups may stand in any order, but must be complete over all
                processes.
            active (`torch.Tensor` of shape `(B,)` and type `bool`):
                Rollouts that take part.
            rows (`dict`):
                What else belongs to the rollouts: `advantages`, `rollout_advantages`, `group_ids`, the masks, and
                `importance_sampling_ratio` where sampling is corrected for.

        Returns:
            `torch.Tensor` of shape `(B,)`: \\( \tilde s_i \\), 0 for rollouts that do not take part.

        Raises:
            `RuntimeError`: If a group is not complete.
        """
        correction, pushed = self._inside(rows), self._outside_of_weights(rows)
        *columns, group_ids = self.monitor.whole_groups(
            ratios, active.to(ratios.dtype), rows["rollout_advantages"], correction, pushed, rows["group_ids"]
        )
        order = in_whole_groups(group_ids, self.group_size)  # (P, G)
        ratios, active, advantages, correction, pushed = (column[order] for column in columns)
        weights = self._consistent(ratios, active.bool(), advantages, correction)
        net, gross = (weights * pushed).sum(-1).abs(), weights.norm(dim=-1) * pushed.norm(dim=-1)
        self.monitor.metrics.add("group_weights/orthogonality", net / gross.where(gross > 0, 1.0), (gross > 0).float())
        back = order.flatten().argsort()
        return self.monitor.own_rows(weights.flatten()[back])

    def _inside(self, rows: Rows) -> torch.Tensor:
        """What is multiplied with the ratio of each rollout before it is transformed, of shape `(B,)`."""
        correction = mean_correction(rows)
        if correction is None or not self.args.group_weights_include_sampling_ratio:
            return torch.ones_like(rows["rollout_advantages"])
        return correction.squeeze(1)

    def _outside_of_weights(self, rows: Rows) -> torch.Tensor:
        """
        What the weight of each rollout is multiplied with, of shape `(B,)`: the mean over its tokens of its advantage
        with token credit, and with a correction that stays in the loss.
        """
        mask, pushes = loss_mask(rows), rows["advantages"].detach()
        pushes = pushes.unsqueeze(1) if pushes.dim() == 1 else pushes
        if "importance_sampling_ratio" in rows and not self.args.group_weights_include_sampling_ratio:
            by_token = self.args.loss_type not in CLIPPED_LOSSES  # in the others a rollout's tokens share one ratio
            pushes = pushes * (rows["importance_sampling_ratio"] if by_token else mean_correction(rows))
        return (pushes * mask).sum(1) / mask.sum(1).clamp(min=1)

    def _consistent(
        self, ratios: torch.Tensor, active: torch.Tensor, advantages: torch.Tensor, correction: torch.Tensor
    ) -> torch.Tensor:
        clipped = self._clip(ratios, advantages)
        cut = (clipped != ratios) & (self.args.loss_type != "cispo")  # where the clipped surrogate is flat
        followed = active & inside_trust_region(
            cut, active & self._outside(ratios, advantages), self.args.group_weights_trust_region
        )
        before = clipped * correction
        weights = consistent_weights(before, advantages, followed, self.args.group_weights)
        weights = self.args.group_weights_scale * weights

        metrics, counted = self.monitor.metrics, active.to(ratios.dtype)
        metrics.add_range("group_weights/ratio_min", "group_weights/ratio_max", ratios[active])
        metrics.add("group_weights/weight_mean", weights, counted)
        metrics.add("group_weights/clip_fraction", (clipped != ratios).float(), counted)
        if self.args.cancellation_metrics:
            metrics.add("cancel/asymmetry_before", gradient_asymmetry(before * counted, advantages))
        return weights

    def _clip(self, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        if self.args.loss_type == "cispo":
            return ratios.clamp(max=self.epsilon_high)
        if self.args.symmetric_clip:
            return symmetric_clip(ratios, self.epsilon_high)
        return post_clip_weights(ratios, advantages, self.epsilon_low, self.epsilon_high, self.args.delta)

    def _outside(self, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        if self.args.loss_type == "cispo":
            return ratios > self.epsilon_high
        high = torch.full_like(ratios, 1 + self.epsilon_high)
        if self.args.delta is not None:  # it may end the range of positive advantages earlier
            high = torch.where(advantages >= 0, high.clamp(max=self.args.delta), high)
        return (ratios > high) | (ratios < 1 - self.epsilon_low)


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
        `RuntimeError`: If a group has fewer rollouts, or more.
    """
    order = group_ids.argsort(stable=True)
    sizes = group_ids.unique(return_counts=True)[1]
    if (sizes != group_size).any():
        raise RuntimeError(
            f"Weights of groups of {group_size} rollouts were to be made of groups of {sizes.unique().tolist()}. An "
            "override of _prepare_inputs or _generate_and_score_completions must leave groups whole; otherwise this is "
            "a fault of trl-cancel: please report it with your configuration."
        )
    return order.view(-1, group_size)
