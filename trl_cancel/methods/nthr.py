r"""
NTHR, negative token hidden reward ([2505.18830](https://huggingface.co/papers/2505.18830), section 5 and Appendix 7.4):
tokens of wrong rollouts whose push would lower the likelihood of the right ones carry less of the advantage.

To first order in the output layer, raising token \\( k \\) of a right rollout and lowering a token of a wrong one meet
in \\( \langle e_k, e\rangle\langle h_k, h\rangle \\), with the prediction errors \\( e = \mathrm{onehot}(y) - \pi \\)
and the hidden states that predict the tokens. The score of a token is the sum over all tokens of the right rollouts
(Eq. 7):

$$ s = \sum_{i\in+}\sum_k \langle e_{ik}, e\rangle\langle h_{ik}, h\rangle = e^\top M_+ h,
\qquad M_+ = \sum_{i\in+}\sum_k e_{ik}h_{ik}^\top $$

so a group costs three products of size tokens x vocabulary x d, not one for each pair of tokens. The vocabulary is
restricted to the tokens that occur in the group's rollouts, as in Appendix 7.4.

Shapes: G rollouts of one prompt, T completion tokens, N active tokens, V* restricted vocabulary, d hidden size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..arguments import (
    finite,
    floats,
    is_factor,
    is_number,
    log_probabilities,
    marks,
    one_of,
    shaped,
    shares,
    whole_numbers,
)
from ..arguments import positive as positive_number
from ..batch.protocol import Scope
from ..batch.rollouts import Rollouts, as_many_at_random, generator_of
from ..batch.states import HELD_LOGITS, LMHead, fitting_head
from ..papers import Paper
from .method import (
    ActiveMethod,
    Config,
    Method,
    Named,
    PaperConfiguration,
    PaperEvaluation,
    Row,
    check_groups_are_local,
    documented,
)


PAPER = Paper(
    "2505.18830",
    "deng2025negative",
    "On the Effect of Negative Gradient in Group Relative Deep Reinforcement Optimization",
    "Wenlong Deng and Yi Ren and Muchen Li and Danica J. Sutherland and Xiaoxiao Li and Christos Thrampoulidis",
)
ETAS = ("balanced", "p", "1-p")
SELECTIONS = ("score", "random")


def nthr_scores(
    hidden: torch.Tensor,
    logps: torch.Tensor,
    token_ids: torch.Tensor,
    mask: torch.Tensor,
    positive: torch.Tensor,
    head: LMHead | torch.Tensor,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Scores of the tokens of one group, and the threshold above which a token of a wrong rollout is selected.

    Args:
        hidden (`torch.Tensor` of shape `(G, T, d)`):
            Last hidden states, the ones that predict each token.
        logps (`torch.Tensor` of shape `(G, T)`):
            Log-probabilities of the tokens, at `temperature`. They hold the normaliser of the softmax, so no logits
            over the whole vocabulary are needed.
        token_ids (`torch.Tensor` of shape `(G, T)`):
            The tokens.
        mask (`torch.Tensor` of shape `(G, T)`):
            1 for the tokens that count.
        positive (`torch.Tensor` of shape `(G,)` and type `bool`):
            The right rollouts.
        head ([`~trl_cancel.batch.states.LMHead`] or `torch.Tensor` of shape `(V, d)`):
            Output layer, or its bare weight.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the policy.

    Returns:
        `tuple`: `scores`, a `torch.Tensor` of shape `(G, T)` with the score of every token (those of right rollouts
        too), 0 where the mask is; and `threshold`, a scalar: the least mean score of a right rollout (Eq. 9 with
        \\( \beta = 1 \\)), infinite if there is none.

    Raises:
        `ValueError`: If the shapes do not fit, a mask holds something else than 0 and 1, the temperature is not
            positive, or of a token that counts the state is not finite, the log-probability is none, or the output layer
            has no such token.
    """
    hidden, logps = floats(hidden=hidden, logps=logps)
    (token_ids,) = whole_numbers(token_ids=token_ids)
    active, positive = marks(mask=mask, positive=positive)
    shaped(
        hidden=(hidden, "G T d"),
        logps=(logps, "G T"),
        token_ids=(token_ids, "G T"),
        mask=(active, "G T"),
        positive=(positive, "G"),
    )
    positive_number("temperature", temperature, "1.0")
    finite(active.unsqueeze(-1), hidden=hidden)
    log_probabilities(logps=logps.masked_fill(~active, 0.0))
    head = fitting_head(head, hidden, token_ids.masked_fill(~active, 0))
    return _scores(hidden, logps, token_ids, active, positive, head, temperature)


