"""Evaluations from the command line: models times data sets, answered, written, resumed and put into a table."""

import hashlib
import importlib.metadata
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from trl import ModelConfig

from .. import playground
from ..evaluation import Evaluation, answer_problems, math_verify_reward, prompt_token_ids, summarize
from ..evaluation.engines import Engine
from ..evaluation.models import (
    ENGINES,
    EngineSettings,
    base_of,
    fingerprint,
    load_end_tokens,
    load_engine,
    load_tokenizer,
)
from ..evaluation.presets import INSTRUCTION, PRESETS, DataSource, load_problems
from ..evaluation.result import shown
from ..evaluation.samples import Sample, SampleLog
from ..evaluation.scoring import chats
from ..evaluation.settings import EvaluationSettings
from ..running import ignored, sources
from ..running.inputs import check_problems
from ..running.secrets import without_secrets, without_tokens
from ..running.storage import is_storage_error
from ..texts import plain, write_text
from . import Failure, UsageError
from ._console import plain_console
from .settings import StrictParser
from .training import cannot_load, check_model_path, check_writable, console, find_reward, nowhere


PLAYGROUND_REWARD = "trl_cancel.playground.reward.answer_reward"
VERSIONS = ("trl-cancel", "trl", "transformers", "torch", "peft", "datasets", "accelerate", "math-verify", "vllm")


