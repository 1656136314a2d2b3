"""Rounds of generation: what each has scored, and the groups that are kept of all of them."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from ..batch.groups import Choice, Groups
from ..batch.rollouts import Rows, join_rows, loss_mask, of_rollouts, take_rows
from ..batch.states import StateStore
from ..upstream.hooks import overridden
from ..upstream.trl import split_pixel_values_by_grid, unsplit_pixel_values_by_grid
from .monitor import UpdateMonitor
from .prompts import FreshPrompts


logger = get_logger(__name__)
ENTROPIES = "entropies"  # entry of a scored batch, where a credit needs them and a pass has had them
Score = Callable[[list[dict[str, Any]]], "Scored"]


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
        counts (`torch.Tensor` of shape `(B,)`, *optional*):
            What each adds to `num_items_in_batch`, by which losses are divided: its tokens, unless an override scales it.
        chosen ([`Chosen`], *optional*):
            How their groups were chosen, if they were.
    """

    batch: Rows
    rewards: torch.Tensor
    idle: torch.Tensor
    even: torch.Tensor
    group_ids: torch.Tensor
    examples: list[dict[str, Any]]
    states: StateStore | None = None
    counts: torch.Tensor | None = None
    chosen: "Chosen | None" = None

    def __len__(self) -> int:
        return len(self.group_ids)

    def take(self, index: torch.Tensor) -> "Scored":
        """Some of the rollouts."""
        states = None if self.states is None else self.states.take(index)
        rows = take_rows(
            {name: value for name, value in vars(self).items() if name not in ("states", "chosen")}, index
        )
        return Scored(**{**rows, "batch": take_rows(self.batch, index)}, states=states)

    @classmethod
    def join(cls, parts: Sequence["Scored"], pad_token_id: int) -> "Scored":
        """Rollouts of several rounds, padded to one length."""
        batch = join_rows([part.batch for part in parts], pad_token_id)
        stores = [part.states for part in parts if part.states is not None]
        counts = [part.counts for part in parts if part.counts is not None]
        return cls(
            batch,
            torch.cat([part.rewards for part in parts]),
            torch.cat([part.idle for part in parts]),
            torch.cat([part.even for part in parts]),
            torch.cat([part.group_ids for part in parts]),
            [example for part in parts for example in part.examples],
            StateStore.join(stores, batch["completion_ids"].size(1)) if len(stores) == len(parts) else None,
            torch.cat(counts) if len(counts) == len(parts) else None,
        )


@dataclass(frozen=True)
class Chosen:
    """
    How groups were chosen.

    Args:
        choice ([`~trl_cancel.batch.groups.Choice`]):
            The choice.
        groups ([`~trl_cancel.batch.groups.Groups`]):
            The chosen groups.
    """

    choice: Choice
    groups: Groups


class GroupPool:
    """
    The groups that one process has generated in several rounds, of which one generation batch is kept.

    Args:
        args ([`~trl_cancel.CancelGRPOConfig`]):
            Configuration.
    """

    def __init__(self, args: Any):
        self.layout, self.selectors = args.layout, args.selectors
        self.rounds: list[Scored] = []

    def add(self, scored: Scored) -> None:
        """Another round."""
        self.rounds.append(scored)

    def groups(self) -> Groups:
        """All groups of the rounds, in the order in which they came."""
        size = self.layout.num_generations
        counted = torch.cat([loss_mask(part.batch).any(1) & ~part.even for part in self.rounds])
        advantages = (torch.cat([of_rollouts(part.batch) for part in self.rounds]) * counted).view(-1, size)
        idle = torch.cat([part.idle for part in self.rounds])[::size]
        positives, negatives = ((sign * advantages > 0).sum(1).masked_fill(idle, 0) for sign in (1, -1))
        return Groups(positives, negatives, idle, self.layout)

    def choose(self) -> Choice:
        """The groups to keep, as things are."""
        groups = self.groups()
        wanted = self.layout.generation_batch_per_process // self.layout.num_generations
        rejected = torch.zeros_like(groups.idle)
        for selector in self.selectors:
            rejected = rejected | selector.rejects(groups)
        (candidates,) = (~rejected).nonzero(as_tuple=True)
        if len(candidates) < wanted:  # filled up with groups that push nothing
            filler = rejected.nonzero().squeeze(1)[: wanted - len(candidates)]
            return Choice(torch.cat([candidates, filler]).sort().values, 0.0, torch.arange(wanted))
        for selector in self.selectors:
            choice = selector.choose(groups.take(candidates), wanted)
            if choice is not None:
                return replace(choice, groups=candidates[choice.groups.to(candidates.device)])
        return Choice(candidates[:wanted], 1.0, torch.arange(wanted))  # then steps need not hold whole groups either

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


