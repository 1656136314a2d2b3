"""
The masking experiment: which tokens, left out of the update, change what happens to another (Table 1 of
[2605.08666](https://huggingface.co/papers/2605.08666)).
"""

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from .probe import UpdateProbe


# What the left-out tokens have in common with the candidate: (same token, low confidence).
CONDITIONS = {"random": (False, False), "same": (True, False), "low": (False, True), "same and low": (True, True)}


@dataclass(frozen=True)
class MaskingEffects:
    """
    Masking effects, in nats, of each condition by name: `torch.Tensor` of shape `(K,)` for K candidates.

    Args:
        head (`dict[str, torch.Tensor]`):
            By an update of the output layer alone.
        full (`dict[str, torch.Tensor]`):
            By an update of all parameters.
    """

    head: dict[str, torch.Tensor]
    full: dict[str, torch.Tensor]


def boost_rate(effects: torch.Tensor) -> float:
    """Fraction of candidates that the left-out tokens would have boosted; half of those without any effect count."""
    return ((effects > 0).double() + 0.5 * (effects == 0).double()).mean().item()


@dataclass(frozen=True)
class Update:
    """
    An update in both scopes.

    Args:
        gradient (`list[torch.Tensor]`):
            Gradient of the loss by all parameters.
        head_step (`torch.Tensor` of shape `(V, d)`):
            Change of the output layer's weight.
    """

    gradient: list[torch.Tensor]
    head_step: torch.Tensor

    @classmethod
    def of(cls, probe: UpdateProbe, weights: torch.Tensor) -> "Update":
        """The update with these weights of the tokens."""
        return cls(probe.gradient(weights), probe.head_step(weights))

    def without(self, part: "Update") -> "Update":
        """This update without a part of it, which is used up: gradients are as large as the model."""
        gradient = [left_out.neg_().add_(whole) for whole, left_out in zip(self.gradient, part.gradient, strict=True)]
        return Update(gradient, self.head_step - part.head_step)

    def shift(self, probe: UpdateProbe, candidate: int) -> torch.Tensor:
        """The shift of an active token by the output layer's update and by that of all parameters, of shape `(2,)`."""
        row, position = probe.active.nonzero()[candidate].tolist()
        where = torch.tensor([candidate], device=probe.active.device)
        with probe.restored():
            probe.step(self.gradient)
            after = probe.log_probs(torch.tensor([row]))[0, position]
        return torch.stack([probe.head_shifts(self.head_step, where)[0], after - probe.before[row, position]]).cpu()


def masking_effects(
    probe: UpdateProbe,
    *,
    num_candidates: int = 64,
    num_masked: int = 8,
    low_confidence: float = 0.2,
    seed: int = 0,
    description: str | None = None,
) -> MaskingEffects:
    r"""
    The masking effect on candidate tokens: their log-probability after the update, minus that after an update from
    whose loss some other tokens are left out. It is positive where these would have boosted the candidate.

    The left-out tokens are of rollouts with positive advantage, so that each pushes its own log-probability up; drawn
    at random; for each candidate equally many under each condition; and never the candidate itself. Candidates are
    drawn from the tokens of low confidence. (The paper does not say how it draws either.)

    Args:
        probe ([`UpdateProbe`]):
            Model and rollouts.
        num_candidates (`int`, *optional*, defaults to `64`):
            Candidates.
        num_masked (`int`, *optional*, defaults to `8`):
            Tokens to leave out, or fewer where there are fewer like the candidate.
        low_confidence (`float`, *optional*, defaults to `0.2`):
            Fraction of the tokens, the least probable ones, that count as of low confidence.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.
        description (`str`, *optional*):
            Label of the progress bar; no bar without one.

    Raises:
        `ValueError`: If no token has another one like it.
    """
    generator = torch.Generator().manual_seed(seed)
    token_ids, logps = probe.token_ids.cpu(), probe.before[probe.active].cpu()
    low = logps <= logps.quantile(low_confidence)
    boosting = (probe.rollouts.advantages > 0).unsqueeze(1).expand_as(probe.active)[probe.active].cpu()

    def alike(candidate: int, same: bool, unsure: bool) -> torch.Tensor:
        """Tokens to leave out under a condition."""
        others = boosting.clone()
        others[candidate] = False
        if same:
            others &= token_ids == token_ids[candidate]
        return (others & low if unsure else others).nonzero().squeeze(1)

    def draw(tokens: torch.Tensor, count: int) -> torch.Tensor:
        return tokens[torch.randperm(len(tokens), generator=generator)[:count]]

    unsure = draw(low.nonzero().squeeze(1), len(low)).tolist()
    candidates = [candidate for candidate in unsure if len(alike(candidate, True, True))][:num_candidates]
    if not candidates:
        raise ValueError(
            "masking: no token of low confidence occurs again in a rollout with positive advantage; take more prompts."
        )
    weights, places = probe.weights("grpo"), probe.active.nonzero().cpu()
    update = Update.of(probe, weights)
    effects: dict[str, list[torch.Tensor]] = {name: [] for name in CONDITIONS}
    for candidate in tqdm(candidates, desc=description, disable=description is None):
        usual, count = update.shift(probe, candidate), min(num_masked, len(alike(candidate, True, True)))
        for name, (same, of_low) in CONDITIONS.items():
            masked = places[draw(alike(candidate, same, of_low), count)].unbind(1)
            left_out = torch.zeros_like(weights)
            left_out[masked] = weights[masked]
            effects[name].append(usual - update.without(Update.of(probe, left_out)).shift(probe, candidate))
    stacked = {name: torch.stack(of_tokens).double() for name, of_tokens in effects.items()}
    return MaskingEffects(
        {name: of_tokens[:, 0] for name, of_tokens in stacked.items()},
        {name: of_tokens[:, 1] for name, of_tokens in stacked.items()},
    )
