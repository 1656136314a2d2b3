"""`trl-cancel demo`: the embedded model learns arithmetic in a minute, offline."""

import argparse
from pathlib import Path

from ..methods import NAMED
from ..texts import plain
from . import OneLineErrors, UsageError
from ._quiet import quiet


FOLDER = "trl-cancel-demo"
# The same as configs/playground.yaml; a test compares the two.
SETTINGS = {
    "model_name_or_path": "playground",
    "dataset_name": "playground",
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 8,
    "num_generations": 8,
    "max_completion_length": 64,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "max_steps": 160,
    "logging_steps": 4,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "eval_problems": 256,
    "eval_samples": 8,
}


class DemoParser(OneLineErrors, argparse.ArgumentParser):
    """The few options of the demo."""


def run(arguments: list[str]) -> int:
    parser = DemoParser(prog="trl-cancel demo", description=__doc__)
    parser.add_argument("--output", default=FOLDER, help="folder for the trained model (default: %(default)s)")
    parser.add_argument(
        "--method", default="query-preserved", help=f"one of {', '.join(NAMED)} (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=SETTINGS["max_steps"], help="optimizer steps (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=42, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace the finished model that the folder holds"
    )
    options = parser.parse_args(arguments)
    if options.steps < 1:
        raise UsageError(f"--steps {options.steps}: must be at least 1.")
    return _train(options)


def _train(options: argparse.Namespace) -> int:
    with quiet():
        from .settings import Parser
        from .training import console, run_training, use_one_thread

        use_one_thread()
        chosen = {**SETTINGS, "output_dir": options.output, "max_steps": options.steps, "seed": options.seed}
        # A folder that bears the demo's name is the demo's.
        chosen["overwrite_output_dir"] = options.overwrite_output_dir or Path(options.output).name.startswith(FOLDER)
        settings = Parser("trl-cancel demo", __doc__).read(
            [
                "--method",
                options.method,
                *(part for name, value in chosen.items() for part in (f"--{name}", str(value))),
            ]
        )
        console.print(INTRODUCTION.format(method=options.method, summary=NAMED[options.method].summary))
        run_training(settings)
        other = "query-preserved" if options.method == "grpo" else "grpo"
        console.print(NEXT_STEPS.format(output=plain(options.output), other=other), markup=False)
    return 0


INTRODUCTION = """\
A 400-thousand-parameter model that learned arithmetic from a teacher who forgets to carry and borrow now learns from
its own rollouts, with {method}: {summary}.
"""
NEXT_STEPS = """\
Use the model:   AutoModelForCausalLM.from_pretrained("{output}")
Compare:         trl-cancel demo --method {other} --output trl-cancel-demo-{other}
                 trl-cancel compare {output} trl-cancel-demo-{other}
In your script:  from trl_cancel import GRPOConfig, GRPOTrainer"""
