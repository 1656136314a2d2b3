"""
Names inside of settings that nothing reads: TRL and transformers pass over them in silence where a dictionary or a text
holds settings of its own. They go on, so each gets a remark only. What fails by itself and names the culprit is left to
that: `accelerator_config`, `model_init_kwargs`, `gradient_checkpointing_kwargs`, and `lr_scheduler_kwargs` but for
constant rates.
"""

import copy
import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from typing import Any

from transformers import GenerationConfig, Trainer

from ..texts import plain, suggestion


# What transformers reads of `fsdp_config`, without the `fsdp_` that may stand before each; tests/contract/ looks.
OF_FSDP = {
    *("activation_checkpointing", "auto_wrap_policy", "backward_prefetch", "cpu_offload", "cpu_ram_efficient_loading"),
    *("forward_prefetch", "limit_all_gathers", "min_num_params", "reshard_after_forward", "state_dict_type"),
    *("sync_module_states", "transformer_layer_cls_to_wrap", "use_orig_params", "version"),
    *("xla", "xla_fsdp_grad_ckpt", "xla_fsdp_settings", "xla_fsdp_v2"),
}
# Schedules that take no further settings and do not say so.
CONSTANT = ("constant", "constant_with_warmup")
# Where versions of vLLM keep what a request to its server may hold.
REQUESTS = ("vllm.entrypoints.openai.completion.protocol", "vllm.entrypoints.openai.protocol")


def of_generation(given: Mapping[str, Any] | None, model: Any) -> str | None:
    """
    A remark on names in `generation_kwargs` that transformers does not know.

    Args:
        given (`Mapping`, *optional*):
            The setting.
        model (`Any`):
            The model, which may know names of its own.
    """
    usual = GenerationConfig()
    known = [config for config in (usual, getattr(model, "generation_config", None)) if config is not None]
    unread = [name for name in given or () if not any(hasattr(config, name) for config in known)]
    return _remark("generation_kwargs", unread, "generation with transformers", _public(usual))


def of_vllm_server(given: Mapping[str, Any] | None) -> str | None:
    """
    A remark on names in `generation_kwargs` that no request to vLLM's server may hold, where vLLM is installed.

    Args:
        given (`Mapping`, *optional*):
            The setting.
    """
    known: set[str] = set()
    for module in REQUESTS if given else ():
        try:
            known.update(import_module(module).CompletionRequest.model_fields)
        except (ImportError, AttributeError):
            continue
    return _remark("generation_kwargs", set(given or ()) - known if known else (), "vLLM's server", known)


def of_templates(given: Mapping[str, Any] | None, tokenizers: Iterable[Any]) -> str | None:
    """
    A remark on names in `chat_template_kwargs` that stand in no chat template.

    Args:
        given (`Mapping`, *optional*):
            The setting.
        tokenizers (`Iterable`):
            Tokenizers and templates that it is for. If one has no template, or is a processor, which takes settings for
            images as well, nothing is certain.
    """
    texts: list[str] = []
    takes: set[str] = set()
    for tokenizer in tokenizers if given else ():
        template = tokenizer if isinstance(tokenizer, str) else getattr(tokenizer, "chat_template", None)
        if template is None or hasattr(tokenizer, "tokenizer"):
            return None
        texts.extend(template.values() if isinstance(template, Mapping) else [template])
        takes.update(inspect.signature(getattr(tokenizer, "apply_chat_template", lambda: None)).parameters)
    words = {word for text in texts for word in re.findall(r"[^\W\d]\w*", text)}
    unread = [name for name in given or () if name not in words | takes]
    return _remark("chat_template_kwargs", unread if texts else (), "the chat template", words)


def of_schedule(args: Any) -> str | None:
    """
    A remark on `lr_scheduler_kwargs` for a schedule that takes none.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The configuration.
    """
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    unread = list(args.lr_scheduler_kwargs or ()) if kind in CONSTANT else []
    return _remark("lr_scheduler_kwargs", unread, f"lr_scheduler_type={kind!r}", ())


def of_fsdp(args: Any) -> str | None:
    """
    A remark on names in `fsdp_config` that transformers does not know.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The configuration.
    """
    given = args.fsdp_config if isinstance(args.fsdp_config, Mapping) else {}
    unread = [name for name in given if name.removeprefix("fsdp_") not in OF_FSDP]
    return _remark("fsdp_config", unread, "transformers", OF_FSDP)


def of_optimizer(args: Any) -> str | None:
    """
    A remark on names in `optim_args` that make no difference to the optimizer.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The configuration.

    Raises:
        `ValueError`: If it is no list of `name=value`, with which the training would fail.
    """
    parts = (args.optim_args or "").replace(" ", "")
    if not parts:
        return None
    pairs = [part.split("=") for part in parts.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            "optim_args must be settings with commas between them, name=value,name=value, of which none may hold a comma "
            "or be a list."
        )
    try:
        kind, _ = _optimizer(args, "")
    except Exception:  # what it needs is missing, a library or the model, or will be said by transformers
        return None
    unread = [name for name, _ in pairs if not _is_read(args, name)]
    takes = inspect.signature(kind).parameters if unread else ()
    read = [name for name in takes if _is_read(args, name)]
    name = str(getattr(args.optim, "value", args.optim))
    return _remark("optim_args", unread, f"optim={name!r}", read, _of_adam(name) if not read else "")


def _is_read(args: Any, name: str) -> bool:
    """Whether what stands under a name in `optim_args` changes the optimizer's settings, or cannot be one."""
    try:
        return repr(_optimizer(args, f"{name}=?")[1]) != repr(_optimizer(args, "")[1])
    except Exception:
        return True


def _optimizer(args: Any, optim_args: str) -> tuple[Any, Any]:
    other = copy.copy(args)
    other.optim_args = optim_args
    return Trainer.get_optimizer_cls_and_kwargs(other)


def _of_adam(name: str) -> str:
    return " Its own settings are adam_beta1, adam_beta2, adam_epsilon and weight_decay." if "adamw" in name else ""


def _public(settings: Any) -> set[str]:
    return {name for name in vars(settings) if not name.startswith("_")}


def _remark(
    setting: str, unread: Collection[str], reader: str, known: Collection[str], further: str = ""
) -> str | None:
    if not unread:
        return None
    names = ", ".join(repr(plain(name)) for name in unread)
    first = next(iter(unread))
    meant = suggestion(str(first), map(str, known)) if len(unread) == 1 else "."
    return f"{setting}: {reader} does not read {names}, so {'it changes' if len(unread) == 1 else 'they change'} nothing{meant}{further}"
