"""In what a run differs from the one that has left a checkpoint or a model behind."""

import hashlib
import io
import json
import pickle
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from .configs import CancelGRPOConfig
from .damage import STATE
from .secrets import without_secrets, without_tokens


ARGUMENTS = "training_args.bin"
SAVED_AS = "trl_cancel.Run"  # among the states of callbacks, which transformers keeps in `trainer_state.json`
SAMPLED_ROWS = 64
# What says where, when and how loudly, not what is trained.
ASIDE_PREFIXES = (
    *("logging_", "log_", "eval_", "save_", "push_to_hub", "hub_", "report_", "dataloader_", "ddp_", "torch_compile"),
    *("vllm_server_", "per_device_eval", "per_gpu_eval", "include_", "trackio", "load_best", "metric_for", "greater"),
)
ASIDE = {
    *("output_dir", "logging_dir", "run_name", "project", "disable_tqdm", "resume_from_checkpoint", "debug"),
    *("num_completions_to_print", "cancellation_metrics", "token_shift_steps", "use_cpu", "do_train", "do_eval"),
    *("do_predict", "num_generations_eval", "skip_memory_metrics", "gradient_checkpointing", "local_rank"),
    *("gradient_checkpointing_kwargs", "activation_checkpointing", "activation_checkpointing_kwargs"),
    *("enable_jit_checkpoint", "restore_callback_states_from_checkpoint", "state_cache_gib", "accelerator_config"),
    *("generation_batch_size", "model_init_kwargs", "deepspeed", "fsdp", "fsdp_config", "remove_unused_columns"),
    *("num_train_epochs", "max_steps", "optim"),  # see below; another optimizer is refused
}
# What the optimizer's state holds, and brings along.
OF_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
CONSTANT = ("constant", "constant_with_warmup")
PLAIN = (bool, int, float, str, type(None))


def settings_of(folder: Path) -> dict[str, Any] | None:
    """
    The settings in the `training_args.bin` of a checkpoint or a model, of TRL's trainer too; `None` if there are none
    that can be read. Nothing of what is pickled there is called or imported.

    Args:
        folder (`Path`):
            Folder of the checkpoint or the model.
    """
    try:
        with zipfile.ZipFile(folder / ARGUMENTS) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            found = _InertUnpickler(io.BytesIO(archive.read(name))).load()
    except Exception:  # whatever noise makes of a pickle
        return None
    settings = getattr(found, "__dict__", None)
    return {name: _plain(value) for name, value in settings.items()} if isinstance(settings, dict) else None


def run_record(trainer: Any, run: str | None = None) -> dict[str, Any]:
    """
    What checkpoints hold of a run beside its settings: its processes, rewards and data, and a name of its own.

    Args:
        trainer ([`CancelGRPOTrainer`]):
            The trainer.
        run (`str`, *optional*):
            The name of the run, if it goes on; a new one if not given.
    """
    record = {
        "processes": trainer.accelerator.num_processes,
        "reward functions": list(trainer.reward_func_names),
        "train_dataset": _data(trainer.train_dataset),
        "run": run or uuid.uuid4().hex,
    }
    return {"args": {}, "attributes": record}


def run_of(states: Any) -> str | None:
    """
    Name of the run among the states of callbacks that a checkpoint holds, `None` if it is one of TRL's own trainer.

    Args:
        states (`dict`):
            `stateful_callbacks` of a `trainer_state.json`.
    """
    try:
        return states[SAVED_AS]["attributes"]["run"]
    except (KeyError, TypeError):
        return None


def changes(folder: Path, args: CancelGRPOConfig, record: dict[str, Any] | None = None) -> list[str]:
    """
    In what a run differs from that of a checkpoint or a model, each as `name: then -> now`.

    Args:
        folder (`Path`):
            Folder of the checkpoint or the model.
        args ([`CancelGRPOConfig`]):
            The settings of the run.
        record (`dict`, *optional*):
            Its [`run_record`].
    """
    then = settings_of(folder)
    found = [] if then is None else list(_changed_settings(then, args))
    before = _saved_record(folder)
    for name, now in record["attributes"].items() if record else ():
        was = before.get(name)
        if was is None or now is None or name == "run":
            continue
        found += (
            list(_changed_data(was, now)) if name == "train_dataset" else [f"{name}: {was} -> {now}"] * (was != now)
        )
    return found


def held_by_optimizer(changed: list[str]) -> list[str]:
    """
    Names among changes whose old values stay in force, with the optimizer's state.

    Args:
        changed (`list[str]`):
            What [`changes`] returns.
    """
    return [name for name in OF_OPTIMIZER if any(change.startswith(f"{name}:") for change in changed)]


def _changed_settings(then: dict[str, Any], args: CancelGRPOConfig) -> Iterator[str]:
    now = {name: _plain(value) for name, value in without_secrets(args.__dict__).items()}
    then = without_secrets(then)
    of_trl = {field.name for field in fields(GRPOConfig)}
    defaults = {field.name: field.default for field in fields(CancelGRPOConfig) if field.name not in of_trl}
    # Symmetric clipping sets TRL's bound on the other side itself.
    aside = ASIDE | ({"delta"} if now.get("symmetric_clip") and then.get("symmetric_clip") else set())
    for field in fields(args):
        name = field.name
        if name in aside or name.startswith(ASIDE_PREFIXES) or (name not in then and name not in defaults):
            continue
        was, becomes = then.get(name, defaults.get(name)), now.get(name)
        if _is_plain(was) and _is_plain(becomes) and was != becomes:
            yield without_tokens(f"{name}: {was} -> {becomes}")
    length = "max_steps" if now["max_steps"] > 0 or (then.get("max_steps") or 0) > 0 else "num_train_epochs"
    if now["lr_scheduler_type"] not in CONSTANT and length in then and then[length] != now[length]:
        yield f"{length}: {then[length]} -> {now[length]}"


def _saved_record(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        record = state["stateful_callbacks"][SAVED_AS]["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return record if isinstance(record, dict) else {}


def _changed_data(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if was["rows"] != now["rows"]:
        yield f"train_dataset: {was['rows']} rows -> {now['rows']} rows"
    elif None not in (was["digest"], now["digest"]) and was["digest"] != now["digest"]:
        yield f"train_dataset: {was['rows']} rows -> as many others"


def _data(dataset: Any) -> dict[str, Any] | None:
    """Number of rows and a digest of some; of the raw rows, so that no transformation of the user's is called."""
    try:
        rows = len(dataset)
    except TypeError:  # a stream
        return None
    if not isinstance(dataset, Dataset) or not rows:
        return {"rows": rows, "digest": None}
    chosen = sorted({rows * number // SAMPLED_ROWS for number in range(SAMPLED_ROWS)})
    columns = dataset.with_format("arrow")[chosen].to_pydict()
    digest = hashlib.sha256(repr(sorted(columns.items())).encode("utf-8", "surrogatepass")).hexdigest()
    return {"rows": rows, "digest": digest[:16]}


class _Inert:
    """Stands for every class and function of a pickle: keeps what it is called with, and does nothing."""

    def __init__(self, *arguments: Any):
        self.__dict__["arguments"] = arguments


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Inert,), {"__module__": module})


def _plain(value: Any) -> Any:
    """Members of enumerations as their values, in the settings of a run as in those that are read."""
    if isinstance(value, _Inert):
        arguments = value.__dict__.get("arguments", ())
        return _plain(arguments[-1]) if arguments and len(value.__dict__) == 1 else value
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {_plain(name): _plain(part) for name, part in value.items()}
    return getattr(value, "value", value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(part) for part in value)
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    return isinstance(value, PLAIN)
