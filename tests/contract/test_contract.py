"""TRL does what this package builds on: the checks of `trl-cancel doctor`, one by one."""

import pytest

from trl_cancel.doctor import CHECKS
from trl_cancel.doctor.off import other_ways


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.says)
def test_assumption_holds(tiny_model, check):
    check.tries(tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torch_compile", "use_transformers_continuous_batching"])
def test_slow_ways_to_log_probs(tiny_model, way):
    """Compiled models call no hooks, by which hidden states are caught in the loss: those of its own pass are taken."""
    other_ways(tiny_model, {way: True})
