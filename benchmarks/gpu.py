"""
Memory and time of every method on one GPU: `python benchmarks/gpu.py`.

QLoRA on a model with Qwen3-0.6B's shape, and training of all weights of one with 60 million parameters, both with random
weights, in the precision that the device computes natively; rollouts are sampled by transformers. For each method of
`trl-cancel train --method`, in a process of its own: seconds of an optimizer step, of its sampling, and peak memory.
Writes `benchmarks/results/gpu.json` and prints a table. `--sizes tiny` tries it without a GPU.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from overhead import QWEN3, StepTimes, Stopwatch, _start
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import BitsAndBytesConfig, PreTrainedModel

from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer, best_precision
from trl_cancel.methods import NAMED
from trl_cancel.playground.data import load_prompts
from trl_cancel.playground.tokenizer import build_tokenizer
from trl_cancel.playground.warm_start import build_model


RESULTS = Path(__file__).parent / "results/gpu.json"
MEDIUM = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
}
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
# Architecture, tokens of a completion, and whether the model is 4-bit with an adapter.
SIZES: dict[str, tuple[dict[str, int], int, bool]] = {
    "QLoRA, Qwen3-0.6B-shaped": (QWEN3, 1024, True),
    "all weights, 60M": (MEDIUM, 1024, False),
    "tiny QLoRA": (TINY, 16, True),
    "tiny": (TINY, 16, False),
}
PROMPTS = {"num_generations": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
UPDATES = 2  # optimizer steps with each generation batch: off policy, where all methods act
BATCHES = 3  # generation batches, of which the first warms up


def run(size: str, method: str) -> dict[str, float]:
    """Seconds of an optimizer step with and without its share of the sampling, and GiB at the peak."""
    architecture, length, four_bit = SIZES[size]
    precision, gpu, tokenizer = best_precision(), torch.cuda.is_available(), build_tokenizer()
    arguments: dict[str, Any] = {"model_init_kwargs": {"dtype": "float32"}}
    quantization, lora = None, None
    if four_bit:
        arguments["model_init_kwargs"] = {"dtype": precision.name}
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=precision.dtype
        )
    sampling = Stopwatch()
    steps = StepTimes(UPDATES, sampling)  # both start anew after the first generation batch
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        build_model(tokenizer, **architecture).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer = CancelGRPOTrainer(
            folder,
            reward_funcs=parity,
            args=CancelGRPOConfig(
                output_dir=f"{folder}/run",
                max_completion_length=length,
                max_steps=BATCHES * UPDATES,
                steps_per_generation=UPDATES * PROMPTS["gradient_accumulation_steps"],
                learning_rate=1e-5,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=precision.bf16,
                fp16=precision.fp16,
                gradient_checkpointing=gpu,
                **PROMPTS,
                **arguments,
                **NAMED[method].settings,
            ),
            train_dataset=load_prompts("train", 64),
            peft_config=lora,
            quantization_config=quantization,
        )
        model: Any = trainer.model
        sampling.watch(model.get_base_model() if four_bit else model, "generate")
        trainer.add_callback(steps)
        trainer.train()
    counted = (BATCHES - 1) * UPDATES
    memory = (
        torch.cuda.max_memory_allocated() / 2**30
        if gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    return {
        "step": steps.seconds / counted,
        "sampling": sampling.seconds / counted,
        "memory": memory,
        "parameters": _parameters(model),
    }


def parity(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward by which the rollouts of a random model differ."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def _parameters(model: PreTrainedModel) -> int:
    """Weights, where 4-bit ones, held two a byte, count as what they stand for."""
    return sum(parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1) for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES)[:2])
    parser.add_argument("--methods", nargs="+", choices=list(NAMED), default=list(NAMED))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    environment = {name: version(name) for name in ("trl", "transformers", "torch", "peft", "bitsandbytes")}
    environment |= {"python": platform.python_version(), "device": device, "precision": best_precision().reason}
    found: dict[str, dict[str, dict[str, float]]] = {size: {} for size in options.sizes}
    table = Table("size", "method", "step", "of which sampling", "peak", title=f"{device}, {best_precision().name}")
    # A process a run, so that peaks of memory do not add up.
    with multiprocessing.get_context("spawn").Pool(1, initializer=_start, maxtasksperchild=1) as pool:
        for size in options.sizes:
            for method in options.methods:
                result = found[size][method] = pool.apply(run, (size, method))
                times = (f"{result[name]:.3f} s" for name in ("step", "sampling"))
                table.add_row(size, method, *times, f"{result['memory']:.2f} GiB")
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps({"environment": environment, "results": found}, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
