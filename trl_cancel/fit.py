"""Whether a checkpoint fits the model that is to go on from it."""

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel


# What gives the weights their names and shapes.
OF_MODELS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
)
OF_ADAPTERS = ("peft_type", "r", "target_modules", "modules_to_save")


def check_fit(checkpoint: str | None, model: Any) -> None:
    """
    Refuses a checkpoint that was saved from another model than the one that is to go on from it: it would fail late,
    or be left aside in silence. Judged by its configuration; one that holds none (FSDP's sharded ones) passes.

    Args:
        checkpoint (`str`, *optional*):
            Folder of the checkpoint.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model that is trained.

    Raises:
        `ValueError`: If it does not fit; the message says in what.
    """
    reason = None if checkpoint is None else why_unfit(Path(checkpoint), model)
    if reason is not None:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint} does not fit the model: {reason}. Use the same model and adapter as "
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
        saved = PeftConfig.from_pretrained(str(checkpoint))
        return _difference(OF_ADAPTERS, saved, model.active_peft_config)
    if not (checkpoint / "config.json").is_file():
        return None
    if is_adapter:
        return "it holds a whole model, and this run trains an adapter (use_peft, peft_config)"
    written = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if written.get("model_type") != model.config.model_type:
        return f"it has model_type={written.get('model_type')!r}, and this one {model.config.model_type!r}"
    saved = type(model.config).from_dict(written)
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
