"""`trl-cancel train` in two processes: `accelerate launch -m tests.distributed.command MODEL FOLDER`."""

import sys

from trl_cancel.cli import main

from .engines import allow_engines_without_gpu, leave


if __name__ == "__main__":
    allow_engines_without_gpu()
    settings = {
        "model_name_or_path": sys.argv[1],
        "dataset_name": "playground",
        "output_dir": sys.argv[2],
        "max_steps": 1,
        "max_completion_length": 8,
        "report_to": "none",
        "eval_problems": 2,
        "eval_samples": 1,
        "use_cpu": "true",
        "gradient_checkpointing": "false",
    }
    if status := main(["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]):
        sys.exit(status)
    leave()
