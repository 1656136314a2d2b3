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
    places = probe.active.nonzero().cpu()  # (N, 2): rollout and position

    def alike(candidate: int, same: bool, unsure: bool) -> torch.Tensor:
        others = boosting.clone()
        others[candidate] = False
        others &= (token_ids == token_ids[candidate]) | (not same)
        return (others & (low | (not unsure))).nonzero().squeeze(1)

    def draw(places: torch.Tensor, count: int) -> torch.Tensor:
        return places[torch.randperm(len(places), generator=generator)[:count]]

    candidates = [
        candidate
        for candidate in draw(low.nonzero().squeeze(1), len(low)).tolist()
        if len(alike(candidate, True, True))
    ][:num_candidates]
    if not candidates:
        raise ValueError(
            "masking: no token of low confidence occurs again in a rollout with positive advantage; take more prompts."
        )
    weights = probe.weights("grpo")
    gradient, step = probe.gradient(weights), probe.head_step(weights)
    head: dict[str, list[float]] = {name: [] for name in CONDITIONS}
    full: dict[str, list[float]] = {name: [] for name in CONDITIONS}
    # All effects are differences from the same update, measured by passes over the candidate's rollout alone.
    for candidate in tqdm(candidates, desc=description, disable=description is None):
        row, position = places[candidate].tolist()
        count = min(num_masked, len(alike(candidate, True, True)))
        where = torch.tensor([candidate], device=probe.active.device)

        def moved(change: torch.Tensor, where: torch.Tensor = where) -> float:
            return probe.head_shifts(change, where).item()

        def after(change: list[torch.Tensor], row: int = row, position: int = position) -> float:
            with probe.restored():
                probe.step(change)
                return probe.log_probs(torch.tensor([row]))[0, position].item()

        usual_head, usual = moved(step), after(gradient)
        for name, (same, unsure) in CONDITIONS.items():
            masked = places[draw(alike(candidate, same, unsure), count)]
            left_out = torch.zeros_like(weights)
            left_out[masked[:, 0], masked[:, 1]] = weights[masked[:, 0], masked[:, 1]]
            part = probe.gradient(left_out)
            head[name].append(usual_head - moved(step - probe.head_step(left_out)))
            full[name].append(usual - after([whole - less for whole, less in zip(gradient, part, strict=True)]))
    return MaskingEffects(
        {name: torch.tensor(values, dtype=torch.double) for name, values in head.items()},
        {name: torch.tensor(values, dtype=torch.double) for name, values in full.items()},
    )
