"""Settings and arguments that TRL and transformers have removed or renamed, for those who come from older versions."""

import inspect
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from ..texts import suggestion


@dataclass(frozen=True)
class Removed:
    """
    What became of a name.

    Args:
        since (`str`):
            The first version without it.
        instead (`str`):
            What to do now.
        replacement (`str`, *optional*):
            The setting or argument that has taken its place.
    """

    since: str
    instead: str
    replacement: str | None = None


def _renamed(since: str, replacement: str) -> Removed:
    return Removed(since, f"it is {replacement} now", replacement)


# Of the configuration and of the command line: all that transformers' `TrainingArguments` have had since 3.1 and TRL's
# `GRPOConfig`, `ModelConfig` and `ScriptArguments` since there is GRPO (0.14), compared release by release. A name that was
# deprecated first is gone where it is not taken any more.
SETTINGS = {
    "vllm_device": Removed(
        "TRL 0.18", "vLLM shares the GPUs of the training, or is a server (vllm_mode)", "vllm_mode"
    ),
    "vllm_dtype": Removed("TRL 0.18", "a server takes it: trl vllm-serve --dtype", "vllm_mode"),
    "vllm_enable_prefix_caching": Removed(
        "TRL 0.18", "a server takes it: trl vllm-serve --enable_prefix_caching", "vllm_mode"
    ),
    "vllm_max_model_len": _renamed("TRL 0.18", "vllm_max_model_length"),
    "torch_dtype": Removed("TRL 0.27", "it is dtype now, in Python model_init_kwargs={'dtype': ...}", "dtype"),
    "gradient_checkpointing_use_reentrant": Removed(
        "TRL 0.27",
        "it is gradient_checkpointing_kwargs={'use_reentrant': ...} now",
        "gradient_checkpointing_kwargs",
    ),
    "wandb_log_unique_prompts": _renamed("TRL 0.27", "log_unique_prompts"),
    "max_prompt_length": Removed(
        "TRL 0.28", "prompts are not cut off any more; filter the data set by their length before the training"
    ),
    "use_liger_loss": Removed(
        "TRL 0.28",
        "the loss never holds all logits now; Liger's layers come with model_init_kwargs={'use_kernels': True}",
        "model_init_kwargs",
    ),
    "vllm_guided_decoding_regex": _renamed("TRL 0.28", "vllm_structured_outputs_regex"),
    "evaluate_during_training": _renamed("transformers 4.0", "eval_strategy"),
    "model_parallel": Removed(
        "transformers 4.2", "model_init_kwargs={'device_map': 'auto'} spreads a model", "model_init_kwargs"
    ),
    "xpu_backend": _renamed("transformers 4.32", "ddp_backend"),
    "sharded_ddp": _renamed("transformers 4.35", "fsdp"),
    "dispatch_batches": Removed(
        "transformers 4.51", "it is accelerator_config={'dispatch_batches': ...} now", "accelerator_config"
    ),
    "evaluation_strategy": _renamed("transformers 4.51", "eval_strategy"),
    "split_batches": Removed(
        "transformers 4.51", "it is accelerator_config={'split_batches': ...} now", "accelerator_config"
    ),
    "tp_size": Removed(
        "transformers 4.52", "it is parallelism_config=ParallelismConfig(tp_size=...) now", "parallelism_config"
    ),
    "use_ipex": Removed("transformers 4.57", "PyTorch itself has what that brought; leave it out"),
    "adafactor": Removed("transformers 5.0", "it is optim='adafactor' now", "optim"),
    "fp16_backend": Removed("transformers 5.0", "PyTorch's own is always used; set fp16 alone", "fp16"),
    "fp16_opt_level": Removed("transformers 5.0", "PyTorch's own is always used; set fp16 alone", "fp16"),
    "fsdp_min_num_params": _renamed("transformers 5.0", "fsdp_config"),
    "fsdp_transformer_layer_cls_to_wrap": _renamed("transformers 5.0", "fsdp_config"),
    "half_precision_backend": Removed("transformers 5.0", "PyTorch's own is always used; leave it out", "fp16"),
    "include_inputs_for_metrics": _renamed("transformers 5.0", "include_for_metrics"),
    "include_tokens_per_second": _renamed("transformers 5.0", "include_num_input_tokens_seen"),
    "jit_mode_eval": _renamed("transformers 5.0", "torch_compile"),
    "mp_parameters": Removed("transformers 5.0", "it was for SageMaker's launcher alone; leave it out"),
    "no_cuda": _renamed("transformers 5.0", "use_cpu"),
    "overwrite_output_dir": Removed(
        "transformers 5.0", "trainers never empty a folder; resume_from_checkpoint goes on from what is in it"
    ),
    "past_index": Removed("transformers 5.0", "GRPO has never used it; leave it out"),
    "per_gpu_eval_batch_size": _renamed("transformers 5.0", "per_device_eval_batch_size"),
    "per_gpu_train_batch_size": _renamed("transformers 5.0", "per_device_train_batch_size"),
    "push_to_hub_model_id": _renamed("transformers 5.0", "hub_model_id"),
    "push_to_hub_organization": Removed("transformers 5.0", "it is a part of hub_model_id now", "hub_model_id"),
    "push_to_hub_token": _renamed("transformers 5.0", "hub_token"),
    "ray_scope": Removed("transformers 5.0", "set the environment variable RAY_SCOPE"),
    "save_safetensors": Removed("transformers 5.0", "weights are always saved as safetensors; leave it out"),
    "torchdynamo": _renamed("transformers 5.0", "torch_compile_backend"),
    "tpu_metrics_debug": _renamed("transformers 5.0", "debug"),
    "tpu_num_cores": Removed("transformers 5.0", "set the environment variable TPU_NUM_CORES"),
    "use_legacy_prediction_loop": Removed("transformers 5.0", "there is one loop now; leave it out"),
    "use_mps_device": Removed("transformers 5.0", "Apple's GPUs are used where they are; leave it out", "use_cpu"),
    "group_by_length": Removed(
        "transformers 5.2",
        "it is train_sampling_strategy='group_by_length' now; GRPO has an order of its own, so leave it out",
        "train_sampling_strategy",
    ),
    "logging_dir": Removed("transformers 5.15", "set the environment variable TENSORBOARD_LOGGING_DIR", "report_to"),
    "warmup_ratio": Removed("transformers 5.15", "warmup_steps takes a share below 1 too", "warmup_steps"),
}
# Of trainers. `GRPOTrainer` itself has never lost one, but scripts for other trainers of TRL's have these.
ARGUMENTS = {
    "tokenizer": _renamed("TRL 0.12", "processing_class"),
    "config": _renamed("TRL 0.13", "args"),
    "policy": _renamed("TRL 0.13", "model"),
    "reward_model": _renamed("TRL 0.22", "reward_funcs"),
}
# What arguments of the trainer are on the command line.
OF_COMMANDS = {
    "model": "model_name_or_path",
    "train_dataset": "dataset_name",
    "eval_dataset": "dataset_test_split",
    "peft_config": "use_peft",
    "quantization_config": "load_in_4bit",
}


