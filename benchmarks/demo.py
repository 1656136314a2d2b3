"""
The demo over several seeds and methods: `python benchmarks/demo.py`.

Runs `trl-cancel demo` for every combination, two at a time, writes `benchmarks/results/demo.json` and prints the table
of README.md. Twelve runs take about nine minutes on two cores.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path


RESULTS = Path(__file__).parent / "results" / "demo.json"


def run(method: str, seed: int, steps: int) -> dict:
    """One run of the demo; its results, and the time of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trl_cancel", "demo", "--output", folder, "--method", method]
        command += ["--seed", str(seed), "--steps", str(steps)]
        time_file = Path(folder) / "time"
        timed = [
            "bash",
            "-c",
            f'TIMEFORMAT=%R; {{ time "$@" 2>/dev/null >/dev/null; }} 2>{time_file}',
            "bash",
            *command,
        ]
        subprocess.run(timed, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        results = json.loads((Path(folder) / "all_results.json").read_text())
        return {"method": method, "seed": seed, "command_seconds": float(time_file.read_text()), **results}


def table(runs: list[dict]) -> str:
    """Means over seeds, with the lowest and the highest."""
    lines = [
        "| method | seeds | greedy before | greedy after | sampled before | sampled after | residual | command |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(run["method"] for run in runs):
        rows = [run for run in runs if run["method"] == method]
        cells = [method, str(len(rows))]
        for how in ("greedy", "sampled"):
            cells += [_spread([run[when][how][0] for run in rows], "{:.1%}") for when in ("before", "after")]
        cells.append(_spread([run["residual"] for run in rows], "{:.2g}"))
        cells.append(_spread([run["command_seconds"] for run in rows], "{:.0f} s"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float], form: str) -> str:
    mean, low, high = (form.format(value) for value in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["grpo", "query-preserved", "grpo-fix", "positive-only"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    cells = [(method, seed, options.steps) for seed in options.seeds for method in options.methods]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = sorted(
            pool.map(lambda cell: run(*cell), cells),
            key=lambda run: (options.methods.index(run["method"]), run["seed"]),
        )
    environment = {name: version(name) for name in ("trl", "transformers", "torch")}
    environment |= {"python": platform.python_version(), "machine": platform.machine(), "jobs": options.jobs}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"environment": environment, "steps": options.steps, "runs": runs}, indent=1))
    print(table(runs))


if __name__ == "__main__":
    main()