@dataclass
class EvalArguments:
    """
    What to evaluate on, and how.

    Args:
        more_models (`list[str]`, *optional*):
            Further models, adapters or checkpoints, evaluated in the same way.
        preset (`list[str]`, *optional*):
            Data sets with the settings of the papers; settings that are given beat them.
        list_presets (`bool`, *optional*, defaults to `False`):
            Prints the presets.
        dataset_name (`str`, *optional*):
            Hub id, file or folder of a data set, or `playground`. A file is the split that is asked for.
        dataset_config (`str`, *optional*):
            Its configuration.
        dataset_split (`str`, *optional*, defaults to `"test"`):
            Its split.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Its column of problems.
        solution_column (`str`, *optional*):
            Its column of right answers; `solution` for Math-Verify, none is needed for `reward_funcs`.
        instruction (`str`, *optional*):
            What is said after each problem that is a text, which then becomes a user's message.
        num_problems (`int`, *optional*):
            How many problems, the first ones; all if not given (128 of the playground's).
        reward_funcs (`str`, *optional*):
            Reward function of TRL's or by its dotted path; Math-Verify if not given.
        num_samples, greedy, temperature, top_p, top_k, max_completion_length, pass_at_k, pass_threshold,
        score_truncated, chat_template_kwargs:
            See [`EvaluationSettings`]; the last may be JSON.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        engine, batch_size, tensor_parallel_size, gpu_memory_utilization, max_model_length, trust_remote_code:
            See [`EngineSettings`].
        output (`str`, *optional*, defaults to `"trl-cancel-eval"`):
            Folder for samples and results.
    """

    more_models: list[str] = field(
        default_factory=list,
        metadata={"help": "Further models, adapters or checkpoints, evaluated in the same way.", "nargs": "+"},
    )
    preset: list[str] = field(
        default_factory=list,
        metadata={"help": "Data sets with the settings of the papers, see --list_presets.", "nargs": "+"},
    )
    list_presets: bool = field(default=False, metadata={"help": "Print the presets and leave."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, file or folder of a data set, or 'playground'."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_split: str = field(default="test", metadata={"help": "Split of the data set."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the problems."})
    solution_column: str | None = field(
        default=None,
        metadata={"help": "Column of the right answers (default: solution; none is needed with --reward_funcs)."},
    )
    instruction: str | None = field(
        default=None,
        metadata={
            "help": "Said after each problem that is a text, which then becomes a user's message; without it texts are "
            f"prompts as they are. Presets say: {INSTRUCTION}"
        },
    )
    num_problems: int | None = field(default=None, metadata={"help": "How many problems, the first ones."})
    reward_funcs: str | None = field(
        default=None, metadata={"help": "Reward function, one of TRL's or by its dotted path (default: Math-Verify)."}
    )
    num_samples: int | None = field(
        default=None, metadata={"help": "Sampled answers a problem, n of avg@n (default: 8); 0 for greedy alone."}
    )
    greedy: bool | None = field(
        default=None, metadata={"help": "Whether each problem gets one greedy answer too (default: true)."}
    )
    temperature: float | None = field(default=None, metadata={"help": "Temperature of the samples (default: 1)."})
    top_p: float | None = field(default=None, metadata={"help": "Nucleus of the samples (default: 1)."})
    top_k: int | None = field(default=None, metadata={"help": "Likeliest tokens to draw from; 0 for all (default)."})
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Longest answer in tokens (default: 1024, of the playground 64)."}
    )
    pass_at_k: list[int] | None = field(
        default=None, metadata={"help": "Numbers of tries of pass@k (default: 1, 2, 4, ...).", "nargs": "+"}
    )
    pass_threshold: float = field(default=1.0, metadata={"help": "Reward from which on an answer is correct."})
    score_truncated: bool = field(
        default=False, metadata={"help": "Score answers that were cut off, too, instead of counting them as wrong."}
    )
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": """Arguments for the chat template, as JSON: '{"enable_thinking": false}'."""}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    engine: str = field(default="transformers", metadata={"help": "What generates.", "choices": list(ENGINES)})
    batch_size: int | None = field(
        default=None, metadata={"help": "Answers at a time (default: 32; of continuous and vllm 1024)."}
    )
    tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that share the model, with vllm."})
    gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of the GPU's memory for vllm."})
    max_model_length: int | None = field(default=None, metadata={"help": "Longest prompt and answer, with vllm."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to run code that a model on the Hub brings."}
    )
    output: str = field(default="trl-cancel-eval", metadata={"help": "Folder for samples and results."})


@dataclass
class EvalSettings:
    """The settings of one command, by who reads them."""

    run: EvalArguments
    model: ModelConfig


class EvalParser(StrictParser):
    """The options of the evaluation."""

    def __init__(self, prog: str, description: str):
        readers: Any = (EvalArguments, ModelConfig)
        super().__init__(readers, prog=prog, description=description)
        self.set_defaults(dtype="auto")  # that of the saved weights

    def read(self, arguments: list[str]) -> EvalSettings:
        settings = EvalSettings(*super().read(arguments))
        for name in ("more_models", "preset", "pass_at_k"):
            value = getattr(settings.run, name)
            if value is not None and not isinstance(value, list):  # one of them, in a file
                setattr(settings.run, name, [value])
        return settings


@dataclass(frozen=True)
class DataSet:
    """
    Problems to answer, and how.

    Args:
        name (`str`):
            Name, of the table and of the folder.
        facts (`dict`):
            Where the problems come from.
        settings ([`EvaluationSettings`]):
            How to answer them.
        reward (`Callable`):
            Reward function.
        load (`Callable`):
            Makes the data set; takes whether prompts are conversations.
    """

    name: str
    facts: dict[str, Any]
    settings: EvaluationSettings
    reward: Callable[..., Any]
    load: Callable[[bool], Dataset]


def run_evaluation(settings: EvalSettings) -> None:
    """
    Evaluates every model on every data set, writes `samples.jsonl` and `results.json` for each, and prints a table.

    Args:
        settings ([`EvalSettings`]):
            The settings of the command.

    Raises:
        `UsageError`: If a setting cannot work.
        `Failure`: If the disk is full, the memory does not suffice, or what generates fails.
    """
    run = settings.run
    check_writable(run.output, "output")
    models = [settings.model.model_name_or_path, *run.more_models]
    if not models[0]:
        raise UsageError(f"model_name_or_path is missing: give a Hub id, a local path or '{playground.NAME}'.")
    for name in ("batch_size", "num_problems", "tensor_parallel_size"):
        value = getattr(run, name)
        if value is not None and value < 1:
            raise UsageError(f"{name}={value}: must be at least 1.")
    for model in models:
        if model not in playground.CHECKPOINTS:
            check_model_path(str(model))
    state = PartialState()
    if run.engine == "vllm" and state.num_processes > 1:
        raise UsageError(
            f"engine=vllm with {state.num_processes} processes: start one process, and let vLLM share the model "
            "between GPUs with --tensor_parallel_size."
        )
    if run.engine == "vllm" and run.more_models:
        raise UsageError("more_models with engine=vllm: vLLM keeps the GPU's memory; evaluate one model a command.")
    with in_one_line(run.output):
        sets = data_sets(run)
        check_folders("model_name_or_path", [str(model) for model in models])
        check_folders("preset", [data.name for data in sets])
        evaluations = [
            (str(model), evaluation) for model in models for evaluation in evaluate_model(str(model), sets, settings)
        ]
    if state.is_main_process:
        console.print(table(evaluations))
        console.print(f"Samples and results: {plain(run.output)}.", markup=False)


@contextmanager
def in_one_line(output: str) -> Iterator[None]:
    """Turns what goes wrong in an evaluation into an error of one line; what is answered is in the file by then."""
    go_on = f"The answers so far are in {output}; the same command goes on from there."
    try:
        yield
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error):
            raise Failure(
                f"out of memory: lower --batch_size or --max_completion_length. {go_on} ({error})"
            ) from error
        raise Failure(f"{error} {go_on}") from error
    except OSError as error:
        if not is_storage_error(error):
            raise
        raise Failure(f"{error}. Make room, or choose another --output. {go_on}") from error


def check_folders(setting: str, names: list[str]) -> None:
    """
    Makes sure that each name has a folder of its own.

    Raises:
        `UsageError`: If two share one.
    """
    owners: dict[str, str] = {}
    for name in names:
        folder = folder_name(name)
        if owners.get(folder) == name:
            raise UsageError(f"{setting}={name}: it is given twice.")
        if folder in owners:
            raise UsageError(
                f"{setting}: {owners[folder]} and {name} would share the folder {folder}. Evaluate them by two "
                "commands with different --output."
            )
        owners[folder] = name


def data_sets(run: EvalArguments) -> list[DataSet]:
    """
    What the options ask for.

    Raises:
        `ValueError`: If a preset is unknown or a setting makes no sense.
    """
    if bool(run.preset) == (run.dataset_name is not None):
        raise UsageError(f"give either --preset ({', '.join(PRESETS)}) or --dataset_name.")
    given = {
        name.name: getattr(run, name.name)
        for name in fields(EvaluationSettings)
        if getattr(run, name.name, None) is not None
    }
    if run.pass_at_k is not None:
        given["pass_at_k"] = tuple(run.pass_at_k)
    if isinstance(run.chat_template_kwargs, str):  # a file gives a dictionary
        given["chat_template_kwargs"] = _read_json("chat_template_kwargs", run.chat_template_kwargs)
    reward = find_reward(run.reward_funcs) if run.reward_funcs else math_verify_reward
    if run.dataset_name in playground.CHECKPOINTS:
        return [_playground(run.dataset_name, run, given)]
    if run.dataset_name:
        solution = run.solution_column or (None if run.reward_funcs else "solution")
        source = DataSource(run.dataset_name, run.dataset_split, run.prompt_column, solution, run.dataset_config)
        settings = EvaluationSettings(**{"max_completion_length": 1024, **given})
        return [_data_set(run.dataset_name, source, settings, run, reward, run.instruction)]
    found = []
    for name in run.preset:
        if name not in PRESETS:
            raise UsageError(f"preset={name}: unknown; use one of {', '.join(PRESETS)}.")
        preset, instruction = PRESETS[name], INSTRUCTION if run.instruction is None else run.instruction
        settings = replace(preset.settings, **given)
        found.append(_data_set(name, preset.source, settings, run, reward, instruction))
    return found


def _read_json(setting: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{setting}={text}: is not JSON ({error}).") from error


def _data_set(
    name: str,
    source: DataSource,
    settings: EvaluationSettings,
    run: EvalArguments,
    reward: Callable[..., Any],
    instruction: str | None,
) -> DataSet:
    facts = {
        "dataset_name": source.path,
        "dataset_config": source.config,
        "dataset_split": source.split,
        "prompt_column": source.problem,
        "solution_column": source.solution,
        "instruction": instruction,
        "reward_funcs": run.reward_funcs or "Math-Verify",
    }
    return DataSet(
        name,
        facts,
        settings,
        reward,
        lambda conversational: load_problems(source, run.num_problems, instruction, conversational),
    )


def _playground(name: str, run: EvalArguments, given: dict[str, Any]) -> DataSet:
    from ..playground.data import load_prompts
    from ..playground.tasks import task_named

    reward = run.reward_funcs or PLAYGROUND_REWARD
    return DataSet(
        name,
        {"dataset_name": name, "reward_funcs": reward},
        EvaluationSettings(**{"max_completion_length": task_named(name).max_completion_length, **given}),
        find_reward(reward),
        lambda conversational: load_prompts("test", run.num_problems or 128, task=name),
    )


def evaluate_model(name: str, sets: list[DataSet], settings: EvalSettings) -> list[Evaluation]:
    """
    Evaluates one model on several data sets.

    Args:
        name (`str`):
            Hub id, folder, or `playground`.
        sets (`list[DataSet]`):
            The data sets.
        settings ([`EvalSettings`]):
            The settings of the command.
    """
    state = PartialState()
    path = sources.expanded(str(playground.CHECKPOINTS.get(name, name)))
    with sources.within_reach(path, *_sources_of(sets)) as out_of_reach:
        engine, prepared = _prepare(name, path, sets, settings, out_of_reach)
    evaluations = []
    for data, rows, how, folder, log in prepared:
        label = plain(without_tokens(f"{name} on {data.name}"))
        samples = answer_problems(engine, rows, data.reward, data.settings, log=log, description=label)
        evaluations.append(summarize(samples, len(rows), data.settings, data.name))
        if state.is_main_process:
            _write(folder / "results.json", evaluations[-1], how, samples)
            _say_what_was_odd(label, samples)
    return evaluations


def _sources_of(sets: list[DataSet]) -> list[str]:
    """Files, folders and Hub ids of data sets; the playground needs none."""
    return [data.facts["dataset_name"] for data in sets if data.facts["dataset_name"] not in playground.CHECKPOINTS]


def _prepare(
    name: str, path: str, sets: list[DataSet], settings: EvalSettings, out_of_reach: str | None
) -> tuple[Engine, list[tuple[DataSet, Dataset, dict[str, Any], Path, SampleLog | None]]]:
    """Loads a model and the data sets; with each of these what made its samples, their folder and their file."""
    run, arguments, state = settings.run, settings.model, PartialState()
    revision = arguments.model_revision if name == arguments.model_name_or_path else "main"
    arguments = replace(arguments, model_revision=revision)
    try:
        tokenizer = load_tokenizer(path, revision, run.trust_remote_code)
        base = base_of(path, revision)
        of_model = {
            "base model": base[0] if base else None,
            "fingerprint of the model": fingerprint(path, revision),
            "fingerprint of the base model": fingerprint(*base) if base else None,
            "end tokens": load_end_tokens(path, tokenizer, revision, run.trust_remote_code),
        }
    except OSError as error:
        raise cannot_load(name, error, out_of_reach) from error
    try:
        problems = [data.load(chats(tokenizer)) for data in sets]
    except ValueError as error:
        asked = [source for source in _sources_of(sets) if source in str(error) and not sources.needs_no_hub(source)]
        if out_of_reach is None or error.__cause__ is None or not asked:
            raise
        what, meant = str(error).partition(" (")[0], sources.said_of_playground(asked[0])
        raise Failure(f"{what}: {nowhere(out_of_reach)}{meant}") from error
    for data, rows in zip(sets, problems, strict=True):
        check_problems(f"data set {data.name}", rows, data.reward, tokenizer)
    remark = ignored.of_templates(sets[0].settings.chat_template_kwargs, [tokenizer])  # the same for all
    if remark is not None and state.is_main_process:
        console.print(remark, markup=False)
    made_by = [
        {
            "model_name_or_path": name,
            "model_revision": revision,
            **of_model,
            "dtype": arguments.dtype,
            "load_in_4bit": arguments.load_in_4bit,
            "load_in_8bit": arguments.load_in_8bit,
            "engine": run.engine,
            **data.facts,
            "num_problems": len(rows),
            "fingerprint of the problems": _digest(rows.with_format("arrow")[:].to_pylist()),
            "fingerprint of the prompts' tokens": _digest(
                prompt_token_ids(tokenizer, rows["prompt"][:], data.settings.chat_template_kwargs)
            ),
            "fingerprint of the reward function's file": _digest(_source(data.reward)),
            **_sampling(data.settings),
        }
        for data, rows in zip(sets, problems, strict=True)
    ]
    output = Path(run.output).expanduser() / folder_name(name)
    folders = [output / folder_name(data.name) for data in sets]
    logs: list[SampleLog | None] = [None] * len(sets)
    if state.is_main_process:
        logs = [SampleLog(folder, how) for folder, how in zip(folders, made_by, strict=True)]
    chosen = EngineSettings(**{setting.name: getattr(run, setting.name) for setting in fields(EngineSettings)})
    try:
        engine = load_engine(path, tokenizer, arguments, chosen, state.device)
    except (OSError, SafetensorError) as error:
        raise cannot_load(name, error, out_of_reach) from error
    return engine, list(zip(sets, problems, made_by, folders, logs, strict=True))


def _sampling(settings: EvaluationSettings) -> dict[str, Any]:
    """The settings that samples depend on: not what is computed of them."""
    computed = ("pass_at_k", "pass_threshold")
    return {name: value for name, value in asdict(settings).items() if name not in computed}


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _source(reward: Callable[..., Any]) -> str | None:
    """The file that a reward function is written in, since it may call others there; `None` if there is none."""
    try:
        return inspect.getsource(inspect.getmodule(reward))  # type: ignore[arg-type]  # None raises TypeError
    except (OSError, TypeError):
        return None


def folder_name(name: str) -> str:
    """A name for a folder, made of a Hub id or the last parts of a path."""
    return re.sub(r"[^\w.-]+", "-", "/".join(Path(name).parts[-2:])).strip("-.") or "model"


def _write(path: Path, evaluation: Evaluation, settings: dict[str, Any], samples: list[Sample]) -> None:
    results = {
        "name": evaluation.name,
        "problems": evaluation.problems,
        "metrics": {
            name: {"mean": mean, "low": low, "high": high} for name, (mean, low, high) in evaluation.metrics.items()
        },
        "answers": len(samples),
        "answers cut off": sum(sample["finish_reason"] == "length" for sample in samples),
        "answers without a reward": sum(sample["reward"] is None for sample in samples),
        "tokens an answer": sum(sample["tokens"] for sample in samples) / len(samples),
        "settings": {**settings, **evaluation.settings},
        "versions": _versions(),
    }
    write_text(path, json.dumps(without_secrets(results), indent=1, ensure_ascii=False) + "\n")


def _versions() -> dict[str, str]:
    """Versions of what takes part, where it is installed."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _say_what_was_odd(label: str, samples: list[Sample]) -> None:
    counts = Counter(
        "cut off at max_completion_length" if sample["finish_reason"] == "length" else "without a reward"
        for sample in samples
        if sample["finish_reason"] == "length" or sample["reward"] is None
    )
    for what, count in counts.items():
        console.print(f"{label}: {count} of {len(samples)} answers {what}.", markup=False)


