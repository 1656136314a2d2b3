"""One round of generation by TRL, with all that subclasses make of it, and what is known of its rollouts after it."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..batch.groups import without_variance
from ..batch.rollouts import Rollouts, Rows, loss_mask, of_rollouts, silenced
from ..batch.states import StateStore
from ..diagnostics.residual import same_prompt
from ..running.rewards import at_the_mean
from ..upstream.hooks import around, overridden
from .forward import Passes
from .monitor import UpdateMonitor
from .overrides import asked_for_in_generation, asked_for_of_groups
from .rounds import ENTROPIES, Scored
from .token_credits import TokenCredits, makes_old_logps


Generate = Callable[[list[dict[str, Any]]], Rows]
HOOK = "_generate_and_score_completions"


@dataclass
class Call:
    """
    What a call of TRL's generation has made, below all overrides.

    Args:
        rollouts (`torch.Tensor` of shape `(B,)`):
            Numbers of the rollouts: of the same prompt and tokens the same.
        rewards (`torch.Tensor` of shape `(B of all processes, F)`, *optional*):
            Their rewards.
        advantages (`torch.Tensor` of shape `(B,)`, *optional*):
            Their advantages, if they are TRL's.
    """

    rollouts: torch.Tensor
    rewards: torch.Tensor | None
    advantages: torch.Tensor | None


class OtherRows(Exception):
    """
    A subclass has made other rollouts of the rows that it was given, of which only TRL's own way is left.

    Args:
        batch (`dict`):
            What it has returned.
    """

    def __init__(self, batch: Rows):
        self.batch = batch


class Scoring:
    """
    Generates and scores rollouts.

    Args:
        trainer ([`~trl_cancel.CancelGRPOTrainer`]):
            The trainer.
        credits ([`~trl_cancel.pipeline.token_credits.TokenCredits`]):
            The token credits, for which hidden states are caught.
        passes ([`~trl_cancel.pipeline.forward.Passes`]):
            Catches them.
        monitor ([`~trl_cancel.pipeline.monitor.UpdateMonitor`]):
            Completes groups that straddle processes.
    """

    def __init__(self, trainer: Any, credits: TokenCredits, passes: Passes, monitor: UpdateMonitor):
        self.trainer, self.args, self.layout = trainer, trainer.args, trainer.args.layout
        self.credits, self.passes, self.monitor = credits, passes, monitor
        self.groups_seen = 0
        self._calls: list[Call] = []  # of TRL's generation in this round; a subclass may make several
        self._rewards: list[torch.Tensor] = []  # that were calculated in this round

    def score(self, generate: Generate, inputs: list[dict[str, Any]]) -> Scored:
        """
        One round.

        Args:
            generate (`Callable`):
                The outermost `_generate_and_score_completions`.
            inputs (`list[dict]`):
                Rows of the data set, each repeated for its group.

        Raises:
            [`OtherRows`]: If these are not the rollouts of these rows any more, and no method needs them.
            `RuntimeError`: If a method does.
        """
        self._calls, self._rewards = [], []

        def calculate(hook: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
            self._rewards.append(hook(*args, **kwargs))
            return self._rewards[-1]

        # Filled by the first pass, for the log-probs of the policy that sampled.
        states = StateStore(self.args.state_cache_gib)
        catches = self.credits.pass_when_scored and makes_old_logps(self.args)
        with (
            around(self.trainer, "_calculate_rewards", calculate),
            self.passes.first_caught(states) if catches else nullcontext(),
        ):
            batch = dict(generate(inputs))
        is_taken = states.logps is not None and states.logps is batch.get("old_per_token_logps")
        if is_taken and self.credits.need_entropies:
            batch[ENTROPIES] = states.entropies
        group_ids = self._group_ids(len(inputs), batch["advantages"].device)
        call = self._call_of(batch, group_ids)
        rewards, idle, even = self._judged(call.rewards, call.advantages, batch)
        if self.credits or self.args.weigher is not None:
            # A reward that equals the mean differs from it by rounding, whose sign no method is to take for credit.
            batch["advantages"] = silenced(batch["advantages"], even)
        return Scored(
            batch, rewards, idle, even, group_ids, inputs, states if is_taken and self.credits.of_states else None
        )

    def note(self, batch: Rows, is_of_trl: bool) -> None:
        """
        Takes down what a call of TRL's generation returns, before subclasses change it.

        Args:
            batch (`dict`):
                The batch.
            is_of_trl (`bool`):
                Whether its advantages are TRL's.
        """
        rewards = self._rewards[-1] if self._rewards else None
        numbers = _numbers(batch) if overridden(self.trainer, [HOOK]) else batch["advantages"].new_zeros(0)
        self._calls.append(Call(numbers, rewards, batch["advantages"].clone() if is_of_trl else None))

    def _call_of(self, batch: Rows, group_ids: torch.Tensor) -> Call:
        """The rewards and TRL's advantages that belong to the rollouts that the outermost override has returned."""
        last = Call(group_ids, self._rewards[-1] if self._rewards else None, None)
        if self._calls:
            last.advantages = self._calls[-1].advantages
        if not overridden(self.trainer, [HOOK]):
            return last
        gather, calls = self.trainer.accelerator.gather, self._calls
        problem, from_call = self._problem(batch, group_ids)
        if gather(torch.tensor([problem is not None], device=group_ids.device)).any():
            self._refuse_rows(problem or "other rollouts on another process", batch)
        self._check_prompts(batch, group_ids)
        if len(calls) < 2 or any(call.rewards is None for call in calls):
            return last
        last.rewards = _picked([call.rewards for call in calls], gather(from_call))
        last.advantages = _picked([call.advantages for call in calls], from_call)
        return last

    def _problem(self, batch: Rows, group_ids: torch.Tensor) -> tuple[str | None, torch.Tensor]:
        """What is wrong with the rows of a batch; and for each the call of TRL's generation that it is from."""
        rows, last = len(group_ids), len(self._calls) - 1
        from_call = torch.full_like(group_ids, last)
        if len(batch["advantages"]) != rows:
            return f"{len(batch['advantages'])} rollouts where it was given {rows} rows", from_call
        if last < 0 or any(len(call.rollouts) != rows for call in self._calls):
            return None, from_call
        made, returned = torch.stack([call.rollouts for call in self._calls]), _numbers(batch)  # (calls, B), (B,)
        in_place = made == returned
        # The latest call that has made this rollout at this place; of one that an override has edited, the last.
        latest = last - in_place.flip(0).int().argmax(0)
        moved = ~in_place.any(0) & torch.isin(returned, made)
        problem = f"rollouts in another order than its rows ({int(moved.sum())} of {rows} stand elsewhere)"
        return (problem if moved.any() else None), latest.where(in_place.any(0), last)

    def _refuse_rows(self, problem: str, batch: Rows) -> None:
        (hook,), asked_for = overridden(self.trainer, [HOOK]), asked_for_in_generation(self.args, self.credits)
        if asked_for:
            raise RuntimeError(
                f"{' and '.join(asked_for)} could not act: {hook} has returned {problem}. It must return one rollout for "
                "each row, in the order of the rows (docs/subclassing.md); or turn that off."
            )
        cutting = [method.chosen(self.args) for method in self.args.methods if method.cuts(self.args)]
        self.monitor.guard.leave_out(f"{hook} has returned {problem}", " and ".join(cutting))
        raise OtherRows(batch)

    def _check_prompts(self, batch: Rows, group_ids: torch.Tensor) -> None:
        """Refuses groups of different prompts where a method compares their rollouts."""
        asked_for = asked_for_of_groups(self.args, self.credits)
        brings_prompts = self.trainer.environment_factories is not None or self.trainer.rollout_func is not None
        if not asked_for or brings_prompts:
            return
        (prompts,) = self.monitor.whole_groups(same_prompt(group_ids, batch["prompt_ids"], batch["prompt_mask"]))
        of_groups = prompts.view(-1, self.layout.num_generations)
        if (of_groups != of_groups[:, :1]).any():
            (hook,) = overridden(self.trainer, [HOOK])
            raise RuntimeError(
                f"{' and '.join(asked_for)} could not act: {hook} has returned rollouts of different prompts in a group. "
                f"The num_generations={self.layout.num_generations} rollouts of a prompt must stand together, in the "
                "order of the rows (docs/subclassing.md); or turn that off."
            )

    def _group_ids(self, rows: int, device: torch.device) -> torch.Tensor:
        first = self.trainer.accelerator.process_index * rows
        index = torch.arange(first, first + rows, device=device)
        group_ids = self.groups_seen + index // self.layout.num_generations
        self.groups_seen += self.layout.prompts_per_generation
        return group_ids

    def _judged(
        self, found: torch.Tensor | None, of_trl: torch.Tensor | None, batch: Rows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Of this process's rollouts: the rewards, `nan` where an override has not asked for any; whether all of their
        prompt are equal; and whether theirs is the mean, so that the advantage is but rounding. The latter two only as
        far as no override has given advantages of its own.
        """
        size, advantages = self.layout.num_generations, batch["advantages"]
        process, reward_weights = self.trainer.accelerator.process_index, self.trainer.reward_weights
        rows = len(advantages)
        own = slice(process * rows, (process + 1) * rows)
        changed = advantages != (of_trl if of_trl is not None and of_trl.shape == advantages.shape else 0)
        changed = changed.view(rows, -1).any(1)
        if found is None:
            found = advantages.new_full((own.stop, len(reward_weights)), torch.nan)
            idle = even = torch.ones_like(changed)
        else:
            groups, weights = found.unflatten(0, (-1, size)), reward_weights.to(found.device)  # (P, G, F)
            apart = self.args.multi_objective_aggregation == "normalize_then_sum"
            idle = without_variance(groups, weights, apart).repeat_interleave(size)[own]
            even = at_the_mean(groups, weights, apart).flatten()[own]
        (of_groups,) = self.monitor.whole_groups(changed.long())
        of_groups = self.monitor.own_rows(of_groups.view(-1, size).any(1).repeat_interleave(size))
        idle = idle & ~of_groups
        return found[own], idle, idle | (even & ~changed)

    def view(self, scored: Scored) -> Rollouts:
        """The rollouts as the methods see them."""
        batch = scored.batch
        return Rollouts(
            prompt_ids=batch["prompt_ids"],
            prompt_mask=batch["prompt_mask"],
            completion_ids=batch["completion_ids"],
            mask=loss_mask(batch),
            advantages=silenced(of_rollouts(batch), scored.even),
            group_ids=scored.group_ids,
            rewards=scored.rewards,
            reward_names=list(self.trainer.reward_func_names),
            examples=scored.examples,
            num_generations=self.layout.num_generations,
            old_logps=batch.get("old_per_token_logps"),
            temperature=self.trainer.temperature,
            reduce=lambda tensor: self.trainer.accelerator.reduce(tensor, reduction="sum"),
            log=self.monitor.metrics.add,
        )


def _numbers(batch: Rows) -> torch.Tensor:
    """Numbers of rollouts, of shape `(B,)`: the same for the same prompt and completion."""
    nothing = batch["prompt_ids"].new_zeros(len(batch["prompt_ids"]))
    prompts = same_prompt(nothing, batch["prompt_ids"], batch["prompt_mask"])
    return same_prompt(prompts, batch["completion_ids"], batch["completion_mask"])


def _picked(of_calls: list[Any], from_call: torch.Tensor) -> Any:
    """The rows of several calls, each of the call that it is from."""
    if any(values is None for values in of_calls):
        return None
    return torch.stack(of_calls)[from_call, torch.arange(len(from_call), device=from_call.device)]
