"""A random search over configurations: `python -m tests.search --seed S --configurations 300 [--processes 2]`."""

import argparse
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..distributed.engines import start
from .report import Report, reproduction
from .search import TRAINS, Outcome
from .settings import draw
from .worker import quiet_and_quick, search


def in_processes(
    seed: Any, indices: range, shrink: int
) -> Iterator[tuple[int, Outcome, dict[str, tuple[dict[str, Any], str]]]]:
    """As `search`, in launches of two processes on gloo: one launch, and another one after each crash."""
    first = indices.start
    with tempfile.TemporaryDirectory() as folder:
        while first < indices.stop:
            arguments = (seed, first, indices.stop, folder, shrink)
            with ThreadPoolExecutor(1) as pool:
                launch = pool.submit(start, "two", "tests.search.worker", *arguments, timeout=7200)
                while not launch.done() or (Path(folder) / f"{first}.pickle").exists():
                    file = Path(folder) / f"{first}.pickle"
                    if file.exists():
                        yield first, *pickle.loads(file.read_bytes())
                        first += 1
                    else:
                        time.sleep(0.1)
            if launch.exception() is not None and first < indices.stop:
                yield first, Outcome(draw((seed, first), 2), broken={TRAINS: str(launch.exception())[-1500:]}), {}
                first += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", default=None, help="seed of the draws (default: a new one, which is printed)")
    parser.add_argument("--configurations", type=int, default=300, help="how many (default: %(default)s)")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="of each run (default: %(default)s)")
    parser.add_argument("--only", type=int, help="number of the one configuration to look at")
    parser.add_argument(
        "--shrink", type=int, default=3, help="failures of each promise to shrink (default: %(default)s)"
    )
    arguments = parser.parse_args()
    seed = arguments.seed or str(random.SystemRandom().randrange(10**6))
    indices = range(arguments.configurations)
    if arguments.only is not None:
        indices = range(arguments.only, arguments.only + 1)
    print(f"seed {seed}, {len(indices)} configurations, {arguments.processes} process(es)", flush=True)
    quiet_and_quick()
    report, began = Report(arguments.processes), time.monotonic()
    found = (search if arguments.processes == 1 else in_processes)(seed, indices, arguments.shrink)
    for done, (index, outcome, least) in enumerate(found, 1):
        report.add(index, outcome)
        if arguments.only is not None:
            print(outcome.settings, outcome.kind, outcome.refusal)
        for promise, problem in outcome.broken.items():
            print(f"\nconfiguration {index} breaks {promise}: {problem}")
            if promise in least:
                settings, problem = least[promise]
                print(
                    f"smallest settings ({problem}):\n{reproduction(settings, promise, arguments.processes)}",
                    flush=True,
                )
        if done % 10 == 0 or done == len(indices):
            print(f"\r{done}/{len(indices)}", end="", file=sys.stderr, flush=True)
    print(f"\n\n{report.table()}\n{(time.monotonic() - began) / len(indices):.2f} s a configuration, seed {seed}")
    return int(bool(report.broken) or (arguments.only is None and bool(report.unchecked)))


if __name__ == "__main__":
    sys.exit(main())
