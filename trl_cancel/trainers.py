"""The trainer: TRL's, with the methods of this package routed into the places where they act."""

import copy
import inspect
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import is_conversational

from . import papers
from ._upstream import (
    WAY_OF_ROWS,
    disable_gradient_checkpointing,
    get_config_model_id,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
    unwrap_model_for_generation,
)
from .active_methods import active_methods, tags_of
from .batching import balanced_order, query_preserved_permutation, without_variance
from .configs import CancelGRPOConfig, DelTAConfig, DFPOConfig, GRPOFixConfig, NTHRConfig
from .credit import Credit
from .diagnostics.callbacks import TokenShiftCallback
from .evaluation import Evaluation
from .explanation import explain, within_generation
from .hooks import around, is_of, is_overridden, left_out
from .inputs import (
    PASSED,
    PROMPTS,
    check_chat_template,
    check_prompt,
    check_prompts,
    check_rewards,
    check_row,
    check_tokens,
    columns_of,
    first_prompt,
    makes_tokens,
)
from .model_card import datasets_of
from .monitor import UpdateMonitor
from .precision import emulates_bfloat16, hold_trained_weights_in_float32
from .prompts import FreshPrompts
from .publishing import Published
from .removed import ARGUMENTS, init_behind, refuse_unknown
from .resuming import Resumable
from .rewards import at_the_mean, check_models, checked
from .rollouts import ABOUT_IMAGES, Rollouts, Rows, generator_of, loss_mask, of_rollouts, silenced, take_rows
from .rounds import Choice, GroupPool, Scored
from .states import CPU_SHARE, GIB, LMHead, StateStore
from .token_credits import TokenCredits, credited, makes_old_logps
from .update_weights import NEEDED_FOR_GROUPS, UpdateWeights, mean_correction


logger = get_logger(__name__)
# Arguments of TRL's trainer that may be given by position, after `train_dataset`.
_FURTHER = list(inspect.signature(GRPOTrainer.__init__).parameters)[5:]

Generate = Callable[[list[dict[str, Any]]], Rows]
Forward = Callable[..., Any]
FORWARD = "_get_per_token_logps_and_entropies"


@dataclass
class LossProgress:
    """
    The loss of a micro-batch while it is computed.

    Args:
        is_measured (`bool`):
            Whether metrics are taken of it.
        inputs (`dict`, *optional*):
            What TRL's loss is computed from, while it is.
        logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            Log-probs of the latest forward pass.
        is_weighed (`bool`):
            Whether the update-time weights are in these inputs.
        losses (`int`):
            How often TRL's loss has been computed; a subclass may do so more than once.
    """

    is_measured: bool
    inputs: Rows | None = None
    logps: torch.Tensor | None = None
    is_weighed: bool = False
    losses: int = 0


