"""
What this package adds to an optimizer step: `python benchmarks/overhead.py`.

Steps of a real run on the playground, and steps on canned rollouts ("update only"), where nothing is generated and the
share of everything else is larger. Two measures: the time spent inside this package's own functions, as a share of the step; and the ratio of
the whole step to that of TRL's trainer, with all variants once a round in random order, which shows what the first
measure cannot see but is only as good as the machine is quiet ("TRL again" shows how quiet). Writes
`benchmarks/results/overhead-<device>.json` and prints a table. About fifteen minutes on a CPU core.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import trl
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer
from trl_cancel.cli._quiet import quiet
from trl_cancel.playground import CHECKPOINT
from trl_cancel.playground.data import load_prompts
from trl_cancel.playground.reward import answer_reward
from trl_cancel.playground.tokenizer import build_tokenizer
from trl_cancel.playground.warm_start import build_model


RESULTS = Path(__file__).parent / "results"
VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "TRL": (trl.GRPOTrainer, {}),
    "TRL again": (trl.GRPOTrainer, {}),  # how far two equal things differ
    "everything off": (CancelGRPOTrainer, {"query_preserved": False, "cancellation_metrics": False}),
    "query_preserved": (CancelGRPOTrainer, {"cancellation_metrics": False}),
    "cancellation_metrics": (CancelGRPOTrainer, {"query_preserved": False}),
    "symmetric_clip": (CancelGRPOTrainer, {"symmetric_clip": True}),
    "dfpo min": (
        CancelGRPOTrainer,
        {"group_weights": "min", "importance_sampling_level": "sequence", "loss_type": "grpo"},
    ),
    "dfpo positive_orth": (
        CancelGRPOTrainer,
        {"group_weights": "positive_orth", "importance_sampling_level": "sequence", "loss_type": "grpo"},
    ),
    "symmetric_clip score": (CancelGRPOTrainer, {"symmetric_clip": True, "symmetric_clip_gradient": "score"}),
}


@dataclass(frozen=True)
class Size:
    """What is trained: the architecture's changes, completion length, optimizer steps, and whether to generate."""

    architecture: dict[str, int]
    length: int
    steps: int
    generate: bool = False


SIZES = {
    "playground (0.4M)": Size({}, length=64, steps=24, generate=True),
    "playground (0.4M), update only": Size({}, length=64, steps=24),
    "5M, update only": Size(
        {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}, length=256, steps=4
    ),
}
GPU_SIZES = {
    "Qwen3-0.6B-shaped, update only": Size(
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 4096,
        },
        length=1024,
        steps=8,
    ),
}
BATCH = {
    "num_generations": 8,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 4,
}


# Where this package spends time of its own; the overridden methods spend TRL's.
OWN = ("_view", "_apply_credits", "_whole_group_batches", "_weigh", "_weigh_groups_ahead")
OWN_OF_MONITOR = ("mark_shared", "watch_loss", "end_step")


