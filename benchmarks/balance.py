"""
What reward-balanced batching and dynamic sampling do where prompts are too hard or too easy: `python
benchmarks/balance.py`.

First, whether optimizer steps hold a quarter of either sign, on problems of which 90% are hopeless and of which 90% are
solved. Then what is learned from equally many generated tokens, on problems of which half are hopeless, by query-preserved
GRPO, with groups without variance replaced, and with balanced steps. The learning rate of each is chosen from the same
grid, on other problems and with other seeds than those reported. Writes `benchmarks/results/balance.json`, where it also
takes up again what was interrupted, and prints the tables. About half an hour on two cores.

`--cost` prints what choosing groups and spreading them over steps cost instead, in seconds.
"""

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import Cell, interval, run_all

from trl_cancel.batching import balanced_order, select_balanced_groups


RESULTS = Path(__file__).parent / "results" / "balance.json"
SHARE = 0.25
PLAIN: dict[str, object] = {}
BALANCED = {"reward_balance": SHARE, "max_generation_rounds": 8}
COMPARED = {
    "GRPO, whole groups": PLAIN,
    "filter_zero_variance": {"filter_zero_variance": True, "max_generation_rounds": 8},
    "reward_balance": BALANCED,
}
LEARNING_RATES = (1e-4, 2e-4, 4e-4)
TUNING_SEEDS = (100, 101)
SIGNS = ("cancel/positive_fraction", "cancel/negative_fraction")
KEPT = (*SIGNS, "balance/satisfied", "balance/rounds", "balance/discarded_fraction", "reward", "num_tokens")


def met(run: dict) -> list[bool]:
    """For each optimizer step, whether both signs have their share."""
    return [min(pair) >= SHARE - 1e-4 for pair in zip(*(run["logs"][sign] for sign in SIGNS), strict=True)]


def known(run: dict, name: str) -> list[float]:
    return [value for value in run["logs"][name] if value is not None]


