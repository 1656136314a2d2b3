r"""
Conflict tokens, GTPO ([2508.03772](https://huggingface.co/papers/2508.03772)): tokens that stand at the same place in
good and bad rollouts of a prompt are not pushed down, and pushed up for both.

A token of a rollout is in conflict if a rollout of the other sign has the same token at the same place, counted from the
start or from the end. Only the unbroken runs of such tokens at both ends of a rollout count, M; what is in conflict by
chance in the middle is left alone. There the advantage is multiplied with

$$ \lambda_{it} = 2 \text{ if } A_i > 0, \quad 0 \text{ if } A_i < 0 $$

so where all rollouts of a group share a token the push on it is the sum of all |A| instead of 0: the opposite of what
cancellation leaves. Rollouts whose mean entropy is above a threshold can be left out.

Departs from the authors' code: a token in both runs is amplified once, as the paper has it, not twice; losses are not
divided by the number of conflict tokens; entropies are those of the policy at its temperature, as TRL's are; and the
threshold holds whatever the entropy at the start of the training. Their penalty on entropy, an offset of the advantage,
is not part of this: TRL's `entropy_coef` is one on entropy itself.

Shapes: G rollouts of one prompt, T completion tokens, N tokens, d hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import floats, is_factor, is_number, marks, one_of, shaped, whole_numbers
from ..batch.protocol import Scope
from ..batch.rollouts import Rollouts, as_many_at_random, generator_of
from ..batch.states import HELD_LOGITS, LMHead
from ..papers import Paper
from .method import ActiveMethod, Config, Method, Named, Row, documented


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


def mean_entropies(states: torch.Tensor, mask: torch.Tensor, head: LMHead, temperature: float = 1.0) -> torch.Tensor:
    """
    Mean entropy of the distributions that each rollout was sampled from.

    Args:
        states (`torch.Tensor` of shape `(G, T, d)`):
            Last hidden states, the ones that predict each token.
        mask (`torch.Tensor` of shape `(G, T)`):
            1 for the tokens that count.
        head ([`~trl_cancel.batch.states.LMHead`]):
            Output layer, of which a copy is made; logits are held for some tokens at a time.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the policy.

    Returns:
        `torch.Tensor` of shape `(G,)`: In nats; 0 where no token counts.
    """
    active = mask.bool()
    vocabulary = torch.arange(head.vocabulary_size, device=states.device)
    head = head.restricted_to(vocabulary)
    dtype = torch.promote_types(states.dtype, torch.float32)
    parts = [torch.zeros(0, dtype=dtype, device=states.device)]
    for part in states[active].split(max(1, HELD_LOGITS // len(vocabulary))):
        log_probs = (head.logits(part, vocabulary).to(dtype) / temperature).log_softmax(-1)
        parts.append(torch.special.entr(log_probs.exp()).sum(-1))
    values = torch.cat(parts)
    entropies = values.new_zeros(active.shape).masked_scatter(active, values)
    return entropies.sum(1) / active.sum(1).clamp(min=1)


def check_conflict(positive: Any, negative: Any, selection: Any, max_entropy: Any, names: tuple[str, ...]) -> None:
    """
    Refuses settings that [`ConflictTokens`] cannot follow.

    Args:
        positive, negative, selection, max_entropy:
            As in [`ConflictTokens`].
        names (`tuple[str, ...]`):
            What they are called.

    Raises:
        `ValueError`: Names the setting.
    """
    for name, value in zip(names, (positive, negative), strict=False):
        if isinstance(value, str) or not is_factor(value):
            raise ValueError(f"{name}={value!r} must be a number that is not negative, e.g. 2.0.")
    one_of(names[2], selection, SELECTIONS)
    if max_entropy is not None and not (is_number(max_entropy) and max_entropy > 0):
        raise ValueError(f"{names[3]}={max_entropy!r} must be a positive number of nats, e.g. 0.7, or None.")


class ConflictTokens:
    r"""
    Conflict-aware credit: tokens in conflict carry `positive` times the advantage in right rollouts and `negative` times
    in wrong ones, all others 1; rollouts of too high an entropy carry 0.

    Args:
        positive (`float`, *optional*, defaults to `2.0`):
            \\( \lambda \\) of right rollouts.
        negative (`float`, *optional*, defaults to `0.0`):
            \\( \lambda \\) of wrong ones.
        selection (`str`, *optional*, defaults to `"conflict"`):
            `"random"` takes as many tokens of each rollout, drawn at random: a control.
        max_entropy (`float`, *optional*):
            Mean entropy, in nats, above which a rollout is left out. Others may still be in conflict with it.

    Raises:
        `ValueError`: If a setting is none of these.
    """

    scope: Scope = "group"

    def __init__(
        self,
        positive: float = 2.0,
        negative: float = 0.0,
        selection: str = "conflict",
        max_entropy: float | None = None,
    ):
        check_conflict(
            positive, negative, selection, max_entropy, ("positive", "negative", "selection", "max_entropy")
        )
        self.positive, self.negative, self.selection, self.max_entropy = positive, negative, selection, max_entropy

    @property
    def needs_states(self) -> bool:
        """Entropies are made of hidden states; conflict needs the tokens alone."""
        return self.max_entropy is not None

    def coefficients(self, rollouts: Rollouts) -> torch.Tensor:
        """Coefficients of shape `(B, T)`."""
        mask, advantages, ids = rollouts.mask.bool(), rollouts.advantages, rollouts.completion_ids
        folded = zip(*map(rollouts.by_group, (ids, mask, advantages)), strict=True)
        selected = torch.cat([conflict_tokens(*group) for group in folded])
        if self.selection == "random":
            selected = as_many_at_random(selected, mask, generator_of(ids))
        signs = advantages.sign().unsqueeze(1)
        factor = torch.where(signs > 0, self.positive, torch.where(signs < 0, self.negative, 1.0))
        credit = torch.where(selected, factor, 1.0).to(advantages.dtype)
        counted = (mask & (signs != 0)).float()
        rollouts.log("conflict/token_fraction", selected.float(), counted)
        if self.max_entropy is None:
            return credit
        head = rollouts.head.restricted_to(torch.arange(rollouts.head.vocabulary_size, device=ids.device))
        groups = [
            slice(first, first + rollouts.num_generations) for first in range(0, len(ids), rollouts.num_generations)
        ]
        entropies = torch.cat(
            [mean_entropies(rollouts.states[rows], mask[rows], head, rollouts.temperature) for rows in groups]
        )
        dropped = entropies > self.max_entropy
        rollouts.log("conflict/entropy", entropies, mask.any(1).float())
        rollouts.log("conflict/dropped_fraction", dropped.float(), mask.any(1).float())
        return credit.masked_fill(dropped.unsqueeze(1), 0.0)


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
    max_completion_entropy (`float`, *optional*):
        Mean entropy, in nats, above which a rollout is left out (GTPO's filter); the authors take 0.7. Also without
        `conflict_tokens`.
    """

    conflict_tokens: bool = False
    conflict_tokens_positive: float = 2.0
    conflict_tokens_negative: float = 0.0
    conflict_tokens_selection: str = "conflict"
    max_completion_entropy: float | None = None


