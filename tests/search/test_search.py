"""The search with a fixed seed: a few dozen configurations by default, three hundred and two processes when slow."""

import contextlib
import gc
import io
import subprocess
import sys
from collections import Counter
from dataclasses import fields

import pytest
import torch
import trl
from trl import GRPOConfig

from tests.distributed.engines import ROOT
from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer
from trl_cancel.config import _OWN_FIELDS
from trl_cancel.credit import NTHR, DelTA
from trl_cancel.pipeline.monitor import UpdateMonitor

from .report import Report, reproduction
from .search import METRICS_CHANGE_NOTHING, OFF_IS_TRL, REFUSED_BY_NAME, TRAINS, check, smallest
from .settings import LEFT_ALONE, draw
from .worker import search


@pytest.fixture(autouse=True, scope="module")
def _quick_garbage_collection():
    """Each training ends with a collection, which need not look at what the whole suite has made so far."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# Checked in a few configurations of the default suite only.
RARE = {"chosen_as_asked"}


def test_every_promise_holds():
    report = Report()
    for index, outcome, _ in search("default suite", range(36)):
        report.add(index, outcome)
    assert not report.texts, "\n".join(report.texts)
    assert set(report.unchecked) <= RARE, report.table()
    assert report.kinds["refused"] < 0.4 * report.kinds.total()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--configurations", "300"], ["--configurations", "100", "--processes", "2"]])
def test_every_promise_holds_of_many(arguments):
    command = [sys.executable, "-m", "tests.search", "--seed", "slow suite", "--shrink", "1", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_field_is_drawn():
    drawn = {name for index in range(600) for name in draw(("fields", index))}
    assert drawn >= _OWN_FIELDS, f"{sorted(_OWN_FIELDS - drawn)} are never drawn; see settings.py"
    of_trl = {setting.name for setting in fields(GRPOConfig) if setting.name in GRPOConfig.__annotations__} - drawn
    assert of_trl <= LEFT_ALONE.keys(), f"{sorted(of_trl - LEFT_ALONE.keys())} are neither drawn nor left alone"
    assert not LEFT_ALONE.keys() & drawn


def test_draws_are_repeatable_and_differ():
    assert draw(("seed", 3)) == draw(("seed", 3))
    assert len({repr(draw(("seed", index))) for index in range(50)}) == 50
    layouts = Counter(
        (settings.get("steps_per_generation", 1) > 1, settings.get("query_preserved", True))
        for settings in (draw(("layouts", index)) for index in range(200))
    )
    assert len(layouts) == 4


OFF_POLICY = {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 4}
ACCUMULATED = {"steps_per_generation": 4, "gradient_accumulation_steps": 2}
SEQUENCE = {"importance_sampling_level": "sequence"}


def doubled(original, trainer, model, inputs):
    """One rollout of each micro-batch counts twice."""
    inputs["advantages"] = inputs["advantages"] * torch.ones_like(inputs["advantages"]).index_fill(0, ONE, 2.0)
    return original(trainer, model, inputs)


def exchanged(original, trainer, batch):
    """Each micro-batch has its first rollout from the one before."""
    inputs = original(trainer, batch)
    buffered = [dict(part) for part in trainer._buffered_inputs]
    before = buffered[(trainer._step - 1) % len(buffered)]
    return {
        name: torch.cat([before[name][:1], value[1:]]) if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in inputs.items()
    }


def always_the_first(original, trainer, batch):
    original(trainer, batch)
    return trainer._buffered_inputs[0]


def only_with_metrics(original, trainer, *args, **kwargs):
    return original(trainer, *args, **kwargs) * (1.01 if trainer.args.cancellation_metrics else 1)


def not_with_trl(original, trainer, *args, **kwargs):
    return original(trainer, *args, **kwargs) * 1.01


def raises(error):
    def method(original, *args):
        raise error

    return method


ONE = torch.tensor([1])
# Faults that are put into the package, with the promise that must be found broken.
FAULTS = [
    ("whole_groups", OFF_POLICY, CancelGRPOTrainer, "_prepare_inputs", exchanged),
    ("whole_in_micro_batches", ACCUMULATED, CancelGRPOTrainer, "_prepare_inputs", exchanged),
    ("cancels", {**SEQUENCE, "group_weights": "min"}, trl.GRPOTrainer, "_compute_loss", doubled),
    ("multiplied_as_stated", {"symmetric_clip": True, **OFF_POLICY}, trl.GRPOTrainer, "_compute_loss", doubled),
    ("credits_as_stated", {"delta_credit": True}, DelTA, "coefficients", lambda *args: args[0](*args[1:]) * 1.1),
    ("credits_as_stated", {"nthr": True}, NTHR, "coefficients", lambda *args: args[0](*args[1:]) * 0.9),
    ("each_rollout_as_often", {**OFF_POLICY, "max_steps": 9}, CancelGRPOTrainer, "_prepare_inputs", always_the_first),
    ("metrics_tell_the_truth", {}, UpdateMonitor, "end_step", lambda end, self: dict.fromkeys(end(self), 7.0)),
    (METRICS_CHANGE_NOTHING, {}, CancelGRPOTrainer, "compute_loss", only_with_metrics),
    (OFF_IS_TRL, {}, CancelGRPOTrainer, "compute_loss", not_with_trl),
    (REFUSED_BY_NAME, {"nthr": True}, CancelGRPOConfig, "check", raises(ValueError("This cannot be."))),
    (TRAINS, {"nthr": True}, CancelGRPOTrainer, "compute_loss", raises(ValueError("nthr cannot be."))),
]


@pytest.mark.parametrize(
    ("promise", "settings", "owner", "name", "fault"), FAULTS, ids=[f"{row[0]}-{row[3]}" for row in FAULTS]
)
def test_a_fault_is_found(monkeypatch, promise, settings, owner, name, fault):
    original = getattr(owner, name)
    assert promise not in check(settings, promise).broken
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: fault(original, *args, **kwargs))
    assert promise in check(settings, promise).broken


def test_failures_are_brought_to_their_smallest_settings(monkeypatch):
    original = DelTA.coefficients
    monkeypatch.setattr(DelTA, "coefficients", lambda *args: original(*args) * 1.1)
    settings = {"delta_credit": True, "delta_gamma": 3.0, "beta": 0.1, "rewards": ["length"], "seed": 7}
    least, problem = smallest(settings, "credits_as_stated")
    assert least == {"delta_credit": True}
    line = reproduction(least, "credits_as_stated", 1)
    assert "mean 1.1000" in problem
    scope = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(line, scope)
    assert "mean 1.1000" in said.getvalue()
