"""The probe from the command line: loads what is asked for, measures it seed by seed, writes numbers and a page."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import find_adapter_config_file
from trl import get_peft_config, get_quantization_config

from .. import playground
from ..diagnostics.probing.measurements import MEASUREMENTS, Subject
from ..diagnostics.probing.probe import UpdateProbe
from ..diagnostics.probing.report import NOT_MEASURED, write_report
from ..diagnostics.probing.sampling import sample_rollouts
from ..diagnostics.shifts import THRESHOLD
from ..evaluation import RewardFunction
from ..evaluation.models import load_tokenizer
from ..evaluation.scoring import awaited
from ..running import ignored, sources
from ..running.inputs import check_prompt, check_rewards
from ..running.rewards import number_of
from ..running.secrets import without_secrets
from ..texts import plain, write_text
from . import UsageError
from .settings import Parser, RunArguments, Settings
from .training import cannot_load, check_adapter, check_model_path, check_writable, console, find_rewards, load_data


@dataclass
class ProbeArguments(RunArguments):
    """
    What to probe.

    Args:
        probe_prompts (`int`, *optional*, defaults to `32`):
            Prompts, drawn from the training split.
        probe_seeds (`int`, *optional*, defaults to `1`):
            Repetitions with other prompts and other rollouts.
        probe_learning_rate (`float`, *optional*, defaults to `0.1`):
            Learning rate of the one update by plain SGD.
        probe_threshold (`float`, *optional*, defaults to `1e-4`):
            Shift in nats beyond which a token is boosted or suppressed.
        probe_batch_size (`int`, *optional*, defaults to `8`):
            Rollouts a forward pass.
        probe_output (`str`, *optional*, defaults to `"trl-cancel-probe"`):
            Folder for the page, its figures and the numbers.
    """

    probe_prompts: int = field(default=32, metadata={"help": "Prompts, drawn from the training split."})
    probe_seeds: int = field(default=1, metadata={"help": "Repetitions with other prompts and other rollouts."})
    probe_learning_rate: float = field(
        default=0.1, metadata={"help": "Learning rate of the one update by plain SGD that is measured."}
    )
    probe_threshold: float = field(
        default=THRESHOLD, metadata={"help": "Shift in nats beyond which a token is boosted or suppressed."}
    )
    probe_batch_size: int = field(default=8, metadata={"help": "Rollouts a forward pass."})
    probe_output: str = field(
        default="trl-cancel-probe", metadata={"help": "Folder for the page, its figures and the numbers."}
    )

    def check(self) -> None:
        """Refuses values that make no sense."""
        for name in ("probe_prompts", "probe_seeds", "probe_batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: must be at least 1.")
        if not 0 < self.probe_learning_rate < math.inf:
            raise UsageError(f"probe_learning_rate={self.probe_learning_rate}: must be positive.")
        if not 0 <= self.probe_threshold < math.inf:
            raise UsageError(f"probe_threshold={self.probe_threshold}: must not be negative.")


def probe_settings(description: str, arguments: list[str]) -> Settings:
    """Reads the settings of a probe."""
    parser = Parser("trl-cancel probe MEASUREMENT", description, ProbeArguments)
    parser.set_defaults(use_cpu=not torch.cuda.is_available(), bf16=False)
    return parser.read(arguments)


def run_probe(settings: Settings, names: list[str], pages: Any) -> None:
    """
    Measures, and writes `probe.json`, `index.html` and the figures: after each seed, and what there is if one fails.

    Args:
        settings ([`Settings`]):
            The settings, with [`ProbeArguments`].
        names (`list[str]`):
            Measurements. What one of several cannot measure on these rollouts is noted in its place.
        pages (`ModuleType`):
            The module of [`~trl_cancel.diagnostics.reports.page.Page`].
    """
    run: Any = settings.run
    run.check()
    folder = Path(run.probe_output).expanduser()
    check_writable(run.probe_output, "probe_output")
    results: dict[str, Any] = {"facts": without_secrets(_facts(settings)), "seeds": []}
    for seed in range(run.probe_seeds):
        if not settings.training.disable_tqdm:
            console.print(f"Seed {seed + 1} of {run.probe_seeds}")
        found: dict[str, Any] = {}
        try:
            for name, value in measurements(settings, names, seed):
                found[name] = value
        except ValueError as error:
            if run.probe_seeds == 1:
                raise
            found[NOT_MEASURED] = str(error)
        finally:
            if NOT_MEASURED in found or not found.keys().isdisjoint(names):
                results["seeds"].append(found)
                index = _write(results, folder, pages)
        for name, reason in _not_measured(found):
            console.print(f"{name}: {reason}", markup=False)
    if all(NOT_MEASURED in found for found in results["seeds"]):
        raise ValueError(results["seeds"][-1][NOT_MEASURED])
    console.print(f"Report: {plain(index)}. Numbers: {plain(index.parent / 'probe.json')}.", markup=False)


def _not_measured(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What could not be measured in a seed, and why."""
    if NOT_MEASURED in found:
        yield "not measured", found[NOT_MEASURED]
    for name, value in found.items():
        if isinstance(value, dict) and NOT_MEASURED in value:
            yield f"{name}: not measured", value[NOT_MEASURED]


