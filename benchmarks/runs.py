"""Many short runs on the playground: each once, some at a time, kept in a file, and taken up again where they stopped."""

import json
import multiprocessing
import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

UPDATES = 4  # optimizer steps with each generation batch
# One process of the playground: 16 prompts x 8 rollouts a generation, cut into 4 optimizer steps of whole groups.
PLAYGROUND = {
    "num_generations": 8,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 8,
    "max_completion_length": 64,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


@dataclass(frozen=True)
class Cell:
    """
    One run.

    Args:
        name (`str`):
            What is compared.
        settings (`dict`):
            Settings over those of the playground.
        seed (`int`):
            Seed of the data order, the sampling and the evaluation.
        split (`str`):
            What the run is for, `"tune"` or `"test"`; the problems to evaluate on are of that split (`"fresh"`, seeds that
            were not used before: of `"test"`).
        mixture (`str`):
            Problems to train on, one of `mixtures.MIXTURES`.
        tokens (`int`, *optional*):
            Tokens of prompts and completions after which training ends, if `max_steps` is not reached before.
        task (`str`):
            Name of the playground's task.
        start (`str`):
            Model to start from, a folder of `benchmarks/checkpoints`; the one embedded for the task if empty.
        problems (`int`, *optional*):
            Problems to evaluate on; as many as the benchmark says if not given.
    """

    name: str
    settings: dict[str, Any]
    seed: int
    split: str = "test"
    mixture: str = "usual"
    tokens: int | None = None
    task: str = "playground"
    start: str = ""
    problems: int | None = None


class RunsFailedError(RuntimeError):
    """
    Some runs failed, after all others were made.

    Args:
        message (`str`):
            Which, and why.
        results (`list[dict | None]`):
            Those of all cells, in their order; `None` for those that failed.
    """

    def __init__(self, message: str, results: list[dict[str, Any] | None]):
        super().__init__(message)
        self.results = results


Run = Callable[[Cell, tuple[str, ...]], dict[str, Any]]


def run(cell: Cell, kept: tuple[str, ...]) -> dict[str, Any]:
    """Trains and evaluates; the accuracies, the metrics `kept` step by step, and the cell itself."""
    warnings.simplefilter("ignore")
    import torch
    from mixtures import level_reward, load_mixture
    from transformers import PrinterCallback, TrainerCallback

    from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer
    from trl_cancel.cli._quiet import quiet
    from trl_cancel.evaluation import score_samples
    from trl_cancel.playground import CHECKPOINT
    from trl_cancel.playground.data import load_prompts
    from trl_cancel.playground.reward import answer_reward

    class Budget(TrainerCallback):
        spent = 0.0

        def on_log(self, args, state, control, logs, **kwargs):
            self.spent = logs.get("num_tokens", self.spent)
            whole = state.global_step % UPDATES == 0  # rollouts that are paid for are trained on
            if cell.tokens and whole and self.spent >= cell.tokens:
                control.should_training_stop = True

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = CancelGRPOConfig(output_dir=folder, seed=cell.seed, **{**PLAYGROUND, **cell.settings})
        trainer = CancelGRPOTrainer(str(CHECKPOINT), level_reward, args, load_mixture(cell.mixture))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Budget())
        trainer.train()
        problems = load_prompts(cell.split, cell.problems or 256)
        evaluated = {
            how: score_samples(
                trainer.model,
                trainer.processing_class,
                problems,
                answer_reward,
                num_samples=samples,
                temperature=temperature,
                max_completion_length=64,
                seed=cell.seed,
            )
            .mean()
            .item()
            for how, samples, temperature in (("greedy", 1, 0.0), ("sampled", 4, 1.0))
        }
    history = trainer.state.log_history[:-1]
    logs = {name: [short(entry.get(name)) for entry in history] for name in kept}
    return {**asdict(cell), **evaluated, "steps": trainer.state.global_step, "logs": logs}


def run_all(
    cells: list[Cell], file: Path, jobs: int, kept: tuple[str, ...] = ("reward",), run: Run = run
) -> list[dict[str, Any]]:
    """
    Runs the cells that `file` does not hold yet; every finished run is written at once.

    Args:
        cells (`list[Cell]`):
            The runs.
        file (`Path`):
            JSON file of finished runs.
        jobs (`int`):
            Runs at a time.
        kept (`tuple[str, ...]`, *optional*):
            Logged metrics to keep.
        run (`Callable`, *optional*):
            Trains and evaluates one cell.

    Returns:
        `list[dict]`: What [`run`] returned for each cell, in their order.

    Raises:
        [`RunsFailedError`]: When all others are made, if some failed.
    """
    done = {_key(result): result for result in json.loads(file.read_text())["runs"]} if file.exists() else {}
    missing = [cell for cell in cells if _key(asdict(cell)) not in done]
    if done:
        known = f"{len(cells) - len(missing)} of {len(cells)} runs are in {file.name}"
        if missing and json.loads(file.read_text())["environment"] != _environment():
            raise SystemExit(f"{known}, made with other versions; give another file or folder to make all of them.")
        print(f"{known}; give another file or folder to make them again.", flush=True)
    failures = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, cell, kept): cell for cell in missing}
        for count, future in enumerate(as_completed(futures), 1):
            if error := future.exception():
                failures.append(f"{futures[future].name} seed {futures[future].seed}: {error!r}")
                continue
            result = future.result()
            done[_key(result)] = result
            _write(file, list(done.values()))
            print(
                f"{count}/{len(missing)} {result['name']} seed {result['seed']}: {result['sampled']:.1%}", flush=True
            )
    if failures:
        message = f"{len(failures)} of {len(missing)} runs failed; the others are kept. " + "; ".join(failures)
        raise RunsFailedError(message, [done.get(_key(asdict(cell))) for cell in cells])
    return [done[_key(asdict(cell))] for cell in cells]


def interval(values: list[float], form: str = "{:.1%}") -> str:
    """The mean and its 95% bootstrap interval over seeds; the value itself of a single seed."""
    import torch

    from trl_cancel.evaluation import mean_with_interval

    if len(values) == 1:
        return form.format(*values)
    mean, low, high = map(form.format, mean_with_interval(torch.tensor(values).unsqueeze(1)))
    return f"{mean} [{low}, {high}]"


def _environment() -> dict[str, str]:
    versions = {name: version(name) for name in ("trl", "transformers", "torch")}
    return {**versions, "python": platform.python_version(), "machine": platform.machine()}


def _write(file: Path, results: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps({"environment": _environment(), "runs": results}, separators=(",", ":")))
    unfinished.replace(file)


def chosen(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that differ from the methods' defaults: what is run stays the same when a method is added."""
    from trl_cancel.methods import MethodSettings

    defaults = {setting.name: setting.default for setting in fields(MethodSettings)}
    return {name: value for name, value in settings.items() if name not in defaults or value != defaults[name]}


def _key(cell: dict[str, Any]) -> str:
    more = [
        cell[name]
        for name in ("mixture", "tokens", "task", "start", "problems")
        if cell.get(name) not in (None, "usual", "playground", "")
    ]
    return json.dumps([cell["name"], chosen(cell["settings"]), cell["seed"], cell["split"], *more], sort_keys=True)


def short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