def said_of(name: str, table: dict[str, Removed], known: Collection[str] | None = None) -> str | None:
    """
    One line about a name that is gone.

    Args:
        name (`str`):
            The name.
        table (`dict[str, Removed]`):
            [`SETTINGS`] or [`ARGUMENTS`].
        known (`Collection[str]`, *optional*):
            Names that can be given; one whose replacement is not among them is not spoken of.

    Returns:
        `str`, *optional*: `None` if the table does not hold it.
    """
    removed = table.get(name)
    if removed is None or (known is not None and removed.replacement not in (None, *known)):
        return None
    return f"{name} is gone since {removed.since}: {removed.instead}."


def advice(name: str, known: Collection[str]) -> str:
    """
    What is said behind a setting that there is not.

    Args:
        name (`str`):
            The setting.
        known (`Collection[str]`):
            Those that there are.

    Returns:
        `str`: The end of a sentence: what may be meant, where something is near.
    """
    if name in inspect.signature(GRPOTrainer).parameters:
        here = f"; here it is {OF_COMMANDS[name]}" if OF_COMMANDS.get(name) in known else ""
        return f" (an argument of trainers in Python{here})."
    meant = suggestion(name, {*known, *(gone for gone in SETTINGS if said_of(gone, SETTINGS, known))})
    said = said_of(meant.removeprefix("; did you mean ").rstrip("?"), SETTINGS)
    return f". {said}" if said else meant


def refuse_unknown(names: Iterable[str], table: dict[str, Removed], takes: Any) -> None:
    """
    Refuses names that are gone, or that never were, as Python does.

    Args:
        names (`Iterable[str]`):
            Names that were given.
        table (`dict[str, Removed]`):
            [`SETTINGS`] or [`ARGUMENTS`].
        takes (`Callable`):
            What is called with them; where a subclass takes one, it stays.

    Raises:
        `TypeError`: Says since when the name is gone and what to use instead, or which name may be meant.
    """
    parameters = inspect.signature(takes).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in names:
        if name in parameters:
            continue
        said = said_of(name, table)
        if said is None:
            near = advice(name, parameters) if table is SETTINGS else _advice_for_argument(name, parameters)
            said = f"{takes.__qualname__}() got an unexpected keyword argument {name!r}{near}"
        raise TypeError(said)


def init_behind(kind: type, last: type) -> Any:
    """
    The `__init__` that a class of this package calls, past its own bases: TRL's, or that of a user's class between them.

    Args:
        kind (`type`):
            Class of an object.
        last (`type`):
            Its class of this package.
    """
    behind = kind.__mro__[kind.__mro__.index(last) + 1 :]
    own = __name__.split(".")[0]
    return next(
        cls.__dict__["__init__"]
        for cls in behind
        if "__init__" in cls.__dict__ and cls.__module__.split(".")[0] != own
    )


def _advice_for_argument(name: str, known: Collection[str]) -> str:
    if name in GRPOConfig.__dataclass_fields__:
        return f" (a setting: args=CancelGRPOConfig({name}=...))."
    return suggestion(name, [*known, "credits"])


class _OfInit:
    """The signature of a class whose `__new__` would hide that of its `__init__`."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        signature = inspect.signature(owner.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class KnowsRemoved:
    """Settings that say of a name that is gone what has become of it, and of one that never was which may be meant."""

    __signature__ = _OfInit()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.keys() <= cls.__dict__.get("__dataclass_fields__", {}).keys():
            refuse_unknown(kwargs, SETTINGS, cls.__init__)
        return super().__new__(cls)