def _rows(settings: Settings) -> list[dict[str, Any]]:
    """Prompts enough for all seeds to have others."""
    run: Any = settings.run
    split = load_data(settings)[run.dataset_train_split]
    count = run.probe_prompts * run.probe_seeds
    rows = list(islice(split.shuffle(seed=settings.training.seed), count))
    if rows:
        check_prompt(f"dataset_name={run.dataset_name}: split {run.dataset_train_split!r}", rows[0])
    if len(rows) < count:
        raise UsageError(
            f"probe_prompts={run.probe_prompts} with probe_seeds={run.probe_seeds} needs {count} prompts; the data set "
            f"has {len(rows)}."
        )
    return rows


def _reward(settings: Settings, columns: Iterable[str]) -> RewardFunction:
    """The reward functions as one, which adds them up with their weights, as TRL does."""
    functions = find_rewards(settings)
    check_rewards(functions, columns, "the data set")
    if not all(map(callable, functions)):
        raise UsageError("reward_funcs: the probe needs reward functions, not reward_model_name_or_path.")
    weights = settings.training.reward_weights or [1.0] * len(functions)
    if len(weights) != len(functions):
        raise UsageError(f"reward_weights={weights}: there are {len(functions)} reward functions.")
    if weights == [1.0]:
        return functions[0]

    def weighted_sum(**columns: Any) -> list[float | None]:
        scores = [awaited(function(**columns)) for function in functions]
        return [_weighted(of_one, weights) for of_one in zip(*scores, strict=True)]

    return weighted_sum


def _weighted(scores: Sequence[Any], weights: Sequence[float]) -> float | None:
    """The weighted sum of the rewards that are known."""
    known = [weight * number_of(score) for score, weight in zip(scores, weights, strict=True) if score is not None]
    return sum(known) if known else None


def load_model(settings: Settings) -> tuple[Any, Any]:
    """The model in float32, with its adapter if it has one, on the device to measure on; and its tokenizer."""
    arguments = settings.model
    name = arguments.model_name_or_path
    if not name:
        raise UsageError(f"model_name_or_path is missing: give a Hub id, a local path or '{playground.NAME}'.")
    path = sources.expanded(str(playground.CHECKPOINTS.get(str(name), name)))
    check_model_path(path)
    peft = get_peft_config(arguments)
    quantization = get_quantization_config(replace(arguments, dtype="float32"))
    loading: Any = {
        "revision": arguments.model_revision,
        "dtype": torch.float32,  # small updates are lost in the rounding of bfloat16
        "attn_implementation": arguments.attn_implementation,
        "quantization_config": quantization,
        "trust_remote_code": settings.training.trust_remote_code,
    }
    with sources.within_reach(path) as out_of_reach:
        try:
            check_adapter(arguments, path)
            if find_adapter_config_file(path, revision=arguments.model_revision):
                if peft is not None:
                    raise UsageError(
                        f"use_peft: model_name_or_path={name} is an adapter already, which is measured as it is."
                    )
                model: Any = AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True, **loading)
            else:
                model = AutoModelForCausalLM.from_pretrained(path, **loading)
            tokenizer = load_tokenizer(path, arguments.model_revision, settings.training.trust_remote_code)
        except OSError as error:
            raise cannot_load(name, error, out_of_reach) from error
    if peft is not None:
        model = get_peft_model(model, peft)
    if quantization is None:
        model = model.to(settings.training.device)
    return model, tokenizer


