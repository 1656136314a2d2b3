"""One training run from the command line: early checks, progress, evaluation before and after, a table at the end."""

import importlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import trl.rewards
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from rich.table import Table
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.utils import find_adapter_config_file
from trl import DatasetMixtureConfig, ModelConfig, get_dataset, get_peft_config, get_quantization_config

from .. import playground
from ..evaluation import Estimate, Evaluation, EvaluationSettings
from ..evaluation import evaluate as evaluate_problems
from ..evaluation.callback import record, steps_trained, trainer_engine, unchanged_random_state
from ..evaluation.result import shown
from ..publishing.hub import PushError, check_token
from ..running import checkpoints, damage, sources
from ..running.changed_settings import changes, run_record
from ..running.finished import CARD, RESULTS, Left, discard, is_of_another_run, left_by
from ..running.fit import check_fit
from ..running.inputs import check_rewards, columns_of
from ..running.outcome import remark_on
from ..running.rewards import RewardError
from ..running.run_lock import FolderInUse
from ..running.weights import WeightsError
from ..texts import plain, suggestion
from ..trainer import CancelGRPOTrainer
from . import Failure, UsageError
from ._console import plain_console
from .output import check_output, says_finished, wanted_checkpoint
from .settings import RunArguments, Settings


console = plain_console()

RESIDUAL = "cancel/shared_prefix_residual"
# What Python and PyTorch say of arguments that a function does not know.
UNEXPECTED = re.compile(
    r"(?:(?P<of>[\w.]+)\(\) got an u|U)nexpected keyword arguments?:? (?P<quote>'?)(?P<name>\w+)(?P=quote)"
)
EVALUATION_BATCH = 256  # answers to test problems that a process generates at a time
# Logged values shown at the end of a run.
LOGGED = {"reward": "reward while training", "completions/mean_length": "tokens a rollout", "entropy": "entropy"}


@dataclass(frozen=True)
class Results:
    """
    What a run came to.

    Args:
        before, after (`dict[str, Estimate]`, *optional*):
            Scores on the test problems, where these were asked for: `greedy`, `sampled` and `pass@k`.
        first, last (`dict[str, float]`):
            Means of logged values over the first and the last tenth of the logs.
        residual (`float`, *optional*):
            Mean of the shared-prefix residual over the run.
        steps (`int`):
            Optimizer steps.
        seconds (`float`, *optional*):
            Time of the training; `None` of one that had finished before, whose model is only saved.
    """

    before: dict[str, Estimate] | None
    after: dict[str, Estimate] | None
    first: dict[str, float]
    last: dict[str, float]
    residual: float | None
    steps: int
    seconds: float | None

    def table(self) -> Table:
        """The table at the end of a run."""
        table = Table(title="Training finished" if self.seconds is not None else "Training had finished")
        table.add_column("")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        if self.before and self.after:
            for metric, score in self.before.items():
                table.add_row(f"accuracy, {metric}", shown(score), shown(self.after[metric]))
        for name, label in LOGGED.items():
            if name in self.first:
                table.add_row(label, f"{self.first[name]:.3g}", f"{self.last[name]:.3g}")
        if self.residual is not None:
            table.add_row("shared-prefix residual, mean", "", f"{self.residual:.2g}")
        table.add_row("optimizer steps", "", str(self.steps))
        if self.seconds is not None:
            table.add_row("training time", "", f"{self.seconds:.0f} s")
        return table

    def known(self) -> dict[str, Any]:
        """What there is, for `all_results.json`: nothing stands for a score that was not asked for."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}


def _scores(evaluation: Evaluation | None) -> dict[str, Estimate] | None:
    """The scores of a run's table; what is sampled once a problem is pass@1 too."""
    if evaluation is None:
        return None
    names = {"greedy": "greedy", f"avg@{evaluation.settings['num_samples']}": "sampled"}
    tries = {name: name for name in evaluation.metrics if name.startswith("pass@") and name != "pass@1"}
    return {label: evaluation.metrics[name] for name, label in {**names, **tries}.items()}


