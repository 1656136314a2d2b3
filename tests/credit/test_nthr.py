"""NTHR scores against the double loop over token pairs, on full logits."""

import pytest
import torch

from tests import references
from trl_cancel.batch.states import LMHead
from trl_cancel.credit import nthr_eta, nthr_scores
from trl_cancel.methods import nthr


def group(seed, rollouts=4, length=5, size=3, vocabulary=7, temperature=1.0, **head):
    """Random hidden states and tokens of a group, with the log-probs that full logits give them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rollouts, length, size, dtype=torch.float64, generator=generator)
    layer = LMHead(torch.randn(vocabulary, size, dtype=torch.float64, generator=generator), **head)
    ids = torch.randint(vocabulary, (rollouts, length), generator=generator)
    lengths = torch.randint(0, length + 1, (rollouts,), generator=generator)
    lengths[:2] = torch.tensor([length, 1])
    mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    logits = layer.logits(hidden, torch.arange(vocabulary)) / temperature
    logps = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    positive = torch.rand(rollouts, generator=generator) < 0.5
    positive[0] = True
    return hidden, logps, ids, mask, positive, layer, logits


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("head", [{}, {"softcap": 2.0}, {"scale": 0.5}], ids=["plain", "softcap", "scale"])
@pytest.mark.parametrize("seed", range(6))
def test_scores_and_threshold(seed, head, temperature):
    hidden, logps, ids, mask, positive, layer, logits = group(
        seed, rollouts=2 + seed, size=1 + seed, temperature=temperature, **head
    )
    scores, threshold = nthr_scores(hidden, logps, ids, mask, positive, layer, temperature)
    expected, expected_threshold = references.nthr_scores(
        hidden.tolist(), logits.softmax(-1).tolist(), ids.tolist(), mask.tolist(), positive.tolist()
    )
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert threshold.item() == pytest.approx(expected_threshold, rel=1e-9, abs=1e-9)


def test_a_bias_and_a_bare_weight():
    hidden, _, ids, mask, positive, layer, _ = group(0)
    linear = torch.nn.Linear(3, 7, dtype=torch.float64).requires_grad_(False)
    biased, logits = LMHead(linear), linear(hidden)
    logps = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    expected, _ = references.nthr_scores(
        hidden.tolist(), logits.softmax(-1).tolist(), ids.tolist(), mask.tolist(), positive.tolist()
    )
    scores, _ = nthr_scores(hidden, logps, ids, mask, positive, biased)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    hidden, logps, ids, mask, positive, layer, _ = group(1)
    for got, same in zip(
        nthr_scores(hidden, logps, ids, mask, positive, layer.layer),
        nthr_scores(hidden, logps, ids, mask, positive, layer),
        strict=True,
    ):
        assert torch.equal(got, same)


def test_chunks_change_nothing(monkeypatch):
    *arguments, _ = group(2, rollouts=6, length=9)
    whole = nthr_scores(*arguments)
    monkeypatch.setattr(nthr, "HELD_LOGITS", 20)
    for got, expected in zip(nthr_scores(*arguments), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_half_precision_is_accumulated_in_single():
    hidden, logps, ids, mask, positive, layer, _ = group(3)
    half = nthr_scores(hidden.bfloat16(), logps.float(), ids, mask, positive, LMHead(layer.layer.bfloat16()))
    exact = nthr_scores(hidden, logps, ids, mask, positive, layer)
    assert half[0].dtype == torch.float32
    torch.testing.assert_close(half[0].double(), exact[0], rtol=0.1, atol=0.2)


def test_without_right_rollouts_nothing_exceeds_the_threshold():
    hidden, logps, ids, mask, positive, layer, _ = group(4)
    scores, threshold = nthr_scores(hidden, logps, ids, mask, torch.zeros_like(positive), layer)
    assert not scores.any()
    assert threshold == torch.inf


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("balanced", [1.0, 0.5, 0.0, 1.0]), ("p", [0, 0.25, 0.5, 1]), ("1-p", [1, 0.75, 0.5, 0]), (0.3, [0.3] * 4)],
)
def test_eta(mode, expected):
    assert nthr_eta(torch.tensor([0, 0.25, 0.5, 1]), mode).tolist() == pytest.approx(expected)


def test_unknown_eta_is_refused():
    with pytest.raises(ValueError, match="mode='half' is not one of 'balanced', 'p', '1-p' or a number"):
        nthr_eta(torch.tensor([0.5]), "half")
