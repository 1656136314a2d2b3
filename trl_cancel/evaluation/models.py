"""Loading what is to be evaluated: a model or an adapter, from the Hub or a folder, into an engine."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash, find_adapter_config_file
from trl import ModelConfig, get_quantization_config

from ..running.precision import best_precision
from .engines import ContinuousEngine, Engine, TransformersEngine, VllmEngine
from .scoring import declared_end_tokens


ENGINES = ("transformers", "continuous", "vllm")


@dataclass(frozen=True)
class EngineSettings:
    """
    What generates, and how fast.

    Args:
        engine (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"`, `"continuous"` or `"vllm"`.
        batch_size (`int`, *optional*):
            Answers at a time; the engine's own default if not given.
        tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs that share the model, with vLLM.
        gpu_memory_utilization (`float`, *optional*, defaults to `0.9`):
            Share of the GPU's memory for vLLM.
        max_model_length (`int`, *optional*):
            Longest prompt with its answer, for vLLM; the model's own if not given.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that a model on the Hub brings.
    """

    engine: str = "transformers"
    batch_size: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_length: int | None = None
    trust_remote_code: bool = False


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or of an adapter's base model if it brings none."""
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        base = base_of(path, revision)
        if base is None:
            raise
        path, revision = base
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)


def base_of(path: str, revision: str | None = None) -> tuple[str, str | None] | None:
    """The base model of an adapter, and its revision; `None` for a model of its own."""
    if find_adapter_config_file(path, revision=revision) is None:
        return None
    config = PeftConfig.from_pretrained(path, revision=revision)
    return None if config.base_model_name_or_path is None else (config.base_model_name_or_path, config.revision)


def load_end_tokens(
    path: str, tokenizer: PreTrainedTokenizerBase, revision: str | None = None, trust_remote_code: bool = False
) -> list[int]:
    """The tokens that end an answer of a model, or of an adapter, without its weights."""
    source, revision = base_of(path, revision) or (path, revision)
    try:
        config = GenerationConfig.from_pretrained(source, revision=revision or "main")
    except OSError:  # it has none of its own
        config = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        )
    return declared_end_tokens(config, tokenizer)


def load_engine(
    path: str, tokenizer: PreTrainedTokenizerBase, arguments: ModelConfig, settings: EngineSettings, device: Any
) -> Engine:
    """
    A model or an adapter, ready to answer.

    Args:
        path (`str`):
            Hub id or folder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        arguments ([`~trl.ModelConfig`]):
            TRL's arguments for models: `dtype`, `model_revision`, `attn_implementation`, `load_in_4bit`, ...
        settings ([`EngineSettings`]):
            Which engine.
        device (`torch.device`):
            Device of a model that transformers runs.

    Raises:
        `ValueError`: If the engine cannot run it.
        `OSError`: If it cannot be loaded.
    """
    size: dict[str, Any] = {} if settings.batch_size is None else {"batch_size": settings.batch_size}
    revision, base = arguments.model_revision, base_of(path, arguments.model_revision)
    if settings.engine == "vllm":
        quantized = arguments.load_in_4bit or arguments.load_in_8bit
        further: dict[str, Any] = {"quantization": "bitsandbytes"} if quantized else {}
        rank = getattr(PeftConfig.from_pretrained(path, revision=revision), "r", 16) if base else 16
        return VllmEngine(
            path,
            tokenizer,
            base=base[0] if base else None,
            base_revision=base[1] if base else None,
            lora_rank=rank,
            revision=revision,
            **size,
            **further,
            trust_remote_code=settings.trust_remote_code,
            dtype=arguments.dtype or "auto",
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            max_model_len=settings.max_model_length,
        )
    if settings.engine == "continuous" and device.type == "cpu":
        raise ValueError(
            "engine=continuous is for GPUs; on a CPU it takes most of the memory and is many times slower than plain "
            "batches. Use engine=transformers."
        )
    computed_in = best_precision().name if arguments.dtype in (None, "auto") else arguments.dtype
    loading: Any = {
        "revision": revision,
        "dtype": arguments.dtype or "auto",
        "attn_implementation": arguments.attn_implementation,
        "quantization_config": get_quantization_config(replace(arguments, dtype=computed_in)),
        "trust_remote_code": settings.trust_remote_code,
    }
    if base is None:
        model: Any = AutoModelForCausalLM.from_pretrained(path, **loading)
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(path, **loading)
    if loading["quantization_config"] is None:
        model = model.to(device)
    if settings.engine == "transformers":
        return TransformersEngine(model, tokenizer, **size)
    if base is not None:
        if loading["quantization_config"] is not None:
            raise ValueError(
                "engine=continuous: cannot run an adapter on a quantized model. Use engine=transformers, or leave "
                "load_in_4bit out."
            )
        model = model.merge_and_unload()  # the class with the continuous batching is the model's own
    return ContinuousEngine(model, tokenizer, **size)


def fingerprint(path: str, revision: str | None = None) -> str | None:
    """A digest of the files that make a local model or adapter what it is; for a Hub id, the commit that is meant."""
    folder = Path(path)
    if not folder.is_dir():
        found = find_adapter_config_file(path, revision=revision) or cached_file(path, CONFIG_NAME, revision=revision)
        return extract_commit_hash(found, None)
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin") or file.name in ("config.json", "adapter_config.json"):
            digest.update(file.name.encode())
            with open(file, "rb") as content:
                while block := content.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()