def _training_means(trainer: CancelGRPOTrainer) -> tuple[dict[str, float], dict[str, float], float | None]:
    first, last = {}, {}
    for name in LOGGED:
        values = [entry[name] for entry in trainer.state.log_history if entry.get(name) is not None]
        if values:
            tenth = max(1, len(values) // 10)
            first[name], last[name] = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    residuals = [entry[RESIDUAL] for entry in trainer.state.log_history if RESIDUAL in entry]
    return first, last, sum(residuals) / len(residuals) if residuals else None


def say(text: str) -> None:
    """Prints a line, which names from outside of the program do not break."""
    console.print(plain(text), markup=False)


def run_training(settings: Settings) -> None:
    """
    Trains and evaluates, saves the model, the logs (`trainer_state.json`) and the results (`all_results.json`), and
    says what came out.

    Args:
        settings ([`Settings`]):
            The settings of the run.

    Raises:
        `UsageError`: If a setting cannot work; nothing has been written then.
        `Failure`: If the disk is full, a reward function returns what cannot be used, or the weights are not finite.
    """
    check_writable(str(settings.training.output_dir))
    try:
        with no_empty_folder(str(settings.training.output_dir)), naming_arguments(settings):
            _run(settings)
    except (checkpoints.SavingError, RewardError, WeightsError) as error:
        raise Failure(" ".join([str(error), *getattr(error, "__notes__", [])])) from error


@contextmanager
def naming_arguments(settings: Settings) -> Iterator[None]:
    """
    Refuses arguments that a setting holds for something that does not take them, by the setting. Before these are used
    nobody knows what is taken.
    """
    given = {name: set(value) for name, value in vars(settings.training).items() if isinstance(value, dict)}
    try:
        yield
    except (TypeError, ValueError) as error:
        named = UNEXPECTED.search(str(error))
        holding = [name for name, arguments in given.items() if named and named["name"] in arguments]
        if named is None or not holding:
            raise
        of = f", which {named['of'].removesuffix('.__init__')} does not take" if named["of"] else ""
        raise UsageError(f"{' / '.join(holding)}: unknown argument {named['name']!r}{of}.") from error


@contextmanager
def no_empty_folder(folder: str) -> Iterator[None]:
    """Takes an output folder away again if it was made for nothing."""
    existed = Path(folder).exists()
    try:
        yield
    finally:
        if not existed and Path(folder).is_dir() and not any(Path(folder).iterdir()):
            Path(folder).rmdir()


def _run(settings: Settings) -> None:
    check_hub(settings)
    check_output(settings)
    check_evaluation(settings)
    dataset = load_data(settings)
    rewards = find_rewards(settings)
    check_columns(settings, dataset, rewards)
    trainer = build_trainer(settings, dataset, rewards)
    checkpoint = find_checkpoint(settings, trainer)
    finished = says_finished(settings, trainer, checkpoint)
    if finished is not None:
        if trainer.is_world_process_zero():
            say(finished)
        return
    test = pick_test_problems(settings, dataset)
    if settings.precision and trainer.is_world_process_zero():
        say(f"Precision: {settings.precision.reason}")
    ended = trainer.finished_at(checkpoint)
    if checkpoint is not None and ended is not None:
        check_same_settings(checkpoint, trainer)
    if wanted_checkpoint(settings) and ended is None and trainer.is_world_process_zero():
        say(f"Going on from {checkpoint}." if checkpoint else "Starting anew: there is no whole checkpoint.")

    try:
        with trainer.holding_output_dir():
            if checkpoint is not None and ended is not None:
                _save_again(settings, trainer, checkpoint, test, rewards)
            else:
                _train(settings, trainer, checkpoint, test, rewards)
    except FolderInUse as error:
        raise UsageError(str(error)) from error
    if hasattr(trainer, "end"):  # transformers 5.18: ends trackers and process groups
        trainer.end()


def check_same_settings(checkpoint: str, trainer: CancelGRPOTrainer) -> None:
    """Refuses to save a model again with other settings than its own, which are saved beside it and stand in the card."""
    changed = checkpoints.decided_by_main(trainer.accelerator, lambda: changes(Path(checkpoint), run_record(trainer)))
    if changed:
        raise UsageError(
            f"{checkpoint}: nothing is left to train from there, and its model can be saved again, but only with the run's "
            f"own settings; they differ: {'; '.join(changed)}. Set these back, or raise max_steps to train on."
        )


def _train(
    settings: Settings,
    trainer: CancelGRPOTrainer,
    checkpoint: str | None,
    test: Dataset | None,
    rewards: list[Any],
) -> None:
    before = evaluate(trainer, test, rewards[0], settings, "Before")
    folder = Path(str(trainer.args.output_dir))
    if trainer.is_world_process_zero() and (checkpoint is None or is_of_another_run(folder, Path(checkpoint))):
        discard(folder)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        ProgressBar.close_of(trainer)
    seconds = time.perf_counter() - started
    with _saving(trainer):
        _save(trainer, Left())
    _finish(settings, trainer, test, rewards, before, seconds)


def _save_again(
    settings: Settings,
    trainer: CancelGRPOTrainer,
    checkpoint: str,
    test: Dataset | None,
    rewards: list[Any],
) -> None:
    """Of a run that has finished but whose model is not there; what is there of its logs and results stays."""
    folder = Path(str(trainer.args.output_dir))
    left = checkpoints.decided_by_main(trainer.accelerator, lambda: left_by(folder, Path(checkpoint)))
    before = None if left.results else evaluate(trainer, test, rewards[0], settings, "Before")
    trainer.load_finished(checkpoint)
    trainer.state.log_history = left.logs or trainer.state.log_history
    with _saving(trainer):
        _save(trainer, left)
    if trainer.is_world_process_zero():
        step = trainer.state.global_step
        say(f"Already finished at step {step}: nothing was trained, and the model was saved again from {checkpoint}.")
    if not left.results:
        _finish(settings, trainer, test, rewards, before)
    elif trainer.is_world_process_zero():
        push = f" To push it: trl-cancel push {folder}." if trainer.args.push_to_hub else ""
        say(f"Model saved to {folder}, beside its results.{push}")


def _finish(
    settings: Settings,
    trainer: CancelGRPOTrainer,
    test: Dataset | None,
    rewards: list[Any],
    before: Evaluation | None,
    seconds: float | None = None,
) -> None:
    """Evaluates a model that is saved, and publishes what came out."""
    try:
        after = evaluate(trainer, test, rewards[0], settings, "After")
    except Failure as error:
        saved = f"The trained model is saved in {trainer.args.output_dir}."
        raise Failure(f"{str(error).rstrip('.')}. {saved}") from error

    results = Results(_scores(before), _scores(after), *_training_means(trainer), trainer.state.global_step, seconds)
    with _saving(trainer):
        trainer.save_metrics("train", results.known())
        if trainer.is_world_process_zero():
            console.print(results.table())
            remark = remark_on(trainer.state.log_history, trainer.args)
            if remark is not None:
                say(remark)
        _publish(trainer)


def _saving(trainer: CancelGRPOTrainer) -> AbstractContextManager[None]:
    return checkpoints.saved_or_said(Path(str(trainer.args.output_dir)), trainer.own_checkpoints)


def _save(trainer: CancelGRPOTrainer, left: Left) -> None:
    """Saves the model, the logs and the card, but for what is left, before anything else can fail."""
    folder = Path(str(trainer.args.output_dir))
    if trainer.is_world_process_zero() and not left.results:
        for name in (RESULTS, "train_results.json"):  # those of another model, whose run had as many steps, say
            (folder / name).unlink(missing_ok=True)
    if trainer.is_fsdp_enabled:  # checkpoints may be sharded, but a model that is loaded elsewhere must not be
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder), _internal_call=True)  # otherwise it would push, too
    if left.logs is None:
        trainer.save_state()  # after the model: it tells that this is saved, see `saved_step`
    if not (left.results and (folder / CARD).exists()):
        trainer.create_model_card()


