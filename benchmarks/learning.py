"""
Which method learns more from the same rollouts: `python benchmarks/learning.py`.

Trains on the playground's tasks with every method, in two regimes: on policy, with one update a generation batch, and
off policy, with two passes of four updates over each. All methods of a regime start from the same model, see the same
prompts in the same order, generate equally many rollouts and make equally many optimizer steps (those that generate
further rounds may make fewer). The learning rate of each is chosen from the same grid, by sampled accuracy on
other problems and with other seeds than those reported; where the best is at the end of the grid, the grid goes on, and
the best and those beside it are tried with more seeds. What comes out best is tried again with seeds that nothing was
seen of before, also at the others' learning rates.

Every run is written to `benchmarks/results/learning/` with its settings and its log, at once; what is there is not run
again. Then `docs/results.md` and its figures are written from all runs there are. `--check METHOD` runs one cell again
and says whether its numbers are those of the file.
"""

import argparse
import itertools
import json
import math
import os
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from learning_report import PAGE, Comparison, draw, write_page
from learning_run import ORACLE, make_checkpoint, run
from runs import PLAYGROUND, Cell, RunsFailedError, run_all

from trl_cancel.methods import complete_settings
from trl_cancel.playground import CHECKPOINTS, NAME, RICH, VARIED
from trl_cancel.playground.tasks import task_named


RESULTS = Path(__file__).parent / "results" / "learning"
# Ratios of whole sequences vary less than those of tokens; in trust_region.py 0.02 was best for DFPO, nearly for GSPO.
SEQUENCE_CLIP = {"epsilon": 0.02}
BASELINE, UNTRAINED = "GRPO", "untrained"


def method(name: str) -> dict[str, Any]:
    """The settings of a named method; whether groups stay whole is said, where it is left to the sizes, which allow it."""
    settings = complete_settings(name)
    return {**settings, "query_preserved": settings["query_preserved"] is not False}


