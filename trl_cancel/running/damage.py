"""What is missing or damaged among the files of a model or a checkpoint, judged without loading them."""

import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO


STATE = "trainer_state.json"  # the last file that transformers writes
COUNTS = ("global_step", "train_batch_size")  # in it
# What stands for the weights: of transformers, PEFT, FSDP (whose folders get `.metadata` last) and DeepSpeed.
WEIGHTS = (
    *("*model.safetensors", "*model.bin", "*model.*.index.json", "*/adapter_model.*"),
    *("pytorch_model_fsdp*.bin", "pytorch_model_fsdp_*/.metadata", "global_step*/*"),
)
# Of these, what can be pushed.
PUSHED_WEIGHTS = ("*model.safetensors", "*model.safetensors.index.json")
# And for each state; all of them are there, or none (`save_only_model`).
STATES = {
    "the optimizer's state": (
        "optimizer.pt*",
        "optimizer*.bin",
        "optimizer_*/.metadata",
        "*-optimizer.pt",
        "global_step*/*",
    ),
    "scheduler.pt": ("scheduler.pt", "global_step*/*"),
    "rng_state.pth": ("rng_state*.pth",),
}
# Small files of PyTorch's, of which all bytes are compared with the checksums they come with; larger ones take time.
CHECKED = ("*.pt", "*.pth", "training_args.bin")
CHECKED_BYTES = 2**26
# Text without a form that could be checked, but never empty: what a disk leaves that loses power.
NEVER_EMPTY = ("tokenizer*.model", "spiece.model", "merges.txt", "vocab.txt")
# Configurations, and what each is told by.
TOLD_BY = {"config.json": "model_type", "adapter_config.json": "peft_type"}


def read_object(file: Path) -> dict[str, Any]:
    """
    The object that a JSON file holds; an empty one where the file cannot be read, or holds something else.

    Args:
        file (`Path`):
            The file.
    """
    try:
        found = _json(file)
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def is_count(value: Any) -> bool:
    """Whether something is a whole number, 0 or more: of steps, say."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def why_unusable(folder: str | os.PathLike) -> str | None:
    """
    What is wrong with a model's weights in a folder, of those that are pushed, or `None` if they are whole.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of the model.
    """
    folder = Path(folder)
    if not _holds(folder, PUSHED_WEIGHTS):
        return "it holds no weights (*.safetensors)"
    lacking = _weights_missing(folder)
    if lacking:
        return f"{lacking} missing"
    files = ", ".join(weights_cut_off(folder))
    return f"{files} cut off" if files else None


def weights_cut_off(folder: str | os.PathLike) -> list[str]:
    """
    Names of the files of weights in a folder that end too early.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of a model or an adapter.
    """
    return sorted(file.name for file in cut_off(Path(folder)) if file.suffix == ".safetensors")


def weights_at(folder: Path) -> str | None:
    """
    Name of a file of weights at the top of a folder, `None` if there is none.

    Args:
        folder (`Path`):
            Folder of a model or an adapter.
    """
    names = sorted(file.name for pattern in ("*model*.safetensors", "*model*.bin") for file in folder.glob(pattern))
    return names[0] if names else None


def why_not_whole(checkpoint: Path) -> str | None:
    """
    What of a checkpoint is missing or damaged, or `None` if it is whole.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
    """
    try:
        if not _can_go_on_from(_json(checkpoint / STATE)):
            return f"{STATE} is damaged"
    except FileNotFoundError:
        return f"{STATE} is missing"
    except (ValueError, OSError):
        return f"{STATE} is cut off"
    lacking = _weights_missing(checkpoint) or _states_missing(checkpoint)
    if lacking:
        return f"{lacking} missing"
    files = ", ".join(sorted(file.name for file in cut_off(checkpoint)))
    return f"{files} cut off" if files else _damaged(checkpoint)


def cut_off(folder: Path) -> list[Path]:
    """Files of weights and states in a folder that end too early."""
    checks = {".safetensors": _ends_as_announced, ".pt": zipfile.is_zipfile, ".pth": zipfile.is_zipfile}
    return [file for file in folder.glob("*") if file.suffix in checks and not checks[file.suffix](file)]


def _damaged(checkpoint: Path) -> str | None:
    adapters = sorted(checkpoint.glob("*/adapter_config.json"))  # of adapters with names
    for file in [*sorted(checkpoint.glob("*.json")), *adapters]:
        name = file.relative_to(checkpoint)
        try:
            settings = _json(file)
        except (ValueError, OSError):
            return f"{name} cannot be read"
        if file.name.endswith("config.json") and not isinstance(settings, dict):
            return f"{name} is damaged"
        told_by = TOLD_BY.get(file.name)
        if told_by is not None and not isinstance(settings.get(told_by), str):
            return f"{name} is damaged"
    for adapter in adapters:
        files = weights_cut_off(adapter.parent)
        if files:
            return f"{adapter.parent.name}/{files[0]} is cut off"
    for file in sorted(file for pattern in CHECKED for file in checkpoint.glob(pattern)):
        if file.stat().st_size <= CHECKED_BYTES and not _agrees_with_checksums(file):
            return f"{file.name} is damaged"
    empty = [file.name for pattern in NEVER_EMPTY for file in checkpoint.glob(pattern) if not file.stat().st_size]
    return f"{empty[0]} is empty" if empty else None


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:  # of thousands of brackets
        raise ValueError(f"{file} is nested too deeply") from error


def _can_go_on_from(state: Any) -> bool:
    """Whether `trainer_state.json` holds what is read of it before the first step."""
    if not isinstance(state, dict) or not all(is_count(state.get(name)) for name in COUNTS):
        return False
    callbacks = state.get("stateful_callbacks", {})
    if not isinstance(callbacks, dict):
        return False
    of_callbacks = [data if isinstance(data, list) else [data] for data in callbacks.values()]
    return all(map(_are_objects, [state.get("log_history", []), *of_callbacks]))


def _are_objects(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)


def _agrees_with_checksums(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError):
        return False


def _weights_missing(checkpoint: Path) -> str | None:
    if not _holds(checkpoint, WEIGHTS):
        return "the weights are"
    for index in checkpoint.glob("*model.*.index.json"):
        try:
            shards = set(_json(index)["weight_map"].values())
            missing = sorted(shard for shard in shards if not (checkpoint / shard).exists())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"the end of {index.name} is"
        if missing:
            return f"{missing[0]} is"
    return None


def _states_missing(checkpoint: Path) -> str | None:
    missing = [state for state, patterns in STATES.items() if not _holds(checkpoint, patterns)]
    return f"{missing[0]} is" if missing and len(missing) < len(STATES) else None


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _ends_as_announced(file: Path) -> bool:
    """The header of a safetensors file, whose length comes first, tells where each tensor ends."""
    with open(file, "rb") as stream:
        try:
            header = json.loads(_read(stream, *struct.unpack("<Q", _read(stream, 8))))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            return stream.tell() + max(ends, default=0) == file.stat().st_size
        except (ValueError, struct.error, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return False


def _read(stream: BinaryIO, length: int) -> bytes:
    return stream.read(min(length, 2**27))  # a header is no longer; a number that is read from noise may be
