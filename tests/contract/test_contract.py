"""TRL does what this package builds on: the checks of `trl-cancel doctor`, one by one."""

import pytest

from trl_cancel.doctor import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.says)
def test_assumption_holds(tiny_model, check):
    check.tries(tiny_model)
