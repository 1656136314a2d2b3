"""Which methods a configuration has on: what a model card states, cites and is tagged with."""

from collections.abc import Iterator, Sequence

from trl import GRPOConfig

from .. import papers
from ..batch.protocol import Credit
from ..config import CancelGRPOConfig
from ..methods.method import ActiveMethod
from ..papers import Paper


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
        *(active for method in config.methods if (active := method.active(config)) is not None),
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
    if config.importance_sampling_level == "sequence" and config.weigher is None:
        acts = not config.layout.is_on_policy
        yield ActiveMethod("GSPO", "one ratio for a whole rollout", ("gspo",), (papers.GSPO,), acts)
    if config.epsilon_high is not None and config.epsilon_high > config.epsilon and not config.clipping.is_symmetric:
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


def _own(credits: Sequence[Credit]) -> Iterator[ActiveMethod]:
    if credits:
        names = ", ".join(f"`{type(credit).__name__}`" for credit in credits)
        yield ActiveMethod("Own token credit", f"advantages times the coefficients of {names}", ("custom-credit",))
