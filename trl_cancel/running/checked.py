"""The trainer's part that refuses data, reward functions and tokenizers that do not fit together."""

from typing import Any, cast

import torch
from accelerate.logging import get_logger
from trl import GRPOTrainer
from trl.data_utils import is_conversational

from ..upstream.hooks import overridden
from ..upstream.trl import WAY_OF_ROWS
from . import ignored
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
from .rewards import check_models, checked


logger = get_logger(__name__)


class Checked(GRPOTrainer):
    """The part of [`CancelGRPOTrainer`] that looks at what it is given, as early as it can be seen."""

    args: Any
    _checked_columns: frozenset[tuple[str, ...]] = frozenset()

    def _check_given(self) -> None:
        """Refuses a tokenizer that lacks what the run needs, once it is loaded."""
        elsewhere = self.use_vllm or self.use_transformers_continuous_batching or self.rollout_func is not None
        generates = self._is_trls("_generate", "_generate_single_turn", "_generate_and_score_completions")
        check_tokens(self._tokenizer, ends_answers=generates and not elsewhere)
        for source, row in self._empty_prompts.items():
            if row is not None and not makes_tokens(self._tokenizer):
                raise ValueError(f"{source}[{row}]['prompt'] is '', of which the tokenizer makes no tokens. {PROMPTS}")
        prompt = first_prompt(self.train_dataset)
        if prompt is not None and self._is_trls(*WAY_OF_ROWS):
            self._check_templates("train_dataset", prompt)
        for remark in self._ignored():
            if remark is not None:
                logger.warning(remark)

    def _ignored(self) -> list[str | None]:
        """Remarks on settings that nothing reads, as far as it is TRL or transformers that would read them."""
        remarks = [ignored.of_fsdp(self.args)]
        own = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None or self.is_deepspeed_enabled
        if not own and self._is_trls("create_optimizer", "get_optimizer_cls_and_kwargs"):
            remarks.append(ignored.of_optimizer(self.args))
        if self.lr_scheduler is None and not self.is_deepspeed_enabled and self._is_trls("create_scheduler"):
            remarks.append(ignored.of_schedule(self.args))
        if self.rollout_func is not None or not self._is_trls(*WAY_OF_ROWS, "_generate_single_turn"):
            return remarks
        if not self.use_vllm:
            model = self.accelerator.unwrap_model(self.model)
            remarks.append(ignored.of_generation(self.args.generation_kwargs, model))
        elif self.vllm_mode == "server":
            remarks.append(ignored.of_vllm_server(self.args.generation_kwargs))
        prompt = first_prompt(self.train_dataset)
        if prompt is None or is_conversational({"prompt": prompt}):
            models = zip(self.reward_funcs, self.reward_processing_classes, strict=True)
            rewards = [tokenizer for function, tokenizer in models if isinstance(function, torch.nn.Module)]
            changed = [self.chat_template] if self.chat_template else []
            tokenizers = [self.processing_class, *changed, *rewards]
            remarks.append(ignored.of_templates(self.args.chat_template_kwargs, tokenizers))
        return remarks

    def _check_inputs(self, args: Any, train_dataset: Any, reward_funcs: Any, given: dict[str, Any]) -> None:
        """Refuses what names of columns tell already, before the model is loaded; the rows tell the rest."""
        evaluated = given.get("eval_dataset")
        evaluated = list(evaluated.values()) if isinstance(evaluated, dict) else [evaluated]
        environment = given.get("environment_factory")
        if environment is None:  # which may bring the prompts
            _check_dataset("train_dataset", train_dataset)
            _check_size(train_dataset, args.layout.prompts_per_generation)
            for dataset in evaluated:
                _check_dataset("eval_dataset", dataset)
        self._empty_prompts: dict[str, int | None] = {}
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
        self._checked_columns |= {(source, *columns)}

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
        return not overridden(self, methods)

    def _calculate_rewards(self, *args, **kwargs):
        functions, names = self.reward_funcs, self.reward_func_names
        self.reward_funcs = [checked(function, name) for function, name in zip(functions, names, strict=True)]
        try:
            rewards = super()._calculate_rewards(*args, **kwargs)
        finally:
            self.reward_funcs = functions
        check_models(rewards, functions, names)
        return rewards


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