def _scores(
    hidden: torch.Tensor,
    logps: torch.Tensor,
    token_ids: torch.Tensor,
    active: torch.Tensor,
    positive: torch.Tensor,
    head: LMHead,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`nthr_scores`] of what is known to fit; both are `nan` where a state or a log-probability that counts is."""
    vocabulary, targets = token_ids[active].unique(return_inverse=True)  # (V*,), (N,)
    states, chosen = hidden[active], logps[active]  # (N, d), (N,)
    dtype = torch.promote_types(states.dtype, torch.float32)
    of_positive = positive.unsqueeze(1).expand_as(active)[active]  # (N,)
    head = head.restricted_to(vocabulary)
    parts = torch.arange(len(states), device=states.device).split(max(1, HELD_LOGITS // max(1, len(vocabulary))))

    @lru_cache(maxsize=1)  # a group is rarely so large that it takes more than one part
    def errors(part: int) -> torch.Tensor:
        tokens = parts[part]
        logits = head.logits(states[tokens], vocabulary).to(dtype) / temperature  # (tokens, V*)
        own = targets[tokens].unsqueeze(1)
        log_normaliser = logits.gather(1, own) - chosen[tokens].to(dtype).unsqueeze(1)
        return torch.zeros_like(logits).scatter(1, own, 1.0) - torch.exp(logits - log_normaliser)

    matrix = states.new_zeros(len(vocabulary), states.size(1), dtype=dtype)  # M+
    for part, tokens in enumerate(parts):
        right = of_positive[tokens]
        matrix += errors(part)[right].T @ states[tokens][right].to(dtype)
    scores = states.new_zeros(len(states), dtype=dtype)
    for part, tokens in enumerate(parts):
        scores[tokens] = ((errors(part) @ matrix) * states[tokens].to(dtype)).sum(1)

    spread = torch.zeros_like(logps, dtype=dtype).masked_scatter(active, scores)
    lengths = active.sum(1)
    means = spread.sum(1) / lengths.clamp(min=1)
    threshold = means.masked_fill(~(positive & (lengths > 0)), torch.inf).amin()
    return spread, threshold


def nthr_eta(success_rate: torch.Tensor, mode: str | float) -> torch.Tensor:
    r"""
    What the advantage of a selected token is multiplied with.

    Args:
        success_rate (`torch.Tensor`):
            p, the fraction of right rollouts in a group.
        mode (`str` or `float`):
            `"balanced"`: \\( 2|0.5-p| \\), the paper's; `"p"`; `"1-p"`; or a number.

    Returns:
        `torch.Tensor` of the same shape.

    Raises:
        `ValueError`: If `mode` is none of these, or a number that is negative or not finite; or if a fraction is not
            between 0 and 1.
    """
    (success_rate,) = floats(success_rate=success_rate)
    check_eta("mode", mode)
    shares(success_rate=success_rate)
    return _eta(success_rate, mode)


def _eta(success_rate: torch.Tensor, mode: str | float) -> torch.Tensor:
    if mode == "balanced":
        return 2 * (0.5 - success_rate).abs()
    if mode == "p":
        return success_rate
    if mode == "1-p":
        return 1 - success_rate
    return torch.full_like(success_rate, float(mode))


def check_eta(name: str, value: Any) -> None:
    """
    Refuses what [`nthr_eta`] does not know.

    Raises:
        `ValueError`: Names what it knows.
    """
    if value not in ETAS and not is_factor(value):
        raise ValueError(
            f"{name}={value!r} is not one of {', '.join(map(repr, ETAS))} or a number that is not negative, e.g. 0.5."
        )


def check_nthr(beta: Any, eta: Any, selection: Any, prefix: str = "") -> None:
    """
    Refuses settings that [`NTHR`] cannot follow.

    Args:
        beta, eta, selection:
            As in [`NTHR`].
        prefix (`str`, *optional*, defaults to `""`):
            What stands before their names in a configuration.

    Raises:
        `ValueError`: Names the setting.
    """
    if not (is_number(beta) and (0 <= beta < math.inf or beta == -math.inf)):
        raise ValueError(
            f"{prefix}beta={beta!r} must be a number of at least 0, e.g. 1.0, or -inf to select all tokens of wrong "
            "rollouts."
        )
    check_eta(f"{prefix}eta", eta)
    one_of(f"{prefix}selection", selection, SELECTIONS)


class NTHR:
    r"""
    Negative token hidden reward as a credit: tokens of wrong rollouts that score above the threshold get \\( \eta \\),
    all others 1. Right and wrong are positive and negative advantages; groups without both are left alone.

    Args:
        beta (`float`, *optional*, defaults to `1.0`):
            Factor on the threshold (Eq. 9), at least 0: a negative one would turn the order of the thresholds around.
            `-inf` selects every token of the wrong rollouts.
        eta (`str` or `float`, *optional*, defaults to `"balanced"`):
            See [`nthr_eta`].
        selection (`str`, *optional*, defaults to `"score"`):
            `"random"` selects as many tokens of each group as the scores would, drawn at random: the paper's control.

    Raises:
        `ValueError`: If a setting is none of these.
    """

    scope: Scope = "group"
    needs_states = True
    reads_states = "one forward pass over the rollouts"

    def __init__(self, beta: float = 1.0, eta: str | float = "balanced", selection: str = "score"):
        check_nthr(beta, eta, selection)
        self.beta, self.eta, self.selection = beta, eta, selection

    def coefficients(self, rollouts: Rollouts) -> torch.Tensor:
        """Coefficients of shape `(B, T)`."""
        active = rollouts.mask.bool()
        head = rollouts.head.restricted_to(rollouts.completion_ids[active])
        credit = torch.ones_like(rollouts.mask, dtype=rollouts.advantages.dtype)
        groups = []
        for first in range(0, len(active), rollouts.num_generations):
            rows = slice(first, first + rollouts.num_generations)
            # Asked for also where it is not used: all processes must make the same passes.
            hidden = rollouts.states[rows]
            positive, negative = rollouts.advantages[rows] > 0, rollouts.advantages[rows] < 0
            punished = active[rows] & (negative & positive.any()).unsqueeze(1)  # (G, T)
            scores, threshold = _scores(
                hidden,
                rollouts.old_logps[rows],
                rollouts.completion_ids[rows],
                active[rows],
                positive,
                head,
                rollouts.temperature,
            )
            if math.isfinite(self.beta):
                threshold = torch.where(threshold.isfinite(), self.beta * threshold, threshold)
            selected = punished & ((scores > threshold) | (self.beta == -math.inf))
            if self.selection == "random":
                generator = generator_of(rollouts.completion_ids[rows])
                drawn = as_many_at_random(selected.view(1, -1), punished.view(1, -1), generator)
                selected = drawn.view_as(selected)
            eta = _eta(positive.float().mean(), self.eta)
            credit[rows] = torch.where(selected, eta, 1.0).to(credit)

            groups.append((punished, selected, scores, threshold))
        self._log(rollouts, *map(torch.stack, zip(*groups, strict=True)))
        return credit

    @staticmethod
    def _log(
        rollouts: Rollouts,
        punished: torch.Tensor,
        selected: torch.Tensor,
        scores: torch.Tensor,
        threshold: torch.Tensor,
    ) -> None:
        """Metrics of groups that are stacked along the first dimension."""
        counted = punished.float()
        rollouts.log("nthr/selected_fraction", selected.float(), counted)
        rollouts.log("nthr/score_mean", scores.float(), counted)
        known = punished.flatten(1).any(1) & threshold.isfinite()
        rollouts.log("nthr/threshold", threshold.where(known, 0.0).float(), known.float())


@documented
@dataclass
class Settings:
    """
    nthr (`bool`, *optional*, defaults to `False`):
        Push those tokens of wrong rollouts down less that would take the likelihood of the right ones down with
        them. Source: section 5 of [2505.18830](https://huggingface.co/papers/2505.18830).
    nthr_beta (`float`, *optional*, defaults to `1.0`):
        Factor on NTHR's threshold, above which tokens are selected, at least 0; `-inf` selects all tokens of wrong rollouts.
    nthr_eta (`str`, *optional*, defaults to `"balanced"`):
        What the advantage of a token that NTHR selects is multiplied with: `balanced`, 2|0.5-p| with the share p of
        right rollouts in the group; `p`; `1-p`; or a number.
    nthr_selection (`str`, *optional*, defaults to `"score"`):
        Which tokens NTHR selects. One of:

        - `"score"`: those whose score is above the threshold.
        - `"random"`: as many tokens of each group at random, the paper's control.
    """

    nthr: bool = False
    nthr_beta: float = 1.0
    nthr_eta: str = "balanced"
    nthr_selection: str = "score"


class NegativeTokenHiddenReward(Method):
    """Gives selected tokens of wrong rollouts less credit."""

    Settings = Settings
    switch = "nthr"
    neutral = {"nthr": True, "nthr_eta": "1"}
    row = Row(
        "docs/nthr.md",
        "NTHR",
        "tokens of wrong rollouts that look like those of right ones are pushed down less (NTHR)",
        "always",
        "0.8% to 5.4%",
        "{NTHR}",
        PAPER.id,
    )
    named = {
        "nthr": Named({"nthr": True}, "wrong rollouts' tokens that right ones need pushed less", PAPER.id),
        "nthr-random": Named(
            {"nthr": True, "nthr_selection": "random"}, "control: as many tokens, drawn at random", PAPER.id
        ),
    }
    configurations = (
        PaperConfiguration(
            "NTHR",
            "NTHR",
            "nthr",
            PAPER,
            {"nthr": True, "filter_zero_variance": True, "beta": 1e-4, "num_generations": 8, "learning_rate": 1e-6},
            "tokens of wrong rollouts that look like those of right ones are pushed down less (NTHR)",
            "NTHR (section 5.4 and Appendix 7.3), without the sizes of its batches.",
            {
                "beta": "Coefficient of the KL term.",
                "num_generations": "Rollouts a prompt.",
                "learning_rate": "The paper takes 5e-7 for its model of 0.5B parameters.",
            },
        ),
    )
    evaluations = (
        PaperEvaluation(
            "nthr",
            PAPER.id,
            ("aime24", "amc23", "math500", "minerva", "olympiad"),
            {"num_samples": 0, "greedy": True, "max_completion_length": 4000},
        ),
    )
    logs = ("nthr/",)

    def check(self, args: Config) -> None:
        if not args.nthr:
            return
        check_nthr(args.nthr_beta, args.nthr_eta, args.nthr_selection, "nthr_")
        check_groups_are_local("nthr=True compares the rollouts of a group", args)

    def active(self, args: Config) -> ActiveMethod:
        does = "tokens of wrong rollouts that right ones need are pushed down less"
        control = ", as a control drawn at random" if args.nthr_selection == "random" else ""
        return ActiveMethod("NTHR", does + control, ("nthr", "nthr-random") if control else ("nthr",), (PAPER,))

    def explain(self, args: Config) -> Iterator[tuple[str, str]]:
        if not args.nthr:
            return
        tokens = {
            "score": "tokens of wrong rollouts that would take the right ones down with them",
            "random": "as many tokens of wrong rollouts as it would select, drawn at random,",
        }[args.nthr_selection]
        eta = {"balanced": "2|0.5 - p|", "p": "p", "1-p": "1 - p"}.get(args.nthr_eta, args.nthr_eta)
        share = ", where p is the share of right rollouts in the group" if "p" in str(eta) else ""
        yield "Credit", f"NTHR: {tokens} carry {eta} of it{share}."

    def leaks(self, args: Config) -> Iterator[str]:
        if args.nthr:
            yield "nthr=True pushes tokens of wrong rollouts less, also those that right ones share."

    def credit(self, args: Config) -> NTHR:
        return NTHR(args.nthr_beta, args.nthr_eta, args.nthr_selection)
