"""Means and extremes over the micro-batches of an optimizer step."""

import pytest
import torch

from trl_cancel.batch.metrics import StepMetrics


def _alone(tensor):
    """`gather` in a single process."""
    return tensor


def test_weighted_means_over_several_calls():
    means = StepMetrics()
    means.add("a", torch.tensor([1.0, 2.0]))
    means.add("a", torch.tensor([[6.0]]), torch.tensor([[2.0]]))
    means.add("b", torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert means.flush(_alone) == {"a": pytest.approx(15 / 4), "b": pytest.approx(5 / 3)}
    assert means.flush(_alone) == {}


def test_nothing_counted_is_left_out():
    means = StepMetrics()
    means.add("empty", torch.tensor([1.0]), torch.tensor([0.0]))
    means.add("full", torch.tensor([1.0]))
    assert means.flush(_alone) == {"full": 1.0}


def test_one_exchange_for_all_metrics():
    """Sums, not means, go between processes: processes of different sizes weigh by what they hold."""
    metrics, calls = StepMetrics(), []

    def gather(rows):
        calls.append(rows)
        another = torch.tensor([[[8.0, 2.0], [0.0, 0.0], [-2.0, -2.0], [9.0, 9.0]]])  # a, b, -lowest, highest
        return torch.cat([rows, another])

    metrics.add("b", torch.tensor([1.0]))
    metrics.add("a", torch.tensor([1.0]))
    metrics.add_range("lowest", "highest", torch.tensor([3.0, 7.0]))
    assert metrics.flush(gather) == {"a": 3.0, "b": 1.0, "lowest": 2.0, "highest": 9.0}
    assert len(calls) == 1


def test_extremes_over_several_calls():
    metrics = StepMetrics()
    metrics.add_range("lowest", "highest", torch.tensor([[-1.0], [4.0]]))
    metrics.add_range("lowest", "highest", torch.tensor([]))
    metrics.add_range("lowest", "highest", torch.tensor([2.0]))
    assert metrics.flush(_alone) == {"lowest": -1.0, "highest": 4.0}
    metrics.add_range("lowest", "highest", torch.tensor([]))
    assert metrics.flush(_alone) == {}


def test_gradients_are_not_kept():
    means = StepMetrics()
    values = torch.tensor([1.0], requires_grad=True)
    means.add("a", 2 * values)
    assert not means._sums["a"][0].requires_grad