def _publish(trainer: CancelGRPOTrainer) -> None:
    """Completes the card by the last evaluation, and pushes model and card if that is wanted."""
    folder = trainer.args.output_dir
    try:
        if trainer.args.push_to_hub:
            trainer.push_to_hub()
        else:
            trainer.create_model_card()
    except PushError as error:
        raise Failure(str(error)) from error
    if trainer.is_world_process_zero():
        pushed = f" and pushed to {trainer.hub_model_id}" if trainer.args.push_to_hub else ""
        say(f"Model saved to {folder}{pushed}.")


def check_hub(settings: Settings) -> None:
    """Asks the Hub for the token's owner, where the model is to be pushed, before anything is loaded."""
    if settings.training.push_to_hub:
        try:
            check_token(settings.training.hub_token)
        except PushError as error:
            raise (UsageError if error.refused else Failure)(str(error)) from error


def check_writable(folder: str, setting: str = "output_dir") -> None:
    """Makes sure that the output folder can be written, without creating it yet."""
    if not folder.strip():
        raise UsageError(f"{setting} is empty: name a folder.")
    path = Path(folder).expanduser().resolve()
    existing = next(parent for parent in [path, *path.parents] if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UsageError(f"{setting}={folder}: cannot write to {existing}: {error.strerror}.") from error


def find_checkpoint(settings: Settings, trainer: CancelGRPOTrainer) -> str | None:
    """The checkpoint to go on from, of the model that is trained; a wrong one is refused before anything is evaluated."""
    try:
        checkpoint = trainer.find_checkpoint(wanted_checkpoint(settings))
        check_fit(checkpoint, trainer.model, trainer.args)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return checkpoint


def check_evaluation(settings: Settings) -> None:
    """Refuses numbers of problems and samples that make no sense."""
    for name, least in (("eval_problems", 0), ("eval_samples", 1)):
        if getattr(settings.run, name) < least:
            raise UsageError(f"{name}={getattr(settings.run, name)}: must be at least {least}.")


def load_data(settings: Settings) -> DatasetDict | dict[str, Any]:
    """The data set by split; `playground` and `playground-varied` are the embedded ones."""
    run, mixture = settings.run, settings.mixture
    if not mixture.datasets and not run.dataset_name:
        raise UsageError(f"dataset_name is missing: give a Hub id, a local path or '{playground.NAME}'.")
    if not mixture.datasets and run.dataset_name in playground.CHECKPOINTS:
        from ..playground.data import load_prompts

        dataset = DatasetDict(
            train=load_prompts("train", task=run.dataset_name),
            test=load_prompts("test", 1024, task=run.dataset_name),
        )
    else:
        name = "datasets" if mixture.datasets else f"dataset_name={run.dataset_name}"
        paths = [part.path for part in mixture.datasets] or [str(run.dataset_name)]
        with sources.within_reach(*paths) as out_of_reach:
            try:
                dataset = _load_mixture(mixture) if mixture.datasets else _load_named(run)
            except Exception as error:  # the library raises a dozen types for names, files and connections
                said = sources.in_short(error, str(run.dataset_name))
                meant = "" if mixture.datasets else sources.said_of_playground(str(run.dataset_name))
                if out_of_reach and not all(map(sources.needs_no_hub, paths)):
                    raise Failure(f"{name}: cannot load it: {nowhere(out_of_reach)}{meant}") from error
                raise UsageError(
                    f"{name}: cannot load it ({said}). Give a Hub id, a local file or folder that datasets.load_dataset "
                    f"reads, or '{playground.NAME}'.{meant}"
                ) from error
    split = run.dataset_train_split
    if split not in dataset:
        raise UsageError(f"dataset_train_split={split}: the data set has the splits {', '.join(dataset)}.")
    return dataset


def nowhere(out_of_reach: str) -> str:
    """Where a data set was looked for, if the Hub cannot be reached."""
    return f"{out_of_reach}, and neither a file or folder of that name nor the cache holds it."


def _load_mixture(mixture: DatasetMixtureConfig) -> DatasetDict:
    """A mixture, whose parts may be files too."""
    for part in mixture.datasets:
        part.path, files = sources.load_arguments(part.path, part.split)
        part.data_files = part.data_files or files.get("data_files")
    return get_dataset(mixture)


def _load_named(run: RunArguments) -> Any:
    """A data set that is no mixture: of the Hub, a folder or a file."""
    name, split = str(run.dataset_name), run.dataset_train_split
    saved = sources.load_files(name, split)
    if saved is not None:
        return {key: rows.to_iterable_dataset() for key, rows in saved.items()} if run.dataset_streaming else saved
    path, files = sources.load_arguments(name, split)
    return load_dataset(path, name=run.dataset_config, streaming=run.dataset_streaming, **files)


def check_columns(settings: Settings, dataset: Any, rewards: list[Any]) -> None:
    """Refuses splits without prompts, and test problems that the first reward function cannot score."""
    run = settings.run
    test, evaluates = run.dataset_test_split, settings.training.eval_strategy != "no"
    used = [run.dataset_train_split, *([test] if (evaluates or run.eval_problems) and test in dataset else [])]
    for split in used:
        columns = columns_of(dataset[split])
        if columns is None:  # of some streams; the trainer looks at their rows
            continue
        if "prompt" not in columns:
            raise UsageError(
                f"dataset_name={run.dataset_name}: split {split!r} has the columns {', '.join(columns)} but no "
                "'prompt'. Rename the column that holds the prompts to 'prompt'."
            )
        if split == test and run.eval_problems:
            try:
                check_rewards(rewards[0], columns, f"split {split!r}")
            except ValueError as error:
                raise UsageError(str(error)) from error


def find_rewards(settings: Settings) -> list[Any]:
    """Reward functions by name: one of TRL's, a dotted path, or the playground's own for the playground."""
    run = settings.run
    names = [run.reward_funcs] if isinstance(run.reward_funcs, str) else run.reward_funcs or []
    rewards: list[Any] = [run.reward_model_name_or_path] if run.reward_model_name_or_path else []
    if not names and not rewards and run.dataset_name in playground.CHECKPOINTS:
        names = ["trl_cancel.playground.reward.answer_reward"]
    rewards += [find_reward(name) for name in names]
    if not rewards:
        raise UsageError(
            "reward_funcs is missing: name one of TRL's (accuracy_reward, think_format_reward, ...) or a function by "
            "its dotted path (my_module.my_reward)."
        )
    if run.eval_problems and not callable(rewards[0]):
        raise UsageError(
            "eval_problems is scored by a reward function, not by reward_model_name_or_path; set it to 0."
        )
    return rewards


def find_reward(name: str) -> Callable[..., Any]:
    """A reward function: one of TRL's, or by its dotted path."""
    if name == "get_soft_overlong_punishment":  # TRL's command line gives it these lengths
        return trl.rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    _refuse_file(name)
    module, _, function = name.rpartition(".")
    try:
        if name.startswith("."):
            raise ImportError("it starts with a dot")
        if module:
            sys.path.insert(0, os.getcwd())
        reward = getattr(importlib.import_module(module) if module else trl.rewards, function)
    except SyntaxError as error:
        raise UsageError(f"reward_funcs={name}: its module cannot be read: {error}.") from error
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"reward_funcs={name}: not found ({error}){suggestion(function, _names_in(module))} Name one of TRL's "
            f"({', '.join(_reward_names())}) or a function by its dotted path."
        ) from error
    if not callable(reward):
        raise UsageError(f"reward_funcs={name}: is a {type(reward).__name__}, not a function.")
    return reward


