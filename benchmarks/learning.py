"""
Which method learns more from the same compute: `python benchmarks/learning.py`.

Trains on the playground's tasks with every method, in two regimes: on policy, with one update a generation batch, and
off policy, with four updates a generation batch that is used twice. All methods of a regime start from the same model,
see the same prompts in the same order, generate equally many rollouts and make equally many optimizer steps (those that
generate further rounds make fewer steps). The learning rate of each is chosen from the same grid, by sampled accuracy on
other problems and with other seeds than those reported; where the best is at the end of the grid, the grid goes on.

Every run is written to `benchmarks/results/learning/` with its settings and its log, at once; what is there is not run
again. Then `docs/results.md` and its figures are written from all runs there are. `--check METHOD` runs one cell again
and says whether its numbers are those of the file.
"""

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

from learning_run import run
from runs import PLAYGROUND, Cell, run_all

from trl_cancel.methods import complete_settings
from trl_cancel.playground import NAME, VARIED
from trl_cancel.playground.tasks import task_named


RESULTS = Path(__file__).parent / "results" / "learning"
# Ratios of whole sequences vary less than those of tokens; 0.02 was best, or equal to it, in trust_region.py.
SEQUENCE = {"epsilon": 0.02}
BASELINE, UNTRAINED = "GRPO", "untrained"
COMPARED: dict[str, dict[str, Any]] = {
    BASELINE: complete_settings("grpo"),
    "GRPO, loss_type grpo": {**complete_settings("grpo"), "loss_type": "grpo"},
    "Pos Only": {**complete_settings("positive-only"), "query_preserved": False},
    "entropy mask": {**complete_settings("grpo"), "top_entropy_quantile": 0.2},
    "SAPO": {**complete_settings("grpo"), "loss_type": "sapo"},
    "GSPO": {**complete_settings("gspo"), **SEQUENCE, "query_preserved": False},
    "query-preserved": complete_settings("query-preserved"),
    "GRPO-fix": complete_settings("grpo-fix"),
    "DFPO min": {**complete_settings("dfpo-min"), **SEQUENCE},
    "DFPO orth": {**complete_settings("dfpo-orth"), **SEQUENCE},
    "DFPO positive_orth": {**complete_settings("dfpo-positive-orth"), **SEQUENCE},
    "NTHR": complete_settings("nthr"),
    "NTHR, random": complete_settings("nthr-random"),
    "DelTA": complete_settings("delta"),
    "DelTA, random": complete_settings("delta-random"),
    "reward-balanced": complete_settings("reward-balanced"),
    "dynamic sampling": complete_settings("dynamic-sampling"),
    "GRPO-fix + DelTA": {**complete_settings("grpo-fix"), "delta_credit": True},
    "NTHR + DelTA": {**complete_settings("nthr"), "delta_credit": True},
    "Pos Only + DelTA": {**complete_settings("positive-only"), "delta_credit": True},
}
REGIMES: dict[str, dict[str, Any]] = {
    "off-policy": {**PLAYGROUND, "num_iterations": 2, "max_steps": 80},
    "on-policy": {
        **PLAYGROUND,
        "per_device_train_batch_size": 64,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "max_steps": 40,
    },
}
# With one update a generation batch all ratios are 1, and these are the other method to the last bit or to rounding.
SAME_ON_POLICY = {
    "query-preserved": BASELINE,
    "GRPO-fix": BASELINE,
    "GRPO-fix + DelTA": "DelTA",
    "SAPO": "GRPO, loss_type grpo",
    "GSPO": "GRPO, loss_type grpo",
    "DFPO min": "GRPO, loss_type grpo",
    "DFPO orth": "GRPO, loss_type grpo",
    "DFPO positive_orth": "GRPO, loss_type grpo",
}
LEARNING_RATES = (1e-4, 2e-4, 4e-4)
LIMITS = (1e-5, 4e-3)
TUNING_SEEDS = (100, 101)
KEPT = ("reward", "entropy", "num_tokens", "cancel/shared_prefix_residual", "grad_norm")
KEPT_OF_ROUNDS = ("balance/rounds",)
STRANDS = [(task, regime) for task in (VARIED, NAME) for regime in REGIMES]


