"""
What the recipes for one GPU take of its memory, estimated: `python benchmarks/memory.py`.

The models are built without weights (on PyTorch's meta device) from their published sizes, with the recipe's adapter, and
what each part takes is added up from the recipe's own numbers. An estimate, not a measurement: what libraries keep for
themselves is a round allowance, and PyTorch's allocator takes some more. `benchmarks/gpu.py` measures.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3Config


ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results/memory.json"
GIB = 2**30
PROMPT = 256  # tokens of a prompt
LIBRARIES = 1.0  # GiB of CUDA's context, kernels and workspaces
QWEN = {"num_hidden_layers": 28, "vocab_size": 151936, "tie_word_embeddings": True}
ARCHITECTURES = {  # from the models' config.json
    "Qwen/Qwen2.5-1.5B-Instruct": Qwen2Config(
        **QWEN, hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2
    ),
    "Qwen/Qwen3-1.7B": Qwen3Config(
        **QWEN, hidden_size=2048, intermediate_size=6144, num_attention_heads=16, num_key_value_heads=8, head_dim=128
    ),
}
GPUS = {"qlora_16gb": 16, "lora_24gb": 24}


@dataclass(frozen=True)
class Part:
    """What one part takes, in bytes, and whether it is there while the model generates and while it is trained."""

    name: str
    size: float
    generating: bool = True
    training: bool = True


def frozen_bytes(model: nn.Module, four_bit: bool, nested: bool) -> float:
    """Weights that are not trained: 16 bit, or 4 bit and a scale every 64 (32 bit, or 8 bit where nested)."""
    scale = (1 + 4 / 256 if nested else 4) / 64
    quantized = {id(layer.weight) for layer in linear_layers(model)} if four_bit else set()
    return sum(
        parameter.numel() * (0.5 + scale if id(parameter) in quantized else 2)
        for parameter in model.parameters()
        if not parameter.requires_grad
    )


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers that a recipe quantizes: those of the blocks."""
    return [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "lora_" not in name and not name.endswith("lm_head")
    ]


def parts(recipe: dict, config: PretrainedConfig) -> list[Part]:
    """What a run with this recipe holds on the GPU."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        lora = LoraConfig(r=recipe["lora_r"], target_modules=recipe["lora_target_modules"], task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    moments = 2 if "8bit" in recipe.get("optim", "") else 8
    rollouts, length = recipe["per_device_train_batch_size"], PROMPT + recipe["max_completion_length"]
    tokens, layers, width = rollouts * length, config.num_hidden_layers, config.hidden_size
    of_a_block = sum(layer.in_features + layer.out_features for layer in linear_layers(model)) / layers
    largest = max(layer.weight.numel() for layer in linear_layers(model))
    heads = config.num_key_value_heads * (getattr(config, "head_dim", None) or width // config.num_attention_heads)
    together = rollouts * recipe["steps_per_generation"]  # a generation batch is sampled at once
    four_bit = recipe.get("load_in_4bit", False)
    found = [
        Part("weights", frozen_bytes(model, four_bit, recipe.get("use_bnb_nested_quant", False))),
        Part("adapter, its gradients and the optimizer's moments", trained * (4 + 4 + moments)),
        Part("inputs of the blocks, kept for the backward pass", layers * tokens * width * 2, generating=False),
        # Twice: what the layers put out, and its gradients.
        Part("one block, computed again", 2 * tokens * of_a_block * 2 + 2 * largest, generating=False),
        Part("libraries", LIBRARIES * GIB),
    ]
    if recipe.get("use_vllm"):
        gpu = GPUS[Path(recipe["output_dir"]).name] * 1e9
        # Asleep it has given its memory back.
        asleep = recipe.get("vllm_enable_sleep_mode", False)
        found.append(Part("vLLM", recipe["vllm_gpu_memory_utilization"] * gpu, training=not asleep))
    else:
        cache = 2 * layers * heads * 2 * together * length
        found.append(Part("keys and values of the rollouts", cache, training=False))
        found.append(Part("logits of the next tokens", 3 * together * config.vocab_size * 4, training=False))
    return found


def states_bytes(recipe: dict, config: PretrainedConfig) -> int:
    """The hidden states of a generation batch, which NTHR and DelTA keep until they are scored."""
    rollouts = recipe["per_device_train_batch_size"] * recipe["steps_per_generation"]
    return rollouts * recipe["max_completion_length"] * config.hidden_size * 2


def estimate(name: str) -> dict[str, float]:
    """GiB by part, and the larger of the two phases."""
    recipe = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    config = ARCHITECTURES[recipe["model_name_or_path"]]
    found = parts(recipe, config)
    states = states_bytes(recipe, config)
    generating, training = (
        sum(part.size for part in found if getattr(part, phase)) for phase in ("generating", "training")
    )
    return {
        **{part.name: part.size / GIB for part in found},
        "generating": generating / GIB,
        "training": training / GIB,
        "more with NTHR or DelTA": states / GIB,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = {name: estimate(name) for name in GPUS}
    table = Table("GiB, estimated", *(f"{name}.yaml" for name in GPUS))
    for part in dict.fromkeys(part for result in results.values() for part in result):
        table.add_row(part, *(f"{result[part]:.2f}" if part in result else "" for result in results.values()))
    Console().print(table)
    RESULTS.write_text(
        json.dumps(
            {name: {part: round(size, 3) for part, size in result.items()} for name, result in results.items()},
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