COMPARED: dict[str, dict[str, Any]] = {
    BASELINE: method("grpo"),
    "GRPO, loss_type grpo": {**method("grpo"), "loss_type": "grpo"},
    "Pos Only": {**method("positive-only"), "query_preserved": False},
    "entropy mask": {**method("grpo"), "top_entropy_quantile": 0.2},
    "SAPO": {**method("grpo"), "loss_type": "sapo"},
    "GSPO": {**method("gspo"), **SEQUENCE_CLIP},
    "query-preserved": method("query-preserved"),
    "GRPO-fix": method("grpo-fix"),
    "DFPO min": {**method("dfpo-min"), **SEQUENCE_CLIP},
    "DFPO orth": {**method("dfpo-orth"), **SEQUENCE_CLIP},
    "DFPO positive_orth": {**method("dfpo-positive-orth"), **SEQUENCE_CLIP},
    "NTHR": method("nthr"),
    "NTHR, random": method("nthr-random"),
    "DelTA": method("delta"),
    "DelTA, random": method("delta-random"),
    "reward-balanced": method("reward-balanced"),
    "dynamic sampling": method("dynamic-sampling"),
    "GRPO-fix + DelTA": {**method("grpo-fix"), "delta_credit": True},
    "NTHR + DelTA": {**method("nthr"), "delta_credit": True},
    "Pos Only + DelTA": {**method("positive-only"), "delta_credit": True, "query_preserved": False},
    ORACLE: method("query-preserved"),
}
# Of a method, the one that lacks just what it adds, where that is not the baseline.
CONTROLS = {
    "GRPO-fix": "query-preserved",
    "DFPO min": "GSPO",
    "DFPO orth": "GSPO",
    "DFPO positive_orth": "GSPO",
    "NTHR": "NTHR, random",
    "DelTA": "DelTA, random",
    "reward-balanced": "query-preserved",
    "dynamic sampling": "query-preserved",
    "GRPO-fix + DelTA": "GRPO-fix",
    "NTHR + DelTA": "NTHR",
    "Pos Only + DelTA": "Pos Only",
}
REGIMES: dict[str, dict[str, Any]] = {
    "off-policy": {**PLAYGROUND, "num_iterations": 2, "max_steps": 64},
    "on-policy": {
        **PLAYGROUND,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "max_steps": 60,
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
# The claims that the reported seeds led to, tried again with others.
CONFIRMED, FIRST_FRESH_SEED = (BASELINE, "Pos Only", "Pos Only + DelTA"), 300
LIMITS = (1e-6, 4e-3)  # of learning rates
TUNING_SEEDS, FIRST_SEED = range(100, 106), 200  # seeds below these have chosen settings in other experiments
TUNED_FIRST = 2  # seeds that every learning rate is tried with; only the best and those beside it are with all
KEPT = ("reward", "entropy", "cancel/shared_prefix_residual", "grad_norm", "balance/rounds")
FOLLOWED = (BASELINE, "Pos Only", "NTHR", "DelTA", "GRPO-fix", "DFPO min")  # in the figures of rewards


@dataclass(frozen=True)
class Setting:
    """
    A task to compare on.

    Args:
        title, short (`str`):
            What the page calls it, and what a cell of a table does.
        rates (`tuple[float, ...]`):
            Learning rates to begin with.
    """

    title: str
    short: str
    rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4)


SETTINGS = {
    VARIED: Setting("Responses of varied form, with filler", "varied"),
    NAME: Setting("The plain chains", "plain"),
    RICH: Setting(
        "38 million parameters, longer and more varied problems",
        "rich",
        rates=(1e-5, 2e-5, 4e-5),
    ),
}


def methods_of(regime: str) -> list[str]:
    return [name for name in COMPARED if regime != "on-policy" or name not in SAME_ON_POLICY]


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


def next_runs(rates: dict[float, list[float]]) -> list[tuple[float, int]]:
    """
    What tuning takes next, learning rates and seeds: a few seeds until the best is between two others, then all of them
    for these three; nothing when that is done.
    """
    if (beside := next_rate(rates)) is not None:
        return [(beside, seed) for seed in TUNING_SEEDS[:TUNED_FIRST]]
    grid, best = sorted(rates), best_rate(rates)
    around = [rate for rate in grid if abs(grid.index(rate) - grid.index(best)) <= 1]
    return [(rate, seed) for rate in around for seed in TUNING_SEEDS[len(rates[rate]) :]]


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal, but for the rounding of numbers, which differs between machines."""
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return isinstance(other, float) and math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6)
    return one == other


@dataclass(frozen=True)
class Strand:
    """
    All runs on one task in one regime.

    Args:
        task (`str`):
            Name of the task.
        regime (`str`):
            Name of the regime.
        results (`Path`):
            Folder of the results.
        jobs (`int`):
            Runs at a time.
        steps (`int`, *optional*):
            Optimizer steps, to try things; those of the regime if not given.
        given_rates (`tuple[float, ...]`, *optional*):
            Learning rates to begin with, to try things; those of the task if not given.
        warm_start_steps (`int`, *optional*):
            Steps of the model that the runs start from, where none is embedded; those of the task if not given.
        problems (`int`, *optional*):
            Problems to evaluate on, to try things.
        failures (`list[str]`, *optional*):
            Filled with what failed.
    """

    task: str
    regime: str
    results: Path = RESULTS
    jobs: int = 1
    steps: int | None = None
    given_rates: tuple[float, ...] = ()
    warm_start_steps: int | None = None
    problems: int | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def start(self) -> str:
        """Name of the model that all runs start from, empty for the embedded one."""
        return "" if self.task in CHECKPOINTS else f"{self.task}-{self.warm_start}"

    @property
    def warm_start(self) -> int:
        return self.warm_start_steps or task_named(self.task).warm_start_steps

    @property
    def rates(self) -> tuple[float, ...]:
        return self.given_rates or SETTINGS[self.task].rates

    @property
    def file(self) -> Path:
        return self.results / f"{self.task}-{self.regime}.json"

    def runs(self) -> list[dict[str, Any]]:
        """All runs that were finished so far."""
        return json.loads(self.file.read_text())["runs"] if self.file.exists() else []

    def run(self, cells: list[tuple[str, float, int]], split: str) -> list[dict[str, Any] | None]:
        """The results of some cells, each a name, a learning rate and a seed; `None` for those that failed."""
        made = [
            replace(cell(self.task, self.regime, *one, split), start=self.start, problems=self.problems)
            for one in cells
        ]
        if self.steps:
            made = [replace(one, settings={**one.settings, "max_steps": self.steps}) for one in made]
        try:
            return list(run_all(made, self.file, self.jobs, KEPT, run))
        except RunsFailedError as error:
            self.failures.append(str(error))
            return error.results

    def tune(self, names: list[str]) -> dict[str, float]:
        """The best learning rate of each method; a grid of one is taken as it is."""
        if len(self.rates) == 1:
            return dict.fromkeys(names, self.rates[0])
        grid: dict[str, dict[float, list[float]]] = {name: {} for name in names}
        wanted = [(name, rate, seed) for seed in TUNING_SEEDS[:TUNED_FIRST] for name in names for rate in self.rates]
        while wanted:
            for (name, rate, _), result in zip(wanted, self.run(wanted, "tune"), strict=True):
                grid[name].setdefault(rate, []).append(result["sampled"] if result else 0.0)
            wanted = [(name, rate, seed) for name, rates in grid.items() for rate, seed in next_runs(rates)]
        return {name: best_rate(rates) for name, rates in grid.items()}

    def compare(self, methods: list[str], seeds: int, fresh_seeds: int = 0) -> None:
        """
        Tunes, then makes the runs that are reported, seed by seed, so that whatever is there can be paired; then those
        with fresh seeds, of each method at the learning rates of all of them.
        """
        rates = {UNTRAINED: 0.0, **self.tune([name for name in methods if name in methods_of(self.regime)])}
        seeds_reported = range(FIRST_SEED, FIRST_SEED + seeds)
        self.run([(*one, seed) for seed in seeds_reported for one in rates.items()], "test")
        names = [name for name in CONFIRMED if name in rates]
        seeds_fresh = range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + fresh_seeds)
        of_any = sorted({rates[name] for name in names})
        if fresh := [(name, rate, seed) for seed in seeds_fresh for name in names for rate in of_any]:
            self.run(fresh, "fresh")

    def check(self, name: str, seed: int) -> bool:
        """Makes a reported run again; whether it measures and logs what the file says."""
        found = [one for one in self.runs() if (one["name"], one["seed"], one["split"]) == (name, seed, "test")]
        if not found:
            raise SystemExit(f"{self.file.name} holds no reported run of {name!r} with seed {seed}.")
        (before,) = found
        made = cell(self.task, self.regime, name, before["settings"]["learning_rate"], seed, "test")
        made = replace(made, settings=before["settings"], start=before["start"], problems=before.get("problems"))
        again = json.loads(json.dumps(run(made, KEPT)))
        differing = [
            key for key in before if key not in ("seconds", "commit", "cpu") and not same(before[key], again[key])
        ]
        print(f"{name}, seed {seed}: sampled {before['sampled']:.2%} in the file, {again['sampled']:.2%} now.")
        print(
            f"At commit {before['commit']} on {before.get('cpu', '?')} then, at {again['commit']} on {again['cpu']} now."
        )
        print(f"Different: {', '.join(differing)}." if differing else "Everything but the time is the same.")
        return not differing


def write_results(results: Path) -> None:
    """The page and its figures, from all runs there are."""
    comparisons, figures = [], []
    for (task, setting), regime in itertools.product(SETTINGS.items(), REGIMES):
        strand = Strand(task, regime, results)
        runs = strand.runs()
        if any(one["name"] == BASELINE and one["split"] == "test" for one in runs):
            left_out = SAME_ON_POLICY if regime == "on-policy" else {}
            controls = {name: left_out.get(control, control) for name, control in CONTROLS.items()}
            titles = (f"{setting.title}, {regime}", f"{setting.short}, {regime}")
            comparisons.append(Comparison(*titles, runs, BASELINE, UNTRAINED, controls))
            figures.append(f"images/results-{strand.file.stem}.png")
            draw(comparisons[-1], PAGE.parent / figures[-1], FOLLOWED)
    superseded = results / "superseded.json"
    if comparisons:
        write_page(comparisons, figures, json.loads(superseded.read_text())["runs"] if superseded.exists() else ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[VARIED, NAME], choices=SETTINGS)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=REGIMES)
    parser.add_argument("--methods", nargs="+", default=list(COMPARED), choices=COMPARED, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=8, help="seeds to report (default: %(default)s)")
    parser.add_argument("--fresh", type=int, default=12, help="fresh seeds for what was best (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, help=f"runs at a time (default: one a core; one for {RICH}, which may take a GPU)"
    )
    parser.add_argument("--check", metavar="METHOD", choices=COMPARED, help="run one cell again")
    parser.add_argument("--check-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--report", action="store_true", help="only write the page, from the runs there are")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run, to try things in another folder")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=(), help="the same of the learning rates; one is taken"
    )
    parser.add_argument("--warm-start-steps", type=int, help=f"the same of the model for {RICH}")
    parser.add_argument("--problems", type=int, help="the same of the problems to evaluate on")
    options = parser.parse_args()
    tried = [name for name in ("steps", "rates", "warm_start_steps", "problems") if getattr(options, name)]
    if tried and options.results == RESULTS:
        parser.error(f"--{tried[0].replace('_', '-')} is for trying things: give another folder with --results.")
    if options.check and len(options.tasks) * len(options.regimes) > 1:
        parser.error("--check takes one of --tasks and one of --regimes.")
    failures: list[str] = []
    for task, regime in itertools.product(options.tasks, options.regimes):
        strand = Strand(
            task,
            regime,
            options.results,
            options.jobs or (len(os.sched_getaffinity(0)) if task in CHECKPOINTS else 1),
            options.steps,
            tuple(options.rates),
            options.warm_start_steps,
            options.problems,
            failures,
        )
        if options.check:
            raise SystemExit(not strand.check(options.check, options.check_seed))
        if not options.report:
            print(f"\n{task}, {regime}\n", flush=True)
            if strand.start:
                make_checkpoint(strand.start, task, strand.warm_start)
            strand.compare(options.methods, options.seeds, options.fresh)
    if options.results == RESULTS:
        write_results(options.results)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
