"""Rounds of generation: what each has scored, and the groups that are kept of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..batch.rollouts import Rows, join_rows, loss_mask, of_rollouts, take_rows
from ..batch.states import StateStore
from ..batching import balanced_order, select_balanced_groups
from ..configs import CancelGRPOConfig


@dataclass
class Scored:
    """
    Scored rollouts of one process, those of one prompt in a row.

    Args:
        batch (`dict`):
            What TRL makes of them.
        rewards (`torch.Tensor` of shape `(B, F)`):
            The reward functions' values; `nan` where a function returned `None`.
        idle (`torch.Tensor` of shape `(B,)` and type `bool`):
            Whether all rollouts of the prompt earn the same.
        even (`torch.Tensor` of shape `(B,)` and type `bool`):
            Whether its reward is the mean of its prompt's, so that its advantage is but rounding.
        group_ids (`torch.Tensor` of shape `(B,)`):
            Which rollouts share a prompt.
        examples (`list[dict]`):
            The data set's row behind each rollout.
        states ([`~trl_cancel.batch.states.StateStore`], *optional*):
            Their hidden states, if a pass over all of them was caught.
    """

    batch: Rows
    rewards: torch.Tensor
    idle: torch.Tensor
    even: torch.Tensor
    group_ids: torch.Tensor
    examples: list[dict[str, Any]]
    states: StateStore | None = None

    def __len__(self) -> int:
        return len(self.group_ids)

    def take(self, index: torch.Tensor) -> "Scored":
        """Some of the rollouts."""
        states = None if self.states is None else self.states.take(index)
        rows = take_rows({name: value for name, value in vars(self).items() if name != "states"}, index)
        return Scored(**{**rows, "batch": take_rows(self.batch, index)}, states=states)

    @classmethod
    def join(cls, parts: Sequence["Scored"], pad_token_id: int) -> "Scored":
        """Rollouts of several rounds, padded to one length."""
        batch = join_rows([part.batch for part in parts], pad_token_id)
        stores = [part.states for part in parts if part.states is not None]
        return cls(
            batch,
            torch.cat([part.rewards for part in parts]),
            torch.cat([part.idle for part in parts]),
            torch.cat([part.even for part in parts]),
            torch.cat([part.group_ids for part in parts]),
            [example for part in parts for example in part.examples],
            StateStore.join(stores, batch["completion_ids"].size(1)) if len(stores) == len(parts) else None,
        )


@dataclass
class Choice:
    """
    Groups that are kept.

    Args:
        groups (`torch.Tensor` of shape `(M,)`):
            Their numbers, counted over all rounds.
        satisfied (`float`):
            Share of the optimizer steps that they can fill as asked for.
        order (`torch.Tensor` of shape `(M,)`):
            An order of `groups` in which they do.
    """

    groups: torch.Tensor
    satisfied: float
    order: torch.Tensor


class GroupPool:
    """
    The groups that one process has generated in several rounds, of which one generation batch is kept.

    Args:
        args ([`CancelGRPOConfig`]):
            Configuration.
    """

    def __init__(self, args: CancelGRPOConfig):
        self.args, self.layout = args, args.layout
        self.rounds: list[Scored] = []

    def add(self, scored: Scored) -> None:
        """Another round."""
        self.rounds.append(scored)

    def counts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Rollouts of positive and of negative advantage in each group, as far as the loss counts any of their tokens, and
        whether its rewards are all equal.
        """
        size = self.layout.num_generations
        counted = torch.cat([loss_mask(part.batch).any(1) & ~part.even for part in self.rounds])
        advantages = (torch.cat([of_rollouts(part.batch) for part in self.rounds]) * counted).view(-1, size)
        idle = torch.cat([part.idle for part in self.rounds])[::size]
        positives, negatives = ((sign * advantages > 0).sum(1).masked_fill(idle, 0) for sign in (1, -1))
        return positives, negatives, idle

    def choose(self) -> Choice:
        """The groups to keep, as things are."""
        positives, negatives, idle = self.counts()
        wanted = self.layout.generation_batch_per_process // self.layout.num_generations
        candidates = torch.arange(len(idle), device=idle.device)
        if self.args.filter_zero_variance:
            candidates = candidates[~idle]
        if len(candidates) < wanted:  # filled up with groups that push nothing
            filler = idle.nonzero().squeeze(1)[: wanted - len(candidates)]
            return Choice(torch.cat([candidates, filler]).sort().values, 0.0, torch.arange(wanted))
        if not self.args.reward_balance:  # then steps need not hold whole groups either
            return Choice(candidates[:wanted], 1.0, torch.arange(wanted))
        positives, negatives = positives[candidates], negatives[candidates]
        chosen, order, enough = self._spread(positives, negatives, wanted, self.args.reward_balance)
        if enough < self.layout.steps_apart:  # enough of both signs in all, but not for each step
            best = self._spread(positives, negatives, wanted, 0.5)
            chosen, order, enough = best if best[-1] > enough else (chosen, order, enough)
        return Choice(candidates[chosen.to(candidates.device)], enough / self.layout.steps_apart, order)

    def _spread(
        self, positives: torch.Tensor, negatives: torch.Tensor, wanted: int, share: float
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """
        Groups that hold at least a share of both signs, or as much as there is; an order of them; and how many steps
        that fills.
        """
        size, steps = self.layout.num_generations, self.layout.steps_apart
        chosen, _ = select_balanced_groups(positives, negatives, wanted, size, share)
        counts = (positives.cpu()[chosen], negatives.cpu()[chosen])
        order, enough = balanced_order(torch.arange(wanted), *counts, steps, size, self.args.reward_balance)
        return chosen, order, enough

    def take(self, groups: torch.Tensor, pad_token_id: int) -> Scored:
        """The rollouts of some groups, in the order of the groups."""
        size = self.layout.num_generations
        parts, first = [], 0
        for part in self.rounds:
            last = first + len(part) // size
            own = groups[(groups >= first) & (groups < last)] - first
            if len(own) == len(part) // size:
                parts.append(part)
            elif len(own):
                rows = own.unsqueeze(1) * size + torch.arange(size, device=own.device)
                parts.append(part.take(rows.flatten()))
            first = last
        taken = parts[0] if len(parts) == 1 else Scored.join(parts, pad_token_id)
        # Other processes may take groups of other rounds, and all must make the same passes.
        if taken.states is not None and not all(part.states.keeps for part in self.rounds if part.states is not None):
            taken.states.forget()
        return taken

    def kept(self, groups: torch.Tensor) -> list[list[bool]]:
        """For each round, whether each rollout is kept."""
        size = self.layout.num_generations
        flags = torch.zeros(sum(len(part) for part in self.rounds) // size, dtype=torch.bool, device=groups.device)
        flags[groups] = True
        parts = flags.repeat_interleave(size).split([len(part) for part in self.rounds])
        return [part.tolist() for part in parts]
