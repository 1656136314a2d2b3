"""How the processes of these tests are started, and what the runs in them have in common."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# Ways of running, by the launch file; `None` is one process without a launcher.
LAUNCH_FILES = {
    "one": None,
    "two": ROOT / "configs/accelerate/multi_cpu.yaml",
    "fsdp2": HERE / "fsdp2.yaml",
    "fsdp2-sharded": HERE / "fsdp2_sharded.yaml",
    "zero2": HERE / "zero2.yaml",
    "zero3": HERE / "zero3.yaml",
}
QUIET = {"CI": "1", "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
FSDP, DEEPSPEED = (os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))


def start(how: str, module: str, *arguments: Any, timeout: int = 1800) -> None:
    """Runs a module of these tests to its end, in one process or in two."""
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(LAUNCH_FILES[how]),
        "--main_process_port",
        "0",
    ]
    command = [sys.executable, *(launcher if LAUNCH_FILES[how] else []), "-m", module, *map(str, arguments)]
    environment = {**os.environ, **QUIET, **({"DS_ACCELERATOR": "cpu"} if "zero" in how else {})}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]


def allow_engines_without_gpu() -> None:
    """What accelerate needs to be told so that FSDP and DeepSpeed start on a CPU; neither itself needs a GPU."""
    if FSDP:
        _allow_fsdp()
    if DEEPSPEED:
        _allow_deepspeed()


def _allow_fsdp() -> None:
    """Accelerate ignores FSDP, without a word, where the processes have no GPU."""
    initialise = PartialState.__init__

    def as_with_gpus(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_with_gpus


def _allow_deepspeed() -> None:
    """Accelerate starts gloo only for processes that are to use the CPU, and ignores DeepSpeed for those."""
    prepare = PartialState._prepare_backend

    def with_gloo(self, *args, **kwargs):
        backend, kind = prepare(self, *args, **kwargs)
        return ("gloo", DistributedType.MULTI_CPU) if backend is None else (backend, kind)

    PartialState._prepare_backend = with_gloo


def leave() -> None:
    """Ends the process at once: a thread of gloo's may abort it while the interpreter is being taken down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """The weights of a model that may be sharded, on the main process."""
    return trainer.accelerator.get_state_dict(trainer.model_wrapped if DEEPSPEED else trainer.model)


def canned_rollouts(prompts, trainer):
    """
    A shared token, then tokens that depend on the prompt and on the rollout's number in its group, so that they do not
    depend on how many processes there are. The second token tells by its parity odd numbers from even ones.
    """
    tokenizer, counts, output = trainer.processing_class, {}, {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    straddles = trainer.accelerator.num_processes > 1 and len(prompts) < trainer.num_generations
    for prompt in prompts:
        text = prompt[0]["content"]
        number = counts.get(text, trainer.accelerator.process_index * len(prompts) if straddles else 0)
        counts[text] = number + 1
        number %= trainer.num_generations
        digest = hashlib.sha256(f"{text}{number}".encode()).digest()
        # Some rollout of every group is of the greatest length, so that all processes pad alike.
        later = (16 + byte % 10 for byte in digest[1 : 4 + (digest[0] if number % 4 else 3) % 4])
        completion = [20, 16 + 2 * (digest[0] % 5) + number % 2, *later, tokenizer.eos_token_id]
        output["prompt_ids"].append(tokenizer(text)["input_ids"])
        output["completion_ids"].append(completion)
        output["logprobs"].append([0.0] * len(completion))
    return output
