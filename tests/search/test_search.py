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
from trl_cancel.batch import clipping
from trl_cancel.batch.clipping import CLIPPED_LOSSES
from trl_cancel.batch.groups import Choice
from trl_cancel.config import _OWN_FIELDS
from trl_cancel.credit import NTHR, DelTA
from trl_cancel.pipeline.monitor import UpdateMonitor
from trl_cancel.pipeline.rounds import GroupPool, Rounds

from .promises import Of
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
TWO_SIDED = {**SEQUENCE, **OFF_POLICY, "epsilon": 0.5, "delta": 1.001}  # within the clipping range
SEVERAL = {"per_device_train_batch_size": 16}  # groups
RARELY = {"rewards": ["rarely_differs"], "max_generation_rounds": 8}


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


def infinite(original, trainer, *args, **kwargs):
    return original(trainer, *args, **kwargs) * torch.inf


def rolled(original, trainer, inputs):
    """Prompts that are not dealt out group by group."""
    return original(trainer, [*inputs[1:], inputs[0]])


def the_first(original, pool):
    """The first groups are called good enough."""
    count = pool.layout.generation_batch_per_process // pool.layout.num_generations
    return Choice(torch.arange(count), 1.0, torch.arange(count))


def after_one_round(original, rounds, *args):
    with rounds.args.set_aside(max_generation_rounds=1):
        return original(rounds, *args)


def cut_at_delta(original, ratios, advantages, epsilon_low, epsilon_high, delta=None):
    """As if `delta` bounded negative advantages alone, and always: wrong where it lies within the clipping range."""
    cut = torch.where(advantages >= 0, ratios > 1 + epsilon_high, ratios < 1 - epsilon_low)
    cut = cut | ((advantages < 0) & (ratios > (torch.inf if delta is None else delta)))
    return torch.where(cut, 0.0, ratios)


def clipped_at_delta(original, ratios, advantages, epsilon_low, epsilon_high, delta=None):
    """The same of the weights of groups."""
    weights = original(ratios, advantages, epsilon_low, epsilon_high)
    return torch.where(advantages < 0, weights.clamp(max=torch.inf if delta is None else delta), weights)


def raises(error):
    def method(original, *args):
        raise error

    return method


ONE = torch.tensor([1])
# Faults that are put into the package, with the promise that must be found broken.
FAULTS = [
    ("finite", {"max_steps": 1}, CancelGRPOTrainer, "compute_loss", infinite),
    ("one_prompt_a_group", SEVERAL, CancelGRPOTrainer, "_generate_and_score_completions", rolled),
    ("chosen_as_asked", {"filter_zero_variance": True, **RARELY, **SEVERAL}, GroupPool, "choose", the_first),
    ("chosen_as_asked", {"reward_balance": 0.5, **RARELY}, GroupPool, "choose", the_first),
    ("chosen_as_asked", {"reward_balance": 0.5, **RARELY}, Rounds, "chosen", after_one_round),
    ("multiplied_as_stated", {**TWO_SIDED, "delta_credit": True}, clipping, "surrogate_weight", cut_at_delta),
    (
        "multiplied_as_stated",
        {**TWO_SIDED, "group_weights": "identity"},
        clipping,
        "post_clip_weights",
        clipped_at_delta,
    ),
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
    ("promise", "settings", "owner", "name", "fault"), FAULTS, ids=[f"{row[0]}-{row[4].__name__}" for row in FAULTS]
)
def test_a_fault_is_found(monkeypatch, promise, settings, owner, name, fault):
    original = getattr(owner, name)
    assert promise not in check(settings, promise).broken
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: fault(original, *args, **kwargs))
    assert promise in check(settings, promise).broken


@pytest.mark.parametrize(
    ("name", "fault"), [("surrogate_weight", cut_at_delta), ("post_clip_weights", clipped_at_delta)]
)
def test_draws_meet_two_sided_clipping_within_the_range(monkeypatch, name, fault):
    """Often enough that some of those that bear on it show the fault."""
    original = getattr(clipping, name)
    drawn = [settings for index in range(300) if two_sided_within_range(settings := draw(("two-sided", index)), name)]
    assert len(drawn) > 5
    monkeypatch.setattr(clipping, name, lambda *args: fault(original, *args))
    assert any("multiplied_as_stated" in check(settings, "multiplied_as_stated").broken for settings in drawn)


def two_sided_within_range(settings, name):
    """Whether ratios leave 1 under a `delta` within the clipping range, where this package weighs rollouts."""
    of = Of(settings)
    delta, weighs_groups = of.delta, of.group_weights != "none"
    weighs = weighs_groups if name == "post_clip_weights" else of.has_credits and not weighs_groups
    weighs = weighs and of.level == "sequence" and of.loss_type in CLIPPED_LOSSES and not of.bf16
    return weighs and not of.on_policy and delta is not None and 1 <= delta < 1 + of.epsilons[1]


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
