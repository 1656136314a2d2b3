r"""
Conflict tokens, GTPO ([2508.03772](https://huggingface.co/papers/2508.03772)): tokens that stand at the same place in
good and bad rollouts of a prompt are not pushed down, and pushed up for both.

A token of a rollout is in conflict if a rollout of the other sign has the same token at the same place, counted from the
start or from the end. Only the unbroken runs of such tokens at both ends of a rollout count, M; what is in conflict by
chance in the middle is left alone. There the advantage is multiplied with

$$ \lambda_{it} = 2 \text{ if } A_i > 0, \quad 0 \text{ if } A_i < 0 $$

so where all rollouts of a group share a token the push on it is the sum of all |A| instead of 0: the opposite of what
cancellation leaves.

Departs from the authors' code: a token in both runs is amplified once, as the paper has it, not twice, and losses are not
divided by the number of conflict tokens.

Shapes: G rollouts of one prompt, T completion tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import floats, is_factor, is_number, marks, one_of, shaped, whole_numbers
from ..batch.protocol import Scope
from ..batch.rollouts import Rollouts, as_many_at_random, generator_of
from ..papers import Paper
from .method import ActiveMethod, Config, Method, Named, Row, check_groups_are_local, documented


PAPER = Paper(
    "2508.03772",
    "simoni2025gtpo",
    "GTPO: Stabilizing Group Relative Policy Optimization via Gradient and Entropy Control",
    "Marco Simoni and Aleksandar Fontana and Giulio Rossolini and Andrea Saracino and Paolo Mori",
)
SELECTIONS = ("conflict", "random")


def conflict_tokens(token_ids: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """
    The tokens of one group that are in conflict: the unbroken runs at both ends of each rollout of tokens that a rollout
    of the other sign has at the same place.

    The rollout that has the token may be another one from place to place. Places count the tokens of the mask, so tool
    results do not shift them.

    Args:
        token_ids (`torch.Tensor` of shape `(G, T)`):
            The tokens.
        mask (`torch.Tensor` of shape `(G, T)`):
            1 for the tokens that count.
        advantages (`torch.Tensor` of shape `(G,)`):
            Advantages; a rollout with 0 is in conflict with none.

    Returns:
        `torch.Tensor` of shape `(G, T)` and type `bool`.

    Raises:
        `ValueError`: If the shapes do not fit, or `token_ids` are not whole numbers.
    """
    (token_ids,) = whole_numbers(token_ids=token_ids)
    (advantages,) = floats(advantages=advantages)
    (mask,) = marks(mask=mask)
    shaped(token_ids=(token_ids, "G T"), mask=(mask, "G T"), advantages=(advantages, "G"))
    from_start = mask.cumsum(1) - 1  # the place of each token that counts, (G, T)
    from_end = mask.sum(1, keepdim=True) - 1 - from_start
    return mask & (_run(token_ids, from_start, mask, advantages) | _run(token_ids, from_end, mask, advantages))


def _run(ids: torch.Tensor, places: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Tokens at places before the first one, of shape `(G, T)`, that both signs do not have."""
    if not mask.any():
        return mask
    found = torch.stack([places[mask], ids[mask]], dim=1).unique(dim=0, return_inverse=True)
    (kinds, of_token), signs = found, advantages.unsqueeze(1).expand_as(mask)[mask]
    both = torch.stack([_any(side, of_token, len(kinds)) for side in (signs > 0, signs < 0)]).all(0)
    in_conflict = torch.zeros_like(mask).masked_scatter(mask, both[of_token] & (signs != 0))
    # The first place that is not in conflict ends the run.
    end = places.masked_fill(in_conflict | ~mask, mask.size(1)).amin(1, keepdim=True)
    return places < end


def _any(marked: torch.Tensor, kinds: torch.Tensor, number: int) -> torch.Tensor:
    """Which of so many kinds are marked anywhere."""
    return torch.zeros(number, device=kinds.device).index_add(0, kinds, marked.float()) > 0


def check_conflict(positive: Any, negative: Any, selection: Any, prefix: str = "") -> None:
    """
    Refuses settings that [`ConflictTokens`] cannot follow.

    Args:
        positive, negative, selection:
            As in [`ConflictTokens`].
        prefix (`str`, *optional*, defaults to `""`):
            What stands before their names in a configuration.

    Raises:
        `ValueError`: Names the setting.
    """
    for name, value in (("positive", positive), ("negative", negative)):
        if not (is_number(value) and is_factor(value)):
            raise ValueError(f"{prefix}{name}={value!r} must be a number that is not negative, e.g. 2.0.")
    one_of(f"{prefix}selection", selection, SELECTIONS)


