"""Means over the micro-batches of an optimizer step."""

import pytest
import torch

from trl_cancel.metrics import StepMeans


def test_weighted_means_over_several_calls():
    means = StepMeans()
    means.add("a", torch.tensor([1.0, 2.0]))
    means.add("a", torch.tensor([[6.0]]), torch.tensor([[2.0]]))
    means.add("b", torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert means.flush(lambda total: total) == {"a": pytest.approx(15 / 4), "b": pytest.approx(5 / 3)}
    assert means.flush(lambda total: total) == {}


def test_nothing_counted_is_left_out():
    means = StepMeans()
    means.add("empty", torch.tensor([1.0]), torch.tensor([0.0]))
    means.add("full", torch.tensor([1.0]))
    assert means.flush(lambda total: total) == {"full": 1.0}


def test_one_reduction_for_all_metrics():
    """Sums, not means, go between processes: processes of different sizes weigh by what they hold."""
    means, calls = StepMeans(), []

    def reduce(total):
        calls.append(total)
        return total + torch.tensor([[8.0, 2.0], [0.0, 0.0]])  # another process with two values of "a"

    means.add("b", torch.tensor([1.0]))
    means.add("a", torch.tensor([1.0]))
    assert means.flush(reduce) == {"a": 3.0, "b": 1.0}
    assert len(calls) == 1


def test_gradients_are_not_kept():
    means = StepMeans()
    values = torch.tensor([1.0], requires_grad=True)
    means.add("a", 2 * values)
    assert not means._sums["a"][0].requires_grad
