"""Two processes evaluate and train: `accelerate launch -m tests.distributed.evaluation MODEL FOLDER`."""

import json
import sys
from pathlib import Path

from tests.runs import build
from trl_cancel.cli import main as command
from trl_cancel.evaluation import EvaluationCallback, EvaluationSettings
from trl_cancel.playground.data import load_prompts

from .engines import allow_engines_without_gpu, leave


def even(completion_ids, **_):
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def main(model, folder):
    allow_engines_without_gpu()
    settings = EvaluationSettings(num_samples=2, max_completion_length=6, score_truncated=True)
    trainer = build(model, output_dir=str(folder / "training"), max_steps=2, learning_rate=0.0)
    problems = load_prompts("test", 9)
    trainer.add_callback(EvaluationCallback(trainer, problems, even, settings, name="set", steps=1, batch_size=4))
    trainer.train()
    rank = trainer.accelerator.process_index
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    result = {
        "processes": trainer.accelerator.num_processes,
        "sharded": sharded,
        "metrics": [evaluation.metrics for evaluation in trainer.evaluations],
        "logged": [entry for entry in trainer.state.log_history if "eval_set_greedy" in entry],
    }
    (folder / f"{rank}.json").write_text(json.dumps(result))
    if not sharded:
        arguments = ["--dataset_name", "playground", "--num_problems", "9", "--num_samples", "2", "--batch_size", "4"]
        arguments += ["--max_completion_length", "8", "--output", str(folder / "out")]
        assert command(["eval", "--model_name_or_path", model, *arguments]) == 0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    leave()
