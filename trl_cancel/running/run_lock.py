"""
One run at a time in an output folder.

The lock is the operating system's, which lets go of it however a process ends; the file says who holds it.
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..texts import plain


LOCK = "_run.lock"  # what starts with an underscore is not pushed
UNKNOWN_TO_DISK = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # a disk without locks


class FolderInUse(ValueError):
    """Another process trains into the same output folder."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """
    Keeps other processes from training into a folder meanwhile; trainers of one process may share it.

    Args:
        folder (`Path`):
            Output folder; made if there is none.

    Raises:
        [`FolderInUse`]: If another process does already.
    """
    key = os.getpid(), folder.resolve()
    if key in _HELD:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = _acquired(folder / LOCK)
    _HELD.add(key)
    try:
        yield
    finally:
        _HELD.discard(key)
        if lock is not None:
            _release(lock, folder / LOCK)


def check_free(folder: Path) -> None:
    """
    Refuses a folder into which another process trains, without writing anything.

    Args:
        folder (`Path`):
            Output folder, which need not exist.

    Raises:
        [`FolderInUse`]: If another process does.
    """
    path = folder / LOCK
    if not path.exists() or (os.getpid(), folder.resolve()) in _HELD:
        return
    lock = _try(path)
    if lock is not None:
        lock.release()


_HELD: set[tuple[int, Path]] = set()  # with the process, since a forked one holds nothing


def _acquired(path: Path) -> FileLock | None:
    lock = _try(path)
    if lock is not None:
        with suppress(OSError):  # as on Windows
            path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
    return lock


def _try(path: Path) -> FileLock | None:
    """A lock that is held, or `None` on a disk that knows no locks."""
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        process, host = _holder(path)
        if host != socket.gethostname() or _is_alive(process):
            raise FolderInUse(_who(path, process, host)) from None
        path.unlink(missing_ok=True)  # only what the dead process has started still holds it
        return _try(path)
    except NotImplementedError:
        return None
    except OSError as error:
        if error.errno not in UNKNOWN_TO_DISK:
            raise
        return None
    return lock


def _release(lock: FileLock, path: Path) -> None:
    with suppress(OSError):
        if _holder(path)[0] in (os.getpid(), None):
            path.unlink(missing_ok=True)
    lock.release()
    with suppress(OSError):  # Windows removes no file that is open
        if _holder(path)[0] == os.getpid():
            path.unlink(missing_ok=True)


def _holder(path: Path) -> tuple[int | None, str | None]:
    """Process and host; `None` while these are not written yet."""
    try:
        process, host = path.read_text(encoding="utf-8").split()
        return int(process), host
    except (OSError, ValueError):
        return None, None


def _is_alive(process: int | None) -> bool:
    if process is None or os.name == "nt":  # where a signal of 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _who(path: Path, process: int | None, host: str | None) -> str:
    who = f"process {process} on {plain(host)}" if process else "another process"
    elsewhere = f", or, if it no longer runs, remove {plain(path)}" if host != socket.gethostname() else ""
    return (
        f"output_dir={plain(path.parent)} is in use by {who}, which trains into it: wait for its end, or set another "
        f"output_dir{elsewhere}."
    )
