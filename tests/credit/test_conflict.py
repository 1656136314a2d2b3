"""Conflict tokens against a loop over pairs of rollouts, and the filter by entropy."""

import pytest
import torch

from tests import references
from trl_cancel.batch.rollouts import Rollouts
from trl_cancel.methods.conflict import ConflictTokens, conflict_tokens
from trl_cancel.methods.entropy_filter import EntropyFilter


def rollouts_of(ids, mask, advantages, **changes):
    """Rollouts of one prompt."""
    rows = len(ids)
    return Rollouts(
        prompt_ids=torch.zeros(rows, 1, dtype=torch.long),
        prompt_mask=torch.ones(rows, 1, dtype=torch.long),
        completion_ids=ids,
        mask=mask,
        advantages=advantages,
        group_ids=torch.zeros(rows, dtype=torch.long),
        rewards=torch.zeros(rows, 1),
        reward_names=["reward"],
        examples=[{}] * rows,
        num_generations=rows,
        **changes,
    )


@pytest.mark.parametrize("vocabulary", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_against_loops(seed, vocabulary):
    """Also with gaps in the mask, as tool results leave them, and rollouts without tokens or advantage."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2 + seed % 5, 1 + seed % 7)
    ids = torch.randint(vocabulary, shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.8
    advantages = torch.randint(-1, 2, shape[:1], generator=generator).double()
    expected = references.conflict_tokens(ids.tolist(), mask.tolist(), advantages.tolist())
    assert conflict_tokens(ids, mask, advantages).tolist() == expected


def test_runs_at_both_ends_and_nothing_between():
    ids = torch.tensor([[1, 2, 5, 3, 4], [1, 2, 6, 3, 4], [1, 9, 5, 9, 4]])
    mask = torch.ones_like(ids)
    found = conflict_tokens(ids, mask, torch.tensor([1.0, -0.5, -0.5]))
    assert found[0].tolist() == [True] * 5, "2 and 3 are shared with one wrong rollout, 5 with the other"
    assert found[1].tolist() == [True, True, False, True, True]
    assert found[2].tolist() == [True, False, False, False, True], "5 is in conflict, but not at an end"


def test_partners_may_change_along_a_run():
    """As in the authors' code: nobody else begins with 1 2."""
    ids = torch.tensor([[1, 2, 3], [1, 5, 4], [6, 2, 8]])
    found = conflict_tokens(ids, torch.ones_like(ids), torch.tensor([1.0, -0.5, -0.5]))
    assert found[0].tolist() == [True, True, False]


@pytest.mark.parametrize("advantages", [[1.0, 1.0], [0.0, 0.0], [-1.0, 0.0]])
def test_one_sign_has_no_conflict(advantages):
    ids = torch.ones(2, 3, dtype=torch.long)
    assert not conflict_tokens(ids, torch.ones_like(ids), torch.tensor(advantages)).any()


def test_coefficients_by_hand():
    ids = torch.tensor([[1, 2, 7], [1, 3, 8], [4, 5, 6]])
    mask, advantages = torch.ones_like(ids), torch.tensor([1.0, -1.0, 0.0])
    credit = ConflictTokens().coefficients(rollouts_of(ids, mask, advantages))
    assert credit.tolist() == [[2.0, 1.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    credit = ConflictTokens(positive=1.5, negative=0.25).coefficients(rollouts_of(ids, mask, advantages))
    assert credit[:, 0].tolist() == [1.5, 0.25, 1.0]


def test_control_takes_as_many_tokens_of_each_rollout():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, (6, 40), generator=generator)
    ids[:, :10] = 1
    mask = (torch.arange(40) < torch.tensor([40, 30, 20, 10, 40, 5]).unsqueeze(1)).long()
    rollouts = rollouts_of(ids, mask, torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]))
    ours, control = (ConflictTokens(selection=kind).coefficients(rollouts) for kind in ("conflict", "random"))
    assert torch.equal((ours != 1).sum(1), (control != 1).sum(1))
    assert (control != 1)[mask == 0].sum() == 0
    assert not torch.equal(ours, control)


def test_filter_by_mean_entropy():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    entropies = torch.tensor([[0.5, 0.7, torch.nan], [0.6, 0.6, 0.9], [0.7, 9.0, 9.0], [9.0, 9.0, 9.0]])
    logged = {}
    rollouts = rollouts_of(
        torch.zeros(4, 3, dtype=torch.long),
        mask,
        torch.tensor([1.0, -1.0, 1.0, -1.0]),
        entropies=entropies,
        log=lambda name, values, weights: logged.update({name: (values, weights)}),
    )
    credit = EntropyFilter(0.65).coefficients(rollouts)
    assert credit.tolist() == [[1.0], [0.0], [0.0], [1.0]]
    values, weights = logged["entropy_filter/entropy"]
    torch.testing.assert_close(values[:3], torch.tensor([0.6, 0.7, 0.7]))
    assert weights.tolist() == [1.0, 1.0, 1.0, 0.0]


def test_entropies_are_there_for_those_who_ask():
    rollouts = rollouts_of(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), torch.ones(2))
    with pytest.raises(ValueError, match="Set needs_entropies = True"):
        rollouts.entropies[0]


def test_settings_that_make_no_sense_are_refused():
    for settings, message in (
        ({"positive": -1.0}, "positive=-1.0 must be a number that is not negative"),
        ({"negative": float("nan")}, "negative=nan must be"),
        ({"selection": "all"}, "selection='all' is not one of 'conflict', 'random'"),
    ):
        with pytest.raises(ValueError, match=message):
            ConflictTokens(**settings)
    for threshold in (0.0, float("nan"), float("inf"), "0.7", None):
        with pytest.raises(ValueError, match=f"max_entropy={threshold!r} must be a positive number of nats"):
            EntropyFilter(threshold)
