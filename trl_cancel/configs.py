"""The configuration of the trainer: TRL's, and a few flat fields more."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from . import _upstream  # noqa: F401  (refuses an untested TRL before anything else happens)
from .arguments import is_number, one_of, whole
from .batching import BatchLayout
from .credit.controls import SIGNS
from .credit.delta import ASSIGNMENTS, PROXIES, check_delta, normalization
from .credit.group_weights import TRANSFORMATIONS, TRUST_REGIONS
from .credit.nthr import SELECTIONS, check_nthr
from .removed import KnowsRemoved
from .secrets import KeepsSecrets, without_secrets
from .value_rules import check_number, check_values, types_of


# Loss types whose surrogate is TRL's clipped one, min(rA, clip(r)A).
CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED_LOSSES, "cispo", "sapo", "vespo")
# TRL refuses others too, some of them after the first generation.
CHOICES_OF_TRL = {
    "loss_type": LOSS_TYPES,
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_importance_sampling_mode": ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate"),
}


@dataclass
class CancelGRPOConfig(KnowsRemoved, KeepsSecrets, GRPOConfig):
    r"""
    Configuration class for the [`CancelGRPOTrainer`].

    This class includes only the parameters that are specific to this package. For a full list of training arguments,
    please refer to the [`~trl.GRPOConfig`] documentation; all defaults are TRL's.

    Parameters:
        > Parameters that control which rollouts meet in one optimizer step

        query_preserved (`bool`, *optional*, defaults to `True`):
            Put all rollouts of a prompt into the same optimizer step, instead of shuffling single rollouts. Acts where
            a generation batch is spread over several optimizer steps (`steps_per_generation` greater than
            `gradient_accumulation_steps`); otherwise batches are TRL's. Source: section 4 of
            [2605.08666](https://huggingface.co/papers/2605.08666).
        reward_balance (`float`, *optional*, defaults to `0.0`):
            Least share, up to 0.5, of the rollouts of an optimizer step that must have positive and that must have
            negative advantages. Where the rollouts of a generation do not allow it, further rounds are generated from
            fresh prompts and groups are exchanged. Source: section 4 of
            [2605.08666](https://huggingface.co/papers/2605.08666).
        filter_zero_variance (`bool`, *optional*, defaults to `False`):
            Replace groups whose rewards are all equal by groups of further rounds (dynamic sampling).
        max_generation_rounds (`int`, *optional*, defaults to `4`):
            Rounds of generation after which the best there is is taken.

        > Parameters that control clipping

        symmetric_clip (`bool`, *optional*, defaults to `False`):
            Clip the ratio to `[0, 1 + epsilon_high]` whatever the sign of the advantage, so that tokens that good and
            bad rollouts share keep one coefficient. Takes `epsilon` where `epsilon_high` is not set. Source: Appendix
            H of [2604.13088](https://huggingface.co/papers/2604.13088).
        symmetric_clip_gradient (`str`, *optional*, defaults to `"surrogate"`):
            Gradient where the ratio exceeds the bound. One of:

            - `"surrogate"`: zero there (Eq. 80).
            - `"score"`: the clipped ratio is a constant weight of the score, so the push goes on (Eq. 81).

        > Parameters that control the weights of a group

        group_weights (`str`, *optional*, defaults to `"none"`):
            Make the sequence-level ratios of each group orthogonal to its advantages before they weigh the rollouts
            (DFPO), so that what the group shares is not pushed. Needs `importance_sampling_level="sequence"`. Source:
            section 4 of [2604.13088](https://huggingface.co/papers/2604.13088). One of:

            - `"none"`: GSPO's ratios, or GRPO's.
            - `"identity"`: GSPO's clipped ratios as constant weights; a control.
            - `"min"`: each rollout gets the smallest weight of its group (Eq. 50).
            - `"orth"`: the nearest orthogonal weights, which can be negative (Eq. 18).
            - `"positive_orth"`: the nearest orthogonal weights that are not negative (Eq. 51).
            - `"rebalance"`: the heavier side is scaled down (Eq. 52 to 55).
        group_weights_trust_region (`str`, *optional*, defaults to `"mask"`):
            What stops the push on a rollout whose ratio has left the clipping range. One of:

            - `"none"`: nothing, as the paper reads literally (Eq. 86).
            - `"mask"`: a rollout whose gradient GSPO's clipping would cut off gets weight 0, and the rest of the group
              is made orthogonal without it.
            - `"group"`: the whole group rests while the ratio of one of its rollouts is outside the range.
        group_weights_include_sampling_ratio (`bool`, *optional*, defaults to `True`):
            Transform the correction for vLLM's sampling together with the ratio, instead of letting it multiply the
            result. One of tokens counts with its mean over the rollout, which is what it multiplies a rollout with.
        group_weights_scale (`float`, *optional*, defaults to `1.0`):
            Multiplies all weights; an ablation of the paper.
        group_weights_stop_gradient (`bool`, *optional*, defaults to `True`):
            Hold the weights constant. `False` differentiates through them, an ablation of the paper.

        > Parameters that control credit

        advantage_sign (`str`, *optional*, defaults to `"both"`):
            Rollouts to learn from: `"both"`, `"positive"` or `"negative"` advantages. The latter two are controls in
            which nothing cancels. Source: Appendix E.1 of [2605.08666](https://huggingface.co/papers/2605.08666).
        nthr (`bool`, *optional*, defaults to `False`):
            Push those tokens of wrong rollouts down less that would take the likelihood of the right ones down with
            them. Source: section 5 of [2505.18830](https://huggingface.co/papers/2505.18830).
        nthr_beta (`float`, *optional*, defaults to `1.0`):
            Factor on the threshold above which tokens are selected, at least 0; `-inf` selects all tokens of wrong
            rollouts.
        nthr_eta (`str`, *optional*, defaults to `"balanced"`):
            What the advantage of a selected token is multiplied with: `"balanced"`, 2|0.5-p| with the share p of right
            rollouts in the group; `"p"`; `"1-p"`; or a number.
        nthr_selection (`str`, *optional*, defaults to `"score"`):
            `"random"` selects as many tokens of each group at random: the paper's control.
        delta_credit (`bool`, *optional*, defaults to `False`):
            Let tokens that tell good rollouts from bad ones carry more of the advantage (DelTA). Source:
            [2605.21467](https://huggingface.co/papers/2605.21467).
        delta_lambda_min (`float`, *optional*, defaults to `0.8`):
            Credit of a token that looks like the other side.
        delta_lambda_max (`float`, *optional*, defaults to `1.2`):
            Credit of a token that looks like its own side.
        delta_refinements (`int`, *optional*, defaults to `1`):
            How often the centroids of both sides are taken again with the tokens weighted.
        delta_gamma (`float`, *optional*):
            Scale of the margins. By default, the standard deviation of each side's.
        delta_proxy (`str`, *optional*, defaults to `"lm_head_row"`):
            What stands for a token's gradient: `"lm_head_row"`, (1 - π)h, or `"hidden_gradient"`, the gradient by the
            hidden state.
        delta_assignment (`str`, *optional*, defaults to `"soft"`):
            `"soft"`; `"hard"`, one side or the other; `"random"`, the soft ones dealt out at random: a control.
        delta_normalize (`str`, *optional*, defaults to `"batch"`):
            What the credits are divided by: `"batch"`, their mean over the generation batch, as the authors have it,
            which pushes one side harder than the other; `"side"`, the mean of their own side, which does not; or
            `"none"`. `True` and `False` mean `"batch"` and `"none"`.
        delta_top_fraction (`float`, *optional*):
            Instead of weighing tokens, keep this fraction of them, those with the highest credit.
        state_cache_gib (`float`, *optional*, defaults to `2.0`):
            Memory for the hidden states of a generation batch on the device, in GiB. More, up to four times as much,
            goes to CPU memory; still more is computed again when it is needed.

        > Parameters that control the logging

        cancellation_metrics (`bool`, *optional*, defaults to `True`):
            Log how much of the push on shared tokens is left (`cancel/shared_prefix_residual`) and how rollouts divide
            by sign. Changes nothing in training.
        token_shift_steps (`int`, *optional*, defaults to `0`):
            Every so many optimizer steps, log which tokens the step boosts and which it suppresses (`shift/*`), which
            takes two forward passes over its rollouts; 0 for never. Changes nothing in training. Source: Appendix C of
            [2605.08666](https://huggingface.co/papers/2605.08666).

        > Parameters that control the saving

        save_on_signal (`bool`, *optional*, defaults to `True`):
            On SIGTERM or SIGINT, finish the optimizer step, save a checkpoint (unless `save_strategy="no"`) and end the
            training; a second signal acts at once. Signals that something else handles already are left to it.

    Raises:
        `ValueError`: If settings contradict each other; the message names them and what would work.
    """

    query_preserved: bool = field(
        default=True,
        metadata={
            "help": "Put all rollouts of a prompt into the same optimizer step, instead of shuffling single rollouts. "
            "Acts where a generation batch is spread over several optimizer steps (`steps_per_generation` greater "
            "than `gradient_accumulation_steps`); otherwise batches are TRL's."
        },
    )
    reward_balance: float = field(
        default=0.0,
        metadata={
            "help": "Least share, up to 0.5, of the rollouts of an optimizer step that must have positive and that "
            "must have negative advantages. Where the rollouts of a generation do not allow it, further rounds are "
            "generated from fresh prompts and groups are exchanged."
        },
    )
    filter_zero_variance: bool = field(
        default=False,
        metadata={
            "help": "Replace groups whose rewards are all equal by groups of further rounds (dynamic sampling)."
        },
    )
    max_generation_rounds: int = field(
        default=4, metadata={"help": "Rounds of generation after which the best there is is taken."}
    )
    symmetric_clip: bool = field(
        default=False,
        metadata={
            "help": "Clip the ratio to [0, 1 + epsilon_high] whatever the sign of the advantage, so that tokens that "
            "good and bad rollouts share keep one coefficient. Takes `epsilon` where `epsilon_high` is not set."
        },
    )
    symmetric_clip_gradient: str = field(
        default="surrogate",
        metadata={
            "help": "Gradient where the ratio exceeds the bound of symmetric clipping: zero (`surrogate`), or that of "
            "the score weighted by the clipped ratio (`score`).",
            "choices": ["surrogate", "score"],
        },
    )
    group_weights: str = field(
        default="none",
        metadata={
            "help": "Make the sequence-level ratios of each group orthogonal to its advantages before they weigh the "
            "rollouts (DFPO). Needs `importance_sampling_level='sequence'`. `none`: GSPO's ratios, or GRPO's; "
            "`identity`: GSPO's as constant weights, a control; `min`: the smallest of the group; `orth`: the nearest "
            "orthogonal weights; `positive_orth`: the nearest that are not negative; `rebalance`: the heavier side "
            "is scaled down.",
            "choices": ["none", *TRANSFORMATIONS],
        },
    )
    group_weights_trust_region: str = field(
        default="mask",
        metadata={
            "help": "What stops the push on a rollout whose ratio has left the clipping range: nothing (`none`), "
            "weight 0 where GSPO's clipping would cut its gradient off (`mask`), or rest for its whole group "
            "(`group`).",
            "choices": list(TRUST_REGIONS),
        },
    )
    group_weights_include_sampling_ratio: bool = field(
        default=True,
        metadata={
            "help": "Transform the correction for vLLM's sampling (of tokens: its mean over the rollout) together with "
            "the ratio, instead of letting it multiply the result."
        },
    )
    group_weights_scale: float = field(
        default=1.0, metadata={"help": "Multiplies all group weights; an ablation of the paper."}
    )
    group_weights_stop_gradient: bool = field(
        default=True,
        metadata={
            "help": "Hold the group weights constant. `False` differentiates through them, an ablation of the paper."
        },
    )
    advantage_sign: str = field(
        default="both",
        metadata={
            "help": "Rollouts to learn from: `both`, `positive` or `negative` advantages. The latter two are controls "
            "in which nothing cancels.",
            "choices": list(SIGNS),
        },
    )
    nthr: bool = field(
        default=False,
        metadata={
            "help": "Push those tokens of wrong rollouts down less that would take the likelihood of the right ones "
            "down with them."
        },
    )
    nthr_beta: float = field(
        default=1.0,
        metadata={"help": "Factor on NTHR's threshold, at least 0; `-inf` selects all tokens of wrong rollouts."},
    )
    nthr_eta: str = field(
        default="balanced",
        metadata={
            "help": "What the advantage of a token that NTHR selects is multiplied with: `balanced`, 2|0.5-p| with the "
            "share p of right rollouts; `p`; `1-p`; or a number."
        },
    )
    nthr_selection: str = field(
        default="score",
        metadata={
            "help": "Tokens that NTHR selects: by `score`, or as many at `random`, a control.",
            "choices": list(SELECTIONS),
        },
    )
    delta_credit: bool = field(
        default=False,
        metadata={"help": "Let tokens that tell good rollouts from bad ones carry more of the advantage (DelTA)."},
    )
    delta_lambda_min: float = field(
        default=0.8, metadata={"help": "DelTA's credit of a token that looks like the other side."}
    )
    delta_lambda_max: float = field(
        default=1.2, metadata={"help": "DelTA's credit of a token that looks like its own side."}
    )
    delta_refinements: int = field(
        default=1, metadata={"help": "How often DelTA's centroids are taken again with the tokens weighted."}
    )
    delta_gamma: float | None = field(
        default=None,
        metadata={"help": "Scale of DelTA's margins. By default, the standard deviation of each side's."},
    )
    delta_proxy: str = field(
        default="lm_head_row",
        metadata={
            "help": "What stands for a token's gradient in DelTA: (1 - probability) times the hidden state "
            "(`lm_head_row`), or the gradient by the hidden state (`hidden_gradient`).",
            "choices": list(PROXIES),
        },
    )
    delta_assignment: str = field(
        default="soft",
        metadata={
            "help": "How DelTA assigns tokens to sides: `soft`; `hard`, one or the other; `random`, the soft ones dealt "
            "out at random, a control.",
            "choices": list(ASSIGNMENTS),
        },
    )
    delta_normalize: str = field(
        default="batch",
        metadata={
            "help": "What DelTA's credits are divided by: their mean over the generation batch (`batch`), which pushes "
            "one side harder than the other; over their own side (`side`); or nothing (`none`). True and False mean "
            "`batch` and `none`."
        },
    )
    delta_top_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Instead of weighing tokens, keep this fraction of them, those with DelTA's highest credit."
        },
    )
    state_cache_gib: float = field(
        default=2.0,
        metadata={
            "help": "Memory for the hidden states of a generation batch on the device, in GiB. More, up to four times "
            "as much, goes to CPU memory; still more is computed again when it is needed."
        },
    )
    cancellation_metrics: bool = field(
        default=True,
        metadata={
            "help": "Log how much of the push on shared tokens is left (`cancel/shared_prefix_residual`) and how "
            "rollouts divide by sign. Changes nothing in training."
        },
    )
    token_shift_steps: int = field(
        default=0,
        metadata={
            "help": "Every so many optimizer steps, log which tokens the step boosts and which it suppresses "
            "(`shift/*`), which takes two forward passes over its rollouts; 0 for never. Changes nothing in training."
        },
    )
    save_on_signal: bool = field(
        default=True,
        metadata={
            "help": "On SIGTERM or SIGINT, finish the optimizer step, save a checkpoint and end the training; a second "
            "signal acts at once."
        },
    )

    def __post_init__(self):
        self._check_numbers()  # before TRL compares them and divides by them
        try:
            super().__post_init__()
        except ValueError:
            if "distributed_state" in self.__dict__:  # otherwise it came before sizes are known
                self._check_whole_groups()  # the same refusal, by the names of what was set
            raise
        self.check()

    @classmethod
    def adopt(cls, args: GRPOConfig) -> "CancelGRPOConfig":
        """
        This configuration with the settings of a plain [`~trl.GRPOConfig`] and this class's defaults for what that
        lacks.

        Args:
            args ([`~trl.GRPOConfig`]):
                A configuration; returned as it is if it is this package's already.

        Raises:
            `TypeError`: If `args` is something else, or this class is that of a paper's settings.
            `ValueError`: If the settings do not fit this class's defaults.
        """
        if isinstance(args, cls):
            args.check()
            return args
        if cls is not CancelGRPOConfig:
            raise TypeError(
                f"args is a {type(args).__name__}; pass a {cls.__name__}, which holds the paper's settings."
            )
        if not isinstance(args, GRPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; pass a {cls.__name__} or a trl.GRPOConfig.")
        # TRL's own `__post_init__` has run on `args` and cannot run twice, so its results are taken over.
        adopted = object.__new__(cls)
        adopted.__dict__.update(copy.copy(args.__dict__))
        for setting in fields(cls):
            if setting.name not in adopted.__dict__:
                setattr(adopted, setting.name, setting.default)  # this package's fields have plain defaults
        adopted.check()
        return adopted

    def to_dict(self) -> dict[str, Any]:
        """As TRL's, which trackers are given; without other secrets either, such as in `model_init_kwargs` or addresses."""
        return without_secrets(super().to_dict())

    @property
    def layout(self) -> BatchLayout:
        """The sizes that decide which rollouts meet in one optimizer step."""
        return BatchLayout.of(self)

    @contextmanager
    def set_aside(self, **settings: Any) -> Iterator[None]:
        """
        Other settings for a while. What is pickled meanwhile, `training_args.bin`, has the user's.

        Args:
            **settings:
                The other settings.
        """
        outer = self.__dict__.get("_set_aside", {})
        before = {name: getattr(self, name) for name in settings}
        self.__dict__.update(settings, _set_aside={**before, **outer})
        try:
            yield
        finally:
            self.__dict__.update(before, _set_aside=outer)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        users = state.pop("_set_aside", {})
        return {**state, **users}

    @property
    def chooses_groups(self) -> bool:
        """Whether generation goes on until the groups are as asked for."""
        return self.reward_balance > 0 or self.filter_zero_variance

    @property
    def has_nothing_to_weigh(self) -> bool:
        """
        Whether group weights change nothing but rounding: all that they could transform is 1 and every rollout takes
        part, so that the advantages of each group sum to zero; and they are neither scaled nor differentiated.
        """
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        drops_some = self.mask_truncated_completions or self.off_policy_mask_threshold is not None
        transforms = corrects or drops_some or not self.group_weights_stop_gradient
        acts = self.group_weights_scale != 1 or (transforms and self.group_weights != "identity")
        return self.layout.is_on_policy and not acts

    @property
    def clip_range(self) -> tuple[float, float]:
        """`epsilon_low` and `epsilon_high` of the loss; symmetric clipping has no lower bound."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return (1.0, high) if self.symmetric_clip else (self.epsilon, high)

    def check(self) -> None:
        """
        Refuses settings that contradict each other, and takes the end of the line off a token that was read from a
        file. Done when the configuration is made, and again by the trainer, since fields can be assigned in between.

        Raises:
            `ValueError`: Names the settings and what would work.
        """
        if isinstance(self.hub_token, str):
            self.hub_token = self.hub_token.strip()
        self._check_numbers()
        self._check_choices()
        self._check_batches()
        self._check_rounds()
        self._check_symmetric_clip()
        self._check_group_weights()
        self._check_nthr()
        self._check_delta()
        self._check_states()
        self._check_logging()
        self._check_own_numbers()

    def _check_numbers(self) -> None:
        if isinstance(self.delta, bool):
            raise ValueError(
                f"delta={self.delta}: delta is TRL's name for a bound on the ratio, a number. Did you mean "
                f"delta_credit={self.delta}?"
            )
        check_values(self)
        self._check_sizes()

    def _check_own_numbers(self) -> None:
        """Settings of a method that is off have not been looked at, and must be numbers all the same."""
        for name, types in types_of(CancelGRPOConfig).items():
            if name in _OWN_FIELDS and types & {int, float}:
                check_number(name, getattr(self, name), types)

    def _check_sizes(self) -> None:
        for name in BatchLayout.__dataclass_fields__.keys() & self.__dataclass_fields__.keys():
            value, least = getattr(self, name), 2 if name == "num_generations" else 1
            if value is not None or name != "steps_per_generation":  # which TRL fills in
                whole(name, value, least)

    def _check_whole_groups(self) -> None:
        if self.steps_per_generation is None:
            return
        layout = self.layout
        total = layout.generation_batch_per_process * layout.num_processes
        if total % layout.num_generations:
            processes = f" x {layout.num_processes} processes" if layout.num_processes > 1 else ""
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} x steps_per_generation="
                f"{self.steps_per_generation}{processes} = {total} rollouts a generation, which is not a multiple of "
                f"num_generations={self.num_generations}. Set one of {', '.join(layout.sizes_that_fit())}."
            )

    def _check_choices(self) -> None:
        for setting in fields(self):
            choices, value = setting.metadata.get("choices"), getattr(self, setting.name)
            if setting.name in _OWN_FIELDS and choices:
                one_of(setting.name, value, choices)
            if setting.name in _OWN_FIELDS and isinstance(setting.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{setting.name}={value!r} must be True or False.")
        for name, known in CHOICES_OF_TRL.items():
            one_of(name, getattr(self, name), known)

    def _check_batches(self) -> None:
        layout = self.layout
        if not self.query_preserved or not layout.is_split or (layout.groups_are_local and layout.groups_fit_steps):
            return
        if layout.groups_are_local:
            problem = (
                f"per_device_train_batch_size={self.per_device_train_batch_size} with gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} and steps_per_generation={self.steps_per_generation} keeps "
                f"{layout.rollouts_together} rollouts of a process together in an optimizer step, which is not a "
                f"multiple of num_generations={self.num_generations}"
            )
        else:
            problem = (
                f"per_device_train_batch_size={self.per_device_train_batch_size} x steps_per_generation="
                f"{self.steps_per_generation} rollouts a process is not a multiple of num_generations="
                f"{self.num_generations}, so groups straddle the {layout.num_processes} processes"
            )
        ways_out = [*layout.sizes_that_fit(), *(["query_preserved=False"] if self.group_weights == "none" else [])]
        raise ValueError(
            f"query_preserved=True cannot keep groups whole: {problem}. Set one of {', '.join(ways_out)}."
        )

    def _check_rounds(self) -> None:
        share, rounds = self.reward_balance, self.max_generation_rounds
        if not (is_number(share) and 0 <= share <= 0.5):
            raise ValueError(f"reward_balance={share!r} must be between 0 and 0.5, e.g. 0.25.")
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise ValueError(f"max_generation_rounds={rounds!r} must be a whole number of at least 1.")
        if not self.chooses_groups:
            return
        chosen = f"reward_balance={share}" if share else "filter_zero_variance=True"
        layout = self.layout
        if not layout.groups_are_local:
            raise ValueError(
                f"{chosen} chooses whole groups, but groups of num_generations={self.num_generations} straddle "
                f"processes that generate {layout.generation_batch_per_process} rollouts each "
                "(per_device_train_batch_size x steps_per_generation). Make that a multiple of num_generations."
            )
        rollouts = layout.rollouts_together
        if share and 2 * math.ceil(share * rollouts - 1e-9) > rollouts:
            raise ValueError(
                f"{chosen} asks for {math.ceil(share * rollouts - 1e-9)} rollouts of either sign among the {rollouts} of "
                f"an optimizer step, which cannot be. Set reward_balance to {rollouts // 2 / rollouts:.3g} or less."
            )
        if share and layout.is_split and not self.query_preserved:
            raise ValueError(
                f"{chosen} needs whole groups in each optimizer step. Set query_preserved=True, or "
                f"steps_per_generation={self.gradient_accumulation_steps} (= gradient_accumulation_steps)."
            )

    def _check_symmetric_clip(self) -> None:
        if not self.symmetric_clip:
            return
        if self.loss_type not in CLIPPED_LOSSES:
            raise ValueError(
                f"symmetric_clip=True has no meaning with loss_type={self.loss_type!r}, which does not clip the ratio "
                f"that way. Set loss_type to one of {', '.join(map(repr, CLIPPED_LOSSES))}, or symmetric_clip=False."
            )
        bound = 1 + self.clip_range[1]
        if self.delta not in (None, bound):
            raise ValueError(
                f"delta={self.delta} and symmetric_clip=True both bound the ratio of negative advantages. Leave delta "
                f"unset (symmetric clipping bounds it at 1 + epsilon_high = {bound}), or set symmetric_clip=False."
            )
        if self.symmetric_clip_gradient == "score" and self.use_bias_correction_kl and self.beta:
            raise ValueError(
                "symmetric_clip_gradient='score' holds the ratio at 1 inside the loss, so use_bias_correction_kl=True "
                f"(with beta={self.beta}) would lose its ratio. Set use_bias_correction_kl=False, "
                "symmetric_clip_gradient='surrogate' or beta=0."
            )

    def _check_group_weights(self) -> None:
        if self.group_weights == "none":
            return
        chosen = f"group_weights={self.group_weights!r}"
        if self.importance_sampling_level != "sequence":
            raise ValueError(
                f"{chosen} transforms the ratios of whole rollouts, but importance_sampling_level="
                f"{self.importance_sampling_level!r}. Set importance_sampling_level='sequence', or group_weights='none'."
            )
        if self.loss_type not in (*CLIPPED_LOSSES, "cispo"):
            raise ValueError(
                f"{chosen} needs a loss that multiplies a ratio with the advantage; loss_type={self.loss_type!r} bends "
                f"it in its own way. Set loss_type to one of {', '.join(map(repr, (*CLIPPED_LOSSES, 'cispo')))}, or "
                "group_weights='none'."
            )
        if self.loss_type == "cispo" and self.clip_range[1] < 1:
            raise ValueError(
                f"{chosen} with loss_type='cispo': epsilon_high={self.clip_range[1]} bounds the ratio itself there, so "
                "every weight would be cut. Set epsilon_high to 1 or more (TRL's documentation recommends 5.0)."
            )
        if self.use_bias_correction_kl and self.beta:
            raise ValueError(
                f"{chosen} holds the ratio at 1 inside the loss, so use_bias_correction_kl=True (with "
                f"beta={self.beta}) would lose its ratio. Set use_bias_correction_kl=False or beta=0."
            )
        self._check_delta_bound(chosen)
        if not (is_number(self.group_weights_scale) and 0 < self.group_weights_scale < math.inf):
            raise ValueError(f"group_weights_scale={self.group_weights_scale!r} must be positive, e.g. 0.5.")
        layout = self.layout
        if layout.is_split and not self.query_preserved:
            raise ValueError(
                f"{chosen} needs whole groups in each optimizer step. Set query_preserved=True, or "
                f"steps_per_generation={self.gradient_accumulation_steps} (= gradient_accumulation_steps)."
            )
        if not self.group_weights_stop_gradient:
            self._check_differentiable_weights(layout)

    def _check_delta_bound(self, chosen: str) -> None:
        """TRL clips the ratio at `delta` again, also one that is held at 1 because the weight holds the real one."""
        if self.delta is not None and self.delta < 1:
            raise ValueError(
                f"{chosen} holds the ratio at 1 inside the loss, so delta={self.delta} would cut off every positive "
                "rollout. Set delta to 1 or more, or leave it unset."
            )

    def _check_differentiable_weights(self, layout: BatchLayout) -> None:
        if self.loss_type == "cispo":
            raise ValueError(
                "group_weights_stop_gradient=False has no meaning with loss_type='cispo', whose ratio is a constant. "
                f"Set loss_type to one of {', '.join(map(repr, CLIPPED_LOSSES))}."
            )
        if not (layout.groups_are_local and layout.groups_fit_micro_batches):
            raise ValueError(
                "group_weights_stop_gradient=False differentiates through the weights of a whole group, which must "
                f"lie in one micro-batch: make per_device_train_batch_size={self.per_device_train_batch_size} a "
                f"multiple of num_generations={self.num_generations}."
            )

    def _check_nthr(self) -> None:
        if not self.nthr:
            return
        check_nthr(self.nthr_beta, self.nthr_eta, self.nthr_selection, "nthr_")
        layout = self.layout
        if not layout.groups_are_local:
            raise ValueError(
                f"nthr=True compares the rollouts of a group, but groups of num_generations={self.num_generations} "
                f"straddle processes that generate {layout.generation_batch_per_process} rollouts each "
                "(per_device_train_batch_size x steps_per_generation). Make that a multiple of num_generations."
            )

    def _check_delta(self) -> None:
        try:
            self.delta_normalize = normalization(self.delta_normalize)
        except ValueError as error:
            raise ValueError(f"delta_{error}") from None
        if not self.delta_credit:
            return
        check_delta(
            self.delta_refinements,
            self.delta_lambda_min,
            self.delta_lambda_max,
            self.delta_gamma,
            self.delta_proxy,
            self.delta_assignment,
            self.delta_top_fraction,
            "delta_",
        )

    def _check_states(self) -> None:
        if not (is_number(self.state_cache_gib) and self.state_cache_gib >= 0):
            raise ValueError(f"state_cache_gib={self.state_cache_gib!r} must be a number of GiB, e.g. 2.0.")

    def _check_logging(self) -> None:
        steps = self.token_shift_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(
                f"token_shift_steps={steps!r} must be a whole number of at least 0, e.g. 10, or 0 for never."
            )


_OWN_FIELDS = {setting.name for setting in fields(CancelGRPOConfig)} - {setting.name for setting in fields(GRPOConfig)}


def _again(name: str, default: Any) -> Any:
    """A field of the class above with another default and the same help."""
    metadata = CancelGRPOConfig.__dataclass_fields__[name].metadata
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class _DesignConditionsConfig(CancelGRPOConfig):
    """The settings that DFPO and GRPO-fix have in common (section 5 and Appendix I of 2604.13088)."""

    num_generations: int | None = _again("num_generations", 32)
    per_device_train_batch_size: int = _again("per_device_train_batch_size", 8)
    gradient_accumulation_steps: int = _again("gradient_accumulation_steps", 4)
    steps_per_generation: int | None = _again("steps_per_generation", 32)
    learning_rate: float = _again("learning_rate", 8e-7)
    lr_scheduler_type: Any = _again("lr_scheduler_type", "cosine_with_min_lr")
    lr_scheduler_kwargs: dict[str, Any] | str | None = _again("lr_scheduler_kwargs", {"min_lr_rate": 0.2})
    warmup_steps: float = _again("warmup_steps", 0.03)

    def __post_init__(self):
        if self.lr_scheduler_type != "cosine_with_min_lr" and self.lr_scheduler_kwargs == {"min_lr_rate": 0.2}:
            self.lr_scheduler_kwargs = None  # another schedule does not know it
        if self.generation_batch_size is not None and self.steps_per_generation == 32:
            self.steps_per_generation = None  # it follows from that
        super().__post_init__()


@dataclass
class DFPOConfig(_DesignConditionsConfig):
    r"""
    [`CancelGRPOConfig`] with the settings of DFPO with Min-Replace, *Design Conditions for Intra-Group Learning of
    Sequence-Level Rewards: Token Gradient Cancellation* ([2604.13088](https://huggingface.co/papers/2604.13088),
    section 5 and Appendix I).

    A generation batch of one process holds 8 prompts of 32 rollouts, and each optimizer step one prompt. The paper
    does not state its clipping range; this is TRL's.

    Parameters:
        group_weights (`str`, *optional*, defaults to `"min"`):
            See [`CancelGRPOConfig`].
        importance_sampling_level (`str`, *optional*, defaults to `"sequence"`):
            See [`~trl.GRPOConfig`], as for all that follow.
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            Mean over the tokens of each rollout.
        num_generations (`int`, *optional*, defaults to `32`):
            Rollouts a prompt.
        per_device_train_batch_size (`int`, *optional*, defaults to `8`):
            Rollouts a micro-batch.
        gradient_accumulation_steps (`int`, *optional*, defaults to `4`):
            Micro-batches an optimizer step.
        steps_per_generation (`int`, *optional*, defaults to `32`):
            Micro-batches a generation batch.
        learning_rate (`float`, *optional*, defaults to `8e-7`):
            Learning rate.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine_with_min_lr"`):
            Schedule.
        lr_scheduler_kwargs (`dict`, *optional*, defaults to `{"min_lr_rate": 0.2}`):
            Its lowest rate.
        warmup_steps (`float`, *optional*, defaults to `0.03`):
            Warmup, as a share of all steps.

    Raises:
        `ValueError`: As [`CancelGRPOConfig`].
    """

    group_weights: str = _again("group_weights", "min")
    importance_sampling_level: str = _again("importance_sampling_level", "sequence")
    loss_type: str = _again("loss_type", "grpo")


@dataclass
class GRPOFixConfig(_DesignConditionsConfig):
    r"""
    [`CancelGRPOConfig`] with the settings of GRPO-fix, symmetric clipping at the level of tokens
    ([2604.13088](https://huggingface.co/papers/2604.13088), Appendices H and I); otherwise those of [`DFPOConfig`].

    Parameters:
        symmetric_clip (`bool`, *optional*, defaults to `True`):
            See [`CancelGRPOConfig`].
        group_weights (`str`, *optional*, defaults to `"none"`):
            See [`CancelGRPOConfig`].
        importance_sampling_level (`str`, *optional*, defaults to `"token"`):
            See [`~trl.GRPOConfig`].
        loss_type (`str`, *optional*, defaults to `"dapo"`):
            All tokens weigh alike: the mean over each rollout would keep shared tokens from cancelling.

    Raises:
        `ValueError`: As [`CancelGRPOConfig`].
    """

    symmetric_clip: bool = _again("symmetric_clip", True)
    group_weights: str = _again("group_weights", "none")
    importance_sampling_level: str = _again("importance_sampling_level", "token")
    loss_type: str = _again("loss_type", "dapo")


@dataclass
class NTHRConfig(CancelGRPOConfig):
    r"""
    [`CancelGRPOConfig`] with the settings of NTHR, *On the Effect of Negative Gradient in Group Relative Deep
    Reinforcement Optimization* ([2505.18830](https://huggingface.co/papers/2505.18830), section 5.4 and Appendix 7.3).

    Parameters:
        nthr (`bool`, *optional*, defaults to `True`):
            See [`CancelGRPOConfig`].
        filter_zero_variance (`bool`, *optional*, defaults to `True`):
            See [`CancelGRPOConfig`].
        beta (`float`, *optional*, defaults to `1e-4`):
            Coefficient of the KL term. See [`~trl.GRPOConfig`], as for all that follow.
        num_generations (`int`, *optional*, defaults to `8`):
            Rollouts a prompt.
        learning_rate (`float`, *optional*, defaults to `1e-6`):
            Learning rate; the paper takes 5e-7 for its model of 0.5B parameters.

    Raises:
        `ValueError`: As [`CancelGRPOConfig`].
    """

    nthr: bool = _again("nthr", True)
    filter_zero_variance: bool = _again("filter_zero_variance", True)
    beta: float = _again("beta", 1e-4)
    num_generations: int | None = _again("num_generations", 8)
    learning_rate: float = _again("learning_rate", 1e-6)


@dataclass
class DelTAConfig(CancelGRPOConfig):
    r"""
    [`CancelGRPOConfig`] with the settings of DelTA, *Discriminative Token Credit Assignment for Reinforcement
    Learning from Verifiable Rewards* ([2605.21467](https://huggingface.co/papers/2605.21467)).

    Parameters:
        delta_credit (`bool`, *optional*, defaults to `True`):
            See [`CancelGRPOConfig`].
        epsilon_high (`float`, *optional*, defaults to `0.28`):
            Upper end of the clipping range. See [`~trl.GRPOConfig`], as for all that follow.
        num_generations (`int`, *optional*, defaults to `16`):
            Rollouts a prompt.
        per_device_train_batch_size (`int`, *optional*, defaults to `16`):
            Rollouts a micro-batch.
        learning_rate (`float`, *optional*, defaults to `1e-6`):
            Learning rate.

    Raises:
        `ValueError`: As [`CancelGRPOConfig`].
    """

    delta_credit: bool = _again("delta_credit", True)
    epsilon_high: float | None = _again("epsilon_high", 0.28)
    num_generations: int | None = _again("num_generations", 16)
    per_device_train_batch_size: int = _again("per_device_train_batch_size", 16)
    learning_rate: float = _again("learning_rate", 1e-6)
