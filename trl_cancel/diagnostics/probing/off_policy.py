"""What is left of the pushes on shared tokens when a generation batch is used for several optimizer steps."""

from dataclasses import dataclass

import torch

from ..energy import asymmetry_by_group
from ..residual import same_prompt, shared_contexts, shared_prefix_residual
from .probe import UpdateProbe
from .variants import Variant


@dataclass(frozen=True)
class StepMeasures:
    """
    One optimizer step.

    Args:
        residual (`float`):
            Shared-prefix residual, see [`shared_prefix_residual`]; `nan` if the step shares no token.
        asymmetry (`float`):
            [`gradient_asymmetry`] of the rollouts' mean weights, mean over groups.
    """

    residual: float
    asymmetry: float


def off_policy_steps(
    probe: UpdateProbe,
    variant: Variant | str,
    *,
    num_steps: int = 4,
    num_iterations: int = 1,
    whole_groups: bool = True,
    seed: int = 0,
) -> list[StepMeasures]:
    """
    Trains on the rollouts as a trainer would, cut into the batches of several optimizer steps, and measures each step
    as it is taken. The model is restored at the end.

    Args:
        probe ([`UpdateProbe`]):
            Model, rollouts and optimizer.
        variant ([`Variant`] or `str`):
            What is applied.
        num_steps (`int`, *optional*, defaults to `4`):
            Optimizer steps that share the rollouts.
        num_iterations (`int`, *optional*, defaults to `1`):
            Times that each rollout is used.
        whole_groups (`bool`, *optional*, defaults to `True`):
            Whether the rollouts of a group share a step, or are shuffled one by one.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the shuffling.

    Raises:
        `ValueError`: If there are fewer groups than steps, or group weights would not see whole groups.
    """
    variant = Variant(variant) if isinstance(variant, str) else variant
    if not whole_groups and variant.weighs_groups:
        raise ValueError(f"whole_groups=False: {variant.name} weighs rollouts within their groups.")
    rollouts, batches = probe.rollouts, _batches(probe, num_steps, whole_groups, seed)
    prompts = same_prompt(rollouts.group_ids, rollouts.prompt_ids, rollouts.prompt_mask)
    contexts, deserved = shared_contexts(rollouts.completion_ids, rollouts.mask, prompts, rollouts.advantages)
    measures = []
    with probe.restored():
        for rows in batches * num_iterations:
            weights = torch.zeros_like(probe.before)
            weights[rows] = probe.weights(variant, probe.log_probs(rows), rows)
            residual, count = shared_prefix_residual(
                weights[rows], contexts[rows] * rollouts.mask[rows], deserved[rows]
            )
            pushes = weights[rows].sum(1) / rollouts.mask[rows].sum(1).clamp(min=1)
            asymmetry = asymmetry_by_group(pushes, rollouts.group_ids[rows]).mean()
            measures.append(StepMeasures(residual.item() if count else float("nan"), asymmetry.item()))
            probe.step(probe.gradient(weights, rows))
    return measures


def logps_after_one_use(probe: UpdateProbe, *, num_steps: int = 4, seed: int = 0) -> torch.Tensor:
    """
    Log-probabilities of the rollouts once GRPO has used each of them for one step: off policy, and the same for all
    variants that are compared there. The model is restored at the end.

    Args:
        probe ([`UpdateProbe`]):
            Model, rollouts and optimizer.
        num_steps (`int`, *optional*, defaults to `4`):
            Optimizer steps that share the rollouts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    with probe.restored():
        for rows in _batches(probe, num_steps, True, seed):
            weights = torch.zeros_like(probe.before)
            weights[rows] = probe.weights("grpo", probe.log_probs(rows), rows)
            probe.step(probe.gradient(weights, rows))
        return probe.log_probs()


def _batches(probe: UpdateProbe, num_steps: int, whole_groups: bool, seed: int) -> list[torch.Tensor]:
    """The rollouts of each optimizer step."""
    rollouts, generator = probe.rollouts, torch.Generator().manual_seed(seed)
    rows = torch.arange(len(rollouts.mask))
    groups = rows.view(-1, rollouts.num_generations)
    if len(groups) < num_steps:
        raise ValueError(f"num_steps={num_steps} needs at least as many groups of rollouts; there are {len(groups)}.")
    units = groups if whole_groups else rows
    order = units[torch.randperm(len(units), generator=generator)]
    return [part.flatten() for part in order.tensor_split(num_steps)]
