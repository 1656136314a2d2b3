"""The kernel of the output layer against gradients of single tokens by autograd, and against loops over pairs."""

import pytest
import torch
from torch import nn

from tests import references
from trl_cancel.batch.states import LMHead
from trl_cancel.diagnostics import (
    coupling_kernel,
    forward,
    head_gradient,
    predicted_shifts,
    prediction_errors,
    sign_agreement,
)


HEADS = {
    "plain": {},
    "scale": {"scale": 0.5},
    "softcap": {"softcap": 3.0},
    "scale and softcap": {"scale": 1.5, "softcap": 4.0},
}


def tokens(seed=0, count=9, size=4, vocabulary=6):
    """Random hidden states, tokens, weights and the weight of an output layer."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, size, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocabulary, size, dtype=torch.float64, generator=generator)
    ids = torch.randint(vocabulary, (count,), generator=generator)
    return hidden, ids, torch.randn(count, dtype=torch.float64, generator=generator), weight


def gradients(hidden, ids, weight, temperature=1.0, scale=1.0, softcap=None):
    """The gradient of each token's log-probability by the output layer, one backward pass a token."""
    found = []
    for state, token in zip(hidden, ids, strict=True):
        leaf = weight.clone().requires_grad_()
        logits = leaf @ state * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        found.append(torch.autograd.grad((logits / temperature).log_softmax(0)[token], leaf)[0])
    return torch.stack(found)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_kernel_is_the_inner_product_of_gradients(head, temperature):
    hidden, ids, _, weight = tokens()
    errors = prediction_errors(hidden, ids, LMHead(weight, **head), temperature)
    kernel = coupling_kernel(hidden, errors, hidden[:5], errors[:5])
    single = gradients(hidden, ids, weight, temperature, **head)
    expected = torch.einsum("avd,bvd->ab", single, single[:5])
    torch.testing.assert_close(kernel, expected, rtol=1e-10, atol=1e-12)


def test_kernel_against_the_papers_formula():
    hidden, ids, _, weight = tokens(1)
    probabilities = [
        [float(value) for value in map(torch.exp, torch.tensor(references.log_softmax(row)))]
        for row in (hidden @ weight.T).tolist()
    ]
    errors = prediction_errors(hidden, ids, LMHead(weight))
    kernel = coupling_kernel(hidden, errors, hidden, errors)
    for j in range(len(ids)):
        for k in range(len(ids)):
            expected = references.coupling(
                hidden[j].tolist(),
                probabilities[j],
                ids[j].item(),
                hidden[k].tolist(),
                probabilities[k],
                ids[k].item(),
            )
            assert kernel[j, k].item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("held", [1, 13, 10**6], ids=["one token at a time", "two at a time", "all at once"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_gradient_and_prediction(head, held, monkeypatch):
    monkeypatch.setattr(forward, "HELD_LOGITS", held)
    hidden, ids, weights, weight = tokens(2)
    layer = LMHead(weight, **head)
    single = gradients(hidden, ids, weight, 0.8, **head)
    gradient = head_gradient(hidden, ids, weights, layer, 0.8)
    torch.testing.assert_close(gradient, torch.einsum("k,kvd->vd", weights, single), rtol=1e-10, atol=1e-12)
    shifts = predicted_shifts(hidden, ids, 0.3 * gradient, layer, 0.8)
    by_pairs = torch.zeros_like(shifts)
    for j in range(len(ids)):
        for k in range(len(ids)):
            by_pairs[j] += 0.3 * weights[k] * (single[j] * single[k]).sum()
    torch.testing.assert_close(shifts, by_pairs, rtol=1e-10, atol=1e-12)


def test_a_bias():
    hidden, ids, weights, weight = tokens(3)
    layer = nn.Linear(4, 6, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(weight)
    leaf = weight.clone().requires_grad_()
    logps = (hidden @ leaf.T + layer.bias).log_softmax(1).gather(1, ids.unsqueeze(1)).squeeze(1)
    (expected,) = torch.autograd.grad((weights * logps).sum(), leaf)
    torch.testing.assert_close(head_gradient(hidden, ids, weights, LMHead(layer)), expected)


def test_sign_agreement():
    first, second = torch.tensor([1.0, -1.0, 0.1, 2.0]), torch.tensor([2.0, 1.0, -1.0, 0.5])
    assert sign_agreement(first, second) == 0.5
    assert sign_agreement(first, second, 0.5) == pytest.approx(2 / 3)
    assert torch.tensor(sign_agreement(first, second, 5.0)).isnan()