class ConflictTokens:
    r"""
    Conflict-aware credit: tokens in conflict carry `positive` times the advantage in right rollouts and `negative` times
    in wrong ones, all others 1.

    Args:
        positive (`float`, *optional*, defaults to `2.0`):
            \\( \lambda \\) of right rollouts.
        negative (`float`, *optional*, defaults to `0.0`):
            \\( \lambda \\) of wrong ones.
        selection (`str`, *optional*, defaults to `"conflict"`):
            `"random"` takes as many tokens of each rollout, drawn at random: a control.

    Raises:
        `ValueError`: If a setting is none of these.
    """

    scope: Scope = "group"

    def __init__(self, positive: float = 2.0, negative: float = 0.0, selection: str = "conflict"):
        check_conflict(positive, negative, selection)
        self.positive, self.negative, self.selection = positive, negative, selection

    def coefficients(self, rollouts: Rollouts) -> torch.Tensor:
        """Coefficients of shape `(B, T)`."""
        mask, advantages, ids = rollouts.mask.bool(), rollouts.advantages, rollouts.completion_ids
        groups = zip(*map(rollouts.by_group, (ids, mask, advantages)), strict=True)
        selected = torch.cat([conflict_tokens(*group) for group in groups])
        if self.selection == "random":
            selected = as_many_at_random(selected, mask, generator_of(ids))
        signs = advantages.sign().unsqueeze(1)
        factor = torch.where(signs > 0, self.positive, torch.where(signs < 0, self.negative, 1.0))
        rollouts.log("conflict/token_fraction", selected.float(), (mask & (signs != 0)).float())
        return torch.where(selected, factor, 1.0).to(advantages.dtype)


@documented
@dataclass
class Settings:
    """
    conflict_tokens (`bool`, *optional*, defaults to `False`):
        Do not push down what stands at the same place in good and bad rollouts of a prompt, at their beginnings and ends,
        and push it up harder (GTPO's conflict tokens). Source: [2508.03772](https://huggingface.co/papers/2508.03772).
    conflict_tokens_positive (`float`, *optional*, defaults to `2.0`):
        What the advantage of a conflict token is multiplied with in right rollouts.
    conflict_tokens_negative (`float`, *optional*, defaults to `0.0`):
        What the advantage of a conflict token is multiplied with in wrong rollouts.
    conflict_tokens_selection (`str`, *optional*, defaults to `"conflict"`):
        Which tokens are treated so. One of:

        - `"conflict"`: those in conflict.
        - `"random"`: as many tokens of each rollout at random, a control.
    """

    conflict_tokens: bool = False
    conflict_tokens_positive: float = 2.0
    conflict_tokens_negative: float = 0.0
    conflict_tokens_selection: str = "conflict"


class Conflict(Method):
    """Gives tokens credit by their place and by the signs that share them."""

    Settings = Settings
    switch = "conflict_tokens"
    neutral = {"conflict_tokens": True, "conflict_tokens_positive": 1.0, "conflict_tokens_negative": 1.0}
    row = Row(
        "docs/conflict.md",
        "conflict tokens",
        "tokens at the same place in good and bad rollouts are not pushed down, and up harder (GTPO)",
        "always",
        "not measured; no pass",
        paper=PAPER.id,
    )
    named = {
        "conflict-tokens": Named(
            {"conflict_tokens": True}, "tokens that both signs share are only pushed up", PAPER.id
        ),
        "conflict-tokens-random": Named(
            {"conflict_tokens": True, "conflict_tokens_selection": "random"},
            "control: as many tokens, drawn at random",
            PAPER.id,
        ),
    }
    logs = ("conflict/",)

    def check(self, args: Config) -> None:
        if args.conflict_tokens:
            selection = args.conflict_tokens_selection
            check_conflict(args.conflict_tokens_positive, args.conflict_tokens_negative, selection, "conflict_tokens_")
            check_groups_are_local("conflict_tokens=True compares the rollouts of a group", args)

    def active(self, args: Config) -> ActiveMethod:
        is_control = args.conflict_tokens_selection == "random"
        tags = ("conflict-tokens", "conflict-tokens-random") if is_control else ("conflict-tokens",)
        which = "drawn at random, as a control," if is_control else "that good and bad rollouts share at their ends"
        factors = f"{args.conflict_tokens_positive:g} and {args.conflict_tokens_negative:g} times"
        does = f"tokens {which} carry {factors} the advantage in good and in bad ones"
        return ActiveMethod("Conflict tokens", does, tags, (PAPER,))

    def explain(self, args: Config) -> Iterator[tuple[str, str]]:
        if args.conflict_tokens:
            which = {
                "conflict": "that stand at the same place in right and wrong rollouts, at their beginnings and ends,",
                "random": "drawn at random, as many as stand at the same place in right and wrong rollouts,",
            }[args.conflict_tokens_selection]
            yield (
                "Credit",
                f"Conflict tokens: those {which} carry {args.conflict_tokens_positive:g} times of it in right rollouts "
                f"and {args.conflict_tokens_negative:g} times in wrong ones.",
            )

    def leaks(self, args: Config) -> Iterator[str]:
        if args.conflict_tokens:
            yield "conflict_tokens=True pushes what both signs share up, instead of letting it cancel."

    def credit(self, args: Config) -> ConflictTokens:
        return ConflictTokens(
            args.conflict_tokens_positive, args.conflict_tokens_negative, args.conflict_tokens_selection
        )
