"""One run at a time in an output folder."""

import os
import signal
import socket
import time
from contextlib import contextmanager

import pytest
from filelock import FileLock

from trl_cancel.running.run_lock import LOCK, FolderInUse, alone_in, check_free

from .runs import build, noisy_reward


SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


@contextmanager
def another_run_in(folder):
    """A process that holds the folder, and has a child of its own, which outlives it."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        with alone_in(folder):
            child = os.fork()
            if child:
                os.write(writer, str(child).encode())
            time.sleep(60)
        os._exit(0)
    child = int(os.read(reader, 20))
    try:
        yield process
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_second_process_is_refused_by_name_and_a_dead_one_is_replaced(tiny_model, tmp_path):
    trainer = build(tiny_model, **SAVING, output_dir=str(tmp_path))
    with another_run_in(tmp_path) as other:
        for start in (trainer.train, lambda: check_free(tmp_path)):
            with pytest.raises(
                FolderInUse, match=f"in use by process {other} on {socket.gethostname()}.*another output_dir"
            ):
                start()
        assert trainer.state.global_step == 0
        build(tiny_model, max_steps=1, output_dir=str(tmp_path)).train()  # which saves nothing
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        assert (tmp_path / LOCK).exists()
        trainer.train()
    assert trainer.state.global_step == 2
    assert not (tmp_path / LOCK).exists()


def test_what_only_orphans_of_a_dead_process_hold_is_taken_over(tmp_path):
    """They may have inherited its lock, as a program does that is started without Python."""
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    path = tmp_path / LOCK
    for host in ("elsewhere", socket.gethostname()):
        with FileLock(path):
            path.write_text(f"{dead}\n{host}\n")
            if host == "elsewhere":
                with (
                    pytest.raises(FolderInUse, match=f"process {dead} on elsewhere.*remove {path}"),
                    alone_in(tmp_path),
                ):
                    pass
                continue
            with alone_in(tmp_path):
                assert path.read_text().split()[0] == str(os.getpid())
    assert not path.exists()


def test_the_lock_lasts_as_long_as_the_training(tiny_model, tmp_path):
    """Whatever ends it, and with trainers of the same process meanwhile."""
    seen = []

    def reward(completion_ids, **kwargs):
        seen.append((tmp_path / LOCK).read_text().split())
        if len(seen) == 1:
            build(tiny_model, **SAVING, output_dir=str(tmp_path)).train()
        if len(seen) == 2:
            raise KeyError("grader")
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return noisy_reward(completion_ids)

    for end in (KeyError, SystemExit, None):
        trainer = build(tiny_model, **SAVING, output_dir=str(tmp_path), arguments={"reward_funcs": reward})
        if end is None:
            trainer.train()
        else:
            with pytest.raises(end):
                trainer.train()
        assert not (tmp_path / LOCK).exists()
    assert set(map(tuple, seen)) == {(str(os.getpid()), socket.gethostname())}


def test_a_disk_without_locks_is_no_obstacle(tiny_model, tmp_path, monkeypatch):
    def unknown(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr("trl_cancel.running.run_lock.FileLock.acquire", unknown)
    build(tiny_model, **SAVING, output_dir=str(tmp_path)).train()