def methods_of(regime: str) -> list[str]:
    return [name for name in COMPARED if regime != "on-policy" or name not in SAME_ON_POLICY]


def file_of(task: str, regime: str) -> Path:
    return RESULTS / f"{task}-{regime}.json"


def cell(task: str, regime: str, name: str, rate: float, seed: int, split: str) -> Cell:
    settings = {**REGIMES[regime], "max_completion_length": task_named(task).max_completion_length}
    settings |= {"max_steps": 1} if name == UNTRAINED else COMPARED[name]
    return Cell(name, {**settings, "learning_rate": rate}, seed, split, task=task)


def best_rate(rates: dict[float, list[float]]) -> float:
    """The learning rate with the highest mean accuracy over the tuning seeds."""
    return max(rates, key=lambda rate: statistics.mean(rates[rate]))


def next_rate(rates: dict[float, list[float]]) -> float | None:
    """The learning rate to try beside the best one, if that is at the end of the grid."""
    best = best_rate(rates)
    beside = best / 2 if best == min(rates) else best * 2 if best == max(rates) else None
    return beside if beside is not None and LIMITS[0] <= beside <= LIMITS[1] else None


class Strand:
    """
    All runs of one task in one regime.

    Args:
        task (`str`):
            Name of the task.
        regime (`str`):
            Name of the regime.
        methods (`list[str]`):
            Methods to run.
        jobs (`int`):
            Runs at a time.
    """

    def __init__(self, task: str, regime: str, methods: list[str], jobs: int):
        self.task, self.regime, self.jobs = task, regime, jobs
        self.methods = [name for name in methods if name in methods_of(regime)]

    def run(self, cells: list[tuple[str, float, int, str]]) -> list[dict[str, Any]]:
        kept = (*KEPT, *KEPT_OF_ROUNDS)
        made = [cell(self.task, self.regime, *one) for one in cells]
        return run_all(made, file_of(self.task, self.regime), self.jobs, kept, run)

    def tune(self) -> dict[str, float]:
        """The best learning rate of each method."""
        grid: dict[str, dict[float, list[float]]] = {name: {} for name in self.methods}
        wanted = [(name, rate) for name in self.methods for rate in LEARNING_RATES]
        while wanted:
            cells = [(name, rate, seed, "tune") for seed in TUNING_SEEDS for name, rate in wanted]
            for result in self.run(cells):
                grid[result["name"]].setdefault(result["settings"]["learning_rate"], []).append(result["sampled"])
            beside = {name: next_rate(rates) for name, rates in grid.items()}
            wanted = [(name, rate) for name, rate in beside.items() if rate is not None]
        return {name: best_rate(rates) for name, rates in grid.items()}

    def report(self, seeds: int) -> None:
        """The runs that are reported: seed by seed, so that whatever is there can be compared in pairs."""
        rates = self.tune()
        names = [UNTRAINED, *self.methods]
        self.run([(name, rates.get(name, 0.0), seed, "test") for seed in range(seeds) for name in names])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[VARIED, NAME], choices=[VARIED, NAME])
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=REGIMES)
    parser.add_argument("--methods", nargs="+", default=list(COMPARED), choices=COMPARED, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=8, help="seeds to report")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--tune-only", action="store_true", help="stop before the seeds that are reported")
    options = parser.parse_args()
    for task in options.tasks:
        for regime in options.regimes:
            strand = Strand(task, regime, options.methods, options.jobs)
            print(f"\n{task}, {regime}\n", flush=True)
            if options.tune_only:
                print({name: f"{rate:g}" for name, rate in strand.tune().items()}, flush=True)
            else:
                strand.report(options.seeds)


if __name__ == "__main__":
    main()