def _refuse_file(name: str) -> None:
    """Refuses what names a file, with the dotted path that may be meant."""
    if os.sep not in name and ":" not in name and not name.endswith(".py"):
        return
    if "://" in name or "@" in name:
        raise UsageError(
            f"reward_funcs={name}: is an address; give a function of TRL's or your own by its dotted path, module.function."
        )
    file, _, function = name.partition(".py")
    path = Path(file).expanduser()
    inside = path.resolve().is_relative_to(Path.cwd())
    module = ".".join(path.resolve().relative_to(Path.cwd()).parts) if inside else path.name
    where = "" if inside else f", started in {path.parent} or with that folder in PYTHONPATH"
    dotted = f"{module}.{function.strip(':.') or 'FUNCTION'}" if file != name else module.replace(":", ".")
    raise UsageError(
        f"reward_funcs={name}: not the path of a file is taken, but, as by TRL's script, a dotted path: module.function, "
        f"where Python finds the module from the current folder. Give {dotted}{where}."
    )


def _names_in(module: str) -> list[str]:
    """What a module, if it could be loaded, holds that may be meant by a name that it does not hold."""
    if module in ("", "trl.rewards"):
        return [*_reward_names(), "get_soft_overlong_punishment"]
    return [name for name, value in getattr(sys.modules.get(module), "__dict__", {}).items() if callable(value)]


