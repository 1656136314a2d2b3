"""The trainer: TRL's hooks, each of which hands over to a stage of the pipeline."""

import copy
import inspect
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from trl import GRPOConfig, GRPOTrainer

from . import papers
from .batch.protocol import Credit
from .batch.rollouts import Rows
from .config import CancelGRPOConfig
from .diagnostics.callbacks import TokenShiftCallback
from .evaluation.result import Evaluation
from .explanation import explain, within_generation
from .methods import CONFIGURATIONS, METHODS
from .pipeline.credit import CreditStage
from .pipeline.forward import Passes
from .pipeline.loss import LossStage
from .pipeline.monitor import UpdateMonitor
from .pipeline.overrides import WAY_TO_LOSS, check_overrides, check_private_names
from .pipeline.prompts import FreshPrompts, PromptSampler
from .pipeline.rounds import Rounds, Scored
from .pipeline.scoring import OtherRows, Scoring
from .pipeline.split import whole_group_batches
from .pipeline.token_credits import TokenCredits
from .pipeline.weights import WeightStage
from .publishing.active_methods import active_methods, tags_of
from .publishing.model_card import datasets_of
from .publishing.published import Published
from .running.checked import Checked
from .running.precision import emulates_bfloat16, hold_trained_weights_in_float32
from .running.removed import ARGUMENTS, init_behind, refuse_unknown
from .running.resuming import Resumable
from .running.weights import check_weights, weights_looked_at
from .upstream.hooks import around, overrides
from .upstream.trl import check_names, get_config_model_id, warn_if_replaced


logger = get_logger(__name__)
# Arguments of TRL's trainer that may be given by position, after `train_dataset`.
_FURTHER = list(inspect.signature(GRPOTrainer.__init__).parameters)[5:]


