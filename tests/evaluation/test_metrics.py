"""avg@k and pass@k against their definitions."""

from itertools import combinations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from trl_cancel.evaluation import avg_at_k, pass_at_k


def passes(correct, k):
    """The fraction of the subsets of k answers with a correct one among them."""
    subsets = list(combinations(correct, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_fraction_of_subsets_that_pass(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    assert pass_at_k(torch.tensor(correct), k).item() == pytest.approx(passes(correct, k), abs=1e-14)


@given(st.integers(1, 500), st.data())
def test_pass_at_k_in_whole_numbers(n, data):
    """Where the binomials have hundreds of digits; Python's integers are exact."""
    from fractions import Fraction
    from math import comb

    k, c = data.draw(st.integers(1, n)), data.draw(st.integers(0, n))
    expected = float(1 - Fraction(comb(n - c, k), comb(n, k)))
    assert pass_at_k(torch.arange(n) < c, k).item() == pytest.approx(expected, rel=1e-12, abs=1e-13)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_pass_at_k_grows_with_k_from_the_mean(rows):
    correct = torch.tensor(rows)
    by_k = torch.stack([pass_at_k(correct, k) for k in range(1, 7)])
    assert (by_k.diff(dim=0) >= -1e-14).all()
    torch.testing.assert_close(by_k[0], avg_at_k(correct.double()))
    assert by_k[-1].tolist() == correct.any(1).double().tolist()


def test_pass_at_k_is_unbiased():
    """Its mean over many draws is 1 - (1 - p)^k; that of the plug-in estimate 1 - (1 - c/n)^k is lower."""
    torch.manual_seed(0)
    p, n, k = 0.2, 6, 4
    correct = torch.rand(40_000, n) < p
    truth = 1 - (1 - p) ** k
    assert pass_at_k(correct, k).mean().item() == pytest.approx(truth, abs=0.005)
    plug_in = 1 - (1 - correct.double().mean(1)) ** k
    assert plug_in.mean().item() < truth - 0.03


def test_shapes_and_first_answers():
    rewards = torch.tensor([[[0.0, 1.0, 0.5], [1.0, 1.0, 0.0]]])
    assert avg_at_k(rewards).tolist() == [[0.5, pytest.approx(2 / 3)]]
    assert avg_at_k(rewards, 2).tolist() == [[0.5, 1.0]]
    assert pass_at_k(rewards == 1, 3).tolist() == [[1.0, 1.0]]
    assert pass_at_k(rewards == 1, 1).dtype is torch.float64


@pytest.mark.parametrize("k", [0, 4])
def test_k_must_fit(k):
    for metric in (avg_at_k, pass_at_k):
        with pytest.raises(ValueError, match=f"k={k} must be between 1 and .* 3"):
            metric(torch.zeros(2, 3), k)