def _reward_names() -> list[str]:
    return [name for name in dir(trl.rewards) if name.endswith("_reward")]


def build_trainer(settings: Settings, dataset: Any, rewards: list[Any]) -> CancelGRPOTrainer:
    """The trainer, on the named model."""
    training, model = settings.training, settings.model
    if not model.model_name_or_path:
        raise UsageError(f"model_name_or_path is missing: give a Hub id, a local path or '{playground.NAME}'.")
    path = sources.expanded(str(playground.CHECKPOINTS.get(model.model_name_or_path, model.model_name_or_path)))
    check_model_path(path)
    loading: Any = training.model_init_kwargs or {}  # a dictionary by now, also where it was given as JSON
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **loading,
    }
    of_hub = [path, *(reward for reward in rewards if isinstance(reward, str))]
    try:
        with sources.within_reach(*of_hub) as out_of_reach:
            check_adapter(model, path)
            trainer = CancelGRPOTrainer(
                path,
                list(rewards),
                training,
                train_dataset=dataset[settings.run.dataset_train_split],
                eval_dataset=_eval_split(settings, dataset) if training.eval_strategy != "no" else None,
                quantization_config=get_quantization_config(model),
                peft_config=get_peft_config(model),
            )
    except PushError as error:
        raise (UsageError if error.refused else Failure)(str(error)) from error
    except (OSError, SafetensorError) as error:  # the first if a path or Hub id holds no model
        of_reward = [
            reward for reward in of_hub[1:] if reward in str(error) or (out_of_reach and sources.needs_no_hub(path))
        ]
        if of_reward:
            raise cannot_load(of_reward[0], error, out_of_reach, "reward_model_name_or_path") from error
        raise cannot_load(model.model_name_or_path, error, out_of_reach) from error
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    except RuntimeError as error:
        if "requires" not in str(error):  # as of a tracker that is not installed
            raise
        raise UsageError(f"report_to={training.report_to}: {error}") from error
    mixed = [dataset.path for dataset in settings.mixture.datasets]
    trainer.dataset_names = mixed or [str(settings.run.dataset_name)]
    if not training.disable_tqdm and trainer.is_world_process_zero():
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ProgressBar())
    return trainer


