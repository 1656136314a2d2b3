"""One run with several processes that something happens to: `python -m tests.distributed.stopping MODEL OUTPUT ACTION`."""

import os
import signal
import sys
from pathlib import Path

import torch
import transformers

from tests.runs import noisy_reward, train

from .engines import leave


def main(model: str, output: str, action: str) -> None:
    settings = {
        "output_dir": output,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "ddp_backend": "gloo",
    }
    rank, calls = int(os.environ.get("RANK", 0)), []

    def reward(completion_ids, **kwargs):
        calls.append(1)
        if action == "signal" and rank == 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return noisy_reward(completion_ids)

    if action == "kill" and rank == 1:
        save, saved = transformers.Trainer._save_rng_state, []

        def save_or_die(trainer, folder):
            saved.append(1)
            if len(saved) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            save(trainer, folder)

        transformers.Trainer._save_rng_state = save_or_die
    run = train(model, **settings, resume="auto", arguments={"reward_funcs": reward})
    if rank == 0:
        torch.save(run.weights, Path(output, "weights.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
