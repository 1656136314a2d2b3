"""Blame by place, against counting by hand."""

from collections import defaultdict

import pytest
import torch

from trl_cancel.diagnostics.blame import blame_by_place, net_pushes, token_places
from trl_cancel.diagnostics.residual import prefix_ids

from ..runs import build


@pytest.fixture
def rollouts():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 3, (8, 6), generator=generator)  # two tokens, so that prefixes are shared
    lengths = torch.randint(2, 7, (8, 1), generator=generator)
    mask = (torch.arange(6) < lengths).long()
    pushes = torch.randn(8, 6, generator=generator, dtype=torch.double) * mask
    return ids * mask, mask, torch.arange(8) // 4, pushes


def test_places():
    assert token_places(torch.tensor([0, 2, 4, 9]), 4).tolist() == [
        [1, 2, 2, 2],
        [0, 0, 1, 2],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]


def test_blame(rollouts):
    _, mask, _, pushes = rollouts
    first_wrong = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    counted = mask.bool() & (torch.arange(8) != 3).unsqueeze(1)
    expected = [0.0, 0.0, 0.0]
    for row in range(8):
        for position in range(6):
            if counted[row, position] and pushes[row, position] < 0:
                wrong = first_wrong[row]
                place = 0 if position < wrong else 1 if position == wrong else 2
                expected[place] -= pushes[row, position].item()
    assert blame_by_place(pushes, token_places(first_wrong, 6), counted).tolist() == pytest.approx(expected)
    assert min(expected) > 0


def test_net_pushes(rollouts):
    ids, mask, groups, pushes = rollouts
    sums, sharing = defaultdict(float), defaultdict(int)

    def prefixes():
        for row in range(8):
            for position in range(int(mask[row].sum())):
                yield row, position, (groups[row].item(), *ids[row, : position + 1].tolist())

    for row, position, prefix in prefixes():
        sums[prefix] += pushes[row, position].item()
        sharing[prefix] += 1
    net = net_pushes(pushes, prefix_ids(ids, mask, groups))
    assert max(sharing.values()) > 2
    for row, position, prefix in prefixes():
        assert net[row, position].item() == pytest.approx(sums[prefix] / sharing[prefix])
    assert (net[mask == 0] == 0).all()
    assert net.sum().item() == pytest.approx(pushes.sum().item())


def test_balanced_pushes_on_shared_tokens_leave_no_blame(rollouts):
    """Where the whole group shares a prefix, what is left is the sum of the advantages: nothing."""
    ids = torch.tensor([[1, 2, 1], [1, 2, 2]])
    pushes = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
    net = net_pushes(pushes, prefix_ids(ids, torch.ones(2, 3), torch.zeros(2)))
    assert net.tolist() == [[0, 0, 1], [0, 0, -1]]


def test_observers_see_the_pushes_of_every_micro_batch(tiny_model):
    """What the monitor tells its observers adds up, over a step, to what the loss does to each token."""
    trainer = build(tiny_model, gradient_accumulation_steps=2, max_steps=2)
    seen = []
    trainer._monitor.observers.append(lambda pushes, inputs: seen.append((pushes, inputs["rollout_advantages"])))
    trainer.train()
    assert len(seen) == trainer.args.max_steps * trainer.args.gradient_accumulation_steps
    assert any(pushes.abs().sum() > 0 for pushes, _ in seen)
    for pushes, advantages in seen:
        assert (pushes.sign() * advantages.sign().unsqueeze(1) >= 0).all(), (
            "on policy every push has its rollout's sign"
        )
