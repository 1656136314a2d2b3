"""DelTA coefficients against a literal transcription with distances, and what makes them what they are."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from tests import references
from trl_cancel.batch.rollouts import Rollouts, generator_of
from trl_cancel.batch.states import LMHead
from trl_cancel.credit import delta_coefficients
from trl_cancel.methods import delta


def batch(seed, tokens=30, size=4, zeros=True):
    generator = torch.Generator().manual_seed(seed)
    proxies = torch.randn(tokens, size, dtype=torch.float64, generator=generator)
    advantages = torch.randn(tokens, dtype=torch.float64, generator=generator)
    if zeros:
        advantages[torch.rand(tokens, generator=generator) < 0.2] = 0
    return proxies + advantages.unsqueeze(1).sign(), advantages


@pytest.mark.parametrize("normalize", [True, False, "batch", "side", "none"])
@pytest.mark.parametrize("gamma", [None, 2.0])
@pytest.mark.parametrize("refinements", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_against_distances(seed, refinements, gamma, normalize):
    proxies, advantages = batch(seed, tokens=10 + 20 * seed, size=1 + 3 * seed)
    settings = {"refinements": refinements, "gamma": gamma, "normalize": normalize}
    found = delta_coefficients(proxies, advantages, lambda_min=0.5, lambda_max=2.0, **settings)
    expected = references.delta_coefficients(proxies.tolist(), advantages.tolist(), 0.5, 2.0, **settings)
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def in_two_processes(run):
    """What a function of the rank and of a sum over processes gives on each of two."""
    barrier, sent = threading.Barrier(2, timeout=60), [None, None]

    def of(rank):
        def reduce(tensor):
            sent[rank] = tensor
            barrier.wait()
            total = sent[0] + sent[1]
            barrier.wait()
            return total

        return run(rank, reduce)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(of, range(2)))


def test_split_over_processes():
    """Two processes that add up their sums compute what one does."""
    proxies, advantages = batch(0)
    parts = [slice(0, 11), slice(11, None)]

    def run(rank, reduce):
        return delta_coefficients(proxies[parts[rank]], advantages[parts[rank]], refinements=2, reduce=reduce)

    found = torch.cat(in_two_processes(run))
    torch.testing.assert_close(found, delta_coefficients(proxies, advantages, refinements=2), rtol=1e-12, atol=1e-12)


def test_words_of_the_hidden_gradient_are_those_of_all_processes():
    """The likeliest words that occur in the whole generation batch, wherever."""
    whole = replace(_rollouts(), head=LMHead(torch.randn(9, 8, generator=torch.Generator().manual_seed(1))))
    whole.completion_ids[:8] = whole.completion_ids[:8] % 4  # the halves have different words
    credit = delta.DelTA(proxy="hidden_gradient")

    def run(rank, reduce):
        half = torch.arange(8) + 8 * rank
        return credit.coefficients(whole.take(half, states=whole.states[half], head=whole.head, reduce=reduce))

    torch.testing.assert_close(torch.cat(in_two_processes(run)), credit.coefficients(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("assignment", delta.ASSIGNMENTS)
def test_the_tilt_is_logged_and_normalisation_by_side_takes_it_away(assignment):
    """A side whose tokens look like it more than the other's do like theirs is pushed harder, unless by side."""
    logged = {}

    def mean_of(name, values, weights=None):
        weights = torch.ones_like(values) if weights is None else weights
        logged[name] = ((values * weights).sum() / weights.expand_as(values).sum()).item()

    rollouts = replace(_rollouts(), log=mean_of)
    rollouts.states[:1] += 3
    sides = [rollouts.advantages > 0, rollouts.advantages < 0]
    for normalize in delta.NORMALIZATIONS:
        values = delta.DelTA(normalize=normalize, assignment=assignment, refinements=2).coefficients(rollouts)
        means = [values[side].mean().item() for side in sides]
        assert [logged["delta/lambda_mean_positive"], logged["delta/lambda_mean_negative"]] == pytest.approx(means)
        assert (means == pytest.approx([1.0, 1.0])) == (normalize == "side")
        assert (values.mean().item() == pytest.approx(1)) == (normalize == "batch")


