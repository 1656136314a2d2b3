"""What is missing or damaged among the files of a model or a checkpoint, judged without loading them."""

import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO


STATE = "trainer_state.json"  # the last file that transformers writes
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
        if not isinstance(_json(checkpoint / STATE), dict):
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
    return json.loads(file.read_text(encoding="utf-8"))


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
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"the end of {index.name} is"
        for shard in sorted(shards):
            if not (checkpoint / shard).exists():
                return f"{shard} is"
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
        except (ValueError, struct.error, KeyError, IndexError, TypeError, AttributeError):
            return False
        return stream.tell() + max(ends, default=0) == file.stat().st_size


def _read(stream: BinaryIO, length: int) -> bytes:
    return stream.read(min(length, 2**27))  # a header is no longer; a number that is read from noise may be