class CancelGRPOTrainer(Checked, Published, Resumable):
    """
    Trainer for Group Relative Policy Optimization in which the opposite pushes on what good and bad rollouts of a
    prompt share can cancel.

    A drop-in for [`~trl.GRPOTrainer`]: it takes the same arguments, and with every feature off it computes the same
    losses, gradients and metrics, bit for bit.

    What happens to a rollout: TRL generates and scores it, in `_generation`, which stands around that, as often as the
    methods want groups to choose from; credits multiply its advantages (those that need hidden states may wait for the
    loss); TRL cuts the generation batch into micro-batches, which are cut again where groups must stay whole. In the
    loss of its micro-batch, after the forward pass and before TRL reads them, the advantages get the credits that have
    waited and the weights of the update.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer

    >>> trainer = CancelGRPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=CancelGRPOConfig("DeepMath"),
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

    Attributes:
        takes_token_advantages (`bool`):
            For subclasses that compute losses without TRL's: whether these take `inputs["advantages"]` of shape `(B, T)`,
            as TRL's does, which token credits make of it.

    Raises:
        `ValueError`: If the configuration, the data set or a credit cannot be honoured.
    """

    _tag_names = ["trl", "grpo", "trl-cancel"]
    _name = "GRPO (trl-cancel)"
    _paper = papers.CANCELLATION.for_trl

    takes_token_advantages: bool = False
    _config_class: type[CancelGRPOConfig] = CancelGRPOConfig
    args: CancelGRPOConfig
    _scored: Scored | None = None  # the generation batch, until it is cut into micro-batches
    _generated_at_step = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_private_names(cls, CancelGRPOTrainer)

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
        warn_if_replaced()
        check_private_names(type(self), CancelGRPOTrainer, vars(self))
        refuse_unknown(trl_kwargs, ARGUMENTS, init_behind(type(self), CancelGRPOTrainer))
        model = str(model) if isinstance(model, PathLike) else model
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self._config_class(f"{name.split('/')[-1]}-GRPO")
        self.args = args = self._own_args(args)
        token_credits = TokenCredits(args, credits, may_wait=self._is_trls(*WAY_TO_LOSS))
        check_overrides(self, CancelGRPOTrainer, args, token_credits)
        self.evaluations: list[Evaluation] = []
        self.dataset_names = datasets_of(train_dataset)
        self.active_methods = active_methods(args, token_credits.own)
        self._tag_names = self._tags()
        given = {**dict(zip(_FURTHER, trl_args, strict=False)), **trl_kwargs}
        self._check_inputs(args, train_dataset, reward_funcs, given)
        if args.selectors:  # before TRL asks for a sampler
            self._fresh_prompts = FreshPrompts(train_dataset, args.seed)

        super().__init__(model, reward_funcs, args, train_dataset, *trl_args, **trl_kwargs)

        self._check_given()
        if args.fp16 and not self.is_deepspeed_enabled:  # which scales gradients by itself
            hold_trained_weights_in_float32(cast(torch.nn.Module, self.model).named_parameters())
        self.epsilon_low, self.epsilon_high = self.args.clipping.low, self.args.clipping.high
        self._make_stages(token_credits)
        if self.args.token_shift_steps:
            self.add_callback(TokenShiftCallback(self, self.args.token_shift_steps))
        self._say_what_falls_short()
        if token_credits.of_states:
            self._check_sharding()
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                _ = self._passes.head  # an unsuitable model is refused now; one that is yet to be sharded, later

    def _own_args(self, args: GRPOConfig) -> CancelGRPOConfig:
        """The configuration as the loss is to read it: methods may set bounds of TRL's."""
        own = self._config_class.adopt(args)
        if own.set_by_methods:
            clipping, own = own.clipping, copy.copy(own)
            for name in own.set_by_methods:
                setattr(own, name, getattr(clipping, name))
        return own

    def _make_stages(self, credits: TokenCredits) -> None:
        """The stages of the pipeline, in the order in which a generation batch goes through them."""
        self._credits = credits
        local = self.args.layout.groups_are_local
        self._monitor = UpdateMonitor(self.accelerator, local, type(self).__name__)
        self._passes = Passes(self, super()._compute_loss, credits)
        self._rounds = None
        if self.args.selectors:
            self._fresh_prompts.dataset = self.train_dataset
            self.add_callback(self._fresh_prompts)
            self._rounds = Rounds(self, self._fresh_prompts, self._monitor)
        self._scoring = Scoring(self, credits, self._passes, self._monitor)
        self._credit = CreditStage(self.args, credits, self._passes)
        self._weights = WeightStage(self, credits, self._passes, self._monitor)
        self._losses = LossStage(self, self._credit, self._weights, self._passes, self._monitor)
        if self._losses.acts:
            self.add_callback(self._losses)

    # What it says

    def _say_what_falls_short(self) -> None:
        # What weighs groups may act all the same, on the advantages of a subclass.
        idle = [
            method.chosen(self.args)
            for method in self.args.methods
            if method.says_when_idle
            and not method.acts(self.args)
            and (not self._weighs or method.weigher(self.args) is None)
        ]
        if idle:
            logger.warning(
                f"{' and '.join(idle)} changes nothing here: each generation batch is used for one optimizer step, so "
                "all ratios are 1. It acts with num_iterations > 1 or with steps_per_generation greater than "
                "gradient_accumulation_steps."
            )
        for method in METHODS:
            for warning in method.warns(self.args):
                logger.warning(warning)
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
            names = " and ".join(self._credits.named(self._credits.of_states))
            raise ValueError(
                f"{names} cannot read the output layer of a model that FSDP's first version has sharded. Set "
                "fsdp_version: 2 in the configuration of accelerate, or use DeepSpeed ZeRO-3."
            )

    def explain(self) -> str:
        """What the configuration does: sizes, how far off policy, what is kept together, what is added and why."""
        return explain(self.args, self._credits.own, may_wait=self._is_trls(*WAY_TO_LOSS))

    def _tags(self) -> list[str]:
        """The tags of the class, with those of the methods that the configuration has on instead of the class's."""
        of_methods = {configuration.tag for configuration in CONFIGURATIONS.values()}
        kept = [tag for tag in type(self)._tag_names if tag not in of_methods]
        return list(dict.fromkeys([*kept, *tags_of(self.active_methods)]))

    # What the stages need to know of this run

    @property
    def _weighs(self) -> bool:
        """Whether group weights differ from 1; advantages of a subclass need not sum to 0 in a group."""
        weigher = self.args.weigher
        are_of_trl = self._is_trls("_generate_and_score_completions")
        return weigher is not None and not (weigher.changes_nothing and are_of_trl)

    @property
    def _cuts(self) -> bool:
        """Whether this package cuts the micro-batches; where TRL's own cut keeps groups whole, it is left alone."""
        layout = self.args.layout
        needs_groups = self._credits.in_loss or (self._weighs and layout.groups_fit_micro_batches)
        if needs_groups and layout.steps_per_generation > 1:
            return True
        return any(method.cuts(self.args) for method in self.args.methods)

    @property
    def _weighs_ahead(self) -> bool:
        """Whether groups are weighed that a micro-batch, taken over all processes, does not hold whole."""
        layout = self.args.layout
        holds_groups = layout.steps_per_generation == 1 or (self._cuts and layout.groups_fit_micro_batches)
        return self.args.weigher is not None and not holds_groups

    # Which prompts, and the generation batch: rounds, credit, micro-batches

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler
        if not self.args.selectors:
            return sampler(dataset)
        return PromptSampler(lambda: sampler(dataset))

    def _generate_and_score_completions(self, inputs):
        self._check_rows(inputs)
        with weights_looked_at(self.accelerator.unwrap_model(self.model)):
            batch = super()._generate_and_score_completions(inputs)
        # A class of TRL's kind that stands after this one may have changed them already.
        self._scoring.note(batch, not overrides(self, "_generate_and_score_completions", after=CancelGRPOTrainer))
        return batch

    def _generation(self, generate: Callable[..., Rows], inputs: list[dict[str, Any]]) -> Rows:
        """Stands around TRL's generation, with all that subclasses make of it."""

        def score(rows: list[dict[str, Any]]) -> Scored:
            return self._scoring.score(generate, rows)

        self._credits.settle(self._is_trls(*WAY_TO_LOSS))
        try:
            scored = score(inputs) if self._rounds is None else self._rounds.chosen(score, inputs)
        except OtherRows as other:
            return other.batch
        batch, rollouts = scored.batch, self._scoring.view(scored)
        batch.update(group_ids=rollouts.group_ids, rollout_advantages=rollouts.advantages)
        if self.args.cancellation_metrics:
            batch.update(self._monitor.mark_shared(batch, rollouts, self._tokenizer.pad_token_id))
        batch.update(self._credit.of_batch(scored, rollouts))
        self._scored, self._generated_at_step = scored, self.state.global_step
        return batch

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            inputs = super()._prepare_inputs(generation_batch)
            if self._rounds is not None:  # the table of completions has a column for it
                self._rounds.mark_kept([None] * len(generation_batch))
            return inputs
        with around(self, "_generate_and_score_completions", self._generation):
            inputs = super()._prepare_inputs(generation_batch)
        self._scored = None
        if self._weighs_ahead:
            self._weigh_ahead()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TokenShiftCallback):
                callback.on_micro_batch(inputs)
        return inputs

    @property
    def _buffered_inputs(self) -> Any:
        """The micro-batches, of which TRL takes the next one after it has set them."""
        return self._micro_batches

    @_buffered_inputs.setter
    def _buffered_inputs(self, micro_batches: Any) -> None:
        # TRL has just shuffled single rollouts into them; cut the batch again, group by group.
        if micro_batches is not None and self._scored is not None and self._cuts:
            micro_batches = whole_group_batches(self._scored.batch, self.args, self._scored.chosen)
            self._scored = None
        self._micro_batches = micro_batches

    def _weigh_ahead(self) -> None:
        """Weighs the groups of the micro-batches that always share an optimizer step, before the first of them."""
        together, micro_batches = self.args.layout.micro_batches_together, cast(list[Rows], self._buffered_inputs)
        first = self._step % len(micro_batches)
        if first % together == 0:
            is_new = self.state.global_step == self._generated_at_step
            self._weights.ahead(micro_batches[first : first + together], is_new)

    def _forget_generation(self):
        super()._forget_generation()
        self._scored = self._credit.rollouts = None
        self._losses.forget_step()

    # The loss

    def _inner_training_loop(self, *args, **kwargs):
        check_overrides(self, CancelGRPOTrainer, self.args, self._credits)  # with hooks set on the object since
        return super()._inner_training_loop(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        compute = super().compute_loss
        loss = self._losses.compute(lambda rows: compute(model, rows, return_outputs, num_items_in_batch), inputs)
        if isinstance(loss, torch.Tensor) and not loss.isfinite().all():
            # Whoever samples for this model, as vLLM does, may not have failed for it.
            check_weights(self.accelerator.unwrap_model(self.model))
        return loss

    def _compute_loss(self, model, inputs):
        compute = super()._compute_loss
        return self._losses.compute(
            lambda rows: self._losses.of_trl(lambda own_rows: compute(model, own_rows), rows), inputs
        )

    def _current_logps(self, inputs: Rows) -> torch.Tensor:
        """Log-probs of a micro-batch now, for callbacks that measure."""
        return self._passes.logps(inputs)


check_names(CancelGRPOTrainer)