@pytest.mark.parametrize("normalize", delta.NORMALIZATIONS)
def test_the_random_control_has_each_sides_values_and_mean(normalize):
    rollouts = _rollouts()
    soft, random = (
        delta.DelTA(normalize=normalize, assignment=assignment).coefficients(rollouts)
        for assignment in ("soft", "random")
    )
    assert not torch.equal(soft, random)
    for side in (rollouts.advantages > 0, rollouts.advantages < 0, rollouts.advantages == 0):
        torch.testing.assert_close(random[side].flatten().sort().values, soft[side].flatten().sort().values)


def test_a_side_of_less_spread_than_the_authors_bound_is_told_apart_less():
    """Margins of 1e-4 and 3e-4 around a spread of 1e-4 or less are divided by 1e-4."""
    proxies = torch.tensor([[0.01], [0.01], [0.0], [0.0]], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    found = delta_coefficients(proxies, advantages, refinements=0, lambda_min=0, lambda_max=1, normalize=False)
    torch.testing.assert_close(found, torch.full((4,), 1 / (1 + torch.tensor(-1.0).exp().item()), dtype=torch.float64))


@pytest.mark.parametrize("normalize", ["sides", None, 2])
def test_unknown_normalisation_is_refused(normalize):
    with pytest.raises(ValueError, match=rf"normalize={normalize!r} is not one of 'batch', 'side', 'none'"):
        delta_coefficients(*batch(0), normalize=normalize)
    with pytest.raises(ValueError, match="is not one of 'batch'"):
        delta.DelTA(normalize=normalize)


def test_neutral_range():
    assert delta_coefficients(*batch(1), lambda_min=1.0, lambda_max=1.0).tolist() == pytest.approx([1.0] * 30)


def test_mean_is_one_and_tokens_without_a_side_get_the_least():
    proxies, advantages = batch(2)
    found = delta_coefficients(proxies, advantages)
    assert found.mean().item() == pytest.approx(1)
    assert (advantages == 0).any()
    assert (found[advantages == 0] == found.min()).all()
    raw = delta_coefficients(proxies, advantages, normalize=False)
    assert raw[advantages == 0].tolist() == [0.8] * int((advantages == 0).sum())
    assert (raw >= 0.8).all()
    assert (raw <= 1.2).all()


def test_tokens_that_look_like_the_other_side_get_less():
    proxies = torch.tensor([[1.0], [1.1], [0.9], [-1.0], [-1.0], [-1.1], [-0.9], [1.0]])
    advantages = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    found = delta_coefficients(proxies, advantages)
    assert found[3] < found[:3].min()
    assert found[7] < found[4:7].min()


@pytest.mark.parametrize("advantages", [[1.0, 2.0], [-1.0, -2.0], [0.0, 0.0]])
def test_one_side_only(advantages):
    """Nothing to tell apart: all tokens of the side are treated alike."""
    found = delta_coefficients(torch.tensor([[1.0], [3.0]]), torch.tensor(advantages))
    assert found.tolist() == pytest.approx([1.0, 1.0])


def test_a_side_without_spread():
    """One token a side: its margin is positive and its scale zero, so it counts as its own side's for certain."""
    found = delta_coefficients(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, -1.0]), normalize=False)
    assert found.tolist() == pytest.approx([1.2, 1.2])
    same = delta_coefficients(torch.tensor([[1.0], [1.0]]), torch.tensor([1.0, -1.0]), normalize=False)
    assert same.tolist() == pytest.approx([1.0, 1.0])


def test_no_tokens():
    assert delta_coefficients(torch.zeros(0, 3), torch.zeros(0)).shape == (0,)


