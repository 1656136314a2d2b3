"""One run of the comparison of learning: a training on the playground, and all that is measured of it."""

import hashlib
import itertools
import math
import statistics
import subprocess
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from oracle import Oracle, first_wrong, response_tokens
from runs import Cell, short
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer
from trl_cancel.cli._quiet import quiet
from trl_cancel.diagnostics.blame import PLACES, blame_by_place, net_pushes, token_places
from trl_cancel.diagnostics.residual import prefix_ids
from trl_cancel.evaluation import continuations, pass_at_k, prompt_token_ids, rewards_of, sampling
from trl_cancel.playground import CHECKPOINTS
from trl_cancel.playground.data import load_prompts
from trl_cancel.playground.reward import answer_reward
from trl_cancel.playground.tasks import Task, task_named
from trl_cancel.playground.warm_start import warm_start
from trl_cancel.running.precision import best_precision


MADE = Path(__file__).parent / "checkpoints"
SAMPLES, PROBLEMS = 8, 128
ORACLE = "oracle"  # a run of this name gets its credit
OBSERVED = 5  # every so many optimizer steps the blame is measured; shares no factor with the updates of a generation


def commit() -> str | None:
    """The commit that is checked out, and whether the code differs from it."""

    def git(*words: str) -> str:
        command = ["git", *words]
        return subprocess.run(command, cwd=MADE.parent, capture_output=True, text=True, check=False).stdout.strip()

    changed = "-dirty" if git("status", "--porcelain", "--", ":/*.py") else ""
    return f"{git('rev-parse', '--short', 'HEAD')}{changed}" or None


COMMIT = commit()  # of the code that is imported, whatever is checked out later


def checkpoint_of(cell: Cell) -> Path:
    """The model that a run starts from."""
    return MADE / cell.start if cell.start else CHECKPOINTS[cell.task]


def make_checkpoint(start: str, task: str, steps: int) -> None:
    """Trains a model to start from that is not embedded in the package, unless it was made before."""
    if not (MADE / start).exists():
        print(f"{steps} steps of warm start on {task}, kept in {MADE / start}.", flush=True)
        unfinished = MADE / f"{start}.part"
        warm_start(unfinished, steps=steps, task=task, use_cpu=not torch.cuda.is_available())
        unfinished.rename(MADE / start)


class Budget(TrainerCallback):
    """
    Counts what is generated, and ends a training that generates further rounds when it has generated as much as one
    that does not: before the generation after which it would be further from that.

    Args:
        rounds (`int`):
            Rounds of generation that a training has.
        rollouts (`int`):
            Rollouts of a round.
        updates (`int`):
            Optimizer steps with each generation batch.
    """

    def __init__(self, rounds: int, rollouts: int, updates: int):
        self.rounds, self.rollouts, self.updates = rounds, rollouts, updates
        self.spent, self.generations = 0.0, 0
        self.tokens: list[float] = []  # generated so far, at each log

    def on_log(self, args, state, control, logs, **kwargs):
        rounds = logs.get("balance/rounds", 1) if "completions/mean_length" in logs else 0
        self.spent += rounds
        self.generations += rounds > 0
        generated = rounds * self.rollouts * logs.get("completions/mean_length", 0)
        self.tokens.append(generated + (self.tokens[-1] if self.tokens else 0))
        expected = self.spent / max(1, self.generations)
        if state.global_step % self.updates == 0 and self.spent + expected / 2 >= self.rounds:
            control.should_training_stop = True