def measurements(settings: Settings, names: list[str], seed: int) -> Iterator[tuple[str, Any]]:
    """
    The measurements on one set of prompts and rollouts, by name, each when it is made; before them a few numbers about
    the rollouts.

    Args:
        settings ([`Settings`]):
            The settings, with [`ProbeArguments`].
        names (`list[str]`):
            Measurements.
        seed (`int`):
            Which of the `probe_seeds` sets.

    Raises:
        `ValueError`: If the one measurement that is asked for cannot be made on the rollouts.
    """
    run: Any = settings.run
    training, progress = settings.training, not settings.training.disable_tqdm
    own = _rows(settings)[seed * run.probe_prompts : (seed + 1) * run.probe_prompts]
    reward = _reward(settings, own[0])
    model, tokenizer = load_model(settings)
    remark = ignored.of_templates(cast(Any, training.chat_template_kwargs), [tokenizer])
    if remark is not None and seed == 0:
        console.print(remark, markup=False)
    length = training.max_completion_length or 256
    rollouts = sample_rollouts(
        model,
        tokenizer,
        own,
        reward,
        num_generations=training.layout.num_generations,
        temperature=training.temperature,
        max_completion_length=length,
        seed=training.seed + seed,
        chat_template_kwargs=cast(Any, training.chat_template_kwargs),
        description="Rollouts" if progress else None,
    )
    mixed = rollouts.by_group(rollouts.advantages).any(1)
    if not mixed.any():
        raise ValueError(
            f"All {training.num_generations} rollouts of every prompt got equal rewards, so there is no update to "
            "measure. Take prompts that the model solves now and then, or raise probe_prompts or num_generations."
        )
    probe = UpdateProbe(model, rollouts, learning_rate=run.probe_learning_rate, batch_size=run.probe_batch_size)
    subject = Subject(
        probe,
        tokenizer,
        reward,
        threshold=run.probe_threshold,
        learning_rate=training.learning_rate,
        max_completion_length=length,
        seed=training.seed + seed,
        progress=progress,
    )
    yield "seed", training.seed + seed
    yield "mean_reward", rollouts.rewards.nanmean().item()
    yield "prompts_with_both_signs", int(mixed.sum())
    yield "tokens", int(rollouts.mask.sum())
    yield "trained_parameters", sum(parameter.numel() for parameter in probe.parameters)
    for name in names:
        try:
            yield name, MEASUREMENTS[name](subject)
        except ValueError as error:
            if len(names) == 1:
                raise
            yield name, {NOT_MEASURED: str(error)}


def _facts(settings: Settings) -> dict[str, Any]:
    run: Any = settings.run
    training = settings.training
    return {
        "model": settings.model.model_name_or_path,
        "data set": run.dataset_name or "a mixture",
        "prompts a seed": run.probe_prompts,
        "rollouts a prompt": training.num_generations,
        "seeds": run.probe_seeds,
        "temperature": training.temperature,
        "update": f"one step of SGD, learning rate {run.probe_learning_rate:g}",
    }


def _write(results: dict[str, Any], folder: Path, pages: Any) -> Path:
    page = pages.Page(
        "What an update does to each token",
        "One update on the same rollouts from the same weights, in several variants, measured token by token and "
        "undone again.",
        results["facts"],
    )
    write_report(page, results)
    index = page.write(folder)
    text = json.dumps(_without_nan(results), indent=1, ensure_ascii=False)
    write_text(folder / "probe.json", text)
    return index


def _without_nan(value: Any) -> Any:
    """JSON has no `nan`; what is not known becomes `null`."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
