"""
Which trust region group weights should have by default: `python benchmarks/trust_region.py`.

Trains on the playground, four optimizer steps a generation batch and every batch used twice, with sequence-level
ratios: GSPO, and group weights with each trust region. The clipping range and the learning rate are chosen for each
from the same grid, by sampled accuracy on other problems and with other seeds than those reported. Writes
`benchmarks/results/trust_region.json`, where it also takes up again what was interrupted, and prints two tables.
"""

import argparse
import itertools
import statistics
from pathlib import Path

from runs import Cell, interval, run_all


RESULTS = Path(__file__).parent / "results" / "trust_region.json"
SEQUENCE = {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2}
EPSILONS = (0.003, 0.02, 0.2)
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
TUNING_SEEDS = (100, 101)


def variants(transformations: list[str]) -> dict[str, dict]:
    """The settings that are compared, by name."""
    named = {"GSPO": {}}
    for transformation, region in itertools.product(transformations, ("none", "mask", "group")):
        named[f"{transformation}, {region}"] = {
            "group_weights": transformation,
            "group_weights_trust_region": region,
        }
    return named


def cell(name: str, settings: dict, epsilon: float, rate: float, steps: int, seed: int, split: str) -> Cell:
    chosen = {"epsilon": epsilon, "learning_rate": rate, "max_steps": steps}
    return Cell(name, {**SEQUENCE, **settings, **chosen}, seed, split)


def tuned(runs: list[dict]) -> dict[str, tuple[float, float]]:
    """The clipping range and learning rate of the best mean accuracy of each variant."""
    best: dict[str, tuple[float, tuple[float, float]]] = {}
    points: dict[tuple, list[float]] = {}
    for run in runs:
        point = run["name"], run["settings"]["epsilon"], run["settings"]["learning_rate"]
        points.setdefault(point, []).append(run["sampled"])
    for (name, *setting), accuracies in points.items():
        candidate = statistics.mean(accuracies), tuple(setting)
        best[name] = max(best.get(name, candidate), candidate)
    return {name: setting for name, (_, setting) in best.items()}


def grid_table(runs: list[dict]) -> str:
    """Mean sampled accuracy over the tuning seeds, for every point of the grid."""
    names = list(dict.fromkeys(run["name"] for run in runs))
    lines = [f"| ε | learning rate | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for epsilon, rate in itertools.product(EPSILONS, LEARNING_RATES):
        here = [
            run for run in runs if (run["settings"]["epsilon"], run["settings"]["learning_rate"]) == (epsilon, rate)
        ]
        means = [statistics.mean(run["sampled"] for run in here if run["name"] == name) for name in names]
        lines.append(f"| {epsilon:g} | {rate:g} | {' | '.join(f'{mean:.0%}' for mean in means)} |")
    return "\n".join(lines)


def table(runs: list[dict], start: float) -> str:
    """What the tuned variants reached."""
    lines = [
        "| | ε | learning rate | sampled | greedy | lowest seed | worse than before |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(run["name"] for run in runs):
        rows = [run for run in runs if run["name"] == name]
        sampled, greedy = [run["sampled"] for run in rows], [run["greedy"] for run in rows]
        setting = rows[0]["settings"]
        cells = [name, f"{setting['epsilon']:g}", f"{setting['learning_rate']:g}"]
        cells += [interval(sampled), interval(greedy), f"{min(sampled):.1%}"]
        cells.append(f"{sum(value < start for value in sampled)} of {len(rows)}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformations", nargs="+", default=["min"])
    parser.add_argument("--seeds", type=int, default=8, help="seeds to report")
    parser.add_argument("--steps", type=int, default=128, help="optimizer steps")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    compared = variants(options.transformations)
    grid = [
        cell(name, settings, epsilon, rate, options.steps, seed, "tune")
        for seed in TUNING_SEEDS
        for epsilon, rate in itertools.product(EPSILONS, LEARNING_RATES)
        for name, settings in compared.items()
    ]
    tuning = run_all(grid, options.output, options.jobs)
    chosen = tuned(tuning)
    reported = [
        cell(name, settings, *chosen[name], options.steps, seed, "test")
        for seed in range(options.seeds)
        for name, settings in compared.items()
    ]
    untrained = [Cell("untrained", {"max_steps": 1, "learning_rate": 0.0}, seed) for seed in range(options.seeds)]
    before = statistics.mean(run["sampled"] for run in run_all(untrained, options.output, options.jobs))
    print(f"\nTuning, mean sampled accuracy over {len(TUNING_SEEDS)} seeds:\n\n{grid_table(tuning)}\n")
    print(f"{options.seeds} other seeds, mean ± 95% interval; before the training {before:.1%}:\n")
    print(table(run_all(reported, options.output, options.jobs), before))


if __name__ == "__main__":
    main()