class Conflict(Method):
    """Gives tokens credit by their place and by the signs that share them."""

    Settings = Settings
    switch = "conflict_tokens"
    row = Row(
        "docs/conflict.md",
        "conflict tokens",
        "tokens at the same place in good and bad rollouts are not pushed down, and up harder (GTPO); "
        "`max_completion_entropy` leaves out rollouts of too high an entropy",
        "always",
        "not measured: no pass; the filter takes hidden states, as NTHR does",
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

    def is_on(self, args: Config) -> bool:
        return args.conflict_tokens or args.max_completion_entropy is not None

    def chosen(self, args: Config) -> str:
        if args.conflict_tokens:
            return super().chosen(args)
        return f"max_completion_entropy={args.max_completion_entropy!r}"

    def check(self, args: Config) -> None:
        if not self.is_on(args):
            return
        prefix = "conflict_tokens_"
        names = (f"{prefix}positive", f"{prefix}negative", f"{prefix}selection", "max_completion_entropy")
        positive, negative, selection, max_entropy = (getattr(args, name) for name in names)
        check_conflict(positive, negative, selection, max_entropy, names)
        layout = args.layout
        if not layout.groups_are_local:
            raise ValueError(
                f"{self.chosen(args)} compares the rollouts of a group, but groups of num_generations="
                f"{args.num_generations} straddle processes that generate {layout.generation_batch_per_process} rollouts "
                "each (per_device_train_batch_size x steps_per_generation). Make that a multiple of num_generations."
            )

    def active(self, args: Config) -> ActiveMethod:
        if not args.conflict_tokens:
            return ActiveMethod("Entropy filter", self._filter(args), ("entropy-filter",), (PAPER,))
        control = ", as a control drawn at random" if args.conflict_tokens_selection == "random" else ""
        tags = ("conflict-tokens", "conflict-tokens-random") if control else ("conflict-tokens",)
        does = f"tokens that good and bad rollouts share at their ends are not pushed down{control}"
        return ActiveMethod("Conflict tokens", f"{does}; {self._filter(args)}".removesuffix("; "), tags, (PAPER,))

    def _filter(self, args: Config) -> str:
        if args.max_completion_entropy is None:
            return ""
        return f"rollouts with a mean entropy above {args.max_completion_entropy:g} are left out"

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
        if args.max_completion_entropy is not None:
            yield "Credit", f"{self._filter(args).capitalize()}."

    def leaks(self, args: Config) -> Iterator[str]:
        if args.conflict_tokens:
            yield "conflict_tokens=True pushes what both signs share up, instead of letting it cancel."
        if args.max_completion_entropy is not None:
            yield "max_completion_entropy drops members of a group after its advantages are computed."

    def credit(self, args: Config) -> ConflictTokens:
        if not args.conflict_tokens:
            return ConflictTokens(positive=1.0, negative=1.0, max_entropy=args.max_completion_entropy)
        return ConflictTokens(
            args.conflict_tokens_positive,
            args.conflict_tokens_negative,
            args.conflict_tokens_selection,
            args.max_completion_entropy,
        )
