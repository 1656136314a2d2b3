"""
What this package adds to a training step: `python benchmarks/overhead.py`.

Real runs on the playground, and runs on canned rollouts, where nothing is generated and the share of everything else is
larger. With four optimizer steps a generation batch TRL makes a pass for the old log-probs, which gives the hidden
states too; with one ("on policy") it makes none. Measured, all variants once a round in random order:

- the time of an optimizer step, and of its update phase: all but the sampling of the rollouts;
- the time spent inside this package's own functions, as a share of the update phase;
- the update phase against that of TRL's trainer in the same round, which shows what the former cannot see but is only
  as good as the machine is quiet ("TRL again" shows how quiet);
- peak memory: of the GPU, or of the process, where each run has one of its own.

Writes `benchmarks/results/overhead-<device>.json` and prints a table. About an hour on a CPU core.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import trl
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer, TokenShiftCallback
from trl_cancel import trainer as trainer_module
from trl_cancel.batch.states import StateStore
from trl_cancel.cli._quiet import quiet
from trl_cancel.pipeline import credit
from trl_cancel.playground import CHECKPOINT
from trl_cancel.playground.data import load_prompts
from trl_cancel.playground.reward import answer_reward
from trl_cancel.playground.tokenizer import build_tokenizer
from trl_cancel.playground.warm_start import build_model


RESULTS = Path(__file__).parent / "results"
SEQUENCE = {"importance_sampling_level": "sequence", "loss_type": "grpo"}
ALWAYS: dict[str, dict[str, Any] | None] = {
    "TRL": None,
    "TRL again": None,  # how far two equal things differ
    "cancellation_metrics": {"query_preserved": False},
    "nthr": {"nthr": True},
    "delta": {"delta_credit": True},
}
OFF_POLICY: dict[str, dict[str, Any] | None] = {
    "symmetric_clip": {"symmetric_clip": True},
    "dfpo min": {"group_weights": "min", **SEQUENCE},
    "token shifts of each step": {"token_shift_steps": 1},
    "delta hidden_gradient": {"delta_credit": True, "delta_proxy": "hidden_gradient"},
}
MORE: dict[str, dict[str, Any] | None] = {
    "everything off": {"query_preserved": False, "cancellation_metrics": False},
    "query_preserved": {"cancellation_metrics": False},
    "symmetric_clip score": {"symmetric_clip": True, "symmetric_clip_gradient": "score"},
    "dfpo positive_orth": {"group_weights": "positive_orth", **SEQUENCE},
    "nthr and delta": {"nthr": True, "delta_credit": True},
}


@dataclass(frozen=True)
class Size:
    """
    What is trained: changes of the architecture, length of the completions, generation batches that are timed, rollouts
    a micro-batch, whether rollouts are sampled or canned, whether each batch is used for one optimizer step only, and
    whether to try all variants.
    """

    architecture: dict[str, int]
    length: int
    batches: int
    rollouts: int = 16
    sampled: bool = False
    on_policy: bool = False
    all_variants: bool = False

    @property
    def steps_per_batch(self) -> int:
        return 1 if self.on_policy else 4

    @property
    def variants(self) -> dict[str, dict[str, Any] | None]:
        more = {} if self.on_policy else OFF_POLICY
        return {**ALWAYS, **more, **(MORE if self.all_variants else {})}

    @property
    def settings(self) -> dict[str, int]:
        return {
            "num_generations": 8,
            "per_device_train_batch_size": self.rollouts,
            "gradient_accumulation_steps": 4 if self.on_policy else 1,
            "steps_per_generation": 4,
        }


SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
}
QWEN3 = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
}
SIZES = {
    "playground (0.4M), sampled": Size({}, length=64, batches=6, sampled=True),
    "playground (0.4M), canned": Size({}, length=64, batches=6, all_variants=True),
    "playground (0.4M), canned, on policy": Size({}, length=64, batches=6, on_policy=True),
    "7M, canned": Size(SMALL, length=256, batches=1, rollouts=8),
    "7M, canned, on policy": Size(SMALL, length=256, batches=1, rollouts=8, on_policy=True),
}
GPU_SIZES = {
    "Qwen3-0.6B-shaped, canned": Size(QWEN3, length=1536, batches=2, rollouts=8),
    "Qwen3-0.6B-shaped, canned, on policy": Size(QWEN3, length=1536, batches=2, rollouts=8, on_policy=True),
}

# Where this package spends time of its own; the overridden methods spend TRL's.
OWN = {
    "_scoring": ("view",),
    "_credit": ("_with_states", "of_micro_batch"),
    "_weights": ("apply", "ahead"),
    "_monitor": ("mark_shared", "watch_loss", "end_step"),
}


class Stopwatch:
    """Seconds spent in some functions; of those that call each other, the outermost counts."""

    def __init__(self):
        self.seconds, self.running = 0.0, False

    def watch(self, owner: Any, *names: str) -> None:
        for name in names:
            setattr(owner, name, self.timed(getattr(owner, name)))

    def timed(self, function):
        def call(*args, **kwargs):
            if self.running:
                return function(*args, **kwargs)
            self.running, started = True, _now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += _now() - started
                self.running = False

        return call


class StepTimes(TrainerCallback):
    """Seconds of all optimizer steps, without those of the first generation batch, which warms up."""

    def __init__(self, warm_up: int, *others: Stopwatch):
        self.warm_up, self.others, self.seconds = warm_up, others, 0.0

    def on_step_begin(self, *args, **kwargs):
        self.started = _now()

    def on_step_end(self, args, state, *others, **kwargs):
        self.seconds += _now() - self.started
        if state.global_step == self.warm_up:
            for clock in (self, *self.others):
                clock.seconds = 0.0


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def canned_rollouts(size: Size, vocabulary: int):
    """A rollout function: a shared first half, then tokens of their own, all drawn by Zipf's law."""
    length, vocabulary = size.length, size.architecture.get("vocab_size", vocabulary)
    frequencies = 1 / torch.arange(1, vocabulary - 9)

    def rollouts(prompts, trainer):
        generator = torch.Generator().manual_seed(0)

        def words(count: int) -> list[int]:
            return (10 + torch.multinomial(frequencies, count, replacement=True, generator=generator)).tolist()

        shared, completions = words(length // 2), []
        for _ in prompts:
            own = int(torch.randint(length // 4, length // 2, (1,), generator=generator))
            completions.append(shared + words(own))
        tokenizer = trainer.processing_class
        return {
            "prompt_ids": [tokenizer(prompt[0]["content"])["input_ids"] for prompt in prompts],
            "completion_ids": completions,
            "logprobs": [[0.0] * len(completion) for completion in completions],
        }

    return rollouts


def run(name: str, variant: str) -> dict[str, float]:
    """Mean seconds of an optimizer step, of its update phase and of this package's share of it, and GiB at the peak."""
    size = {**SIZES, **GPU_SIZES}[name]
    settings = size.variants[variant]
    trainer_class, config_class = (
        (trl.GRPOTrainer, trl.GRPOConfig) if settings is None else (CancelGRPOTrainer, CancelGRPOConfig)
    )
    gpu = torch.cuda.is_available()
    tokenizer, own, sampling = build_tokenizer(), Stopwatch(), Stopwatch()
    step = StepTimes(size.steps_per_batch, own, sampling)
    torch.manual_seed(0)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    if size.sampled:
        model, reward = AutoModelForCausalLM.from_pretrained(CHECKPOINT), answer_reward
        sampling.watch(model, "generate")
        rollouts = None
    else:
        model = build_model(tokenizer, **size.architecture)
        rollouts = sampling.timed(canned_rollouts(size, len(tokenizer)))

        def reward(completion_ids, **kwargs):
            return [float(sum(ids) % 2) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model,
            reward_funcs=reward,
            args=config_class(
                output_dir=folder,
                max_completion_length=size.length,
                max_steps=(1 + size.batches) * size.steps_per_batch,
                learning_rate=1e-4,
                save_strategy="no",
                report_to="none",
                logging_steps=4,
                disable_tqdm=True,
                use_cpu=not gpu,
                bf16=gpu,
                gradient_checkpointing=gpu,
                **size.settings,
                **(settings or {}),
            ),
            train_dataset=load_prompts("train", 512),
            processing_class=tokenizer,
            rollout_func=rollouts,
        )
        trainer.add_callback(step)  # after the trainer's own, so that their time counts
        trainer.log = lambda logs, *args, **kwargs: trainer._metrics["train"].clear()
        if settings is not None:
            for stage, names in OWN.items():
                own.watch(getattr(trainer, stage), *names)
            own.watch(trainer_module, "whole_group_batches")
            own.watch(credit, "credited")
            own.watch(StateStore, "add")
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, TokenShiftCallback):
                    own.watch(callback, "on_micro_batch", "on_step_end")
        trainer.train()
    steps = size.batches * size.steps_per_batch
    return {
        "step": step.seconds / steps,
        "update": (step.seconds - sampling.seconds) / steps,
        "own": own.seconds / steps,
        "memory": (
            torch.cuda.max_memory_allocated() / 2**30
            if gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        ),
    }


def measure(name: str, variants: list[str], rounds: int) -> list[dict]:
    """For each variant what [`run`] measures, and the ratio of the update phase to TRL's of the same round."""
    results = []
    measured: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    # A process a run, so that peaks of memory do not add up and patches do not stay.
    with multiprocessing.get_context("spawn").Pool(1, initializer=_start, maxtasksperchild=1) as pool:
        for round_ in range(rounds):
            for variant in random.Random(round_).sample(list(measured), len(measured)):
                measured[variant].append(pool.apply(run, (name, variant)))
    for variant, runs in measured.items():
        found = {key: [one[key] for one in runs] for key in runs[0]}
        base = measured["TRL"]
        ratios = [one["update"] / theirs["update"] for one, theirs in zip(runs, base, strict=True)]
        more = [one["memory"] - theirs["memory"] for one, theirs in zip(runs, base, strict=True)]
        results.append({"size": name, "variant": variant, **found, "ratios": ratios, "more_memory": more})
    return results


def _start() -> None:
    warnings.simplefilter("ignore")
    quiet().__enter__()


def _row(result: dict) -> str:
    middle = {key: statistics.median(values) for key, values in result.items() if isinstance(values, list)}
    added, low, high = ((value - 1) * 100 for value in (middle["ratios"], *_range(result["ratios"])))
    cells = [
        result["size"],
        result["variant"],
        f"{middle['step'] * 1000:.0f} ms",
        f"{middle['update'] * 1000:.0f} ms",
        f"{middle['own'] * 1000:.2f} ms ({middle['own'] / middle['update']:.2%})",
        f"{added:+.1f}% ({low:+.1f} to {high:+.1f})",
        f"{middle['memory']:.2f} GiB ({middle['more_memory']:+.2f})",
    ]
    return f"| {' | '.join(cells)} |"


def _range(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", help="those to compare with TRL (default: all)")
    parser.add_argument("--output", type=Path, help="file of the results (default: one in benchmarks/results)")
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "cpu"
    environment = {name: version(name) for name in ("trl", "transformers", "torch")}
    environment |= {"python": platform.python_version(), "device": device, "threads": torch.get_num_threads()}
    file = options.output or RESULTS / f"overhead-{'cuda' if gpu else 'cpu'}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Any] = {"environment": environment, "rounds": options.rounds, "sizes": {}, "results": []}
    print("| size | variant | step | update phase | of which ours | update against TRL's (range) | peak (more) |")
    print("|---|---|---|---|---|---|---|")
    for name, size in (GPU_SIZES if gpu else SIZES).items():
        variants = [one for one in size.variants if one == "TRL" or one in (options.variants or size.variants)]
        if len(variants) == 1:
            continue
        results = measure(name, variants, options.rounds)
        print("\n".join(map(_row, results)), flush=True)
        contents["sizes"][name] = asdict(size) | size.settings
        contents["results"] += results
        file.write_text(json.dumps(contents, indent=1))


if __name__ == "__main__":
    main()