def time_own_functions(trainer: Any) -> list[float]:
    """Makes a trainer record the seconds of each call of this package's own functions."""
    seconds: list[float] = []

    def timed(function):
        def call(*args, **kwargs):
            started = _now()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.append(_now() - started)

        return call

    if hasattr(trainer, "_monitor"):
        for owner, names in ((trainer, OWN), (trainer._monitor, OWN_OF_MONITOR)):
            for name in names:
                setattr(owner, name, timed(getattr(owner, name)))
    return seconds


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self):
        self.seconds: list[float] = []
        self.on_first_batch_end = lambda: None

    def on_step_begin(self, *args, **kwargs):
        self.started = _now()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(_now() - self.started)
        if len(self.seconds) == 4:
            self.on_first_batch_end()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def canned_rollouts(size: Size, vocabulary: int):
    """A rollout function: a shared first half, random tokens after it."""
    length, vocabulary = size.length, size.architecture.get("vocab_size", vocabulary)

    def rollouts(prompts, trainer):
        generator = torch.Generator().manual_seed(0)
        shared = torch.randint(10, vocabulary, (length // 2,), generator=generator).tolist()
        completions = []
        for _ in prompts:
            own = int(torch.randint(length // 4, length // 2, (1,), generator=generator))
            completions.append(shared + torch.randint(10, vocabulary, (own,), generator=generator).tolist())
        tokenizer = trainer.processing_class
        return {
            "prompt_ids": [tokenizer(prompt[0]["content"])["input_ids"] for prompt in prompts],
            "completion_ids": completions,
            "logprobs": [[0.0] * len(completion) for completion in completions],
        }

    return rollouts


def run(variant: str, size: Size) -> tuple[float, float]:
    """Mean seconds of an optimizer step and of this package's share of it, without the first generation batch."""
    trainer_class, settings = VARIANTS[variant]
    config = trl.GRPOConfig if trainer_class is trl.GRPOTrainer else CancelGRPOConfig
    gpu = torch.cuda.is_available()
    tokenizer, times = build_tokenizer(), StepTimes()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            AutoModelForCausalLM.from_pretrained(CHECKPOINT)
            if size.generate
            else build_model(tokenizer, **size.architecture),
            reward_funcs=answer_reward
            if size.generate
            else lambda completion_ids, **_: [float(sum(ids) % 2) for ids in completion_ids],
            args=config(
                output_dir=folder,
                max_completion_length=size.length,
                max_steps=4 + size.steps,
                learning_rate=1e-4,
                save_strategy="no",
                report_to="none",
                logging_steps=4,
                disable_tqdm=True,
                use_cpu=not gpu,
                bf16=gpu,
                gradient_checkpointing=gpu,
                **BATCH,
                **settings,
            ),
            train_dataset=load_prompts("train", 512),
            processing_class=tokenizer,
            callbacks=[times],
            rollout_func=None if size.generate else canned_rollouts(size, len(tokenizer)),
        )
        trainer.log = lambda logs, *args, **kwargs: trainer._metrics["train"].clear()
        own = time_own_functions(trainer)
        times.on_first_batch_end = own.clear
        trainer.train()
    return statistics.mean(times.seconds[4:]), sum(own) / size.steps


def measure(sizes: dict[str, Size], rounds: int) -> list[dict]:
    """For each size and variant, seconds of a step and of our share of it, and the ratios to TRL's of the same round."""
    results = []
    shuffle = random.Random(0).sample
    for name, size in sizes.items():
        measured: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
        run("TRL", size)  # warm up
        for _ in range(rounds):
            for variant in shuffle(list(VARIANTS), len(VARIANTS)):
                measured[variant].append(run(variant, size))
        for variant, values in measured.items():
            step, own = zip(*values, strict=True)
            ratios = [value / base for value, (base, _) in zip(step, measured["TRL"], strict=True)]
            results.append({"size": name, "variant": variant, "step": step, "own": own, "ratios": ratios})
            print(_row(results[-1]), flush=True)
    return results


def _row(result: dict) -> str:
    ratios, step = result["ratios"], statistics.median(result["step"])
    added, low, high = ((value - 1) * 100 for value in (statistics.median(ratios), min(ratios), max(ratios)))
    own = statistics.median(result["own"])
    cells = [result["size"], result["variant"], f"{step * 1000:.0f} ms", f"{own * 1000:.2f} ms ({own / step:.2%})"]
    return f"| {' | '.join(cells)} | {added:+.1f}% ({low:+.1f} to {high:+.1f}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file of the results (default: one in benchmarks/results)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "cpu"
    print("| size | variant | optimizer step | of which ours | step against TRL's (lowest to highest) |")
    print("|---|---|---|---|---|")
    with quiet():
        results = measure(GPU_SIZES if gpu else SIZES, options.rounds)
    environment = {name: version(name) for name in ("trl", "transformers", "torch")}
    environment |= {"python": platform.python_version(), "device": device, "threads": torch.get_num_threads()}
    file = options.output or RESULTS / f"overhead-{'cuda' if gpu else 'cpu'}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    contents = {"environment": environment, "rounds": options.rounds, "batch": BATCH, "results": results}
    file.write_text(json.dumps(contents, indent=1))


if __name__ == "__main__":
    main()