class Blame:
    """
    Adds up, over some optimizer steps, where in wrong rollouts the push downwards lands: gross, of each rollout by
    itself, and net, after the pushes of rollouts of the same prompt on shared tokens have cancelled.
    """

    def __init__(self, trainer: CancelGRPOTrainer, task: Task):
        self.trainer, self.task = trainer, task
        self.tokenizer: PreTrainedTokenizerBase = trainer.processing_class
        self.sums = {"gross": torch.zeros(len(PLACES)), "net": torch.zeros(len(PLACES))}
        self.waiting: list[tuple[torch.Tensor, ...]] = []
        trainer._monitor.observers.append(self)

    def __call__(self, pushes: torch.Tensor, inputs: dict[str, Any]) -> None:
        if self.trainer.state.global_step % OBSERVED == 0:
            rows = [inputs[name] for name in ("prompt_ids", "completion_ids", "completion_mask", "group_ids")]
            self.waiting.append(
                (pushes.detach().cpu(), *(row.cpu() for row in rows), inputs["rollout_advantages"].cpu())
            )
            if self.trainer.accelerator.sync_gradients:
                self._add()

    def _add(self) -> None:
        """Takes an optimizer step's micro-batches together, since a group may be spread over them."""
        pushes, prompts, ids, mask, groups, advantages = (torch.cat(rows) for rows in zip(*self.waiting, strict=True))
        self.waiting.clear()
        wrong = torch.tensor([self._first_wrong(*row) for row in zip(prompts, ids, mask.bool(), strict=True)])
        where = token_places(wrong, ids.size(1))
        self.sums["gross"] += blame_by_place(pushes, where, mask.bool() & (advantages < 0).unsqueeze(1))
        self.sums["net"] += blame_by_place(net_pushes(pushes, prefix_ids(ids, mask, groups)), where, mask.bool())

    def _first_wrong(self, prompt: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> int:
        wrong = first_wrong(self.task, self.tokenizer, prompt, response_tokens(self.tokenizer, ids[mask]))
        return ids.numel() if wrong is None else wrong

    def shares(self) -> dict[str, list[float] | None]:
        """Shares of the push before, on and after the first wrong token; `None` where nothing is pushed down."""
        return {
            name: [round(share, 4) for share in (sums / sums.sum()).tolist()] if sums.sum() else None
            for name, sums in self.sums.items()
        }


def run(cell: Cell, kept: tuple[str, ...]) -> dict[str, Any]:
    """
    Trains and evaluates.

    Args:
        cell ([`Cell`]):
            The run; its settings are complete, but for what TRL has by default.
        kept (`tuple[str, ...]`):
            Metrics to keep, step by step.

    Returns:
        `dict`: The cell, what was measured of it, and its log.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started, task = time.perf_counter(), task_named(cell.task)
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = CancelGRPOConfig(output_dir=folder, seed=cell.seed, **{**cell.settings, **device_settings(cell)})
        problems = load_prompts("train", 4096, task=cell.task)
        start = checkpoint_of(cell)
        credits = [Oracle(task, AutoTokenizer.from_pretrained(start))] if cell.name == ORACLE else []
        trainer = CancelGRPOTrainer(start, answer_reward, args, problems, credits=credits)
        trainer.remove_callback(PrinterCallback)
        layout = args.layout
        updates = layout.steps_per_generation // args.gradient_accumulation_steps * args.num_iterations
        rollouts = layout.prompts_per_generation * args.num_generations
        budget = Budget(math.ceil(args.max_steps / updates), rollouts, updates)
        trainer.add_callback(budget)
        watched = Blame(trainer, task)
        trainer.train()
        trained = time.perf_counter()
        history = trainer.state.log_history[:-1]
        measured = {
            **evaluated(trainer, cell, task),
            "blame": watched.shares(),
            "steps": trainer.state.global_step,
            "rollouts": round(budget.spent * rollouts),
            "generated_tokens": round(budget.tokens[-1]),
            "entropy": statistics.mean(entry["entropy"] for entry in history[-max(1, len(history) // 10) :]),
            "seconds": {"training": round(trained - started, 1), "all": round(time.perf_counter() - started, 1)},
        }
    logs = {name: [short(entry.get(name)) for entry in history] for name in kept}
    logs["generated_tokens"] = [round(tokens) for tokens in budget.tokens[: len(history)]]
    made_with = {"model": digest(checkpoint_of(cell)), "device": device_settings(cell), "commit": COMMIT}
    made_with["cpu"] = torch.backends.cpu.get_cpu_capability()  # on which the last bits of products depend
    return {**asdict(cell), **measured, **made_with, "logs": logs}


def device_settings(cell: Cell) -> dict[str, Any]:
    """Where a model that is not embedded is trained, and how precisely: whatever the machine has."""
    precision = best_precision()
    return {"use_cpu": False, "bf16": precision.bf16, "fp16": precision.fp16} if cell.start else {}


def digest(checkpoint: Path) -> str:
    """What tells the weights of a checkpoint from others."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:12]


def evaluated(trainer: CancelGRPOTrainer, cell: Cell, task: Task) -> dict[str, Any]:
    """Accuracies on problems of the cell's split, each seed having its own, and the variety of right answers."""
    split = "tune" if cell.split == "tune" else "test"
    problems = load_prompts(split, cell.problems or PROBLEMS, seed=cell.seed, task=cell.task)
    tokenizer = trainer.processing_class
    _, greedy = answers(trainer, problems, task, 1, 0.0, cell.seed)
    ids, sampled = answers(trainer, problems, task, SAMPLES, 1.0, cell.seed)
    right = [
        [task.forms.bare(tokenizer.decode(ids)) for ids, reward in zip(several, rewards, strict=True) if reward == 1]
        for several, rewards in zip(ids, sampled.tolist(), strict=True)
    ]
    return {
        "greedy": greedy.mean().item(),
        "sampled": sampled.mean().item(),
        "pass": pass_at_k(sampled == 1, SAMPLES).mean().item(),
        "distinct": statistics.mean(len(set(several)) for several in right),
        "variety": variety([[answer.split("\n")[0] for answer in several] for several in right]),
        "flawed": flawed(task, tokenizer, problems, ids, sampled == 1),
    }


def flawed(
    task: Task, tokenizer: PreTrainedTokenizerBase, problems: Any, ids: list[list[list[int]]], right: torch.Tensor
) -> float | None:
    """The share of right answers whose work is wrong all the same, as slips may cancel; `None` without a right one."""
    found = [
        first_wrong(task, tokenizer, prompt, response_tokens(tokenizer, torch.tensor(answer))) is not None
        for prompt, several, rewards in zip(prompts_of(tokenizer, problems), ids, right.tolist(), strict=True)
        for answer, is_right in zip(several, rewards, strict=True)
        if is_right
    ]
    return statistics.mean(found) if found else None


def prompts_of(tokenizer: PreTrainedTokenizerBase, problems: Any) -> list[torch.Tensor]:
    """The token ids of each problem's prompt."""
    return [torch.tensor(ids) for ids in prompt_token_ids(tokenizer, problems["prompt"][:])]


def variety(groups: list[list[str]]) -> float | None:
    """How often two texts of a group differ, over all pairs (Gini-Simpson index); `None` without a pair."""
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    return statistics.mean(first != second for first, second in pairs) if pairs else None


def answers(
    trainer: CancelGRPOTrainer, problems: Any, task: Task, samples: int, temperature: float, seed: int
) -> tuple[list[list[list[int]]], torch.Tensor]:
    """Several answers to each problem, of shape `(P, samples)` as token ids, and their rewards."""
    tokenizer = trainer.processing_class
    rows = [row for row in problems for _ in range(samples)]
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    ids: list[list[int]] = []
    with sampling(model, seed):
        for first in range(0, len(rows), 384):
            prompts = prompt_token_ids(tokenizer, [row["prompt"] for row in rows[first : first + 384]])
            ids += continuations(model, tokenizer, prompts, task.max_completion_length, temperature)
    rewards = torch.tensor(rewards_of(answer_reward, tokenizer, rows, ids)).view(-1, samples)
    return [ids[first : first + samples] for first in range(0, len(ids), samples)], rewards
