"""`trl-cancel doctor`: what is installed, and what does not hold, in words."""

import subprocess
import sys

import pytest
import torch
import trl

from trl_cancel import doctor
from trl_cancel.cli import main


FORWARD = "_get_per_token_logps_and_entropies"


def some(*tries):
    return [check for check in doctor.CHECKS if any(check.says.startswith(says) for says in tries)]


def told(capsys, monkeypatch, *checks):
    """Exit status and output of the doctor, with a few of the checks."""
    monkeypatch.setattr(doctor, "CHECKS", list(checks))
    status = main(["doctor"])
    return status, capsys.readouterr().out


def test_versions(capsys):
    assert main(["doctor", "--versions"]) == 0
    out = capsys.readouterr().out
    assert f"trl              {trl.__version__}\n" in out
    assert f"torch            {torch.__version__}\n" in out
    assert "Device           " in out
    assert "assumption" not in out


def test_what_holds_is_one_line(capsys, monkeypatch):
    status, out = told(capsys, monkeypatch, *some("evaluation is not buffered", "splitting keeps"))
    assert status == 0
    assert "\nAll 3 assumptions hold (" in out
    assert "{" not in out, "what trainings log is not shown"


FORWARD_OF_TRL = getattr(trl.GRPOTrainer, FORWARD)
LOSS_OF_TRL = trl.GRPOTrainer._compute_loss


def two_values(self, *args, **kwargs):
    return FORWARD_OF_TRL(self, *args, **kwargs)[:2]


class ReadBefore(dict):
    """A micro-batch whose advantages were read before the forward pass."""

    def __init__(self, inputs):
        super().__init__(inputs)
        self.advantages = inputs["advantages"]

    def __getitem__(self, name):
        return self.advantages if name == "advantages" else super().__getitem__(name)


def reading_before(self, model, inputs):
    return LOSS_OF_TRL(self, model, ReadBefore(inputs))


def scoring_in_the_loss(self, model, inputs):
    """A loss that makes a pass of its own before TRL's, for old log-probs say."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    with torch.no_grad():
        self._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), inputs["completion_ids"].size(1))
    return LOSS_OF_TRL(self, model, inputs)


@pytest.mark.parametrize(
    ("hook", "change", "check", "found"),
    [
        (FORWARD, two_values, "a forward pass runs the backbone in pieces", "returns 2 values, not 3"),
        ("_compute_loss", reading_before, "the loss reads after its forward pass", "advantages was read before"),
        ("_compute_loss", scoring_in_the_loss, "the hooks are called one after the other", f"{FORWARD}, {FORWARD}"),
    ],
    ids=["returned values", "order of reading", "order of hooks"],
)
def test_a_future_trl_is_named_in_words(capsys, monkeypatch, hook, change, check, found):
    checks = some(check)[:1]
    monkeypatch.setattr(trl.GRPOTrainer, hook, change)
    status, out = told(capsys, monkeypatch, *checks)
    assert status == 1
    assert f"Does not hold: {checks[0].says}." in out
    assert found in out
    assert "1 of 2 assumptions do not hold" in out


def test_a_trl_that_is_refused_is_reported():
    """In a process of its own, in which the trainer has not been imported yet."""
    code = "import trl; del trl.GRPOTrainer._calculate_rewards; import trl_cancel.cli as c; raise SystemExit(c.main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "trl              " in done.stdout
    assert "Does not hold: TRL has the names that are built on" in done.stdout
    assert "GRPOTrainer._calculate_rewards is gone" in done.stdout
    assert "Traceback" not in done.stderr
