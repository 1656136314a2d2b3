r"""
Symmetric clipping, GRPO-fix ([2604.13088](https://huggingface.co/papers/2604.13088), Appendices F and H): one clipping
range for both signs of the advantage.

Stock clipping, \\( \min(rA, \mathrm{clip}(r)A) \\), treats one ratio r differently for positive and negative
advantages, so tokens that good and bad rollouts share no longer cancel outside the clipping range. Symmetric clipping
uses one function of r for both signs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..arguments import floats, not_negative
from ..batch.clipping import CLIPPED_LOSSES, Clipping
from ..batch.groups import Add
from ..papers import DESIGN_CONDITIONS
from .method import ActiveMethod, Config, Method, Named, PaperConfiguration, Row, documented, said


def symmetric_clip(ratios: torch.Tensor, epsilon: float) -> torch.Tensor:
    r"""
    The sign-independent weight of Eq. 79 of [2604.13088](https://huggingface.co/papers/2604.13088):
    \\( \phi(r) = \mathrm{clip}(r, 0, 1+\varepsilon) \\).

    The surrogate \\( A\,\phi(r) \\) (Eq. 80) has gradient zero above the bound. The score form (Eq. 81) takes
    \\( \phi(r) \\) as a constant, so its gradient \\( A\,\phi(r)\nabla\log\pi \\) goes on above the bound.

    Args:
        ratios (`torch.Tensor`):
            Importance ratios of tokens or sequences, of any shape.
        epsilon (`float`):
            Distance of the upper bound from 1.

    Returns:
        `torch.Tensor` of the same shape: The weights; `nan` where the ratio is.

    Raises:
        `ValueError`: If `epsilon` is negative or not a number.
    """
    (ratios,) = floats(ratios=ratios)
    not_negative("epsilon", epsilon, "0.2")
    return ratios.clamp(0.0, 1.0 + epsilon)


@dataclass(frozen=True)
class ScoreClipping(Clipping):
    """The clipped ratio as a constant weight of the score (Eq. 81)."""

    is_constant: ClassVar[bool] = True

    def weights(self, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        return symmetric_clip(ratios, self.high)


@documented
@dataclass
class Settings:
    """
    > Parameters that control clipping

    symmetric_clip (`bool`, *optional*, defaults to `False`):
        Clip the ratio to `[0, 1 + epsilon_high]` whatever the sign of the advantage, so that tokens that good and
        bad rollouts share keep one coefficient. Takes `epsilon` where `epsilon_high` is not set. Source: Appendix
        H of [2604.13088](https://huggingface.co/papers/2604.13088).
    symmetric_clip_gradient (`str`, *optional*, defaults to `"surrogate"`):
        Gradient where the ratio exceeds the bound of symmetric clipping. One of:

        - `"surrogate"`: zero there (Eq. 80).
        - `"score"`: the clipped ratio is a constant weight of the score, so the push goes on (Eq. 81).
    """

    symmetric_clip: bool = False
    symmetric_clip_gradient: str = "surrogate"


# What GRPO-fix and DFPO have in common (section 5 and Appendix I of 2604.13088).
OF_PAPER = {
    "num_generations": 32,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "steps_per_generation": 32,
    "learning_rate": 8e-7,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.2},
    "warmup_steps": 0.03,
}
NOTES = {
    "num_generations": "Rollouts a prompt.",
    "per_device_train_batch_size": "Rollouts a micro-batch.",
    "gradient_accumulation_steps": "Micro-batches an optimizer step.",
    "steps_per_generation": "Micro-batches a generation batch.",
    "lr_scheduler_kwargs": "The lowest rate of the schedule.",
    "warmup_steps": "Warmup, as a share of all steps.",
}
GIVES_WAY = {
    "lr_scheduler_kwargs": "lr_scheduler_type",  # another schedule does not know it
    "steps_per_generation": "generation_batch_size",  # it follows from that
}


class SymmetricClip(Method):
    """
    TRL's surrogate with `delta` = 1 + epsilon_high and no lower bound is that of Eq. 80, so it needs no loss of its own.
    Where the score is weighed (Eq. 81) the ratio is held at 1 inside the loss.
    """

    Settings = Settings
    switch = "symmetric_clip"
    neutral = {"symmetric_clip": True, "num_iterations": 1, "steps_per_generation": 1, "max_steps": 3}
    row = Row(
        "docs/symmetric_clip.md",
        "symmetric clipping",
        'one clipping range for both signs ("GRPO-fix")',
        "off-policy updates",
        "0.1% to 1.4%",
        "{GRPO-fix}",
        DESIGN_CONDITIONS.id,
    )
    named = {"grpo-fix": Named({"symmetric_clip": True}, "symmetric clipping, and whole groups", DESIGN_CONDITIONS.id)}
    configurations = (
        PaperConfiguration(
            "GRPOFix",
            "GRPO-fix",
            "grpo-fix",
            DESIGN_CONDITIONS,
            {
                **OF_PAPER,
                "symmetric_clip": True,
                "importance_sampling_level": "token",
                "loss_type": "dapo",  # the mean over each rollout would keep shared tokens from cancelling
            },
            "one clipping range for both signs of the advantage (GRPO-fix, Appendix H)",
            "GRPO-fix, symmetric clipping at the level of tokens (Appendices H and I). All tokens weigh alike: the mean "
            "over each rollout would keep shared tokens from cancelling. Otherwise the settings are those of DFPO.",
            {**NOTES, "loss_type": "All tokens weigh alike."},
            GIVES_WAY,
        ),
    )
    logs = ("symmetric_clip/",)
    acts_in_loss = True
    sets = ("delta",)
    says_when_idle = True

    def acts(self, args: Config) -> bool:
        return not args.layout.is_on_policy

    def check(self, args: Config) -> None:
        if not args.symmetric_clip:
            return
        if args.loss_type not in CLIPPED_LOSSES:
            raise ValueError(
                f"symmetric_clip=True has no meaning with loss_type={args.loss_type!r}, which does not clip the ratio "
                f"that way. Set loss_type to one of {', '.join(map(repr, CLIPPED_LOSSES))}, or symmetric_clip=False."
            )
        bound = args.clipping.delta
        if args.delta not in (None, bound):
            raise ValueError(
                f"delta={args.delta} and symmetric_clip=True both bound the ratio of negative advantages. Leave delta "
                f"unset (symmetric clipping bounds it at 1 + epsilon_high = {bound}), or set symmetric_clip=False."
            )
        if args.symmetric_clip_gradient == "score" and args.use_bias_correction_kl and args.beta:
            raise ValueError(
                "symmetric_clip_gradient='score' holds the ratio at 1 inside the loss, so "
                f"{said(args, 'use_bias_correction_kl')} with beta={args.beta} would lose its ratio. Set "
                "use_bias_correction_kl=False, "
                "symmetric_clip_gradient='surrogate' or beta=0."
            )

    def active(self, args: Config) -> ActiveMethod:
        tags = ("grpo-fix",) if args.importance_sampling_level == "token" else ("symmetric-clip",)
        does = f"ratios above {1 + args.clipping.high:g} are clipped whatever the sign of the advantage"
        return ActiveMethod("Symmetric clipping", does, tags, (DESIGN_CONDITIONS,), self.acts(args))

    def explain(self, args: Config) -> Iterator[tuple[str, str]]:
        if args.symmetric_clip and args.weigher is None:  # otherwise it is inside of the weights
            above = {"surrogate": "stops", "score": "goes on with constant weight"}[args.symmetric_clip_gradient]
            yield (
                "Clipping",
                f"Symmetric: {args.importance_sampling_level}-level ratio in [0, {1 + args.clipping.high:g}] for both "
                f"signs; above it the push {above}. See symmetric_clip/* for what is clipped; TRL's clip_ratio/* reads 0.",
            )

    def leaks(self, args: Config) -> Iterator[str]:
        by_sign = not args.symmetric_clip and args.loss_type != "cispo" and args.weigher is None
        if by_sign and not args.layout.is_on_policy:
            yield f"loss_type={args.loss_type!r} treats one ratio differently by sign (symmetric_clip=False)."

    def clipping(self, args: Config, clipping: Clipping) -> Clipping:
        kind = ScoreClipping if args.symmetric_clip_gradient == "score" else Clipping
        return kind(clipping.loss_type, low=1.0, high=clipping.high, delta=1 + clipping.high)

    def watch_ratios(
        self, args: Config, ratios: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, add: Add
    ) -> None:
        """TRL's own `clip_ratio/*` reads 0, taking it for two-sided clipping."""
        counted = mask.any(1, keepdim=True).float() if ratios.size(1) == 1 else mask.float()
        clipped = (ratios > 1 + args.clipping.high).float()
        sign = advantages if ratios.size(1) > 1 else advantages.sum(1, keepdim=True)
        add("symmetric_clip/clip_fraction", clipped, counted)
        add("symmetric_clip/clip_fraction_positive", clipped, counted * (sign > 0))
        add("symmetric_clip/clip_fraction_negative", clipped, counted * (sign < 0))
