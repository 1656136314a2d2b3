"""
Rounds of generation on two processes: `accelerate launch ... -m tests.distributed.balance MODEL FOLDER`.

A run and the same run resumed from a checkpoint; and one in which all rollouts of the second process are wrong.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch

from tests.runs import train

from .engines import leave


SETTINGS = {
    "per_device_train_batch_size": 8,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 1,
    "num_iterations": 2,
    "reward_balance": 0.25,
    "filter_zero_variance": True,
    "max_generation_rounds": 3,
    "delta_credit": True,
    "learning_rate": 1e-3,
    "max_steps": 12,
}


def rare_reward(completion_ids, **kwargs):
    return [float(sum(ids) % 7 == 0) for ids in completion_ids]


def starving_reward(completion_ids, **kwargs):
    return [0.0] * len(completion_ids) if os.environ["RANK"] == "1" else rare_reward(completion_ids)


def main(model: str, folder: Path) -> None:
    saving = {**SETTINGS, "output_dir": str(folder / "whole"), "save_strategy": "steps", "save_steps": 4}
    found = {}
    for name, reward, settings, resume in (
        ("whole", rare_reward, saving, None),
        ("resumed", rare_reward, saving, str(folder / "whole" / "checkpoint-4")),
        ("starved", starving_reward, {**SETTINGS, "max_steps": 4}, None),
    ):
        run = train(model, **settings, arguments={"reward_funcs": reward}, resume=resume)
        found[name] = run.logs
        if run.trainer.accelerator.is_main_process:
            torch.save(run.weights, folder / f"{name}.pt")
    if run.trainer.accelerator.is_main_process:
        (folder / "logs.json").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], Path(sys.argv[2]))
    leave()
