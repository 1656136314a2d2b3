"""Whether a checkpoint fits the model and the optimizer that are to go on from it, and whether these can learn."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from ..texts import plain
from .changed_settings import settings_of
from .damage import STATES


# What gives the weights their names and shapes.
OF_MODELS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
)
OF_ADAPTERS = ("peft_type", "r", "target_modules", "modules_to_save")


# Optimizers, by their names in the settings, whose states are the same.
ALIKE = (
    {"adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"},
    {"adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"},
    *({"lion_8bit", "paged_lion_8bit"}, {"lion_32bit", "paged_lion_32bit"}),
    *({"ademamix_8bit", "paged_ademamix_8bit"}, {"ademamix", "paged_ademamix_32bit"}),
)
# Settings of optimizers that tell one kind from another.
OF_KINDS = {"betas", "momentum", "alpha", "lr_decay", "rho", "scale_parameter", "beta2_decay"}


def check_fit(checkpoint: str | None, model: Any, args: Any = None) -> None:
    """
    Refuses a checkpoint that was saved from another model than the one that is to go on from it, or with another
    optimizer: it would fail late, or be left aside in silence. Judged by its configuration; one that holds none (FSDP's
    sharded ones) passes.

    Args:
        checkpoint (`str`, *optional*):
            Folder of the checkpoint.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model that is trained.
        args ([`CancelGRPOConfig`], *optional*):
            Settings of the run; left out where its optimizer is not the one that they name.

    Raises:
        `ValueError`: If it does not fit; the message says in what.
    """
    if checkpoint is not None and args is not None:
        _check_optimizers_name(Path(checkpoint), args)
    reason = None if checkpoint is None else why_unfit(Path(checkpoint), model)
    if reason is not None:
        raise ValueError(
            f"resume_from_checkpoint={plain(checkpoint)} does not fit the model: {plain(reason)}. Use the same model and adapter as "
            "then, or start anew in another output_dir."
        )


def why_unfit(checkpoint: Path, model: Any) -> str | None:
    """
    In what a checkpoint differs from a model, or `None` if it fits.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
    """
    is_adapter = isinstance(model, PeftModel)
    if (checkpoint / "adapter_config.json").is_file():
        if not is_adapter:
            return "it holds an adapter, and this run trains the whole model (no use_peft, no peft_config)"
        try:
            saved = PeftConfig.from_pretrained(str(checkpoint))
        except (
            KeyError,
            TypeError,
            ValueError,
        ) as error:  # of a kind of adapter, say, that this version does not know
            return f"its adapter_config.json cannot be read ({type(error).__name__}: {error})"
        return _difference(OF_ADAPTERS, saved, model.active_peft_config)
    if not (checkpoint / "config.json").is_file():
        return None
    if is_adapter:
        return "it holds a whole model, and this run trains an adapter (use_peft, peft_config)"
    written = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if written.get("model_type") != model.config.model_type:
        return f"it has model_type={written.get('model_type')!r}, and this one {model.config.model_type!r}"
    try:
        saved = type(model.config).from_dict(written)
    except Exception as error:  # of the library that checks types, which says on several lines what it expected
        return f"its config.json cannot be read ({' '.join(str(error).split())})"
    return _difference(OF_MODELS, saved.get_text_config(), model.config.get_text_config())


def _difference(names: tuple[str, ...], saved: Any, present: Any) -> str | None:
    for name in names:
        then, now = (_comparable(getattr(config, name, None)) for config in (saved, present))
        if isinstance(then, str) != isinstance(now, str):  # a pattern and names may mean the same modules
            continue
        if then != now:
            return f"it has {name}={then!r}, and this one {now!r}"
    return None


def _comparable(value: Any) -> Any:
    """Names of modules in any order, enumerations as their values."""
    value = getattr(value, "value", value)
    return sorted(value) if isinstance(value, list | set | tuple) else value


def kind_of(optimizer: Any) -> set[str]:
    """
    What tells the kind of an optimizer, among the names of its settings. A state that is loaded brings its own.

    Args:
        optimizer ([`~torch.optim.Optimizer`]):
            The optimizer.
    """
    groups = getattr(optimizer, "param_groups", None) or [{}]
    return set(groups[0]) & OF_KINDS


def check_kind(checkpoint: str, before: set[str], loaded: set[str]) -> None:
    """
    Refuses a checkpoint with the state of another kind of optimizer, which has just been loaded.

    Args:
        checkpoint (`str`):
            Folder of the checkpoint.
        before, loaded (`set[str]`):
            The kind of the optimizer before and after.

    Raises:
        `ValueError`: If they differ.
    """
    if before != loaded:
        then, now = (", ".join(sorted(names)) or "none of these" for names in (loaded, before))
        raise ValueError(_another_optimizer(checkpoint, f"has {then}", f"has {now}"))


@contextmanager
def fitting_states(checkpoint: str | None) -> Iterator[None]:
    """
    Lets an optimizer that cannot take the state of a checkpoint name it.

    Args:
        checkpoint (`str`, *optional*):
            Folder of the checkpoint, whose state is loaded meanwhile.

    Raises:
        `ValueError`: If the state is of another optimizer, or of other parameters.
    """
    try:
        yield
    except (ValueError, KeyError) as error:
        reason = f"KeyError: {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"resume_from_checkpoint={plain(checkpoint)} holds a state that does not fit this run's optimizer ({reason}). Use "
            f"the same optimizer and train the same parameters, or start anew from its weights: "
            f"model_name_or_path={plain(checkpoint)}."
        ) from error


def check_trainable(model: Any) -> None:
    """
    Refuses a model of which nothing would be trained.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.

    Raises:
        `ValueError`: If no parameter is trainable.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if isinstance(model, PeftModel):
        remedy = "Load the adapter with PeftModel.from_pretrained(model, path, is_trainable=True)."
    else:
        remedy = "Call requires_grad_(True) on what is to be trained, or pass a peft_config."
    raise ValueError(
        f"No parameter of the model is trainable (requires_grad=False), so nothing would be learned. {remedy}"
    )


def _check_optimizers_name(checkpoint: Path, args: Any) -> None:
    holds_state = any(True for pattern in STATES["the optimizer's state"] for _ in checkpoint.glob(pattern))
    then, now = settings_of(checkpoint).get("optim"), getattr(args.optim, "value", args.optim)
    if holds_state and isinstance(then, str) and then != now and not any({then, now} <= group for group in ALIKE):
        raise ValueError(_another_optimizer(str(checkpoint), f"optim={then!r}", f"optim={now!r}"))


def _another_optimizer(checkpoint: str, then: str, now: str) -> str:
    return (
        f"resume_from_checkpoint={plain(checkpoint)} holds the state of another optimizer ({then}) than this run's ({now}). "
        f"Use the same, or start anew from its weights: model_name_or_path={plain(checkpoint)}."
    )
