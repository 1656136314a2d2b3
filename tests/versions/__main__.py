"""Makes an environment for each combination of versions, runs the tests in it, and writes the table of docs/versions.md."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

from .table import RESULTS, write


ROOT = Path(__file__).parents[2]
TESTS = (
    *("tests/contract", "tests/test_off_is_off.py", "tests/test_methods.py", "tests/test_version_0_1.py"),
    "tests/test_examples.py",
)
SHOWN = ("trl", "transformers", "peft", "accelerate", "datasets", "torch")
TORCH = "torch==2.13.0"  # of which the machine has a build for the CPU
# What is installed in place of what constraints.txt pins, with which the whole suite is run anyway; of the newest nothing
# is pinned but PyTorch.
ENVIRONMENTS: dict[str, list[str]] = {
    "oldest": ["trl==1.14.2"],
    "newest": ["trl", "transformers", "peft", "accelerate", "datasets"],
}


def main() -> None:
    parser = argparse.ArgumentParser("tests/versions/run", description=__doc__)
    parser.add_argument("folder", type=Path, help="for the environments, some 2 GB each, kept for the next time")
    parser.add_argument("names", nargs="*", help=f"which; all if none is named: {', '.join(ENVIRONMENTS)}")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join(ENVIRONMENTS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.names or ENVIRONMENTS:
        python = installed(options.folder.resolve() / name.replace(" ", "-"), name)
        results[name] = tested(python)
        print(f"{name}: {results[name]}", flush=True)
        RESULTS.write_text(f"{json.dumps(results, indent=1)}\n")
    write(results)
    failed = [name for name in options.names or ENVIRONMENTS if results[name]["failed"]]
    sys.exit(f"Failures with {', '.join(failed)}." if failed else 0)


def installed(folder: Path, name: str) -> Path:
    """Python of an environment that holds these versions and this package."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    others = ENVIRONMENTS[name]
    pins = folder / "constraints.txt"
    pins.write_text(f"{TORCH}\n" if name == "newest" else kept(others))
    upgrade = ["--upgrade"] if name == "newest" else []
    command = [python, "-m", "pip", "install", "-qq", *upgrade, "-c", pins, ".[test]", TORCH, *others]
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)
    return python


def kept(others: list[str]) -> str:
    """The pins that stand in constraints.txt, without those of what is chosen here."""
    chosen = {re.split(r"[=<>]", other)[0] for other in others}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.split("==")[0] not in chosen)


def tested(python: Path) -> dict[str, object]:
    """Versions and numbers of tests that passed, failed and were skipped; the package is that of the environment."""
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    asked = f"import importlib.metadata as m; print(*[m.version(name) for name in {SHOWN}])"
    versions = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    started = time.perf_counter()
    command = [python, "-m", "pytest", "-o", "addopts=-n2 --dist=loadscope -m 'not slow'", *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    counts = {
        what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout)
    }
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    return {
        "versions": dict(zip(SHOWN, versions, strict=True)),
        "passed": counts.get("passed", 0),
        "failed": failed or int(done.returncode != 0),
        "skipped": counts.get("skipped", 0),
        "seconds": round(time.perf_counter() - started),
    }


main()
