"""Errors of the disk: which are, and what they say in plain words."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..texts import one_line


STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN),  # a disk that is no longer there
}
# PyTorch and safetensors raise errors of their own, with the number in the text at best.
OF_PYTORCH = re.compile(r"PytorchStreamWriter|unexpected pos")
OF_SAFETENSORS = re.compile(r"\(os error (\d+)\)")
FULL, READ_ONLY = "the disk is full", "the disk is read-only"
MEANINGS = {errno.ENOSPC: FULL, errno.EDQUOT: f"{FULL} up to your quota", errno.EROFS: READ_ONLY}
LITTLE = 2**20  # a disk with less is full, whatever an error says


def is_storage_error(error: BaseException) -> bool:
    """Whether an error, or what caused it, comes from the disk."""
    return any(OF_PYTORCH.search(str(cause)) for cause in _causes(error)) or bool(_numbers(error) & STORAGE_ERRORS)


def what_happened(error: BaseException, folder: Path) -> str:
    """
    What an error of the disk says, after what it means where that is known.

    Args:
        error (`BaseException`):
            The error.
        folder (`Path`):
            What was written to.
    """
    said = one_line(error)
    meanings = [meaning for number, meaning in MEANINGS.items() if number in _numbers(error)]
    if not meanings and not _numbers(error):  # of PyTorch, which does not tell one from the other
        meanings = list(_state_of_disk(folder))
    return f"{meanings[0]} ({said})" if meanings else said


def free_bytes(folder: Path) -> int | None:
    """
    Space that is left on the disk of a folder, which need not exist yet; `None` if the disk does not say.

    Args:
        folder (`Path`):
            The folder.
    """
    try:
        return shutil.disk_usage(_existing(folder)).free
    except OSError:
        return None


def readable(size: float | None) -> str:
    """
    A number of bytes in the unit that suits it.

    Args:
        size (`float`, *optional*):
            The bytes.
    """
    if size is None:
        return "unknown space"
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _existing(folder: Path) -> Path:
    return next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())


def _state_of_disk(folder: Path) -> Iterator[str]:
    with suppress(OSError):
        if os.name != "nt" and os.statvfs(_existing(folder)).f_flag & os.ST_RDONLY:
            yield READ_ONLY
    free = free_bytes(folder)
    if free is not None and free < LITTLE:
        yield FULL


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _numbers(error: BaseException) -> set[int]:
    numbers = {cause.errno for cause in _causes(error) if isinstance(cause, OSError) and cause.errno is not None}
    return numbers | {int(number) for cause in _causes(error) for number in OF_SAFETENSORS.findall(str(cause))}
