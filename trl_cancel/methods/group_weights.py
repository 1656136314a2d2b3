r"""
Group-consistent weights: DFPO, *Design Conditions for Intra-Group Learning of Sequence-Level Rewards: Token Gradient
Cancellation* ([2604.13088](https://huggingface.co/papers/2604.13088), section 4, Appendices B and K).

A sequence-level ratio weighs each rollout of a group differently, so tokens that good and bad rollouts share keep the
push \\( \sum_i s_iA_i \ne 0 \\) (Eq. 38). Each function here turns the weights of a group into others that are
orthogonal to the advantages, \\( \sum_i \tilde s_iA_i = 0 \\) (Eq. 63), given that \\( \sum_i A_i = 0 \\).

Departs from the paper: \\( \beta \\) of Eq. 55 is taken with the sign that makes it positive, and the weights after it
are positive but not, as the text says, above the floor.

Shapes: the last dimension is the group (G); leading dimensions are free. Rollouts that are missing from the update
(`active` is 0) get weight 0, and the others are made consistent without them. A weight or advantage that is `nan` or
infinite makes all weights of its group `nan`. Half precision is computed in single.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..arguments import common, floats, is_number, not_negative, shaped, single, to_one
from ..batch.clipping import CLIPPED_LOSSES, Clipping
from ..batch.groups import GroupRatios, Metrics
from ..diagnostics.energy import gradient_asymmetry
from ..papers import DESIGN_CONDITIONS, GSPO
from .method import (
    ActiveMethod,
    Config,
    Method,
    Named,
    PaperConfiguration,
    PaperEvaluation,
    Row,
    documented,
    said,
    whole_groups,
)
from .symmetric_clip import GIVES_WAY, NOTES, OF_PAPER


def min_replace(weights: torch.Tensor) -> torch.Tensor:
    r"""
    Every rollout gets the smallest weight of its group (Eq. 50): \\( \tilde s_i = \min_j \bar s_j \\).

    Args:
        weights (`torch.Tensor` of shape `(..., G)`):
            Weights.

    Returns:
        `torch.Tensor` of shape `(..., G)`: The weights, all equal in a group.
    """
    (weights,) = floats(weights=weights)
    shaped(weights=(weights, "... G"))
    return weights.amin(-1, keepdim=True).expand_as(weights) if weights.size(-1) else weights


def orthogonal_projection(weights: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    r"""
    The nearest weights that are orthogonal to the advantages (Eq. 18):
    \\( \tilde s = \bar s - \frac{A \cdot \bar s}{\|A\|^2} A \\). They can be negative.

    Args:
        weights (`torch.Tensor` of shape `(..., G)`):
            Weights.
        advantages (`torch.Tensor` of shape `(..., G)`):
            Advantages; a group in which all are 0 is left alone.

    Returns:
        `torch.Tensor` of shape `(..., G)`: The weights.

    Raises:
        `ValueError`: If the shapes differ.
    """
    dtype, weights, advantages = _of_groups(weights, advantages)
    (weights, scale), (advantages, _) = to_one(weights, -1), to_one(advantages, -1)
    projected = weights - _quotient(_dot(advantages, weights), _dot(advantages, advantages)) * advantages
    return (projected * scale).to(dtype)


def positive_orthogonal_projection(weights: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    r"""
    The nearest non-negative weights that are orthogonal to the advantages (Eq. 51):

    $$ \tilde s = \arg\min_v \tfrac12\|v-\bar s\|^2 \quad\text{s.t.}\quad A \cdot v = 0,\ v \ge 0 $$

    In closed form \\( v = \max(0, \bar s - \nu A) \\), where \\( \nu \\) is the root of
    \\( f(\nu) = \sum_i A_i \max(0, \bar s_i - \nu A_i) \\), which falls and is linear between the breakpoints
    \\( \bar s_i/A_i \\). On its way from \\( f(0) = A \cdot \bar s \\) to 0 only rollouts of the heavier side reach 0;
    these are the ones with \\( f \\) still on the same side of 0 at their breakpoints. Without them the root is that of
    a line: exact, without iteration.

    Args:
        weights (`torch.Tensor` of shape `(..., G)`):
            Weights, not negative.
        advantages (`torch.Tensor` of shape `(..., G)`):
            Advantages; a group in which all are 0 is left alone. In a group of one sign, the rollouts with that sign
            get 0.

    Returns:
        `torch.Tensor` of shape `(..., G)`: The weights.

    Raises:
        `ValueError`: If the shapes differ.
    """
    dtype, weights, advantages = _of_groups(weights, advantages)
    (weights, scale), (advantages, _) = to_one(weights, -1), to_one(advantages, -1)
    # With the advantages' sign turned so that f(0) >= 0, the root is not negative and the heavier side is positive.
    heavy = advantages * torch.where(_dot(advantages, weights) < 0, -1.0, 1.0)
    # f at the breakpoint of each rollout of the heavier side, times its advantage, which is positive: no quotient that
    # could overflow.
    at_breakpoints = (weights.unsqueeze(-2) * heavy.unsqueeze(-1) - weights.unsqueeze(-1) * heavy.unsqueeze(-2)).clamp(
        min=0
    )  # (..., G, G)
    f = (to_one(at_breakpoints, -1)[0] * heavy.unsqueeze(-2)).sum(-1)  # (..., G)
    dropped = (heavy > 0) & (f >= 0)
    kept, _ = to_one(heavy.where(~dropped, 0.0), -1)  # without the dropped, all may be small
    root = _quotient(_dot(kept, weights), _dot(kept, kept))
    return ((weights - root * kept).clamp(min=0).where(~dropped, 0.0) * scale).to(dtype)


def truncate_and_rebalance(weights: torch.Tensor, advantages: torch.Tensor, floor: float = 1e-6) -> torch.Tensor:
    r"""
    Weights raised to a floor, then the heavier side of the group scaled down until both balance (Eq. 52 to 55): with
    \\( s^+ = \max(\bar s, \epsilon) \\), \\( P = \sum_{A_i>0} A_is^+_i \\) and \\( N = \sum_{A_i<0} |A_i|s^+_i \\), the
    positive side is scaled by \\( \alpha = N/P \\) if \\( P > N \\), the negative one by \\( \beta = P/N \\) if
    \\( N > P \\).

    Args:
        weights (`torch.Tensor` of shape `(..., G)`):
            Weights.
        advantages (`torch.Tensor` of shape `(..., G)`):
            Advantages. In a group of one sign, the rollouts with that sign get 0.
        floor (`float`, *optional*, defaults to `1e-6`):
            Smallest weight before scaling.

    Returns:
        `torch.Tensor` of shape `(..., G)`: The weights, none negative and none above `max(weights, floor)`.

    Raises:
        `ValueError`: If the shapes differ, or `floor` is negative or not a number.
    """
    dtype, weights, advantages = _of_groups(weights, advantages)
    not_negative("floor", floor, "1e-6")
    (raised, scale), (advantages, _) = to_one(weights.clamp(min=floor), -1), to_one(advantages, -1)
    positive = _dot(advantages.clamp(min=0), raised)
    negative = _dot((-advantages).clamp(min=0), raised)
    alpha = _quotient(negative, positive).clamp(max=1)
    beta = _quotient(positive, negative).clamp(max=1)
    factor = torch.where(advantages > 0, alpha, torch.where(advantages < 0, beta, 1.0))
    return (raised * factor * scale).to(dtype)


def _of_groups(weights: torch.Tensor, advantages: torch.Tensor) -> tuple[torch.dtype, torch.Tensor, torch.Tensor]:
    """The type of the result, and both in that in which it is computed; `nan` for groups that are not finite."""
    weights, advantages = floats(weights=weights, advantages=advantages)
    shaped(weights=(weights, "... G"), advantages=(advantages, "... G"))
    dtype = common(weights, advantages)
    weights, advantages = single(weights, advantages)
    is_finite = (weights.isfinite() & advantages.isfinite()).all(-1, keepdim=True)
    return dtype, weights.where(is_finite, torch.nan), advantages.where(is_finite, torch.nan)


def _dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Inner product of each group, of shape `(..., 1)`."""
    return (first * second).sum(-1, keepdim=True)