def target_table(runs: list[dict]) -> str:
    lines = [
        "| problems | | optimizer steps with a quarter of either sign | logged as satisfied | rounds a generation |",
        "|---|---|---|---|---|",
    ]
    for mixture, name in dict.fromkeys((run["mixture"], run["name"]) for run in runs):
        rows = [run for run in runs if (run["mixture"], run["name"]) == (mixture, name)]
        cells = [mixture, name, interval([statistics.mean(met(run)) for run in rows], "{:.0%}")]
        for metric, form in (("balance/satisfied", "{:.0%}"), ("balance/rounds", "{:.1f}")):
            values = [statistics.mean(known(run, metric)) for run in rows if known(run, metric)]
            cells.append(interval(values, form) if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison_table(runs: list[dict], before: float) -> str:
    lines = [
        "| | learning rate | tokens | optimizer steps | rounds | sampled | greedy | worse than before |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(run["name"] for run in runs):
        rows = [run for run in runs if run["name"] == name]
        rounds = [statistics.mean(known(run, "balance/rounds") or [1]) for run in rows]
        tokens = statistics.mean(max(known(run, "num_tokens")) for run in rows)
        cells = [name, f"{rows[0]['settings']['learning_rate']:g}", f"{tokens:,.0f}"]
        cells += [f"{statistics.mean(run['steps'] for run in rows):.0f}", f"{statistics.mean(rounds):.1f}"]
        cells += [interval([run[how] for run in rows]) for how in ("sampled", "greedy")]
        cells.append(f"{sum(run['sampled'] < before for run in rows)} of {len(rows)}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grid_table(runs: list[dict]) -> str:
    names = list(dict.fromkeys(run["name"] for run in runs))
    lines = [f"| learning rate | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for rate in LEARNING_RATES:
        means = [f"{mean_accuracy(runs, name, rate):.0%}" for name in names]
        lines.append(f"| {rate:g} | {' | '.join(means)} |")
    return "\n".join(lines)


def mean_accuracy(runs: list[dict], name: str, rate: float) -> float:
    here = [run for run in runs if run["name"] == name and run["settings"]["learning_rate"] == rate]
    return statistics.mean(run["sampled"] for run in here)


def measured(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, its seconds, and its peak of memory in MB (on a second run, since counting takes time)."""
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return result, seconds, peak


def cost_table(kept: int = 512, size: int = 16, steps: int = 64) -> str:
    """Four rounds of generation, of which a quarter is kept; pools in which a target can and cannot be reached."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(4 * kept, generator=generator)
    right = torch.binomial(torch.full((4 * kept,), float(size)), shares, generator=generator).long()
    wrong = ((size + 1 - right) * torch.rand(4 * kept, generator=generator)).long()
    hopeless = right * (shares > 0.9)
    pools = {
        "90% hopeless": (hopeless, size - hopeless),
        "all shares of right ones": (right, size - right),
        "even numbers of right ones": (right // 2 * 2, size - right // 2 * 2),
        "some without advantage": (right, wrong),
    }
    lines = ["| groups | target | reached | seconds | peak MB | steps filled | seconds | peak MB |", "|---" * 8 + "|"]
    for name, (positives, negatives) in pools.items():
        for share in (0.1, 0.25, 0.4, 0.5):
            (chosen, met), seconds, peak = measured(
                lambda p=positives, n=negatives, share=share: select_balanced_groups(p, n, kept, size, share)
            )
            of_chosen = positives[chosen], negatives[chosen]
            (_, filled), *cost = measured(
                lambda counts=of_chosen, share=share: balanced_order(torch.arange(kept), *counts, steps, size, share)
            )
            cells = [name, f"{share:.0%}", "yes" if met else "no", f"{seconds:.3f}", f"{peak:.1f}"]
            cells += [f"{filled} of {steps}", f"{cost[0]:.3f}", f"{cost[1]:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="seeds of the comparison")
    parser.add_argument("--tokens", type=int, default=150_000, help="budget of the comparison")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--cost", action="store_true", help="only what choosing and spreading groups cost")
    options = parser.parse_args()
    if options.cost:
        print(f"512 of 2048 groups of 16 are chosen, and spread over 64 steps:\n\n{cost_table()}")
        return

    def compared(name: str, rate: float, seed: int, split: str) -> Cell:
        settings = {**COMPARED[name], "learning_rate": rate, "max_steps": 400}
        return Cell(name, settings, seed, split, "half hopeless", options.tokens)

    def run(cells: list[Cell]) -> list[dict]:
        return run_all(cells, options.output, options.jobs, KEPT)

    short = {"learning_rate": 1e-4, "max_steps": 32}
    targets = [
        Cell(name, {**settings, **short}, seed, mixture=mixture)
        for mixture in ("90% hopeless", "90% solved")
        for name, settings in (("GRPO, whole groups", PLAIN), ("reward_balance", BALANCED))
        for seed in range(3)
    ]
    print(f"\n3 seeds, means and 95% intervals:\n\n{target_table(run(targets))}\n", flush=True)
    tuning = run(
        [compared(name, rate, s, "tune") for s in TUNING_SEEDS for rate in LEARNING_RATES for name in COMPARED]
    )
    best = {name: max(LEARNING_RATES, key=lambda rate: mean_accuracy(tuning, name, rate)) for name in COMPARED}
    reported = run([compared(name, best[name], s, "test") for s in range(options.seeds) for name in COMPARED])
    untrained = run([Cell("untrained", {"max_steps": 1, "learning_rate": 0.0}, s) for s in range(options.seeds)])
    before = statistics.mean(one["sampled"] for one in untrained)
    print(f"Tuning, mean sampled accuracy over {len(TUNING_SEEDS)} seeds:\n\n{grid_table(tuning)}\n")
    print(f"{options.seeds} other seeds, {options.tokens} tokens each; before the training {before:.1%}:\n")
    print(comparison_table(reported, before))


if __name__ == "__main__":
    main()