class Rounds:
    """
    Generates until there are the groups that the methods ask for.

    Args:
        trainer ([`~trl_cancel.CancelGRPOTrainer`]):
            The trainer.
        prompts ([`~trl_cancel.pipeline.prompts.FreshPrompts`]):
            Prompts of further rounds.
        monitor ([`~trl_cancel.pipeline.monitor.UpdateMonitor`]):
            Takes `balance/*`.
    """

    def __init__(self, trainer: Any, prompts: FreshPrompts, monitor: UpdateMonitor):
        self.trainer, self.prompts, self.monitor = trainer, prompts, monitor
        self.args, self.layout = trainer.args, trainer.args.layout
        self._make_room()

    def chosen(self, score: Score, inputs: list[dict[str, Any]]) -> Scored:
        """
        The groups that are kept of as many rounds as it takes.

        Args:
            score (`Callable`):
                Generates and scores rollouts of some rows.
            inputs (`list[dict]`):
                The rows of the first round.
        """
        pool, gather = GroupPool(self.args), self.trainer.accelerator.gather
        for log in _columns(self.trainer._logs):
            log.clear()
        while True:
            scored = score(inputs)
            batch = split_pixel_values_by_grid(scored.batch)
            pool.add(replace(scored, batch=batch, counts=self._counts(batch)))
            choice = pool.choose()
            satisfied = gather(torch.tensor([choice.satisfied], device=self.trainer.accelerator.device))
            if satisfied.min() == 1 or len(pool.rounds) == self.args.max_generation_rounds:
                break
            inputs = self._fresh_inputs(inputs[0].keys())
        chosen = self._note(pool, choice)
        scored = pool.take(choice.groups, self.trainer._tokenizer.pad_token_id)
        batch = scored.batch
        if scored.counts is not None:
            batch = {**batch, "num_items_in_batch": gather(scored.counts.sum()).sum()}
        return replace(scored, batch=unsplit_pixel_values_by_grid(batch), chosen=chosen)

    def _counts(self, batch: Rows) -> torch.Tensor | None:
        """What the rollouts of a round add to its `num_items_in_batch`."""
        if "num_items_in_batch" not in batch:
            return None
        tokens, items = loss_mask(batch).sum(1), batch["num_items_in_batch"]
        if not overridden(self.trainer, ["_generate_and_score_completions"]):
            return tokens
        of_trl = self.trainer.accelerator.gather(tokens.sum()).sum()
        return tokens if of_trl == items else tokens * (items / of_trl.clamp(min=1))

    def _fresh_inputs(self, columns: Any) -> list[dict[str, Any]]:
        """This process's part of another round of prompts, each repeated for its group."""
        rows = self.prompts.draw(self.layout.prompts_per_generation)
        part = self.layout.prompts_per_generation // self.layout.num_processes
        own = rows[self.trainer.accelerator.process_index * part :][:part]
        return [
            {name: value for name, value in row.items() if name in columns}
            for row in own
            for _ in range(self.layout.num_generations)
        ]

    def _note(self, pool: GroupPool, choice: Choice) -> Chosen:
        """Metrics of a choice, and the column of the table of completions that tells what was kept."""
        groups = pool.groups()
        chosen = groups.take(choice.groups)
        size, add = self.layout.num_generations, self.monitor.metrics.add
        add("balance/rounds", groups.idle.new_tensor([len(pool.rounds)], dtype=torch.float))
        add("balance/satisfied", groups.idle.new_tensor([choice.satisfied], dtype=torch.float))
        add("balance/positive_fraction", chosen.positives / size)
        add("balance/negative_fraction", chosen.negatives / size)
        discarded = 1 - len(choice.groups) / len(groups)
        add("balance/discarded_fraction", groups.idle.new_tensor([discarded], dtype=torch.float))
        add("balance/zero_variance_fraction", groups.idle.float())
        for kept in pool.kept(choice.groups):
            self.mark_kept(kept)
        if choice.satisfied < 1:
            asked_for = [method.chosen(self.args) for method in self.args.methods if method.selector(self.args)]
            logger.warning_once(
                f"{len(pool.rounds)} rounds of generation (max_generation_rounds) did not yield the groups that "
                f"{' and '.join(asked_for)} {'asks' if len(asked_for) == 1 else 'ask'} for; the best there are are used. balance/satisfied tells how often that happens: raise "
                "max_generation_rounds, ask for less, or use prompts of which more have mixed rewards."
            )
        return Chosen(choice, chosen)

    def mark_kept(self, kept: list[Any]) -> None:
        """Adds to the column of the table of completions that tells which were kept; `None` where none were chosen."""
        self.trainer._logs["extra"]["balance/kept"].extend(gather_object(kept))

    def _make_room(self) -> None:
        """Lets the table of completions hold all rounds of a generation."""
        logs = self.trainer._logs
        rollouts = self.layout.prompts_per_generation * self.layout.num_generations
        length = rollouts * self.args.max_generation_rounds
        for name, log in logs.items():
            logs[name] = deque(maxlen=length) if isinstance(log, deque) else defaultdict(lambda: deque(maxlen=length))


def _columns(logs: dict[str, Any]) -> Iterator[Any]:
    """The columns of TRL's table of completions."""
    for log in logs.values():
        yield from log.values() if isinstance(log, dict) else [log]
