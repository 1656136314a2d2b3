"""Runs that die, by SIGKILL, at a chosen place: in a process of their own, forked so that nothing is imported again."""

import os
import signal
import traceback
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
import trl

from trl_cancel.pipeline.rounds import Rounds


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def status_of(run: Any) -> int:
    """
    Exit status of a function that a forked process runs: 0, or minus the signal that has killed it.

    Args:
        run (`Callable`):
            The function; an exception counts as status 1, `SystemExit` as its own.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run()
            code = 0
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def nth(number: int, function: Any, instead: Any) -> Any:
    """A function that is `function` but for its call of this number, counted from 1, which is `instead`."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return (instead if len(calls) == number else function)(*args, **kwargs)

    return counted


def half(function: Any, path_of: Any) -> Any:
    """Writes a file, cuts it in the middle, dies."""

    def written(*args, **kwargs):
        function(*args, **kwargs)
        path = Path(path_of(*args, **kwargs))
        os.truncate(path, path.stat().st_size // 2)
        die()

    return written


def killed(place: str, model: str, train: Any, **settings: Any) -> None:
    """
    Trains until it is killed.

    Args:
        place (`str`):
            Where: one of `PLACES`.
        model (`str`):
            Path of the model.
        train (`Callable`):
            Trains it.
        **settings:
            Settings of the run.
    """
    with pytest.MonkeyPatch.context() as patch:
        PLACES[place](patch)
        status = status_of(lambda: train(model, **settings))
    assert status == -signal.SIGKILL, f"ended with {status} instead"


def in_call(number: int, owner: type, name: str) -> Any:
    """Within a call of a method."""
    return lambda patch: patch.setattr(owner, name, nth(number, getattr(owner, name), lambda *args, **kwargs: die()))


def in_model(patch):
    save = safetensors.torch.save_file
    dying = half(save, lambda tensors, path, *args, **kwargs: path)
    patch.setattr("transformers.modeling_utils.safe_save_file", nth(2, save, dying))


def in_optimizer(patch):
    save, seen = torch.save, []

    def save_or_die(thing, path, *args, **kwargs):
        if str(path).endswith("optimizer.pt"):
            seen.append(1)
            if len(seen) == 2:
                half(save, lambda thing, path: path)(thing, path)
        save(thing, path, *args, **kwargs)

    patch.setattr(torch, "save", save_or_die)


def _in_state(before: bool):
    def place(patch):
        save = transformers.TrainerState.save_to_json
        dying = half(save, lambda state, path: path)
        instead = (lambda *args: die()) if before else dying
        patch.setattr(transformers.TrainerState, "save_to_json", nth(2, save, instead))

    return place


def in_rotation(patch):
    """After an older checkpoint is gone."""
    from transformers import trainer_utils

    remove = trainer_utils.shutil.rmtree

    def removed(*args, **kwargs):
        remove(*args, **kwargs)
        die()

    patch.setattr(trainer_utils.shutil, "rmtree", removed)


PLACES = {
    "loss": in_call(5, trl.GRPOTrainer, "compute_loss"),
    "generation": in_call(5, trl.GRPOTrainer, "_generate"),
    "rewards": in_call(5, trl.GRPOTrainer, "_calculate_rewards"),
    "round": in_call(5, Rounds, "_fresh_inputs"),
    "evaluation": in_call(6, trl.GRPOTrainer, "prediction_step"),
    "model": in_model,
    "optimizer": in_optimizer,
    "before state": _in_state(before=True),
    "state": _in_state(before=False),
    "rotation": in_rotation,
}
