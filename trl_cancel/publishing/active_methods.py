"""Which methods a configuration has on: what a model card states, cites and is tagged with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trl import GRPOConfig

from .. import papers
from ..configs import CancelGRPOConfig
from ..credit import Credit
from ..papers import Paper


@dataclass(frozen=True)
class ActiveMethod:
    """
    A method that is on.

    Args:
        name (`str`):
            Its name.
        does (`str`):
            What it does, with the settings that decide it.
        tags (`tuple[str, ...]`):
            Tags of the models trained with it: the names that `--method` knows, where there is one.
        papers (`tuple` of [`~trl_cancel.papers.Paper`]):
            Its sources.
        acts (`bool`):
            Whether it changes anything with these sizes of batches.
    """

    name: str
    does: str
    tags: tuple[str, ...] = ()
    papers: tuple[Paper, ...] = ()
    acts: bool = True


# Loss types of TRL's that are methods of their own. `dapo` is the default and only a part of DAPO: no tag.
LOSSES = {
    "dapo": ActiveMethod("Token-level loss", "all tokens of a batch weigh alike", papers=(papers.DAPO,)),
    "dr_grpo": ActiveMethod("Dr. GRPO", "losses are divided by a constant length", ("dr-grpo",), (papers.DR_GRPO,)),
    "cispo": ActiveMethod("CISPO", "clips the ratio and not the gradient", ("cispo",), (papers.MINIMAX,)),
    "sapo": ActiveMethod("SAPO", "a smooth gate instead of clipping", ("sapo",), (papers.SAPO,)),
    "luspo": ActiveMethod("LUSPO", "sequence-level losses times the length", ("luspo",), (papers.LUSPO,)),
    "vespo": ActiveMethod("VESPO", "smooth weights of whole sequences", ("vespo",), (papers.VESPO,)),
}


def active_methods(config: GRPOConfig, credits: Sequence[Credit] = ()) -> list[ActiveMethod]:
    """
    The methods that are on, GRPO and what TRL adds to it first.

    Args:
        config ([`CancelGRPOConfig`] or [`~trl.GRPOConfig`]):
            The configuration.
        credits (`Sequence` of [`~trl_cancel.credit.Credit`], *optional*):
            Token credits that are passed to the trainer rather than configured.
    """
    config = CancelGRPOConfig.adopt(config)
    grpo = ActiveMethod("GRPO", "advantages relative to the group of rollouts of a prompt", papers=(papers.GRPO,))
    return [
        grpo,
        *_of_trl(config),
        *_of_batches(config),
        *_of_ratios(config),
        *_of_tokens(config),
        *_own(credits),
    ]


def cited(methods: Sequence[ActiveMethod]) -> list[Paper]:
    """The papers of the methods that act, each once."""
    return list(dict.fromkeys(paper for method in methods if method.acts for paper in method.papers))


def tags_of(methods: Sequence[ActiveMethod]) -> list[str]:
    """The tags of the methods that act, each once."""
    return list(dict.fromkeys(tag for method in methods if method.acts for tag in method.tags))


def _of_trl(config: CancelGRPOConfig) -> Iterator[ActiveMethod]:
    if config.loss_type in LOSSES:
        yield LOSSES[config.loss_type]
    if config.importance_sampling_level == "sequence" and config.group_weights == "none":
        acts = not config.layout.is_on_policy
        yield ActiveMethod("GSPO", "one ratio for a whole rollout", ("gspo",), (papers.GSPO,), acts)
    if config.epsilon_high is not None and config.epsilon_high > config.epsilon and not config.symmetric_clip:
        does = f"ratios may rise by {config.epsilon_high:g} but fall by {config.epsilon:g}"
        yield ActiveMethod("Clip-higher", does, papers=(papers.DAPO,), acts=not config.layout.is_on_policy)
    if config.mask_truncated_completions:
        yield ActiveMethod("Overlong filtering", "truncated rollouts are left out", papers=(papers.DAPO,))
    if config.scale_rewards == "none":
        yield ActiveMethod("Unscaled rewards", "advantages keep the scale of the rewards", papers=(papers.DR_GRPO,))
    if config.scale_rewards == "batch":
        yield ActiveMethod("Batch scaling", "advantages are scaled over the batch", papers=(papers.LITE_PPO,))
    if config.multi_objective_aggregation == "normalize_then_sum":
        yield ActiveMethod("GDPO", "each reward is normalized before they are summed", ("gdpo",), (papers.GDPO,))
    if config.top_entropy_quantile < 1:
        does = f"only the {config.top_entropy_quantile:.0%} of tokens with the highest entropy are trained on"
        yield ActiveMethod("High-entropy tokens", does, papers=(papers.HIGH_ENTROPY,))


def _of_batches(config: CancelGRPOConfig) -> Iterator[ActiveMethod]:
    source = (papers.CANCELLATION,)
    if config.query_preserved and config.layout.is_split:  # elsewhere batches are TRL's
        does = "all rollouts of a prompt are in the same optimizer step"
        yield ActiveMethod("Query-preserved mini-batching", does, ("query-preserved",), source)
    if config.reward_balance:
        does = f"at least {config.reward_balance:.0%} of either sign of the advantage in each optimizer step"
        yield ActiveMethod("Reward-balanced batching", does, ("reward-balanced",), source)
    if config.filter_zero_variance:
        does = "groups whose rewards are all equal are replaced"
        yield ActiveMethod("Dynamic sampling", does, ("dynamic-sampling",), (papers.DAPO,))


def _of_ratios(config: CancelGRPOConfig) -> Iterator[ActiveMethod]:
    source = (papers.DESIGN_CONDITIONS,)
    if config.symmetric_clip:
        tags = ("grpo-fix",) if config.importance_sampling_level == "token" else ("symmetric-clip",)
        does = f"ratios above {1 + config.clip_range[1]:g} are clipped whatever the sign of the advantage"
        yield ActiveMethod("Symmetric clipping", does, tags, source, not config.layout.is_on_policy)
    if config.group_weights == "identity":
        does = "a control of DFPO: GSPO's clipped ratios as constant weights"
        yield ActiveMethod("Constant weights", does, (), (papers.GSPO, *source), not config.has_nothing_to_weigh)
    elif config.group_weights != "none":
        kind = config.group_weights.replace("_", "-")
        does = f"weights of a group made orthogonal to its advantages (group_weights={config.group_weights!r})"
        yield ActiveMethod("DFPO", does, ("dfpo", f"dfpo-{kind}"), source, not config.has_nothing_to_weigh)


def _of_tokens(config: CancelGRPOConfig) -> Iterator[ActiveMethod]:
    if config.advantage_sign != "both":
        does = f"only rollouts with {config.advantage_sign} advantages are learned from"
        yield ActiveMethod("One sign only", does, (f"{config.advantage_sign}-only",), (papers.CANCELLATION,))
    if config.nthr:
        does = "tokens of wrong rollouts that right ones need are pushed down less"
        control = ", as a control drawn at random" if config.nthr_selection == "random" else ""
        tags = ("nthr", "nthr-random") if control else ("nthr",)
        yield ActiveMethod("NTHR", does + control, tags, (papers.NEGATIVE_GRADIENT,))
    if config.delta_credit:
        does = "tokens that tell good rollouts from bad ones carry more of the advantage"
        control = ", as a control dealt out at random" if config.delta_assignment == "random" else ""
        tags = ("delta", "delta-random") if control else ("delta",)
        yield ActiveMethod("DelTA", does + control, tags, (papers.DISCRIMINATIVE_CREDIT,))


def _own(credits: Sequence[Credit]) -> Iterator[ActiveMethod]:
    if credits:
        names = ", ".join(f"`{type(credit).__name__}`" for credit in credits)
        yield ActiveMethod("Own token credit", f"advantages times the coefficients of {names}", ("custom-credit",))
