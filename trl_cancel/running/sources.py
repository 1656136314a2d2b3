"""Where data sets and models come from: files and folders on this machine, or the Hub, which may be out of reach."""

import glob
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants, get_session

from .. import playground
from ..texts import suggestion


# Endings of files that are taken for data, also where there is no such file; the library reads more.
DATA = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")


def looks_local(name: str) -> bool:
    """Whether a name can only be that of a file or folder: ids of the Hub have at most one slash."""
    if "://" in name:
        return False
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.endswith(os.sep) or name.count(os.sep) > 1


def said_of_address(name: str) -> str | None:
    """
    What to give instead of an address, which is neither a file nor a Hub id.

    Args:
        name (`str`):
            File, folder, Hub id or address.

    Returns:
        `str`, *optional*: `None` if it is no address.
    """
    if "://" not in name or name.startswith("hf://"):
        return None
    of_hub = re.match(r"https?://(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)", name)
    instead = f"give the Hub id, {of_hub[1]}" if of_hub else "download what is there and give the file or folder"
    return f"it is an address; {instead}"


def said_of_playground(name: str) -> str:
    """A sentence about the playground's names, if one of them may be meant; empty otherwise."""
    meant = suggestion(name, playground.CHECKPOINTS).removeprefix("; d")
    return f" D{meant}" if meant != "." else ""


def is_on_disk(name: str) -> bool:
    """Whether there is a file or folder of that name."""
    return Path(name).expanduser().exists()


def expanded(name: str) -> str:
    """A name with the home folder in the place of `~`, as shells write it, but not within `--name=~/data`."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


def load_files(name: str, split: str) -> Any:
    """
    A data set from this machine that `load_dataset` does not take by its name: what `save_to_disk` has saved.

    Args:
        name (`str`):
            File, folder or Hub id.
        split (`str`):
            Name for the only split, where there is one.

    Returns:
        [`~datasets.DatasetDict`], *optional*: `None` for everything else.
    """
    folder = Path(name).expanduser()
    if not any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return None
    saved = datasets.load_from_disk(str(folder))
    return saved if isinstance(saved, dict) else datasets.DatasetDict({split: saved})


def load_arguments(name: str, split: str) -> tuple[str, dict[str, Any]]:
    """
    Arguments for `load_dataset`, which takes a folder or a Hub id by its name, but not a file.

    Args:
        name (`str`):
            File, folder or Hub id.
        split (`str`):
            The split that a file is read as.

    Returns:
        `tuple[str, dict]`: The name, and keyword arguments.

    Raises:
        `FileNotFoundError`: If it can only be a file or folder, and is not there.
        `ValueError`: If it is a file, but not of a kind that is read, or an address.
    """
    path = Path(name).expanduser()
    address = said_of_address(name)
    if address is not None and not path.exists():
        raise ValueError(address)
    if path.is_file():
        if not path.suffix:
            raise ValueError(f"its name tells no kind of file; use one of {', '.join(DATA)}, also compressed")
        files = {re.split(r"\W", split)[0]: glob.escape(path.name)}
        return str(path.resolve().parent), {"data_files": files}
    if not path.is_dir() and (looks_local(name) or _is_file_name(name)):
        raise FileNotFoundError("there is no such file or folder")
    return expanded(name), {}


def _is_file_name(name: str) -> bool:
    """Whether a name is that of a file of data in a folder that is there, rather than a Hub id that looks like one."""
    return _is_data(name) and "://" not in name and Path(name).expanduser().parent.is_dir()


def _is_data(name: str) -> bool:
    return _kind(name) in DATA


def _kind(name: str) -> str:
    """The ending that tells the kind of a file, without that of a compression; only this if there is no other."""
    path = Path(name.lower())
    return (path.with_suffix("").suffix if path.suffix in COMPRESSED else "") or path.suffix


def in_short(error: Exception, name: str = "") -> str:
    """
    What went wrong when a data set was loaded.

    Args:
        error (`Exception`):
            What the library has raised.
        name (`str`, *optional*):
            File, folder or Hub id.
    """
    if isinstance(error, StopIteration):  # of the reader of JSON
        return "it is empty"
    said = str(error.__cause__ or error)
    if said.startswith("Unable to find") and Path(name).expanduser().is_file() and not _is_data(name):
        return f"files of the kind {_kind(name)} are not read; make it one of {', '.join(DATA)}, also compressed"
    return said.split(" with any supported extension")[0] or type(error).__name__


@contextmanager
def within_reach(*names: str | None) -> Iterator[str | None]:
    """
    Asks once whether the Hub can be reached, where something is to come from there. If it cannot, what is loaded
    meanwhile comes from the cache at once, instead of after half a minute of attempts for each file.

    Args:
        *names (`str`):
            Hub ids, files and folders that are to be loaded.

    Yields:
        `str`, *optional*: Why it cannot be reached.
    """
    if constants.is_offline_mode() or all(name is None or needs_no_hub(name) for name in names):
        yield None
        return
    why = _why_unreachable()
    if why is None:
        yield None
        return
    switches: tuple[Any, ...] = (constants, datasets.config)  # each library reads its own
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    try:
        for switch in switches:
            switch.HF_HUB_OFFLINE = True
        yield why
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


def needs_no_hub(name: str) -> bool:
    """Whether all of a data set, a model or an adapter is here."""
    adapter = Path(name).expanduser() / "adapter_config.json"
    try:
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):  # no adapter
        local = is_on_disk(name) or looks_local(name) or _is_file_name(name)
        return local or said_of_address(name) is not None
    return base is None or is_on_disk(base)


def _why_unreachable(attempts: int = 2) -> str | None:
    """Any answer will do, also a late one; only what cannot be connected to is out of reach."""
    why = None
    for attempt in range(attempts):
        time.sleep(min(attempt, 1))  # names may not be resolved for a moment
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return None
        except Exception as error:  # of whichever client the Hub's library has
            if type(error).__name__ not in ("ConnectError", "ConnectTimeout", "ProxyError"):
                return None
            late = type(error).__name__ == "ConnectTimeout"
            said = f"no answer within {constants.HF_HUB_ETAG_TIMEOUT} s" if late else str(error).splitlines()[0]
            why = f"{constants.ENDPOINT} cannot be reached ({said})"
    return why
