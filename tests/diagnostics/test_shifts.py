"""Ratios of boosted and suppressed tokens against counting by hand."""

import pytest
import torch

from trl_cancel.diagnostics import token_shifts


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_ratios(seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, 6, 5, generator=generator)
    mask = torch.rand(6, 5, generator=generator) < 0.7
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, 0.0])
    found = token_shifts(before, after, mask.long(), advantages, threshold)
    for name, belongs in (
        ("positive", lambda a: a > 0),
        ("negative", lambda a: a < 0),
        ("all", lambda a: True),
    ):
        changes = [
            (after[i, t] - before[i, t]).item()
            for i in range(6)
            for t in range(5)
            if mask[i, t] and belongs(advantages[i])
        ]
        ratios = getattr(found, name)
        assert ratios.tokens == len(changes)
        assert ratios.boosted == pytest.approx(sum(change > threshold for change in changes) / len(changes))
        assert ratios.suppressed == pytest.approx(sum(change < -threshold for change in changes) / len(changes))
        assert ratios.boosted + ratios.suppressed + ratios.stable == pytest.approx(1)
        assert ratios.mean == pytest.approx(sum(changes) / len(changes), abs=1e-6)
        assert ratios.mean_magnitude == pytest.approx(sum(map(abs, changes)) / len(changes))
    assert torch.equal(found.shifts, ((after - before) * mask))


def test_without_tokens():
    found = token_shifts(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), torch.tensor([1.0]))
    assert found.negative.tokens == 0
    assert found.negative.boosted != found.negative.boosted


def test_a_masked_nan_does_no_harm():
    after = torch.tensor([[1.0, float("nan")]])
    found = token_shifts(torch.zeros(1, 2), after, torch.tensor([[1, 0]]), torch.tensor([1.0]))
    assert found.all.boosted == 1
    assert found.shifts.tolist() == [[1.0, 0.0]]


def test_a_negative_threshold_is_refused():
    with pytest.raises(ValueError, match="threshold=-1"):
        token_shifts(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1), -1)


def test_what_is_not_a_number_is_not_stable():
    found = token_shifts(torch.zeros(1, 2), torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2), torch.ones(1))
    assert (found.all.boosted, found.all.suppressed, found.all.stable) == (0.5, 0.0, 0.0)
