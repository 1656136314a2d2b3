"""In what a run differs from the one that has left a checkpoint or a model behind."""

import hashlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset

from .damage import STATE, is_count, read_object
from .secrets import without_secrets, without_tokens


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
}
# What the optimizer's state holds, and brings along.
OF_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
LENGTHS = ("max_steps", "num_train_epochs")
CONSTANT = ("constant", "constant_with_warmup")
PLAIN = (bool, int, float, str, type(None))


def settings_of(folder: Path) -> dict[str, Any]:
    """
    The settings that a checkpoint, or the `trainer_state.json` of a finished run, says it was trained with; none if it
    is of TRL's own trainer. `training_args.bin` has them too, but is pickled, and could run what it likes.

    Args:
        folder (`Path`):
            Folder of the checkpoint or the model.
    """
    settings = _attributes(folder).get("settings")
    return settings if isinstance(settings, dict) else {}


def run_record(trainer: Any, run: str | None = None) -> dict[str, Any]:
    """
    What checkpoints hold of a run: its settings, processes, rewards and data, and a name of its own.

    Args:
        trainer ([`CancelGRPOTrainer`]):
            The trainer.
        run (`str`, *optional*):
            The name of the run, if it goes on; a new one if not given.
    """
    record = {
        "settings": _settings(trainer.args),
        "processes": trainer.accelerator.num_processes,
        "reward functions": list(trainer.reward_func_names),
        "train_dataset": _data(trainer.train_dataset),
        "run": run or uuid.uuid4().hex,
    }
    return {"args": {}, "attributes": record}


def settings_record(args: Any) -> dict[str, Any]:
    """
    What is known of a run before its trainer is made, for [`changes`].

    Args:
        args ([`~trl_cancel.CancelGRPOConfig`]):
            Its settings.
    """
    return {"args": {}, "attributes": {"settings": _settings(args)}}


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


def is_same_run(state: dict[str, Any], other: dict[str, Any]) -> bool:
    """
    Whether two checkpoints, or a checkpoint and a result, are of one run: by its name, or by their first log where one
    has no name, as those of TRL's own trainer. `False` if that cannot be told.

    Args:
        state, other (`dict`):
            What their `trainer_state.json` hold.
    """
    names = [run_of(each.get("stateful_callbacks")) for each in (state, other)]
    if None not in names:
        return names[0] == names[1]
    return bool(logs_of(state)) and logs_of(state)[:1] == logs_of(other)[:1]


def tells_run(state: dict[str, Any]) -> bool:
    """
    Whether a checkpoint, or a result, tells of which run it is.

    Args:
        state (`dict`):
            What its `trainer_state.json` holds.
    """
    return run_of(state.get("stateful_callbacks")) is not None or bool(logs_of(state))


def logs_of(state: dict[str, Any]) -> list[str]:
    """
    The logs of a run, each as text, in which `nan` equals itself.

    Args:
        state (`dict`):
            What `trainer_state.json` holds.
    """
    logs = state.get("log_history")
    return [json.dumps(log, sort_keys=True) for log in logs] if isinstance(logs, list) else []


def saved_record(folder: Path) -> dict[str, Any]:
    """
    The [`run_record`] that a checkpoint or a model was saved with, for [`changes`]; one without anything in it if it is
    of TRL's own trainer.

    Args:
        folder (`Path`):
            Folder of the checkpoint or the model.
    """
    return {"args": {}, "attributes": _attributes(folder)}


def changes(folder: Path, record: dict[str, Any]) -> list[str]:
    """
    In what a run differs from that of a checkpoint or a model, each as `name: then -> now`; as far as is known.

    Args:
        folder (`Path`):
            Folder of the checkpoint or the model.
        record (`dict`):
            The [`run_record`] of the run, or what is known of it yet.
    """
    then, now = _attributes(folder), record["attributes"]
    found = list(_changed_settings(settings_of(folder), now.get("settings", {})))
    for name in ("processes", "reward functions"):
        if None not in (then.get(name), now.get(name)) and then[name] != now[name]:
            found.append(f"{name}: {then[name]} -> {now[name]}")
    if then.get("train_dataset") and now.get("train_dataset"):
        found += _changed_data(then["train_dataset"], now["train_dataset"])
    return sorted(found)


def is_of_length(change: str) -> bool:
    """
    Whether one of the [`changes`] is that of the length of the run: it is trained on, say.

    Args:
        change (`str`):
            The change.
    """
    return change.partition(":")[0] in (*LENGTHS, "length of the run")


def held_by_optimizer(changed: list[str]) -> list[str]:
    """
    Names among changes whose old values stay in force, with the optimizer's state.

    Args:
        changed (`list[str]`):
            What [`changes`] returns.
    """
    return [name for name in OF_OPTIMIZER if any(change.startswith(f"{name}:") for change in changed)]


def _changed_settings(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    aside = {"optim", *LENGTHS}  # another optimizer is refused
    was, is_now = _length(then), _length(now)
    # Where the rate is constant, more steps are no other schedule.
    if was and is_now and was != is_now and now.get("lr_scheduler_type") not in CONSTANT:
        yield _changed_length(was, is_now)
    for name in now.keys() & then.keys() - aside:
        if then[name] != now[name]:
            yield without_tokens(f"{name}: {then[name]} -> {now[name]}")


def _length(settings: dict[str, Any]) -> tuple[str, int | float] | None:
    """What sets the length of a run, `max_steps` where that is greater than 0, and its value; `None` if unknown."""
    for name in LENGTHS:
        value = settings.get(name)
        if isinstance(value, int | float) and value > 0:
            return name, value
    return None


def _changed_length(then: tuple[str, int | float], now: tuple[str, int | float]) -> str:
    if then[0] == now[0]:
        return f"{then[0]}: {then[1]} -> {now[1]}"
    return f"length of the run: {'='.join(map(str, then))} -> {'='.join(map(str, now))}"


def _attributes(folder: Path) -> dict[str, Any]:
    record: Any = read_object(folder / STATE)
    for name in ("stateful_callbacks", SAVED_AS, "attributes"):
        record = record.get(name)
        if not isinstance(record, dict):
            return {}
    return record


def _changed_data(was: Any, now: dict[str, Any]) -> Iterator[str]:
    rows, digest = (was.get(name) if isinstance(was, dict) else None for name in ("rows", "digest"))
    if not is_count(rows):
        return
    if rows != now["rows"]:
        yield f"train_dataset: {rows} rows -> {now['rows']} rows"
    elif None not in (digest, now["digest"]) and digest != now["digest"]:
        yield f"train_dataset: {rows} rows -> as many others"


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


def _settings(args: Any) -> dict[str, Any]:
    """What of the settings can be written as JSON, as it is then read, without what does not touch the training."""
    set_by_methods = getattr(args, "set_by_methods", ())  # what the user has not chosen
    names = [field.name for field in fields(args) if field.name not in {*ASIDE, *set_by_methods}]
    names = [name for name in names if not name.startswith(ASIDE_PREFIXES)]
    in_force = getattr(args, "in_force", {})
    values = without_secrets({name: in_force.get(name, getattr(args, name)) for name in names})
    plain = {name: getattr(value, "value", value) for name, value in values.items()}  # of enumerations
    return {name: json.loads(json.dumps(value)) for name, value in plain.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(part) for part in value)
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    return isinstance(value, PLAIN)
