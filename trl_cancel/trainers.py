"""The trainer: TRL's, with the methods of this package routed into the places where they act."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from trl import GRPOConfig, GRPOTrainer

from ._upstream import get_config_model_id, split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid
from .batching import query_preserved_permutation
from .configs import CLIPPED_LOSSES, CancelGRPOConfig
from .credit import Credit, SignControl, sequence_ratios, surrogate_weight, symmetric_clip, token_ratios
from .credit.protocol import SCOPES, combine
from .diagnostics.pushes import policy_pushes
from .diagnostics.residual import shared_contexts, shared_prefix_residual
from .explanation import explain
from .metrics import StepMeans
from .rollouts import Rollouts, Rows, take_rows


logger = get_logger(__name__)


class CancelGRPOTrainer(GRPOTrainer):
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
    _paper = {
        "title": "The Cancellation Hypothesis in Critic-Free RL: From Outcome Rewards to Token Credits",
        "id": "2605.08666",
        # docstyle-ignore
        "citation": (
            "@article{cancellation2026,\n"
            "    title  = {{The Cancellation Hypothesis in Critic-Free RL: From Outcome Rewards to Token Credits}},\n"
            "    year   = 2026,\n"
            "    eprint = {arXiv:2605.08666},\n"
            "}"
        ),
    }

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
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = CancelGRPOConfig(f"{name.split('/')[-1]}-GRPO")
        args = CancelGRPOConfig.adopt(args)
        self._layout = args.layout
        self._credits: list[Credit] = [SignControl(args.advantage_sign)] if args.advantage_sign != "both" else []
        self._credits += credits
        self._check_credits(args)
        if trl_kwargs.get("environment_factory") is None:  # an environment may bring the prompts
            _check_dataset(train_dataset)

        self._step_means = StepMeans()
        self._shared: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # of the optimizer step at hand
        self._groups_seen = 0
        self._rewards: torch.Tensor | None = None
        self._scored: Rows | None = None  # the generation batch, until it is cut into micro-batches
        self._loss_inputs: Rows | None = None  # the inputs of the loss that is being computed
        self._loss_logps: torch.Tensor | None = None

        super().__init__(model, reward_funcs, args, train_dataset, *trl_args, **trl_kwargs)

        self.epsilon_low, self.epsilon_high = args.clip_range
        if self.args.symmetric_clip and self._layout.is_on_policy and not self._uses_sampling_correction:
            logger.warning(
                "symmetric_clip=True changes nothing here: each generation batch is used for one optimizer step, so "
                "all ratios are 1. It acts with num_iterations > 1 or with steps_per_generation greater than "
                "gradient_accumulation_steps."
            )

    # What TRL tells about itself

    @property
    def _uses_sampling_correction(self) -> bool:
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def _keeps_groups_whole(self) -> bool:
        """Whether this package cuts the micro-batches; where TRL's own cut keeps groups whole, it is left alone."""
        return self.args.query_preserved and self._layout.is_split

    @property
    def _acts_in_loss(self) -> bool:
        return self.args.cancellation_metrics or self._weighs_updates

    @property
    def _weighs_updates(self) -> bool:
        return self.args.symmetric_clip or self._spreads_token_credit

    @property
    def _spreads_token_credit(self) -> bool:
        """Whether the loss would average a rollout's token credits, since its tokens share one ratio."""
        return (
            bool(self._credits)
            and self.args.importance_sampling_level == "sequence"
            and self.args.loss_type in CLIPPED_LOSSES
        )

    def explain(self) -> str:
        """What the configuration does: sizes, how far off policy, what is kept together, what is added and why."""
        own = [type(credit).__name__ for credit in self._credits if not isinstance(credit, SignControl)]
        return explain(self.args, credits=own)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """
        Trains as [`~transformers.Trainer.train`] does. If something fails in the middle, a reward function say, the
        progress so far is saved as a checkpoint that `resume_from_checkpoint=True` continues from (in a single
        process, unless `save_strategy="no"`).
        """
        try:
            return super().train(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            self._save_progress(error)
            raise

    def _save_progress(self, error: BaseException) -> None:
        step, folder = self.state.global_step, Path(str(self.args.output_dir))
        # With several processes, the others would not take part in saving.
        if not step or self.args.save_strategy == "no" or self.accelerator.num_processes > 1:
            return
        try:
            if not (folder / f"checkpoint-{step}" / "trainer_state.json").exists():
                self._save_checkpoint(self.model, trial=None)
        except Exception as saving:
            error.add_note(f"The progress could not be saved: {saving}")
        else:
            error.add_note(
                f"The progress up to step {step} is saved in {folder}; continue with "
                "train(resume_from_checkpoint=True)."
            )

    # Early checks

    def _check_credits(self, args: CancelGRPOConfig) -> None:
        for credit in self._credits:
            name = type(credit).__name__
            if isinstance(credit, type):
                raise ValueError(f"credits: {credit.__name__} needs to be an object; pass {credit.__name__}(...).")
            if not isinstance(credit, Credit) or credit.scope not in SCOPES:
                raise ValueError(
                    f"credits: {name} needs a method coefficients(rollouts) and an attribute scope, one of "
                    f"{', '.join(map(repr, SCOPES))}; its scope is {getattr(credit, 'scope', None)!r}."
                )
            if credit.scope == "group" and not self._layout.groups_are_local:
                raise ValueError(
                    f"credits: {name} has scope 'group', but groups of num_generations={args.num_generations} straddle "
                    f"processes that generate {self._layout.generation_batch_per_process} rollouts each "
                    "(per_device_train_batch_size x steps_per_generation). Make that a multiple of num_generations."
                )
        if self._credits and args.importance_sampling_level == "sequence":
            if args.loss_type == "sapo":
                raise ValueError(
                    "loss_type='sapo' with importance_sampling_level='sequence' would average the token credits of a "
                    "rollout. Set importance_sampling_level='token', or another loss_type."
                )
            if args.use_bias_correction_kl and args.beta:
                raise ValueError(
                    "Token credits with importance_sampling_level='sequence' hold the ratio at 1 inside the loss, so "
                    f"use_bias_correction_kl=True (with beta={args.beta}) would lose its ratio. Set "
                    "use_bias_correction_kl=False, importance_sampling_level='token' or beta=0."
                )

    # Generation: credit, then micro-batches of whole groups

    def _calculate_rewards(self, *args, **kwargs):
        rewards = super()._calculate_rewards(*args, **kwargs)
        self._rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            rollouts = self._view(batch, inputs)
            if self.args.cancellation_metrics:
                batch.update(self._contexts(batch, rollouts))
            if self._credits:
                self._apply_credits(batch, rollouts)
            self._scored = batch if self._keeps_groups_whole else None
        self._rewards = None
        return batch

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if self._scored is not None:
            # TRL has just shuffled single rollouts into the micro-batches; cut the batch again, group by group.
            self._buffered_inputs = self._whole_group_batches(self._scored)
            self._scored = None
            inputs = self._buffered_inputs[self._step % len(self._buffered_inputs)]
        return inputs

    def _whole_group_batches(self, batch: Rows) -> list[Rows]:
        group_size = self._layout.num_generations
        order = query_preserved_permutation(self._layout.generation_batch_per_process // group_size, group_size)
        batch = take_rows(split_pixel_values_by_grid(batch), order)
        parts: list[Any] = split_tensor_dict(batch, self._layout.steps_per_generation)
        return [unsplit_pixel_values_by_grid(part) for part in parts]

    def _view(self, batch: Rows, examples: list[dict[str, Any]]) -> Rollouts:
        rows = len(examples)
        first = self.accelerator.process_index * rows
        index = torch.arange(first, first + rows, device=batch["advantages"].device)
        mask = batch["completion_mask"]
        assert self._rewards is not None
        rollouts = Rollouts(
            prompt_ids=batch["prompt_ids"],
            prompt_mask=batch["prompt_mask"],
            completion_ids=batch["completion_ids"],
            mask=mask * batch["tool_mask"] if "tool_mask" in batch else mask,
            advantages=batch["advantages"],
            group_ids=self._groups_seen + index // self._layout.num_generations,
            rewards=self._rewards[first : first + rows],
            reward_names=list(self.reward_func_names),
            examples=examples,
            num_generations=self._layout.num_generations,
            old_logps=batch.get("old_per_token_logps"),
            reduce=self._sum_over_processes,
        )
        self._groups_seen += self._layout.prompts_per_generation
        return rollouts

    def _apply_credits(self, batch: Rows, rollouts: Rollouts) -> None:
        coefficients = combine(self._credits, rollouts)
        if coefficients.size(1) == 1:
            batch["advantages"] = batch["advantages"] * coefficients.squeeze(1)
        elif (coefficients[rollouts.mask.bool()] != 1).any():
            batch["advantages"] = batch["advantages"].unsqueeze(1) * coefficients  # (B, T), which TRL's loss accepts

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (self.model.training and self._acts_in_loss):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)  # the micro-batch itself is used again by later iterations
        advantages = inputs["advantages"] = (
            inputs["advantages"].detach().requires_grad_(self.args.cancellation_metrics)
        )
        level, self._loss_inputs = self.importance_sampling_level, inputs
        try:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if self.args.cancellation_metrics:
                self._measure(loss, advantages, inputs)
        finally:
            self.importance_sampling_level, self._loss_inputs, self._loss_logps = level, None, None
        if self.accelerator.sync_gradients:
            self._end_optimizer_step()
        return loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._loss_inputs is not None:  # called by the loss, which reads its other inputs only now
            self._loss_logps = logps
            if self._weighs_updates:
                self._weigh(self._loss_inputs, logps.detach())
        return logps, entropies, aux_loss

    def _weigh(self, inputs: Rows, logps: torch.Tensor) -> None:
        """Update-time weights: those that depend on the ratios of the very forward pass that the loss makes."""
        old_logps = inputs.get("old_per_token_logps")
        old_logps = logps if old_logps is None else old_logps
        mask = inputs["completion_mask"] * inputs["tool_mask"] if "tool_mask" in inputs else inputs["completion_mask"]
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        if self.importance_sampling_level == "sequence":
            ratios, counted = sequence_ratios(logps, old_logps, mask).unsqueeze(1), mask.any(1, keepdim=True).float()
        else:
            ratios, counted = token_ratios(logps, old_logps), mask.float()

        weights = None
        if self.args.symmetric_clip:
            self._count_clipped(ratios, advantages.detach(), counted)
            if self.args.symmetric_clip_gradient == "score":
                weights = symmetric_clip(ratios, self.epsilon_high)
        if self._spreads_token_credit and advantages.size(1) > 1:
            if weights is None:
                weights = surrogate_weight(ratios, advantages, self.epsilon_low, self.epsilon_high, self.args.delta)
            self.importance_sampling_level = "token"  # until the loss is done: the weights hold the sequence's ratio
        if weights is not None:
            self._freeze_ratios(inputs, logps, old_logps, advantages * weights)

    def _freeze_ratios(
        self, inputs: Rows, logps: torch.Tensor, old_logps: torch.Tensor, weighted_advantages: torch.Tensor
    ) -> None:
        """Makes the loss's ratio 1 in value with gradient ∇log π, so that the advantages alone weigh the tokens."""
        inputs["advantages"] = weighted_advantages
        inputs["old_per_token_logps"] = logps
        # The off-policy mask would take its drift from the old log-probs; it must still see the true ones.
        inputs.setdefault("sampling_per_token_logps", old_logps)

    def _count_clipped(self, ratios: torch.Tensor, advantages: torch.Tensor, counted: torch.Tensor) -> None:
        # TRL's own `clip_ratio/*` reads 0 under symmetric clipping, whose bounds it takes for two-sided clipping.
        clipped = (ratios > 1 + self.epsilon_high).float()
        sign = advantages if ratios.size(1) > 1 else advantages.sum(1, keepdim=True)
        self._step_means.add("symmetric_clip/clip_fraction", clipped, counted)
        self._step_means.add("symmetric_clip/clip_fraction_positive", clipped, counted * (sign > 0))
        self._step_means.add("symmetric_clip/clip_fraction_negative", clipped, counted * (sign < 0))

    # Metrics

    def _contexts(self, batch: Rows, rollouts: Rollouts) -> Rows:
        """The contexts that good and bad rollouts share, row by row, to be carried along with the rollouts."""
        ids = batch["completion_ids"]
        # A completion that is masked for being truncated is missing from the update but not from its group.
        present = (ids != self._tokenizer.pad_token_id) | batch["completion_mask"].bool()
        tensors = [ids, present.long(), rollouts.group_ids, rollouts.advantages]
        if not self._layout.groups_are_local:
            tensors = [self._gather_rows(tensor) for tensor in tensors]
        contexts, deserved = shared_contexts(*tensors)
        first = 0 if self._layout.groups_are_local else self.accelerator.process_index * ids.size(0)
        local = slice(first, first + ids.size(0)), slice(ids.size(1))
        return {"shared_contexts": contexts[local] * rollouts.mask, "deserved": deserved[local]}

    def _measure(self, loss: torch.Tensor, advantages: torch.Tensor, inputs: Rows) -> None:
        """Reads off the loss what it does to each token, for the metrics of the optimizer step."""
        assert self._loss_logps is not None
        pushes = policy_pushes(loss, self._loss_logps, advantages)
        self._shared.append((pushes.flatten(), inputs["shared_contexts"].flatten(), inputs["deserved"].flatten()))
        counted = inputs["completion_mask"].any(1).float()
        sign = advantages.detach() if advantages.dim() == 1 else advantages.detach().sum(1)
        self._step_means.add("cancel/positive_fraction", (sign > 0).float(), counted)
        self._step_means.add("cancel/negative_fraction", (sign < 0).float(), counted)

    def _end_optimizer_step(self) -> None:
        if self._shared:
            pushes, contexts, deserved = (torch.cat(part) for part in zip(*self._shared, strict=True))
            if not self._layout.groups_are_local:
                pushes, contexts, deserved = map(self._gather_rows, (pushes, contexts, deserved))
            residual, count = shared_prefix_residual(pushes, contexts, deserved)
            self._step_means.add("cancel/shared_prefix_residual", residual, count.float())
            self._shared.clear()
        for name, mean in self._step_means.flush(self._sum_over_processes).items():
            self._metrics["train"][name].append(mean)

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of all processes; rows and columns that some of them lack are 0."""
        for dim in range(tensor.dim()):
            tensor = self.accelerator.pad_across_processes(tensor, dim=dim)
        return self.accelerator.gather(tensor)


def _check_dataset(dataset: Any) -> None:
    columns = getattr(dataset, "column_names", None)  # not known for every stream
    if columns is not None and "prompt" not in columns:
        raise ValueError(
            f"train_dataset has the columns {columns} but no 'prompt'. Rename or map the column that holds the prompts, "
            "e.g. dataset.rename_column('question', 'prompt')."
        )
