"""
Runs that are made in one process, in two, and in two that share one model (FSDP2, ZeRO), on the same rollouts:
`python -m tests.distributed.scenarios MODEL FOLDER NAME ...`.

The rollouts are canned, a function of the prompt and of their number in the group, so that they do not depend on how
many processes there are.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig
from trl import GRPOTrainer

from tests.runs import build
from trl_cancel import CancelGRPOTrainer

from .engines import DEEPSPEED, allow_engines_without_gpu, canned_rollouts, leave, whole_weights


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
# Those that the default suite leaves to the slow tests.
SLOW = (
    "dfpo",
    "dfpo-straddling",
    "delta-on-policy",
    "delta-top-fraction",
    "delta-straddling-recomputed",
    "nthr-on-policy",
)
# Those in which the states, or a pass of its own, meet a sharded model.
SHARDED = ("nthr", "nthr-on-policy", "delta", "delta-on-policy", "dfpo-spread", "lora")


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
            **{**settings, "use_cpu": not DEEPSPEED},
        )
        trainer.train()
    finally:
        GRPOTrainer.compute_loss = loss
    weights = whole_weights(trainer)
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
    allow_engines_without_gpu()
    for scenario in sys.argv[3:]:
        run(scenario, sys.argv[1], Path(sys.argv[2]))
    leave()