def test_half_precision_is_accumulated_in_single():
    proxies, advantages = batch(1)
    found = delta_coefficients(proxies.bfloat16(), advantages.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), delta_coefficients(proxies, advantages), rtol=0.02, atol=0.02)


def test_dealing_out_keeps_the_sides_apart():
    values, sides = torch.arange(40.0), torch.tensor([1.0, -1.0, 0.0, 1.0]).repeat(10)
    dealt = delta._dealt_out(values, sides, torch.Generator().manual_seed(0))
    assert not torch.equal(dealt, values)
    for side in (-1, 0, 1):
        assert sorted(dealt[sides == side].tolist()) == values[sides == side].tolist()
    assert torch.equal(dealt[sides == 0], values[sides == 0])


def test_sides_that_do_not_differ_tell_nothing_apart():
    """The same tokens on both sides, in float32, whose rounding would otherwise be blown up to margins."""
    tokens = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    proxies, advantages = torch.cat([tokens, tokens.flip(0)]), torch.tensor([1.0] * 50 + [-1.0] * 50)
    torch.testing.assert_close(delta_coefficients(proxies, advantages), torch.ones(100))


def test_top_fraction_is_of_the_tokens_that_have_an_advantage():
    rollouts = _rollouts()
    values = delta.DelTA(top_fraction=0.5, normalize=False).coefficients(rollouts)
    pushed = rollouts.mask.bool() & (rollouts.advantages != 0).unsqueeze(1)
    assert values[pushed].mean().item() == pytest.approx(0.5, abs=0.1)
    assert not values[rollouts.mask.bool() & ~pushed].any()


def _rollouts():
    """Sixteen rollouts, of which three quarters have no advantage."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(16, 5)
    return Rollouts(
        prompt_ids=mask.long(),
        prompt_mask=mask,
        completion_ids=torch.randint(9, (16, 5), generator=generator),
        mask=mask,
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0] + [0.0] * 12),
        group_ids=torch.arange(16) // 4,
        rewards=torch.zeros(16, 1),
        reward_names=["reward"],
        examples=[{}] * 16,
        num_generations=4,
        old_logps=-torch.rand(16, 5, generator=generator),
        states=torch.randn(16, 5, 8, generator=generator),
    )


def test_random_numbers_follow_the_seed_and_the_tokens():
    def drawn(seed, tokens):
        torch.manual_seed(seed)
        return torch.rand(3, generator=generator_of(torch.tensor(tokens))).tolist()

    assert drawn(0, [1, 2]) == drawn(0, [1, 2])
    assert drawn(0, [1, 2]) != drawn(1, [1, 2])
    assert drawn(0, [1, 2]) != drawn(0, [1, 3])


@pytest.mark.parametrize("proxy", ["lm_head_row", "hidden_gradient"])
def test_processes_ask_for_states_equally_often(monkeypatch, proxy):
    """However long their rollouts are: where the states are computed again, a sharded model waits for all of them."""
    monkeypatch.setattr(delta, "CHUNK", 12)

    class Counted:
        keeps = False

        def __init__(self, states):
            self.states, self.asked = states, 0

        def __getitem__(self, rows):
            self.asked += 1
            return self.states[rows]

    def run(rank, reduce):
        rollouts = _rollouts()
        width = 5 if rank else 1  # three rollouts at a time, or all
        columns = ("completion_ids", "mask", "old_logps")
        cut = {name: getattr(rollouts, name)[:, :width] for name in columns}
        counted = Counted(rollouts.states[:, :width])
        head = LMHead(torch.randn(9, 8, generator=torch.Generator().manual_seed(1)))
        rollouts = replace(rollouts, **cut, states=counted, reduce=reduce, head=head)
        delta.DelTA(proxy=proxy).coefficients(rollouts)
        return counted.asked

    first, second = in_two_processes(run)
    assert first == second > 4
