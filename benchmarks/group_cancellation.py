"""
How much of the push on shared tokens group weights leave: `python benchmarks/group_cancellation.py`.

Trains on the playground with whole groups and every generation batch used four times, so that ratios leave 1, with
the same data, learning rate and clipping range for all. Residual and asymmetry are means over all optimizer steps but
the first with each part of a generation batch, whose ratios are still 1 or nearly so. Writes
`benchmarks/results/group_cancellation.json`, where it also takes up again what was interrupted, and prints a table.
About six minutes on two cores.
"""

import argparse
import statistics
from pathlib import Path

from runs import Cell, interval, run_all


RESULTS = Path(__file__).parent / "results" / "group_cancellation.json"
SEQUENCE = {"importance_sampling_level": "sequence"}
METHODS = {
    "GRPO": {"importance_sampling_level": "token"},
    "GSPO": SEQUENCE,
    **{
        f"{transformation}, {region}": {
            **SEQUENCE,
            "group_weights": transformation,
            "group_weights_trust_region": region,
        }
        for region in ("none", "mask")
        for transformation in ("min", "orth", "positive_orth", "rebalance")
    },
}
# dapo weighs all tokens alike, so that nothing but the ratios keeps shared tokens from cancelling.
COMMON = {"num_iterations": 4, "loss_type": "dapo", "epsilon": 0.2, "learning_rate": 1e-4}
METRICS = ("cancel/shared_prefix_residual", "cancel/asymmetry", "cancel/asymmetry_before")
STEPS_PER_BATCH = 4  # optimizer steps with each generation batch, in each iteration


def off_policy_mean(run: dict, metric: str) -> float:
    """The mean of a metric over the steps of the second to the last iteration."""
    iterations = run["settings"]["num_iterations"]
    moved = [
        value
        for step, value in enumerate(run["logs"][metric])
        if step % (STEPS_PER_BATCH * iterations) >= STEPS_PER_BATCH and value is not None
    ]
    return statistics.mean(moved)


def table(runs: list[dict]) -> str:
    """Means over seeds with their intervals."""
    lines = ["| | residual | asymmetry | of it before | accuracy, sampled |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        rows = [run for run in runs if run["name"] == name]
        cells = [name]
        for metric in METRICS:
            known = any(value is not None for value in rows[0]["logs"][metric])
            cells.append(interval([off_policy_mean(run, metric) for run in rows], "{:.3g}") if known else "")
        cells.append(interval([run["sampled"] for run in rows]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=64, help="optimizer steps")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the results (default: %(default)s)")
    options = parser.parse_args()
    cells = [
        Cell(name, {**COMMON, **settings, "max_steps": options.steps}, seed)
        for seed in range(options.seeds)
        for name, settings in METHODS.items()
    ]
    print(f"\n{table(run_all(cells, options.output, options.jobs, METRICS))}")


if __name__ == "__main__":
    main()