def check_model_path(path: str) -> None:
    """Refuses a local path without a model in it, of which transformers would speak as of a Hub id."""
    folder = Path(path).expanduser()
    address = sources.said_of_address(path)
    if address is not None and not folder.is_dir():
        raise UsageError(f"model_name_or_path={path}: {address}.")
    if sources.looks_local(path) and not folder.is_dir():
        raise UsageError(f"model_name_or_path={path}: there is no such folder.")
    if folder.is_dir() and not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UsageError(f"model_name_or_path={path}: the folder holds no model (no config.json).")
    damaged = damage.weights_cut_off(folder) if folder.is_dir() else []
    if damaged:
        raise UsageError(f"model_name_or_path={path}: {', '.join(damaged)} cut off; copy or download the model again.")


def check_adapter(model: ModelConfig, path: str) -> None:
    """Refuses quantized weights with nothing to train on top of them, before they are loaded."""
    bits = 4 if model.load_in_4bit else 8 if model.load_in_8bit else None
    if bits and not model.use_peft and not find_adapter_config_file(path, revision=model.model_revision):
        raise UsageError(f"load_in_{bits}bit: weights of {bits} bits cannot be trained. Add --use_peft (LoRA).")


def cannot_load(
    name: Any, error: Exception, out_of_reach: str | None, setting: str = "model_name_or_path"
) -> UsageError | Failure:
    """What is said of a model that cannot be loaded: whether its name or the network is to blame."""
    what, meant = f"{setting}={name}: cannot load it", sources.said_of_playground(str(name))
    if out_of_reach:
        return Failure(f"{what}: {out_of_reach}, and neither a folder of that name nor the cache holds it.{meant}")
    reason = str(error).splitlines()[0]
    return UsageError(
        f"{what}: {reason} Give a Hub id, a local folder of a model or an adapter, or '{playground.NAME}'.{meant}"
    )