def table(evaluations: list[tuple[str, Evaluation]]) -> Table:
    """Means with their 95% intervals: a row a metric, a column a model."""
    models = list(dict.fromkeys(model for model, _ in evaluations))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for model, evaluation in evaluations:
        for metric, estimate in evaluation.metrics.items():
            label = f"{evaluation.name} ({evaluation.problems})"
            rows.setdefault((label, metric), {})[model] = shown(estimate)
    result = Table(title="Evaluation")
    result.add_column("data (problems)")
    result.add_column("metric")
    for model in models:
        result.add_column(Text(model), justify="right")
    for (label, metric), by_model in rows.items():
        result.add_row(Text(label), metric, *(by_model.get(model, "") for model in models))
    return result


def print_presets() -> None:
    """Prints the presets as a table."""
    result = Table(title="Presets")
    for column in ("preset", "data", "split", "paper", "answers", "temperature", "top-p", "top-k", "length"):
        result.add_column(column)
    for name, preset in PRESETS.items():
        how = preset.settings
        sampled = (f"{how.temperature:g}", f"{how.top_p:g}", str(how.top_k or "all"))
        result.add_row(
            name,
            preset.source.path,
            preset.source.split,
            preset.paper,
            str(how.num_samples) if how.num_samples else "greedy",
            *(sampled if how.num_samples else ("", "", "")),
            str(how.max_completion_length),
        )
    plain_console(width=150).print(result)  # however narrow the terminal: names are to be copied
