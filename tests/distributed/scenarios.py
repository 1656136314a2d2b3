"""
Runs that are made in one process, in two, and in two that share one model (FSDP2, ZeRO-3), on the same rollouts:
`python -m tests.distributed.scenarios MODEL FOLDER`.

The rollouts are canned, a function of the prompt and of their number in the group, so that they do not depend on how
many processes there are.
"""

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from trl import GRPOTrainer

from tests.runs import build
from trl_cancel import CancelGRPOTrainer


torch.set_num_threads(1)
FSDP, ZERO3 = (os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
# Sizes of one process; with two each gets half of every micro-batch.
PLAIN = {"learning_rate": 0.1, "optim": "sgd"}  # Adam would blow up what rounding leaves of a gradient of 0
DFPO = {
    "importance_sampling_level": "sequence",
    "loss_type": "grpo",
    "group_weights": "orth",
    "num_iterations": 3,
    "max_steps": 6,
    "learning_rate": 0.1,
    "optim": "sgd",
}
ADAPTER = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "up_proj"])}
CREDIT = {"per_device_train_batch_size": 16, "learning_rate": 0.05, "optim": "sgd"}
SCENARIOS = {
    "on-policy": {**PLAIN, "per_device_train_batch_size": 16, "max_steps": 2},
    # Groups of four lie across the two processes, two rollouts on each.
    "straddling": {**PLAIN, "per_device_train_batch_size": 4, "max_steps": 2, "token_shift_steps": 1},
    "symmetric-clip": {
        "per_device_train_batch_size": 16,
        "num_iterations": 3,
        "max_steps": 6,
        "symmetric_clip": True,
        **PLAIN,
    },
    "stock-clip": {**PLAIN, "per_device_train_batch_size": 16, "num_iterations": 3, "max_steps": 6},
    # Whole groups in each micro-batch; groups spread over the four micro-batches of a step; and groups of which each
    # process holds a half, in one micro-batch and in two.
    "dfpo": {**DFPO, "per_device_train_batch_size": 16},
    "dfpo-spread": {
        **DFPO,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": 3,
        "token_shift_steps": 1,
    },
    "dfpo-straddling": {**DFPO, "per_device_train_batch_size": 4},
    "dfpo-straddling-spread": {
        **DFPO,
        "group_weights": "positive_orth",
        "num_generations": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
    },
    # Centroids of all processes; groups of one. On policy the states come from the loss, or from a pass of their own.
    "delta": {**CREDIT, "delta_credit": True, "num_iterations": 2, "max_steps": 4},
    "delta-on-policy": {**CREDIT, "delta_credit": True, "max_steps": 2},
    "delta-top-fraction": {**CREDIT, "delta_credit": True, "delta_top_fraction": 0.4, "max_steps": 2},
    "delta-straddling-recomputed": {
        **CREDIT,
        "delta_credit": True,
        "num_generations": 8,
        "per_device_train_batch_size": 8,
        "num_iterations": 2,
        "max_steps": 4,
        "state_cache_gib": 0.0,
    },
    "nthr": {**CREDIT, "nthr": True, "nthr_beta": 0.2, "num_iterations": 2, "max_steps": 4},
    "nthr-on-policy": {**CREDIT, "nthr": True, "nthr_beta": 0.2, "max_steps": 2},
    # Adapters, with the reference of the KL term by switching them off.
    "lora": {
        **CREDIT,
        "nthr": True,
        "delta_credit": True,
        "beta": 0.05,
        "num_iterations": 2,
        "max_steps": 4,
        "token_shift_steps": 2,
    },
    "split": {"per_device_train_batch_size": 8, "steps_per_generation": 4, "max_steps": 4},
}
# Those in which the states, or a pass of its own, meet a sharded model.
SHARDED = ("nthr", "nthr-on-policy", "delta", "delta-on-policy", "dfpo-spread", "lora")


def allow_fsdp_without_gpu() -> None:
    """Accelerate ignores FSDP where the processes have no GPU; PyTorch does not need one."""
    initialise = PartialState.__init__

    def as_with_gpus(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_with_gpus


def allow_zero3_without_gpu() -> None:
    """Accelerate starts gloo only for processes that are to use the CPU, and ignores DeepSpeed for those."""
    prepare = PartialState._prepare_backend

    def with_gloo(self, *args, **kwargs):
        backend, kind = prepare(self, *args, **kwargs)
        return ("gloo", DistributedType.MULTI_CPU) if backend is None else (backend, kind)

    PartialState._prepare_backend = with_gloo


def canned_rollouts(prompts, trainer):
    """Two shared tokens, then tokens that depend on the prompt and on the rollout's number in its group."""
    tokenizer, counts, output = trainer.processing_class, {}, {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    straddles = trainer.accelerator.num_processes > 1 and len(prompts) < trainer.num_generations
    for prompt in prompts:
        text = prompt[0]["content"]
        number = counts.get(text, trainer.accelerator.process_index * len(prompts) if straddles else 0)
        counts[text] = number + 1
        digest = hashlib.sha256(f"{text}{number}".encode()).digest()
        completion = [20, 21, *(16 + byte % 10 for byte in digest[: 3 + digest[0] % 4]), tokenizer.eos_token_id]
        output["prompt_ids"].append(tokenizer(text)["input_ids"])
        output["completion_ids"].append(completion)
        output["logprobs"].append([0.0] * len(completion))
    return output


def run(name: str, model: str, folder: Path) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    settings = {**SCENARIOS[name]}
    settings["per_device_train_batch_size"] //= processes
    steps = []
    loss = GRPOTrainer.compute_loss

    def watched_loss(self, model, inputs, *args, **kwargs):
        groups = self.accelerator.gather(inputs["prompt_ids"].sum(1) * 1000 + inputs["prompt_ids"].prod(1) % 1000)
        steps.append(torch.unique(groups, return_counts=True)[1].tolist())
        return loss(self, model, inputs, *args, **kwargs)

    GRPOTrainer.compute_loss = watched_loss
    try:
        trainer = build(
            model,
            CancelGRPOTrainer,
            output_dir=str(folder / name),
            arguments={"rollout_func": canned_rollouts, **(ADAPTER if name == "lora" else {})},
            **{**settings, "use_cpu": not ZERO3},
        )
        trainer.train()
    finally:
        GRPOTrainer.compute_loss = loss
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped if ZERO3 else trainer.model)
    if trainer.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(weights, folder / f"{name}.pt")
        found = {
            "logs": trainer.state.log_history,
            "steps": steps,
            "processes": trainer.accelerator.num_processes,
            "sharded": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        }
        (folder / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if FSDP:
        allow_fsdp_without_gpu()
    if ZERO3:
        allow_zero3_without_gpu()
    for scenario in SHARDED if FSDP or ZERO3 else SCENARIOS:
        run(scenario, sys.argv[1], Path(sys.argv[2]))