class CancelGRPOTrainer(Published, Resumable):
    """
    Trainer for Group Relative Policy Optimization in which the opposite pushes on what good and bad rollouts of a
    prompt share can cancel.

    A drop-in for [`~trl.GRPOTrainer`]: it takes the same arguments, and with every feature off it computes the same
    losses, gradients and metrics, bit for bit.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer

    >>> trainer = CancelGRPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=CancelGRPOConfig(symmetric_clip=True),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as in [`~trl.GRPOTrainer`].
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Reward functions, as in [`~trl.GRPOTrainer`].
        args ([`CancelGRPOConfig`] or [`~trl.GRPOConfig`], *optional*):
            Configuration. A plain [`~trl.GRPOConfig`] gets this package's defaults.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Data set with a column `prompt`, as in [`~trl.GRPOTrainer`].
        *trl_args:
            Further positional arguments of [`~trl.GRPOTrainer`], from `eval_dataset` on.
        credits (`Sequence` of [`~trl_cancel.credit.Credit`], *optional*):
            Your own token credits; they multiply with the configured ones.
        **trl_kwargs:
            Further keyword arguments of [`~trl.GRPOTrainer`].

    Raises:
        `ValueError`: If the configuration, the data set or a credit cannot be honoured.
    """

    _tag_names = ["trl", "grpo", "trl-cancel"]
    _name = "GRPO (trl-cancel)"
    _paper = papers.CANCELLATION.for_trl

    _config_class: type[CancelGRPOConfig] = CancelGRPOConfig
    args: CancelGRPOConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        *trl_args: Any,
        credits: Sequence[Credit] = (),
        **trl_kwargs: Any,
    ):
        refuse_unknown(trl_kwargs, ARGUMENTS, init_behind(type(self), CancelGRPOTrainer))
        model = str(model) if isinstance(model, PathLike) else model
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self._config_class(f"{name.split('/')[-1]}-GRPO")
        args = self._config_class.adopt(args)
        if args.symmetric_clip:
            # With the bound on negative advantages too, and no lower one, TRL's surrogate is the symmetric one (Eq. 80).
            args = copy.copy(args)
            args.delta = 1 + args.clip_range[1]
        self.args, self._layout = args, args.layout
        own_loss = any(left_out(type(self), hook, CancelGRPOTrainer) for hook in ("compute_loss", "_compute_loss"))
        self._credits = TokenCredits(args, credits, may_wait=not own_loss)
        self._check_overrides()
        self.evaluations: list[Evaluation] = []
        self.dataset_names = datasets_of(train_dataset)
        self.active_methods = active_methods(args, self._credits.own)
        self._tag_names = self._tags()
        self._checked_columns: set[tuple[str, ...]] = set()
        self._empty_prompts: dict[str, int | None] = {}
        given = {**dict(zip(_FURTHER, trl_args, strict=False)), **trl_kwargs}
        self._check_inputs(args, train_dataset, reward_funcs, given)

        self._groups_seen = 0
        self._generated_at_step = 0
        self._advantages_of_trl: torch.Tensor | None = None  # before subclasses have changed them
        self._scored: Rows | None = None  # the generation batch, until it is cut into micro-batches
        self._loss: LossProgress | None = None  # the loss that is being computed
        self._rollouts: Rollouts | None = None  # the generation batch, for credits that wait for the loss
        self._head: LMHead | None = None

        super().__init__(model, reward_funcs, args, train_dataset, *trl_args, **trl_kwargs)

        elsewhere = self.use_vllm or self.use_transformers_continuous_batching or self.rollout_func is not None
        generates = self._is_trls("_generate", "_generate_single_turn", "_generate_and_score_completions")
        check_tokens(self._tokenizer, ends_answers=generates and not elsewhere)
        self._check_empty_prompts()
        prompt = first_prompt(self.train_dataset)
        if prompt is not None and self._is_trls(*WAY_OF_ROWS):
            self._check_templates("train_dataset", prompt)
        if args.fp16 and not self.is_deepspeed_enabled:  # which scales gradients by itself
            hold_trained_weights_in_float32(cast(torch.nn.Module, self.model).named_parameters())
        self.epsilon_low, self.epsilon_high = args.clip_range
        self._monitor = UpdateMonitor(self.accelerator, self._layout.groups_are_local)
        self._update_weights = UpdateWeights(self.args, self._monitor, lambda **rows: self.get_off_policy_mask(**rows))
        if self.args.chooses_groups:
            self._fresh_prompts = FreshPrompts(self.train_dataset, self.args.seed)
            self.add_callback(self._fresh_prompts)
            self._make_room_for_rounds()
        if self.args.token_shift_steps:
            self.add_callback(TokenShiftCallback(self, self.args.token_shift_steps))
        self._say_what_falls_short()
        if self._credits.of_states:
            self._check_sharding()
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                self._lm_head()  # an unsuitable model is refused now; one that is yet to be sharded, later

    # What it is given

    def _check_inputs(
        self, args: CancelGRPOConfig, train_dataset: Any, reward_funcs: Any, given: dict[str, Any]
    ) -> None:
        """Refuses what names of columns tell already, before the model is loaded; the rows tell the rest."""
        evaluated = given.get("eval_dataset")
        evaluated = list(evaluated.values()) if isinstance(evaluated, dict) else [evaluated]
        environment = given.get("environment_factory")
        if environment is None:  # which may bring the prompts
            _check_dataset("train_dataset", train_dataset)
            _check_size(train_dataset, args.layout.prompts_per_generation)
            for dataset in evaluated:
                _check_dataset("eval_dataset", dataset)
        if not self._is_trls(*WAY_OF_ROWS):
            return
        used = [("train_dataset", train_dataset)]
        used += [("eval_dataset", dataset) for dataset in evaluated if args.eval_strategy != "no"]
        if environment is None and given.get("rollout_func") is None:
            self._empty_prompts = {source: check_prompts(source, dataset) for source, dataset in reversed(used)}
        if args.remove_unused_columns:
            return
        for source, dataset in used:
            columns = columns_of(dataset)
            if columns is not None:
                passed = PASSED if environment is None else (*PASSED, "environments")
                check_rewards(
                    reward_funcs, columns, source, passed=passed, may_grow=given.get("rollout_func") is not None
                )

    def _check_empty_prompts(self) -> None:
        for source, row in self._empty_prompts.items():
            if row is not None and not makes_tokens(self._tokenizer):
                raise ValueError(f"{source}[{row}]['prompt'] is '', of which the tokenizer makes no tokens. {PROMPTS}")

    def _check_rows(self, rows: list[dict[str, Any]]) -> None:
        """Refuses rows that nothing fits, where no names of columns were known before; each set of columns once."""
        training = cast(torch.nn.Module, self.model).training
        source, columns = "train_dataset" if training else "eval_dataset", tuple(rows[0])
        if self.rollout_func is None and self.environment_factories is None and self._is_trls(*WAY_OF_ROWS):
            for row in rows:
                if "prompt" in row:
                    check_row(source, row, self._tokenizer)
        if (source, *columns) in self._checked_columns:
            return
        environment = self.environment_factories
        if environment is None:
            check_prompt(source, columns)
        if self._is_trls("_calculate_rewards"):
            passed = PASSED if environment is None else (*PASSED, "environments")
            may_grow = self.rollout_func is not None or not self._is_trls("_generate")
            check_rewards(self.reward_funcs, columns, source, passed=passed, may_grow=may_grow)
        if self._is_trls(*WAY_OF_ROWS):
            self._check_templates(source, rows[0].get("prompt", [{"role": "user", "content": ""}]))
        self._checked_columns.add((source, *columns))

    def _check_templates(self, source: str, prompt: Any) -> None:
        """Refuses conversations that the model's tokenizer, or a reward model's, cannot write."""
        if not is_conversational({"prompt": prompt}):
            return
        if self.rollout_func is None and self.chat_template is None:
            check_chat_template(source, self.processing_class)
        for function, tokenizer in zip(self.reward_funcs, self.reward_processing_classes, strict=True):
            if isinstance(function, torch.nn.Module):
                check_chat_template(source, tokenizer, "the tokenizer of a reward model")

    def _is_trls(self, *methods: str) -> bool:
        """Whether some methods are as they stand here or in TRL's trainer, and not a user's."""
        return not any(is_overridden(self, name, CancelGRPOTrainer) for name in methods)

    def _say_what_falls_short(self) -> None:
        idle = ["symmetric_clip=True"] if self.args.symmetric_clip and self._layout.is_on_policy else []
        if self._weighs_groups and self._has_nothing_to_weigh:
            idle.append(f"group_weights={self.args.group_weights!r}")
        if idle:
            logger.warning(
                f"{' and '.join(idle)} changes nothing here: each generation batch is used for one optimizer step, so "
                "all ratios are 1. It acts with num_iterations > 1 or with steps_per_generation greater than "
                "gradient_accumulation_steps."
            )
        if self.args.bf16 and emulates_bfloat16(self.accelerator.device):
            logger.warning(
                "bf16=True, TRL's default, is emulated by this GPU, many times slower than float16. Set fp16=True; "
                "trl_cancel.best_precision() tells what suits the device."
            )
        remark = within_generation(self.args)
        if remark is not None:
            logger.warning(remark)

    def _check_sharding(self) -> None:
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            names = " and ".join(type(credit).__name__ for credit in self._credits.of_states)
            raise ValueError(
                f"{names} cannot read the output layer of a model that FSDP's first version has sharded. Set "
                "fsdp_version: 2 in the configuration of accelerate, or use DeepSpeed ZeRO-3."
            )

    # What TRL tells about itself

    @property
    def _uses_sampling_correction(self) -> bool:
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def _weighs_groups(self) -> bool:
        return self.args.group_weights != "none"

    @property
    def _has_nothing_to_weigh(self) -> bool:
        # Advantages of a subclass need not sum to 0 in a group.
        hook = "_generate_and_score_completions"
        are_of_trl = self._is_trls(hook) and is_of(self, hook, CancelGRPOTrainer, GRPOTrainer)
        return self.args.has_nothing_to_weigh and are_of_trl

    @property
    def _differentiates_weights(self) -> bool:
        return self._weighs_groups and not self.args.group_weights_stop_gradient

    @property
    def _keeps_groups_whole(self) -> bool:
        """Whether this package cuts the micro-batches; where TRL's own cut keeps groups whole, it is left alone."""
        weighs = self._weighs_groups and not self._has_nothing_to_weigh and self._layout.groups_fit_micro_batches
        if (weighs or self._credits.in_loss) and self._layout.steps_per_generation > 1:
            return True
        return self.args.query_preserved and self._layout.is_split

    @property
    def _holds_groups_in_micro_batches(self) -> bool:
        """Whether each micro-batch holds whole groups, taken over all processes."""
        cut_so = self._keeps_groups_whole and self._layout.groups_fit_micro_batches
        return cut_so or self._layout.steps_per_generation == 1

    @property
    def _asked_for_in_generation(self) -> list[str]:
        """What cannot do without the way from the generation to the micro-batches."""
        asked_for = {
            "reward_balance": bool(self.args.reward_balance),
            "filter_zero_variance": self.args.filter_zero_variance,
            "group_weights": self._weighs_groups,
        }
        named = [f"{name}={getattr(self.args, name)!r}" for name, is_on in asked_for.items() if is_on]
        return [*named, *(f"the token credit {type(credit).__name__}" for credit in self._credits.all)]

    @property
    def _asked_for_in_loss(self) -> list[str]:
        """What cannot do without TRL's loss."""
        asked_for = {"symmetric_clip": self.args.symmetric_clip, "group_weights": self._weighs_groups}
        named = [f"{name}={getattr(self.args, name)!r}" for name, is_on in asked_for.items() if is_on]
        credits = self._credits.all if self._credits.spread_over_tokens else self._credits.in_loss
        return [*named, *(f"the token credit {type(credit).__name__}" for credit in credits)]

    def _check_overrides(self) -> None:
        """
        Refuses subclasses whose overrides leave out what a method cannot do without.

        Raises:
            `ValueError`: Names the hook, the class and the settings.
        """
        for hook in ("compute_loss", "_compute_loss", "_prepare_inputs"):
            asked_for = self._asked_for_in_generation if hook == "_prepare_inputs" else self._asked_for_in_loss
            if asked_for and not is_of(self, hook, CancelGRPOTrainer, GRPOTrainer):
                raise ValueError(
                    f"A class that stands after CancelGRPOTrainer in {type(self).__name__}'s bases overrides {hook}, but "
                    f"{' and '.join(asked_for)} acts there. Put it before, as in class {type(self).__name__}(Its, "
                    "CancelGRPOTrainer)."
                )
        for hooks, asked_for in (
            (("_prepare_inputs",), self._asked_for_in_generation),
            (("compute_loss", "_compute_loss"), self._asked_for_in_loss),
        ):
            for hook in hooks:
                name = left_out(type(self), hook, CancelGRPOTrainer)
                if name is not None and asked_for:
                    raise ValueError(
                        f"{name}.{hook} does not call super().{hook}, but {' and '.join(asked_for)} acts there. Call "
                        "it, or turn that off."
                    )

    @property
    def _acts_in_loss(self) -> bool:
        acts = self.args.symmetric_clip or bool(self._credits) or self._weighs_groups or self.args.chooses_groups
        return self.args.cancellation_metrics or acts

    @property
    def _holds_ratio(self) -> bool:
        """Whether symmetric clipping weighs the score, instead of being TRL's surrogate with other bounds."""
        return self.args.symmetric_clip and self.args.symmetric_clip_gradient == "score"

    def explain(self) -> str:
        """What the configuration does: sizes, how far off policy, what is kept together, what is added and why."""
        return explain(self.args, credits=self._credits.own)

    def _tags(self) -> list[str]:
        """The tags of the class, with those of the methods that the configuration has on instead of the class's."""
        of_classes = {tag for trainer in NAMED_TRAINERS for tag in trainer._tag_names}
        kept = [tag for tag in type(self)._tag_names if tag not in of_classes or tag in CancelGRPOTrainer._tag_names]
        return list(dict.fromkeys([*kept, *tags_of(self.active_methods)]))

    # Generation: credit, then micro-batches of whole groups

    def _calculate_rewards(self, *args, **kwargs):
        functions, names = self.reward_funcs, self.reward_func_names
        self.reward_funcs = [checked(function, name) for function, name in zip(functions, names, strict=True)]
        try:
            rewards = super()._calculate_rewards(*args, **kwargs)
        finally:
            self.reward_funcs = functions
        check_models(rewards, functions, names)
        return rewards

    def _generate_and_score_completions(self, inputs):
        self._check_rows(inputs)
        batch = super()._generate_and_score_completions(inputs)
        # A class of TRL's kind that stands after this one may have changed them already.
        is_of_trl = is_of(self, "_generate_and_score_completions", CancelGRPOTrainer, GRPOTrainer)
        self._advantages_of_trl = batch["advantages"].clone() if is_of_trl else None
        return batch

    def _generation(self, generate: Generate, inputs: list[dict[str, Any]]) -> Rows:
        """Stands around TRL's generation, with all that subclasses make of it."""
        scored = self._chosen(generate, inputs) if self.args.chooses_groups else self._score(generate, inputs)
        batch, rollouts = scored.batch, self._view(scored)
        batch.update(group_ids=rollouts.group_ids, rollout_advantages=rollouts.advantages)
        if self.args.cancellation_metrics:
            batch.update(self._monitor.mark_shared(batch, rollouts, self._tokenizer.pad_token_id))
        if self._credits.in_loss:
            self._lm_head()  # while all processes are here, in case the model is sharded
            batch["rollout_rows"] = torch.arange(len(scored), device=rollouts.mask.device)
            self._rollouts = rollouts
        if self._credits.states_when_scored:
            rollouts = self._with_states(rollouts, scored)
        batch["advantages"] = credited(batch["advantages"], self._credits.when_scored, rollouts)
        self._scored = batch if self._keeps_groups_whole else None
        self._generated_at_step = self.state.global_step
        return batch

    def _score(self, generate: Generate, inputs: list[dict[str, Any]]) -> Scored:
        """One round of generation."""
        found: list[torch.Tensor] = []
        self._advantages_of_trl = None

        def calculate(hook: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
            found.append(hook(*args, **kwargs))
            return found[-1]

        # Filled by the first pass, for the log-probs of the policy that sampled.
        states = StateStore(self.args.state_cache_gib)
        catches = self._credits.states_when_scored and makes_old_logps(self.args)
        with (
            around(self, "_calculate_rewards", calculate),
            self._first_pass_caught(states) if catches else nullcontext(),
        ):
            batch = dict(generate(inputs))
        is_taken = states.logps is not None and states.logps is batch.get("old_per_token_logps")
        rows = len(inputs)
        first = self.accelerator.process_index * rows
        index = torch.arange(first, first + rows, device=batch["advantages"].device)
        group_ids = self._groups_seen + index // self._layout.num_generations
        self._groups_seen += self._layout.prompts_per_generation
        rewards, idle, even = self._judged(found[-1] if found else None, batch)
        if self._credits or self._weighs_groups:
            # A reward that equals the mean differs from it by rounding, whose sign no method is to take for credit.
            batch["advantages"] = silenced(batch["advantages"], even)
        return Scored(batch, rewards, idle, even, group_ids, inputs, states if is_taken else None)

    def _judged(self, found: torch.Tensor | None, batch: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Of this process's rollouts: the rewards, `nan` where an override has not asked for any; whether all of their
        prompt are equal; and whether theirs is the mean, so that the advantage is but rounding. The latter two only as
        far as no override has given advantages of its own.
        """
        size, advantages, process = self._layout.num_generations, batch["advantages"], self.accelerator.process_index
        rows, of_trl = len(advantages), self._advantages_of_trl
        own = slice(process * rows, (process + 1) * rows)
        changed = advantages != (of_trl if of_trl is not None and of_trl.shape == advantages.shape else 0)
        changed = changed.view(rows, -1).any(1)
        if found is None:
            found = advantages.new_full((own.stop, len(self.reward_weights)), torch.nan)
            idle = even = torch.ones_like(changed)
        else:
            groups, weights = found.unflatten(0, (-1, size)), self.reward_weights.to(found.device)  # (P, G, F)
            apart = self.args.multi_objective_aggregation == "normalize_then_sum"
            idle = without_variance(groups, weights, apart).repeat_interleave(size)[own]
            even = at_the_mean(groups, weights, apart).flatten()[own]
        (of_groups,) = self._monitor.whole_groups(changed.long())
        of_groups = self._monitor.own_rows(of_groups.view(-1, size).any(1).repeat_interleave(size))
        idle = idle & ~of_groups
        return found[own], idle, idle | (even & ~changed)

    @contextmanager
    def _first_pass_caught(self, store: StateStore) -> Iterator[None]:
        """Lets a store take states and log-probs of the first forward pass made meanwhile."""

        def watched(
            forward: Forward, model: Any, input_ids: Any, mask: Any, length: int, *args: Any, **kwargs: Any
        ) -> Any:
            if store.logps is not None:
                return forward(model, input_ids, mask, length, *args, **kwargs)
            with self._catch(store, mask[:, -length:]):
                result = forward(model, input_ids, mask, length, *args, **kwargs)
            store.logps = result[0]
            return result

        with around(self, FORWARD, watched):
            yield

    # Rounds of generation

    def _chosen(self, generate: Generate, inputs: list[dict[str, Any]]) -> Scored:
        """The groups that are kept of as many rounds as it takes."""
        pool = GroupPool(self.args)
        for log in _logs_of(self._logs):
            log.clear()
        while True:
            scored = self._score(generate, inputs)
            pool.add(replace(scored, batch=split_pixel_values_by_grid(scored.batch)))
            choice = pool.choose()
            satisfied = self.accelerator.gather(torch.tensor([choice.satisfied], device=self.accelerator.device))
            if satisfied.min() == 1 or len(pool.rounds) == self.args.max_generation_rounds:
                break
            inputs = self._fresh_inputs(inputs[0].keys())
        self._note_choice(pool, choice)
        scored = pool.take(choice.groups, self._tokenizer.pad_token_id)
        tokens = self.accelerator.gather(loss_mask(scored.batch).sum()).sum()
        return replace(scored, batch=unsplit_pixel_values_by_grid({**scored.batch, "num_items_in_batch": tokens}))

    def _fresh_inputs(self, columns: Any) -> list[dict[str, Any]]:
        """This process's part of another round of prompts, each repeated for its group."""
        layout = self._layout
        rows = self._fresh_prompts.draw(layout.prompts_per_generation)
        part = layout.prompts_per_generation // layout.num_processes
        own = rows[self.accelerator.process_index * part :][:part]
        return [
            {name: value for name, value in row.items() if name in columns}
            for row in own
            for _ in range(layout.num_generations)
        ]

    def _note_choice(self, pool: GroupPool, choice: Choice) -> None:
        positives, negatives, idle = pool.counts()
        self._choice = choice
        self._chosen_counts = positives[choice.groups], negatives[choice.groups]
        size, add = self._layout.num_generations, self._monitor.metrics.add
        add("balance/rounds", idle.new_tensor([len(pool.rounds)], dtype=torch.float))
        add("balance/satisfied", idle.new_tensor([choice.satisfied], dtype=torch.float))
        for name, counts in zip(("positive", "negative"), self._chosen_counts, strict=True):
            add(f"balance/{name}_fraction", counts / size)
        add("balance/discarded_fraction", idle.new_tensor([1 - len(choice.groups) / len(idle)], dtype=torch.float))
        add("balance/zero_variance_fraction", idle.float())
        for kept in pool.kept(choice.groups):
            self._mark_kept(kept)
        if choice.satisfied < 1:
            logger.warning_once(
                f"{len(pool.rounds)} rounds of generation (max_generation_rounds) did not yield the groups that "
                f"reward_balance={self.args.reward_balance} and filter_zero_variance={self.args.filter_zero_variance} "
                "ask for; the best there are are used. balance/satisfied tells how often that happens: raise "
                "max_generation_rounds, lower reward_balance, or use prompts of which more have mixed rewards."
            )

    def _mark_kept(self, kept: list[Any]) -> None:
        extra: Any = self._logs["extra"]
        extra["balance/kept"].extend(gather_object(kept))

    def _make_room_for_rounds(self) -> None:
        """Lets the table of completions hold all rounds of a generation."""
        layout = self._layout
        length = layout.prompts_per_generation * layout.num_generations * self.args.max_generation_rounds
        for name, log in self._logs.items():
            is_column = isinstance(log, deque)
            self._logs[name] = deque(maxlen=length) if is_column else defaultdict(lambda: deque(maxlen=length))

    def _forget_generation(self):
        super()._forget_generation()
        self._scored = self._rollouts = None
        self._monitor.forget_step()

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            inputs = super()._prepare_inputs(generation_batch)
            if self.args.chooses_groups:  # the table of completions has a column for it
                self._mark_kept([None] * len(generation_batch))
            return inputs
        with around(self, "_generate_and_score_completions", self._generation):
            inputs = super()._prepare_inputs(generation_batch)
        if self._scored is not None:
            # TRL has just shuffled single rollouts into the micro-batches; cut the batch again, group by group.
            self._buffered_inputs = self._whole_group_batches(self._scored)
            self._scored = None
            inputs = self._buffered_inputs[self._step % len(self._buffered_inputs)]
        if self._weighs_groups and not self._holds_groups_in_micro_batches:
            together = self._layout.micro_batches_together
            first = self._step % len(self._buffered_inputs)
            if first % together == 0:
                self._weigh_groups_ahead(self._buffered_inputs[first : first + together])
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TokenShiftCallback):
                callback.on_micro_batch(inputs)
        return inputs

    def _whole_group_batches(self, batch: Rows) -> list[Rows]:
        group_size = self._layout.num_generations
        # Where TRL's order would do too, later rollouts are to be sampled as if it had been kept.
        generator = None if self._layout.is_split else generator_of(batch["completion_ids"])
        num_groups = self._layout.generation_batch_per_process // group_size
        order = query_preserved_permutation(num_groups, 1, generator)
        if self.args.reward_balance:
            steps, share = self._layout.steps_apart, self.args.reward_balance
            order, enough = balanced_order(order, *self._chosen_counts, steps, group_size, share)
            order = order if enough >= steps * self._choice.satisfied else self._choice.order
        rows = (order.unsqueeze(1) * group_size + torch.arange(group_size)).flatten()
        return self._micro_batches(batch, rows, self._layout.steps_per_generation)

    def _micro_batches(self, batch: Rows, rows: torch.Tensor, count: int) -> list[Rows]:
        """Some rollouts of a batch, cut into as many parts."""
        batch = take_rows(split_pixel_values_by_grid(batch), rows)
        parts: list[Any] = split_tensor_dict(batch, count)
        return [unsplit_pixel_values_by_grid(part) for part in parts]

    def _view(self, scored: Scored) -> Rollouts:
        batch = scored.batch
        return Rollouts(
            prompt_ids=batch["prompt_ids"],
            prompt_mask=batch["prompt_mask"],
            completion_ids=batch["completion_ids"],
            mask=loss_mask(batch),
            advantages=silenced(of_rollouts(batch), scored.even),
            group_ids=scored.group_ids,
            rewards=scored.rewards,
            reward_names=list(self.reward_func_names),
            examples=scored.examples,
            num_generations=self._layout.num_generations,
            old_logps=batch.get("old_per_token_logps"),
            temperature=self.temperature,
            reduce=self._sum_over_processes,
            log=self._monitor.metrics.add,
        )

    # Hidden states

    def _lm_head(self) -> LMHead:
        if self._head is None:
            # As for generation: DeepSpeed ZeRO-3 prepares for the next pass to be like this one unless it is told.
            gathers, checkpointing = self.args.ds3_gather_for_generation, self.args.gradient_checkpointing_kwargs
            with unwrap_model_for_generation(
                cast(Any, self.model_wrapped),
                self.accelerator,
                gather_deepspeed3_params=gathers,
                gradient_checkpointing_kwargs=cast(Any, checkpointing),
            ) as model:
                self._head = LMHead.of(model)
        return self._head

    def _with_states(self, rollouts: Rollouts, scored: Scored) -> Rollouts:
        """The rollouts with their states and log-probs: of TRL's own pass if it has made one, otherwise of another."""
        states, logps, batch = scored.states, rollouts.old_logps, scored.batch
        if states is None:
            states = StateStore(self.args.state_cache_gib)
            logps = self._pass_over(batch, torch.arange(len(scored)), states)

        def recompute(rows: slice) -> torch.Tensor:
            again = StateStore()
            self._pass_over(batch, torch.arange(len(rollouts.mask))[rows], again)
            return again[:]

        states.recompute = recompute
        return replace(rollouts, states=states, old_logps=logps, head=self._lm_head())

    def _pass_over(self, batch: Rows, rows: torch.Tensor, states: StateStore) -> torch.Tensor:
        """Log-probs of some rollouts by a pass without gradients, in pieces no larger than a micro-batch."""
        count = -(-len(rows) // self._layout.per_device_train_batch_size)
        while len(rows) % count:  # pieces are of one size
            count += 1
        return torch.cat([self._current_logps(part, states) for part in self._micro_batches(batch, rows, count)])

    def _credit_micro_batch(self, inputs: Rows, logps: torch.Tensor, states: StateStore) -> None:
        """Applies the credits that wait for the loss's own forward pass."""
        assert self._rollouts is not None
        order = inputs["rollout_rows"].argsort()  # TRL may have shuffled the rollouts within the micro-batch
        rollouts = self._rollouts.take(
            inputs["rollout_rows"][order],
            states=states[:][order],
            old_logps=logps.detach()[order],
            head=self._lm_head(),
        )
        back = order.argsort()
        inputs["advantages"] = credited(inputs["advantages"][order], self._credits.in_loss, rollouts)[back]

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (self.model.training and self._acts_in_loss):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        measures = self._was_prepared(inputs) and self.args.cancellation_metrics
        inputs = dict(inputs)  # the micro-batch itself is used again by later iterations
        # The metrics tell the pushes of the policy from those of a KL term by their advantages.
        advantages = inputs["advantages"].detach().requires_grad_(measures and bool(self.beta))
        inputs["advantages"] = advantages
        progress = self._loss = LossProgress(measures)
        try:
            with around(self, FORWARD, self._pass_of_loss):
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._loss = None
        if self._credits.in_loss or self._acts_by_weights(advantages):
            self._check_weighed(progress)
        if measures:
            self._watch(loss, progress, advantages, inputs)
        if self.accelerator.sync_gradients:
            for name, value in self._monitor.end_step().items():
                self._metrics["train"][name].append(value)
        return loss

    def _compute_loss(self, model, inputs):
        if self._loss is None:
            return super()._compute_loss(model, inputs)
        level, self._loss.inputs, self._loss.is_weighed = self.importance_sampling_level, dict(inputs), False
        try:
            return super()._compute_loss(model, self._loss.inputs)
        finally:
            self.importance_sampling_level, self._loss.inputs = level, None

    def _pass_of_loss(
        self, forward: Forward, model: Any, input_ids: Any, mask: Any, length: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Stands around the forward pass of the loss. TRL's loss reads its other inputs only after it."""
        progress = self._loss
        assert progress is not None
        inputs = None if progress.is_weighed else progress.inputs
        states = StateStore() if inputs is not None and self._credits.in_loss else None
        with self._catch(states, mask[:, -length:]):
            result = forward(model, input_ids, mask, length, *args, **_without_empty_images(kwargs))
        progress.logps = result[0]
        if inputs is not None:
            if states is not None:
                self._credit_micro_batch(inputs, progress.logps, states)
            self._weigh(inputs, progress.logps)
            progress.is_weighed = True
            progress.losses += 1
        return result

    def _acts_by_weights(self, advantages: torch.Tensor) -> bool:
        """Whether the update needs weights that TRL's surrogate does not give."""
        spread = self._credits.spread_over_tokens and advantages.dim() > 1
        return self._weighs_groups or self.args.symmetric_clip or spread

    def _was_prepared(self, inputs: Rows) -> bool:
        """Whether a micro-batch has come by way of this package; an override may have made it by itself."""
        if "group_ids" in inputs:
            return True
        asked_for = self._asked_for_in_generation
        if asked_for:
            raise RuntimeError(
                f"{' and '.join(asked_for)} could not act: {type(self).__name__}'s micro-batches have no group_ids. "
                "They are added on the way from _generate_and_score_completions to _prepare_inputs: let your override "
                "of _prepare_inputs call super()._prepare_inputs, and keep all entries of what it returns."
            )
        logger.warning_once(
            f"cancel/* and query_preserved are left out: the micro-batches of {type(self).__name__} do not come from "
            "this package's _prepare_inputs."
        )
        return False

    def _check_weighed(self, progress: LossProgress) -> None:
        if not progress.is_weighed:
            raise RuntimeError(
                f"{' and '.join(self._asked_for_in_loss)} could not act: {type(self).__name__} has computed its loss "
                "without TRL's. Let your overrides of compute_loss and _compute_loss call super(), or turn it off."
            )

    def _watch(self, loss: torch.Tensor, progress: LossProgress, advantages: torch.Tensor, inputs: Rows) -> None:
        """Metrics of a loss. They never end a run."""
        problem = "it computes TRL's loss more than once" if progress.losses > 1 else None
        if progress.logps is None:
            problem = "it makes no forward pass by _get_per_token_logps_and_entropies"
        try:
            if problem is None and progress.logps is not None:
                self._monitor.watch_loss(loss, progress.logps, advantages, inputs)
        except RuntimeError as error:  # of PyTorch, for a graph that cannot be followed
            problem = str(error)
        if problem is not None:
            logger.warning_once(f"cancel/* is left out: the loss of {type(self).__name__} cannot be read ({problem}).")

    def _catch(self, states: StateStore | None, mask: torch.Tensor) -> AbstractContextManager[None]:
        """Lets a store, if there is one, take the hidden states of the passes made meanwhile."""
        if states is None:
            return nullcontext()
        model = self.accelerator.unwrap_model(self.model)
        if not states.decided:
            width = model.config.get_text_config().hidden_size * model.dtype.itemsize
            rollouts = self._layout.generation_batch_per_process
            rollouts *= self.args.max_generation_rounds if self.args.chooses_groups else 1  # all may be held at once
            size = torch.tensor(rollouts * mask.size(1) * width, device=mask.device)
            # All processes decide alike: where the model is sharded, they must make the same passes.
            states.reserve(int(self.accelerator.gather(size).max()))
            if not states.keeps:
                logger.warning_once(
                    f"The hidden states of a generation batch may take {size.item() / GIB:.2f} GiB, more than "
                    f"{CPU_SHARE} x state_cache_gib={self.args.state_cache_gib}, so they are computed again each time "
                    "they are needed: one forward pass over the rollouts for NTHR, 2 (delta_refinements + 1) for DelTA."
                )
        return states.filled_by(model, mask)

    def _weigh(self, inputs: Rows, logps: torch.Tensor) -> None:
        """Puts the update-time weights into the advantages, where they differ from what TRL's surrogate does."""
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        ratios = self._update_weights.ratios(inputs, logps.detach())
        of_surrogate = self._update_weights.of_surrogate(inputs, ratios, advantages.detach())
        weights: torch.Tensor | None = None
        if self._weighs_groups:
            weights = self._weigh_groups(inputs, logps)
        elif self._holds_ratio or (self._credits.spread_over_tokens and advantages.size(1) > 1):
            weights = of_surrogate
        if self.args.symmetric_clip:
            self._update_weights.count_clipped(inputs, ratios, advantages.detach())
        if self._loss is not None and self._loss.is_measured:
            self._monitor.watch_weights(of_surrogate if weights is None else weights, inputs, loss_mask(inputs))
        if weights is None:
            return
        if self._credits.spread_over_tokens and advantages.size(1) > 1:
            self.importance_sampling_level = "token"  # until the loss is done: the weights hold the sequence's ratio
            if (correction := mean_correction(inputs)) is not None:  # which its tokens shared, as they did the ratio
                inputs["importance_sampling_ratio"] = correction
        self._freeze_ratios(inputs, logps, advantages * weights)

    def _freeze_ratios(self, inputs: Rows, logps: torch.Tensor, weighted_advantages: torch.Tensor) -> None:
        """Makes the loss's ratio 1 in value with gradient ∇log π, so that the advantages alone weigh the tokens."""
        old_logps = inputs.get("old_per_token_logps")
        # The off-policy mask would take its drift from the old log-probs; it must still see the true ones.
        inputs.setdefault("sampling_per_token_logps", logps.detach() if old_logps is None else old_logps)
        inputs["advantages"] = weighted_advantages
        # Weights that are differentiated through carry the whole gradient; the ratio then has none.
        inputs["old_per_token_logps"] = logps if self._differentiates_weights else logps.detach()

    # Weights of whole groups

    def _weigh_groups(self, inputs: Rows, logps: torch.Tensor) -> torch.Tensor:
        """The weights of the rollouts of a micro-batch, of shape `(B, 1)`; what they hold is taken out of the loss."""
        if "group_weights" in inputs:
            weights = inputs["group_weights"]
        else:
            attached = logps if self._differentiates_weights else logps.detach()
            ratios = self._update_weights.ratios(inputs, attached).squeeze(1)
            active = self._update_weights.taking_part(inputs, logps.detach())
            weights = self._update_weights.of_groups(ratios, active, inputs)
        if self.args.off_policy_mask_threshold is not None:
            # Rollouts that it drops have weight 0 already; it must not drop others for the sign of their weight.
            inputs["sampling_per_token_logps"] = logps.detach()
        correction = inputs.get("importance_sampling_ratio")
        if self.args.group_weights_include_sampling_ratio and correction is not None:
            inputs["importance_sampling_ratio"] = torch.ones_like(correction)
        return weights.unsqueeze(1)

    def _weigh_groups_ahead(self, micro_batches: list[Rows]) -> None:
        """
        The weights of groups that are spread over micro-batches, before the first of these is trained on: with one
        forward pass, or none where the weights of the model are still those that sampled.
        """
        weighing, parts = self._update_weights, []
        logps = [self._logps_before_update(micro_batch) for micro_batch in micro_batches]
        for micro_batch, current in zip(micro_batches, logps, strict=True):
            ratios = weighing.ratios(micro_batch, current).squeeze(1)
            parts.append((ratios, weighing.taking_part(micro_batch, current)))
        ratios, active = (torch.cat(part) for part in zip(*parts, strict=True))
        names = NEEDED_FOR_GROUPS & micro_batches[0].keys()
        rows = {name: torch.cat([micro_batch[name] for micro_batch in micro_batches]) for name in names}
        weights = weighing.of_groups(ratios, active, rows)
        sizes = [micro_batch["group_ids"].size(0) for micro_batch in micro_batches]
        for micro_batch, part in zip(micro_batches, weights.split(sizes), strict=True):
            micro_batch["group_weights"] = part

    def _logps_before_update(self, inputs: Rows) -> torch.Tensor:
        """Current log-probs, as far as the weights need them: not where the policy is still the one that sampled."""
        old_logps = inputs.get("old_per_token_logps")
        if self.state.global_step == self._generated_at_step:
            if old_logps is not None:
                return old_logps
            if self.args.off_policy_mask_threshold is None or "sampling_per_token_logps" not in inputs:
                return torch.zeros_like(inputs["completion_mask"]).float()
        return self._current_logps(inputs)

    def _current_logps(self, inputs: Rows, states: StateStore | None = None) -> torch.Tensor:
        """A forward pass without gradients, with the arguments that TRL's loss would give it."""

        def only(
            forward: Forward, model: Any, input_ids: Any, mask: Any, length: int, *args: Any, **kwargs: Any
        ) -> Any:
            kwargs = {**_without_empty_images(kwargs), "compute_entropy": False}
            with self._catch(states, mask[:, -length:]):
                raise _ForwardDone(forward(model, input_ids, mask, length, *args, **kwargs)[0])

        model, checkpointing = cast(Any, (self.model, self.args.gradient_checkpointing_kwargs))
        # Its dropout is not to change what is sampled and trained later.
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        try:
            with (
                torch.random.fork_rng(devices),
                torch.no_grad(),
                disable_gradient_checkpointing(model, checkpointing),
                around(self, FORWARD, only),
            ):
                super()._compute_loss(model, inputs)
        except _ForwardDone as done:
            return done.logps
        raise AssertionError("TRL's loss has made no forward pass")

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")


class DFPOTrainer(CancelGRPOTrainer):
    """
    [`CancelGRPOTrainer`] with [`DFPOConfig`]: sequence-level ratios made consistent within each group (DFPO, *Design
    Conditions for Intra-Group Learning of Sequence-Level Rewards: Token Gradient Cancellation*,
    [2604.13088](https://huggingface.co/papers/2604.13088)).
    """

    _tag_names = ["trl", "grpo", "trl-cancel", "dfpo"]
    _name = "DFPO (trl-cancel)"
    _paper = papers.DESIGN_CONDITIONS.for_trl
    _config_class = DFPOConfig


class GRPOFixTrainer(CancelGRPOTrainer):
    """
    [`CancelGRPOTrainer`] with [`GRPOFixConfig`]: one clipping range for both signs of the advantage (GRPO-fix,
    Appendix H of [2604.13088](https://huggingface.co/papers/2604.13088)).
    """

    _tag_names = ["trl", "grpo", "trl-cancel", "grpo-fix"]
    _name = "GRPO-fix (trl-cancel)"
    _paper = papers.DESIGN_CONDITIONS.for_trl
    _config_class = GRPOFixConfig


class NTHRTrainer(CancelGRPOTrainer):
    """
    [`CancelGRPOTrainer`] with [`NTHRConfig`]: tokens of wrong rollouts that look like those of right ones are pushed
    down less (NTHR, *On the Effect of Negative Gradient in Group Relative Deep Reinforcement Optimization*,
    [2505.18830](https://huggingface.co/papers/2505.18830)).
    """

    _tag_names = ["trl", "grpo", "trl-cancel", "nthr"]
    _name = "NTHR (trl-cancel)"
    _paper = papers.NEGATIVE_GRADIENT.for_trl
    _config_class = NTHRConfig


class DelTATrainer(CancelGRPOTrainer):
    """
    [`CancelGRPOTrainer`] with [`DelTAConfig`]: tokens that tell good rollouts from bad ones carry more of the advantage
    (DelTA, *Discriminative Token Credit Assignment for Reinforcement Learning from Verifiable Rewards*,
    [2605.21467](https://huggingface.co/papers/2605.21467)).
    """

    _tag_names = ["trl", "grpo", "trl-cancel", "delta"]
    _name = "DelTA (trl-cancel)"
    _paper = papers.DISCRIMINATIVE_CREDIT.for_trl
    _config_class = DelTAConfig


NAMED_TRAINERS = (DFPOTrainer, GRPOFixTrainer, NTHRTrainer, DelTATrainer)


def _without_empty_images(arguments: dict[str, Any]) -> dict[str, Any]:
    """Models want no images rather than 0, where no prompt has one."""
    pixels = arguments.get("pixel_values")
    if pixels is None or len(pixels):
        return arguments
    return {name: value for name, value in arguments.items() if name not in ABOUT_IMAGES}


class _ForwardDone(Exception):
    """Carries the log-probs out of a loss of which nothing else is wanted."""

    def __init__(self, logps: torch.Tensor):
        self.logps = logps


def _logs_of(logs: dict[str, Any]) -> Iterator[Any]:
    """The columns of TRL's table of completions."""
    for log in logs.values():
        yield from log.values() if isinstance(log, dict) else [log]


def _check_size(train_dataset: Any, prompts: int) -> None:
    try:
        rows = len(train_dataset)
    except TypeError:
        return  # a stream
    if rows < prompts:
        raise ValueError(
            f"train_dataset has {rows} rows, but a generation takes {prompts} prompts (per_device_train_batch_size x "
            "steps_per_generation x processes / num_generations), so nothing would be trained. Lower one of these."
        )


def _check_dataset(argument: str, dataset: Any) -> None:
    if isinstance(dataset, dict):
        raise ValueError(f"{argument} holds the splits {list(dataset)}; pass one of them, e.g. dataset['train'].")
    columns = columns_of(dataset)
    if columns is not None:
        check_prompt(argument, columns)