def _quotient(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """The quotient, 0 where the denominator is 0, with gradients that stay finite there."""
    zero = denominator == 0
    return (numerator / denominator.where(~zero, 1.0)).where(~zero, 0.0)


TRANSFORMATIONS = ("identity", "min", "orth", "positive_orth", "rebalance")
TRUST_REGIONS = ("none", "mask", "group")


def consistent_weights(
    weights: torch.Tensor, advantages: torch.Tensor, active: torch.Tensor, transformation: str
) -> torch.Tensor:
    r"""
    Makes the weights of the active rollouts of a group consistent, so that \\( \sum_i \tilde s_iA_i = 0 \\) over what
    takes part in the update. Rollouts that do not get weight 0.

    Where a rollout is missing the advantages of the others do not sum to zero. The projections and `rebalance` need
    not care; the equal weights of `min` are then rebalanced, so that none is above the minimum.

    Args:
        weights (`torch.Tensor` of shape `(..., G)`):
            Weights.
        advantages (`torch.Tensor` of shape `(..., G)`):
            Advantages.
        active (`torch.Tensor` of shape `(..., G)` and type `bool`):
            Rollouts that take part.
        transformation (`str`):
            `"min"`, `"orth"`, `"positive_orth"`, `"rebalance"`, or `"identity"` for none (then nothing is consistent).

    Returns:
        `torch.Tensor` of shape `(..., G)`: The weights.
    """
    present = advantages.where(active, 0.0)
    weights = weights.where(active, 0.0)  # what is left out may be infinite
    if transformation == "min":
        largest = weights.amax(-1, keepdim=True)
        equal = min_replace(weights.where(active, largest))
        weights = equal.where(active.all(-1, keepdim=True), truncate_and_rebalance(equal, present, floor=0.0))
    elif transformation == "orth":
        projected = orthogonal_projection(weights, present)
        # What is left of a group with one member is rounding, and must not look like a push.
        rounding = 8 * torch.finfo(weights.dtype).eps * weights.abs().amax(-1, keepdim=True)
        weights = projected.where(projected.abs() > rounding, 0.0)
    elif transformation == "positive_orth":
        weights = positive_orthogonal_projection(weights, present)
    elif transformation == "rebalance":
        weights = truncate_and_rebalance(weights, present)
    return weights.where(active, 0.0)


def inside_trust_region(cut: torch.Tensor, outside: torch.Tensor, trust_region: str) -> torch.Tensor:
    """
    Rollouts that an update may still move. The paper leaves open what stops the push on a rollout whose ratio has left
    the clipping range, since its weights are constants and nothing is cut off (Eq. 86).

    Args:
        cut (`torch.Tensor` of shape `(..., G)` and type `bool`):
            Rollouts whose gradient the clipped surrogate would cut off.
        outside (`torch.Tensor` of shape `(..., G)` and type `bool`):
            Rollouts whose ratio is outside the clipping range, on either side.
        trust_region (`str`):
            `"none"`: all rollouts (the paper, read literally). `"mask"`: those that are not cut off. `"group"`: those
            of groups in which none is outside.

    Returns:
        `torch.Tensor` of shape `(..., G)` and type `bool`.
    """
    if trust_region == "mask":
        return ~cut
    if trust_region == "group":
        return (~outside).all(-1, keepdim=True).expand_as(outside)
    return torch.ones_like(cut)


@documented
@dataclass
class Settings:
    """
    > Parameters that control the weights of a group

    group_weights (`str`, *optional*, defaults to `"none"`):
        Make the sequence-level ratios of each group orthogonal to its advantages before they weigh the rollouts
        (DFPO), so that what the group shares is not pushed. Needs `importance_sampling_level="sequence"`. Source:
        section 4 of [2604.13088](https://huggingface.co/papers/2604.13088). One of:

        - `"none"`: GSPO's ratios, or GRPO's.
        - `"identity"`: GSPO's clipped ratios as constant weights, a control.
        - `"min"`: each rollout gets the smallest weight of its group (Eq. 50).
        - `"orth"`: the nearest orthogonal weights, which can be negative (Eq. 18).
        - `"positive_orth"`: the nearest orthogonal weights that are not negative (Eq. 51).
        - `"rebalance"`: the heavier side is scaled down (Eq. 52 to 55).
    group_weights_trust_region (`str`, *optional*, defaults to `"mask"`):
        What stops the push of group weights on a rollout whose ratio has left the clipping range. One of:

        - `"none"`: nothing, as the paper reads literally (Eq. 86).
        - `"mask"`: a rollout whose gradient GSPO's clipping would cut off gets weight 0, and the rest of the group
          is made orthogonal without it.
        - `"group"`: the whole group rests while the ratio of one of its rollouts is outside the range.
    group_weights_include_sampling_ratio (`bool`, *optional*, defaults to `True`):
        Transform the correction for vLLM's sampling together with the ratio, instead of letting it multiply the
        result. One of tokens counts with its mean over the rollout, which is what it multiplies a rollout with.
    group_weights_scale (`float`, *optional*, defaults to `1.0`):
        Multiplies all group weights; an ablation of the paper.
    group_weights_stop_gradient (`bool`, *optional*, defaults to `True`):
        Hold the group weights constant. `False` differentiates through them, an ablation of the paper.
    """

    group_weights: str = "none"
    group_weights_trust_region: str = "mask"
    group_weights_include_sampling_ratio: bool = True
    group_weights_scale: float = 1.0
    group_weights_stop_gradient: bool = True


class ConsistentWeights:
    """
    The weights of whole groups (section 4 of [2604.13088](https://huggingface.co/papers/2604.13088)): each ratio is
    clipped as the loss would, multiplied with the correction for the sampling engine, and made consistent within its
    group.

    Args:
        transformation (`str`):
            As in [`consistent_weights`].
        trust_region (`str`):
            As in [`inside_trust_region`].
        clipping ([`~trl_cancel.batch.clipping.Clipping`]):
            How the loss clips ratios.
        scale (`float`):
            Multiplies all weights.
        takes_correction (`bool`):
            Whether the correction for the sampling engine is transformed with the ratios.
        differentiates (`bool`):
            Whether the loss is differentiated through the weights.
        changes_nothing (`bool`):
            Whether the weights are 1, given advantages that sum to 0 in each group.
        measures (`bool`):
            Whether `cancel/asymmetry_before` is logged.
    """

    def __init__(
        self,
        transformation: str,
        trust_region: str,
        clipping: Clipping,
        scale: float,
        takes_correction: bool,
        differentiates: bool,
        changes_nothing: bool,
        measures: bool,
    ):
        self.transformation, self.trust_region, self.clipping, self.scale = (
            transformation,
            trust_region,
            clipping,
            scale,
        )
        self.takes_correction, self.differentiates = takes_correction, differentiates
        self.changes_nothing, self.measures = changes_nothing, measures

    def weights(self, groups: GroupRatios, metrics: Metrics) -> torch.Tensor:
        r"""
        The weights \\( \tilde s_i \\), 0 for rollouts that do not take part.

        Args:
            groups ([`~trl_cancel.batch.groups.GroupRatios`]):
                The groups, of shape `(P, G)`.
            metrics ([`~trl_cancel.batch.metrics.StepMetrics`]):
                Takes `group_weights/*`.

        Returns:
            `torch.Tensor` of shape `(P, G)`.
        """
        ratios, advantages, active = groups.ratios, groups.advantages, groups.active
        clipped = self.clipping.clipped(ratios, advantages)
        followed = active & inside_trust_region(
            self.clipping.cuts(ratios, advantages),
            active & self.clipping.is_outside(ratios, advantages),
            self.trust_region,
        )
        before = clipped * groups.correction
        weights = self.scale * consistent_weights(before, advantages, followed, self.transformation)

        counted = active.to(ratios.dtype)
        metrics.add_range("group_weights/ratio_min", "group_weights/ratio_max", ratios[active])
        metrics.add("group_weights/weight_mean", weights, counted)
        metrics.add("group_weights/clip_fraction", (clipped != ratios).float(), counted)
        if self.measures:
            metrics.add("cancel/asymmetry_before", gradient_asymmetry(before * counted, advantages))
        net, gross = (weights * groups.pushes).sum(-1).abs(), weights.norm(dim=-1) * groups.pushes.norm(dim=-1)
        metrics.add("group_weights/orthogonality", net / gross.where(gross > 0, 1.0), (gross > 0).float())
        return weights


_SEQUENCE = {"importance_sampling_level": "sequence", "loss_type": "grpo"}


def _named(transformation: str, summary: str) -> Named:
    return Named({**_SEQUENCE, "group_weights": transformation}, summary, DESIGN_CONDITIONS.id)


class GroupWeights(Method):
    """Weighs the rollouts of each group in place of their clipped ratios, which are held at 1 inside the loss."""

    Settings = Settings
    switch = "group_weights"
    needs_whole_groups = True
    neutral = {
        "group_weights": "min",
        "importance_sampling_level": "sequence",
        "loss_type": "grpo",
        "num_iterations": 1,
        "steps_per_generation": 1,
        "max_steps": 3,
    }
    is_neutral_exactly = False
    off = "none"
    row = Row(
        "docs/dfpo.md",
        "group-consistent weights",
        "the ratios of whole rollouts are made consistent within each group (DFPO): `min`, `orth`, `positive_orth`, "
        "`rebalance`",
        "off-policy updates with sequence-level ratios",
        "0.1% to 2.3%",
        "`min`: {DFPO min}; `orth`: {DFPO orth}; `positive_orth`: {DFPO positive_orth}; `rebalance`: not compared",
        DESIGN_CONDITIONS.id,
    )
    named = {
        "gspo": Named(_SEQUENCE, "ratios of whole sequences, clipped"),
        "dfpo-min": _named("min", "each rollout weighs as the lightest of its group"),
        "dfpo-orth": _named("orth", "nearest weights that are orthogonal to the advantages"),
        "dfpo-positive-orth": _named("positive_orth", "the nearest such weights without negative ones"),
        "dfpo-rebalance": _named("rebalance", "the heavier side of each group scaled down"),
    }
    configurations = (
        PaperConfiguration(
            "DFPO",
            "DFPO",
            "dfpo",
            DESIGN_CONDITIONS,
            {**OF_PAPER, **_SEQUENCE, "group_weights": "min"},
            "sequence-level ratios made consistent within each group (DFPO)",
            "DFPO with Min-Replace (section 5 and Appendix I). A generation batch of one process holds 8 prompts of 32 "
            "rollouts, and each optimizer step one prompt. The paper does not state its clipping range; this is TRL's.",
            {**NOTES, "loss_type": "Mean over the tokens of each rollout."},
            GIVES_WAY,
        ),
    )
    evaluations = (
        PaperEvaluation(
            "dfpo",
            DESIGN_CONDITIONS.id,
            ("aime25", "hmmt25-feb"),
            {
                "num_samples": 32,
                "greedy": False,
                "temperature": 0.6,
                "top_p": 0.95,
                "top_k": 20,
                "max_completion_length": 31 * 1024,  # 32k tokens of context, of which 1k are left to the prompt
            },
            is_usual=False,
        ),
    )
    logs = ("group_weights/",)
    acts_in_generation = True
    acts_in_loss = True
    says_when_idle = True

    def acts(self, args: Config) -> bool:
        """
        Not where all that could be transformed is 1 and every rollout takes part, so that the advantages of each group
        sum to 0; and the weights are neither scaled nor differentiated.
        """
        corrects = args.use_vllm and args.vllm_importance_sampling_correction
        drops_some = args.mask_truncated_completions or args.off_policy_mask_threshold is not None
        transforms = corrects or drops_some or not args.group_weights_stop_gradient
        return (
            not args.layout.is_on_policy
            or args.group_weights_scale != 1
            or (transforms and args.group_weights != "identity")
        )

    def weigher(self, args: Config) -> ConsistentWeights:
        return ConsistentWeights(
            args.group_weights,
            args.group_weights_trust_region,
            args.clipping,
            scale=args.group_weights_scale,
            takes_correction=args.group_weights_include_sampling_ratio,
            differentiates=not args.group_weights_stop_gradient,
            changes_nothing=not self.acts(args),
            measures=args.cancellation_metrics,
        )

    # What it refuses

    def check(self, args: Config) -> None:
        if not self.is_on(args):
            return
        self._check_loss(args)
        scale, layout = args.group_weights_scale, args.layout
        if not (is_number(scale) and 0 < scale < math.inf):
            raise ValueError(f"group_weights_scale={scale!r} must be positive, e.g. 0.5.")
        if args.tears_groups:
            raise ValueError(f"{self.chosen(args)} needs whole groups in each optimizer step. {whole_groups(args)}")
        if args.group_weights_stop_gradient:
            return
        if args.loss_type == "cispo":
            raise ValueError(
                "group_weights_stop_gradient=False has no meaning with loss_type='cispo', whose ratio is a constant. "
                f"Set loss_type to one of {', '.join(map(repr, CLIPPED_LOSSES))}."
            )
        if not (layout.groups_are_local and layout.groups_fit_micro_batches):
            raise ValueError(
                "group_weights_stop_gradient=False differentiates through the weights of a whole group, which must "
                f"lie in one micro-batch: make per_device_train_batch_size={args.per_device_train_batch_size} a "
                f"multiple of num_generations={args.num_generations}."
            )

    def _check_loss(self, args: Config) -> None:
        chosen = self.chosen(args)
        if args.importance_sampling_level != "sequence":
            raise ValueError(
                f"{chosen} transforms the ratios of whole rollouts, but here they are those of tokens: "
                f"{said(args, 'importance_sampling_level')}. Set importance_sampling_level='sequence', or "
                "group_weights='none'."
            )
        if args.loss_type not in (*CLIPPED_LOSSES, "cispo"):
            raise ValueError(
                f"{chosen} needs a loss that multiplies a ratio with the advantage; loss_type={args.loss_type!r} bends "
                f"it in its own way. Set loss_type to one of {', '.join(map(repr, (*CLIPPED_LOSSES, 'cispo')))}, or "
                "group_weights='none'."
            )
        if args.loss_type == "cispo" and args.clipping.high < 1:
            raise ValueError(
                f"{chosen} with loss_type='cispo': epsilon_high={args.clipping.high} bounds the ratio itself there, so "
                "every weight would be cut. Set epsilon_high to 1 or more (TRL's documentation recommends 5.0)."
            )
        if args.use_bias_correction_kl and args.beta:
            raise ValueError(
                f"{chosen} holds the ratio at 1 inside the loss, so {said(args, 'use_bias_correction_kl')} with "
                f"beta={args.beta} would lose its ratio. Set use_bias_correction_kl=False or beta=0."
            )
        if args.delta is not None and args.delta < 1:  # which clips also a ratio that is held at 1
            raise ValueError(
                f"{chosen} holds the ratio at 1 inside the loss, so delta={args.delta} would cut off every positive "
                "rollout. Set delta to 1 or more, or leave it unset."
            )

    # What it says

    def active(self, args: Config) -> ActiveMethod:
        if args.group_weights == "identity":
            does = "a control of DFPO: GSPO's clipped ratios as constant weights"
            return ActiveMethod("Constant weights", does, (), (GSPO, DESIGN_CONDITIONS), self.acts(args))
        kind = args.group_weights.replace("_", "-")
        does = f"weights of a group made orthogonal to its advantages (group_weights={args.group_weights!r})"
        return ActiveMethod("DFPO", does, ("dfpo", f"dfpo-{kind}"), (DESIGN_CONDITIONS,), self.acts(args))

    def explain(self, args: Config) -> Iterator[tuple[str, str]]:
        if self.is_on(args):
            yield "Clipping", self._clipping(args)
            yield "Group weights", self._weights(args)

    def _clipping(self, args: Config) -> str:
        clipping = args.clipping
        bounds = f"by {1 - clipping.low:g} and {1 + clipping.high:g}"
        if clipping.is_symmetric:
            bounds = f"into [0, {1 + clipping.high:g}]"
        elif args.loss_type == "cispo":
            bounds = f"at most {clipping.high:g}"
        return (
            f"Inside the group weights, which hold the {args.importance_sampling_level}-level ratios clipped {bounds}; "
            "TRL's clip_ratio/* reads 0."
        )

    def _weights(self, args: Config) -> str:
        weights = {
            "identity": "the clipped ratios as constants, which cancel no better",
            "min": "the smallest of the group for all",
            "orth": "the nearest that are orthogonal to the advantages",
            "positive_orth": "the nearest that are orthogonal to the advantages and not negative",
            "rebalance": "the heavier side scaled down until both balance",
        }[args.group_weights]
        region = args.group_weights_trust_region
        region = "none" if region == "mask" and args.loss_type == "cispo" else region  # nothing is cut off there
        region = {
            "none": "nothing stops the push on a rollout outside the clipping range",
            "mask": "a rollout whose gradient clipping would cut off rests, and the others balance without it",
            "group": "a group rests while one of its rollouts is outside the clipping range",
        }[region]
        scale = "" if args.group_weights_scale == 1 else f", times {args.group_weights_scale:g}"
        through = "" if args.group_weights_stop_gradient else ", differentiated through"
        return f"{args.group_weights}: {weights}{scale}{through}; {region}."

    def leaks(self, args: Config) -> Iterator[str]:
        kind = args.group_weights
        if (
            kind in ("none", "identity")
            and args.importance_sampling_level == "sequence"
            and not args.layout.is_on_policy
        ):
            yield "Sequence-level ratios weigh the rollouts of a group differently."
        if kind in ("orth", "positive_orth", "rebalance"):
            yield f"group_weights={kind!r} balances whole groups, not what only a part of a group shares."
        if kind != "none" and args.top_entropy_quantile < 1:
            yield (
                "top_entropy_quantile masks tokens after the group weights are made, so rollouts weigh what is left of "
                "them."
            )
