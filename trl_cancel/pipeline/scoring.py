"""One round of generation by TRL, with all that subclasses make of it, and what is known of its rollouts after it."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from ..batch.rollouts import Rollouts, Rows, loss_mask, of_rollouts, silenced
from ..batch.states import StateStore
from ..methods.dynamic_sampling import without_variance
from ..running.rewards import at_the_mean
from ..upstream.hooks import around
from .forward import Passes
from .monitor import UpdateMonitor
from .rounds import ENTROPIES, Scored
from .token_credits import TokenCredits, makes_old_logps


Generate = Callable[[list[dict[str, Any]]], Rows]


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
        self.advantages_of_trl: torch.Tensor | None = None  # before subclasses have changed them

    def score(self, generate: Generate, inputs: list[dict[str, Any]]) -> Scored:
        """
        One round.

        Args:
            generate (`Callable`):
                The outermost `_generate_and_score_completions`.
            inputs (`list[dict]`):
                Rows of the data set, each repeated for its group.
        """
        found: list[torch.Tensor] = []
        self.advantages_of_trl = None

        def calculate(hook: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
            found.append(hook(*args, **kwargs))
            return found[-1]

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
        rewards, idle, even = self._judged(found[-1] if found else None, batch)
        if self.credits or self.args.weigher is not None:
            # A reward that equals the mean differs from it by rounding, whose sign no method is to take for credit.
            batch["advantages"] = silenced(batch["advantages"], even)
        return Scored(
            batch, rewards, idle, even, group_ids, inputs, states if is_taken and self.credits.of_states else None
        )

    def _group_ids(self, rows: int, device: torch.device) -> torch.Tensor:
        first = self.trainer.accelerator.process_index * rows
        index = torch.arange(first, first + rows, device=device)
        group_ids = self.groups_seen + index // self.layout.num_generations
        self.groups_seen += self.layout.prompts_per_generation
        return group_ids

    def _judged(self, found: torch.Tensor | None, batch: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Of this process's rollouts: the rewards, `nan` where an override has not asked for any; whether all of their
        prompt are equal; and whether theirs is the mean, so that the advantage is but rounding. The latter two only as
        far as no override has given advantages of its own.
        """
        size, advantages = self.layout.num_generations, batch["advantages"]
        process, reward_weights = self.trainer.accelerator.process_index, self.trainer.reward_weights
        rows, of_trl = len(advantages), self.advantages_of_trl
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
