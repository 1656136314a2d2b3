"""One training run with vLLM on the CPU, in a process of its own: `python scenarios.py NAME FOLDER`."""

import functools
import json
import os
import sys
import warnings
from pathlib import Path

from trl_cancel.methods import NAMED


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
SEQUENCE = {"importance_sampling_level": "sequence", "loss_type": "grpo"}
OTHERS = ("gspo", "dfpo-orth", "dfpo-positive-orth", "dfpo-rebalance", "nthr-random", "delta-random", "positive-only")
SCENARIOS = {
    "grpo": {},
    "query-preserved": {"vllm_importance_sampling_mode": "token_truncate"},
    "balance": {"reward_balance": 0.25, "filter_zero_variance": True},
    "credits": {"nthr": True, "delta_credit": True, "filter_zero_variance": True, "reward_balance": 0.25},
    "dfpo": {**SEQUENCE, "group_weights": "min"},
    "grpo-fix": {"symmetric_clip": True},
    "grpo-fix-score": {"symmetric_clip": True, "symmetric_clip_gradient": "score"},
    "delta-top-fraction": {"delta_credit": True, "delta_top_fraction": 0.5},
    **{name: NAMED[name].settings for name in OTHERS},
    "no sync": {},
}


def patch_cpu_backend():
    """The CPU backend packs weights when it loads them, and so loses what is synchronised later."""
    import torch
    import trl.generation.vllm_generation as generation
    import vllm.model_executor.layers.utils as layers

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = plain
    # Exact numbers, so that stale weights would show.
    generation.LLM = functools.partial(generation.LLM, dtype="float32", enforce_eager=True)
    return generation


def reward(completion_ids, **columns):
    return [float(sum(ids) % 7 == 0) for ids in completion_ids]


def main(name, folder):
    os.environ.update(ENVIRONMENT, VLLM_CPU_KVCACHE_SPACE="1")  # GiB
    warnings.simplefilter("ignore")
    generation = patch_cpu_backend()
    import torch

    from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer
    from trl_cancel.playground.data import load_prompts
    from trl_cancel.playground.tokenizer import build_tokenizer
    from trl_cancel.playground.warm_start import build_model

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    build_model(tokenizer, **sizes, initializer_range=0.2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    if name == "no sync":
        generation.VLLMGeneration.sync_weights = lambda self: None
    args = CancelGRPOConfig(
        str(folder / "out"),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.1,
        vllm_max_model_length=128,
        per_device_train_batch_size=8,
        num_generations=4,
        gradient_accumulation_steps=1,
        steps_per_generation=4,
        max_completion_length=12,
        max_steps=8,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        learning_rate=1e-3,
        save_strategy="no",
        disable_tqdm=True,
        **SCENARIOS[name],
    )
    trainer = CancelGRPOTrainer(str(folder / "model"), reward, args, load_prompts("train", 64))
    trainer.train()
    (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
