"""The variants of an update that are compared: the methods by name, as weights of tokens."""

from dataclasses import replace
from typing import Any, cast

import torch

from ...arguments import one_of
from ...batch.rollouts import Rollouts
from ...config import CancelGRPOConfig
from ...methods import NAMED
from ...pipeline.credit import credited
from ...pipeline.monitor import UpdateMonitor
from ...pipeline.weights import UpdateWeights


# Short names; those of the papers' figures use underscores.
ALIASES = {"dfpo": "dfpo-min"}


class Variant:
    r"""
    One method as weights: an update is \\( \sum_{it} w_{it}\nabla\log\pi(y_{it}) / \sum_{it} m_{it} \\), to first order
    what its clipped loss does (Eq. 2 of [2605.08666](https://huggingface.co/papers/2605.08666)), with all tokens
    normalised alike, so that variants differ in their method alone.

    Args:
        name (`str`):
            A method, e.g. `"grpo"`, `"positive_only"` or `"dfpo"`; hyphens and underscores are the same.
        **settings:
            Fields of [`CancelGRPOConfig`] that differ from the method's, e.g. `nthr_eta=0`.

    Raises:
        `ValueError`: If there is no such method or setting, or a value makes no sense.
    """

    def __init__(self, name: str, **settings: Any):
        method = ALIASES.get(name, name).replace("_", "-")
        if method not in NAMED:
            known = [*NAMED, *ALIASES]
            raise ValueError(f"variant {name!r} is not one of {', '.join(known)}.")
        for setting, value in settings.items():
            field = CancelGRPOConfig.__dataclass_fields__.get(setting)
            if field is None:
                raise ValueError(f"{setting} is not a setting of CancelGRPOConfig.")
            choices = field.metadata.get("choices")
            if choices:
                one_of(setting, value, choices)
        self.name, self.settings = name, {**NAMED[method].settings, **settings}
        _ = self._args(
            num_generations=2
        ).token_credits  # refuses values that make no sense, before anything is sampled

    def __repr__(self) -> str:
        return f"Variant({self.name!r})"

    @property
    def needs_entropies(self) -> bool:
        """Whether its token credit needs the entropies of the tokens' distributions."""
        credits = self._args(num_generations=2).token_credits
        return any(getattr(credit, "needs_entropies", False) for credit in credits)

    @property
    def weighs_groups(self) -> bool:
        """Whether rollouts are weighed within their groups, which must then be whole."""
        return self._args(num_generations=2).weigher is not None

    def credited(self, rollouts: Rollouts) -> Rollouts:
        """
        The rollouts with this variant's token credit in their advantages, which are then of shape `(B,)` or `(B, T)`.

        Args:
            rollouts ([`~trl_cancel.batch.rollouts.Rollouts`]):
                Whole groups, with `states`, `old_logps` and `head` for variants that need them.
        """
        return replace(
            rollouts,
            advantages=credited(rollouts.advantages, self._args(rollouts.num_generations).token_credits, rollouts),
        )

    def weights(self, rollouts: Rollouts, logps: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """
        The weights of the tokens.

        Args:
            rollouts ([`~trl_cancel.batch.rollouts.Rollouts`]):
                Rollouts as they were scored; whole groups for variants that weigh groups. Off policy their `old_logps`
                tell how far.
            logps (`torch.Tensor` of shape `(B, T)`):
                Log-probabilities now.
            advantages (`torch.Tensor` of shape `(B,)` or `(B, T)`):
                Advantages with token credit, see [`Variant.credited`].

        Returns:
            `torch.Tensor` of shape `(B, T)`.
        """
        args = self._args(rollouts.num_generations)
        weighing = UpdateWeights(args, UpdateMonitor(cast(Any, None), groups_are_local=True))
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        rows = {
            "completion_mask": rollouts.mask,
            "old_per_token_logps": rollouts.old_logps,
            "advantages": advantages,
            "rollout_advantages": rollouts.advantages,
            "group_ids": rollouts.group_ids,
        }
        ratios = weighing.ratios(rows, logps)
        weigher = args.weigher
        if weigher is None:
            weights = cast(torch.Tensor, args.clipping.weights(ratios, advantages))
        else:
            taking_part = weighing.taking_part(rows, logps)
            weights = weighing.of_groups(weigher, ratios.squeeze(1), taking_part, rows).unsqueeze(1)
        return weights * advantages * rollouts.mask

    def _args(self, num_generations: int) -> "_Fields":
        """The fields of a configuration. Making one would set up accelerate anew, also under a trainer at work."""
        fields = CancelGRPOConfig.__dataclass_fields__
        args = object.__new__(_Fields)
        args.__dict__.update({name: field.default for name, field in fields.items()} | self.settings)
        args.__dict__.update(num_generations=num_generations, steps_per_generation=1)
        return args


class _Fields(CancelGRPOConfig):
    """A configuration that knows nothing of devices."""

    world_size = 1
