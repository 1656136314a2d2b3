"""
Every method of the table trained, saved and resumed: `python -m tests.distributed.matrix KIND MODEL FOLDER [ROW ...]`,
in one process or in two of any engine. KIND is `full`, `lora` or `nf4`.

Each run takes the fewest optimizer steps that hold two and whole generations, saves a checkpoint, and takes as many
again; a second run resumes from the checkpoint. A process takes the batch size of the row, and a single one twice
that: so every process sees the layout that the row is about, and the global batch is the same.
"""

import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import trl.trainer.grpo_trainer
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from tests.methods import METHODS, Row
from tests.runs import DEFAULTS, OFF_POLICY, build, repeatable
from trl_cancel.batching import BatchLayout
from trl_cancel.pipeline import split

from .engines import DEEPSPEED, FSDP, allow_engines_without_gpu, canned_rollouts, leave, whole_weights


PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
KINDS = ("full", "lora", "nf4")
# Two optimizer steps a generation, the second off policy; and no Adam, which blows up what rounding leaves of a
# gradient of 0.
SHORT = {**OFF_POLICY, "steps_per_generation": 2, "num_iterations": 1, "optim": "sgd", "learning_rate": 0.1}


def settings_of(row: Row) -> dict[str, Any]:
    """The settings of a row for its two halves, `save_steps` optimizer steps each."""
    settings = {**DEFAULTS, **SHORT, **row.settings}
    names = BatchLayout.__dataclass_fields__.keys() & settings.keys()
    updates = BatchLayout(**{name: settings[name] for name in names}).updates_per_generation
    steps = max(2, int(updates))
    settings["per_device_train_batch_size"] *= 2 // PROCESSES
    if FSDP:  # PyTorch does not load the state of an optimizer that has none
        settings["optim"], settings["learning_rate"] = "adamw_torch", 1e-3
    return {**settings, "max_steps": 2 * steps, "save_strategy": "steps", "save_steps": steps}


def reward(completion_ids, **columns):
    """Half of each group right, as its rollouts' parity has it, with rewards that differ among them too."""
    return [10.0 * (ids[1] % 2) + sum(ids) % 7 for ids in completion_ids]


def deal_groups_alike() -> None:
    """The same groups in the same optimizer step whatever the number of processes, in place of a shuffle of each."""

    def in_order(num_groups: int, generator: Any = None) -> torch.Tensor:
        groups = torch.arange(num_groups)
        return groups if PROCESSES > 1 else groups.view(2, -1).T.flatten()  # what would be two processes', in turn

    split.order_of_groups = in_order
    trl.trainer.grpo_trainer.shuffle_sequence_dict = lambda batch: batch


def arguments_of(kind: str, row: Row) -> dict[str, Any]:
    arguments = {"rollout_func": canned_rollouts, "reward_funcs": reward, "credits": row.credits()}
    if kind != "full":
        arguments["peft_config"] = LoraConfig(r=2, target_modules="all-linear")
    if kind == "nf4":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    return arguments


def run(kind: str, row: Row, model: str, folder: Path, resume: str | None = None) -> Any:
    settings = {**settings_of(row), "use_cpu": not DEEPSPEED, "output_dir": str(folder)}
    trainer = build(model, arguments=arguments_of(kind, row), **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def train_save_and_resume(kind: str, row: Row, model: str, folder: Path) -> None:
    first = time.perf_counter()
    trainer = run(kind, row, model, folder)
    trainer.save_model(str(folder / "saved"))
    weights, main = whole_weights(trainer), trainer.accelerator.is_main_process
    logs = [repeatable(entry) for entry in trainer.state.log_history]
    resumed = run(kind, row, model, folder, resume=str(folder / f"checkpoint-{trainer.args.save_steps}"))
    resumed_weights = whole_weights(resumed)
    if main:
        torch.save({"weights": weights, "resumed": resumed_weights}, folder / "weights.pt")
        found = {
            "logs": logs,
            "resumed_logs": [repeatable(entry) for entry in resumed.state.log_history],
            "processes": trainer.accelerator.num_processes,
            "sharded": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
            "is_4bit": getattr(trainer.model, "is_loaded_in_4bit", False),
            "seconds": time.perf_counter() - first,
        }
        (folder / "found.json").write_text(json.dumps(found))


def main(kind: str, model: str, folder: Path, names: list[str]) -> None:
    for name in names or METHODS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        try:
            train_save_and_resume(kind, METHODS[name], model, folder / name)
        except Exception:
            # One row that fails must not hide the others; both processes fail alike, or the launcher ends them.
            (folder / name / f"error-{os.environ.get('RANK', 0)}.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    allow_engines_without_gpu()
    deal_groups_alike()
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    leave()
