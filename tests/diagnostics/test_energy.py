"""Energy by frequency against counting by hand."""

import pytest
import torch

from tests import references
from trl_cancel.diagnostics import energy_by_frequency, output_row_energy
from trl_cancel.diagnostics.energy import asymmetry_by_group


@pytest.mark.parametrize("num_buckets", [1, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_shares(seed, num_buckets):
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(40, generator=generator) ** 3 * 12).long()
    energies = torch.rand(40, generator=generator, dtype=torch.float64)
    energy, tokens = energy_by_frequency(energies, ids, num_buckets)
    expected = references.energy_by_frequency(energies.tolist(), ids.tolist(), num_buckets)
    assert energy.tolist() == pytest.approx(expected[0])
    assert tokens.tolist() == pytest.approx(expected[1])
    assert energy.sum().item() == pytest.approx(1)


def test_the_frequent_come_first():
    energy, tokens = energy_by_frequency(torch.ones(10), torch.tensor([7] * 6 + [1] * 2 + [2, 3]), 2)
    assert tokens.tolist() == pytest.approx([0.6, 0.4])
    assert torch.equal(energy, tokens)


def test_output_row():
    """The norm of the gradient in the token's own row of the output layer."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 3, generator=generator), torch.randn(7, 3, generator=generator)
    ids, weights = torch.randint(7, (5,), generator=generator), torch.randn(5, generator=generator)
    leaf = weight.requires_grad_()
    logps = (hidden @ leaf.T).log_softmax(1).gather(1, ids.unsqueeze(1)).squeeze(1)
    found = output_row_energy(weights, logps.detach(), hidden)
    for token in range(5):
        (gradient,) = torch.autograd.grad(weights[token] * logps[token], leaf, retain_graph=True)
        assert found[token].item() == pytest.approx(gradient[ids[token]].norm().item(), rel=1e-5)


def test_asymmetry_by_group_is_a_variance():
    """Also where the mean is large, whose square less the mean of the squares is rounding, and negative at times."""
    generator = torch.Generator().manual_seed(0)
    coefficients = 1e4 + torch.rand(400, generator=generator)
    groups = torch.arange(400) % 100
    found = asymmetry_by_group(coefficients, groups)
    expected = torch.stack([coefficients[groups == group].double().var(correction=0) for group in range(100)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-6)
    assert (found >= 0).all()
    assert asymmetry_by_group(torch.ones(4).half() * 300, torch.zeros(4)).tolist() == [0.0]
    with pytest.raises(ValueError, match="group_ids of shape"):
        asymmetry_by_group(torch.ones(4), torch.zeros(1))