def _eval_split(settings: Settings, dataset: Any) -> Dataset | IterableDataset:
    split = settings.run.dataset_test_split
    if split not in dataset:
        raise UsageError(f"dataset_test_split={split}: the data set has the splits {', '.join(dataset)}.")
    return dataset[split]


def pick_test_problems(settings: Settings, dataset: Any) -> Dataset | None:
    """The first `eval_problems` rows of the test split."""
    count = settings.run.eval_problems
    if not count:
        return None
    split = _eval_split(settings, dataset)
    if isinstance(split, IterableDataset):
        rows = list(split.take(count))
        if not rows:
            raise UsageError(f"dataset_test_split={settings.run.dataset_test_split}: it is empty.")
        return Dataset.from_list(rows, features=split.features)
    return split.select(range(min(count, len(split))))


def evaluate(
    trainer: CancelGRPOTrainer, problems: Dataset | None, reward: Any, settings: Settings, label: str
) -> Evaluation | None:
    """
    Answers the test problems greedily and by sampling, as the training samples.

    Raises:
        `Failure`: If the answers cannot be made or scored.
    """
    if problems is None:
        return None
    training = settings.training
    how = EvaluationSettings(
        num_samples=settings.run.eval_samples,
        temperature=training.temperature or 1.0,
        top_p=training.top_p or 1.0,
        top_k=training.top_k or 0,
        max_completion_length=training.max_completion_length or 256,
        score_truncated=True,  # as in training
        chat_template_kwargs=cast(Any, training.chat_template_kwargs),  # a dictionary by now
    )
    try:
        engine = trainer_engine(trainer, EVALUATION_BATCH)
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        with unchanged_random_state():
            evaluation = evaluate_problems(
                engine,
                problems,
                reward,
                how,
                name=settings.run.dataset_name or "test problems",
                step=steps_trained(trainer),
                description=label,
                trainer=trainer,
            )
    except ValueError as error:
        raise Failure(f'The evaluation "{label}" has failed: {error}') from error
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise Failure(f'The evaluation "{label}" is out of memory ({error}); set eval_problems to 0.') from error
    record(trainer, evaluation)
    return evaluation


class ProgressBar(TrainerCallback):
    """A progress bar with the latest reward and residual, instead of a dictionary at every log."""

    shown = {"reward": "latest reward", RESIDUAL: "latest residual"}

    def __init__(self):
        self.bar: Any = None
        self.latest: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Training", unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.latest |= {
            label: f"{float(logs[name]):.3g}" for name, label in self.shown.items() if name in (logs or {})
        }
        if self.bar is not None:
            self.bar.set_postfix(self.latest)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    @classmethod
    def close_of(cls, trainer: CancelGRPOTrainer) -> None:
        """Ends the line of the bar where a training has ended early, so that what is said next has its own."""
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, cls) and callback.bar is not None:
                callback.bar.close()


def use_one_thread() -> None:
    """
    One thread computes tiny models fastest: on a busy machine a second one mostly waits. `OMP_NUM_THREADS` overrides.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
