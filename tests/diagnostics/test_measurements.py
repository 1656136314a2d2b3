"""The measurements against counting by hand on the same probe: what the tables and claims are made of."""

import itertools
import statistics

import pytest
import torch
from transformers import AutoTokenizer

from tests.diagnostics.test_probe import as_reward, rollouts_of
from tests.runs import load
from trl_cancel.diagnostics import UpdateProbe, Variant
from trl_cancel.diagnostics.probing import measurements
from trl_cancel.diagnostics.probing.measurements import Subject
from trl_cancel.diagnostics.probing.off_policy import off_policy_steps
from trl_cancel.diagnostics.probing.values import TokenValues


@pytest.fixture(scope="module")
def subject(tiny_model):
    model = load(tiny_model).double()
    probe = UpdateProbe(model, rollouts_of(model, tiny_model, prompts=6), learning_rate=0.05)
    return Subject(probe, AutoTokenizer.from_pretrained(tiny_model), as_reward, learning_rate=3e-3)


def places(subject):
    return [tuple(place) for place in subject.probe.active.nonzero().tolist()]


def test_shifts(subject):
    found = measurements.measure_shifts(subject)
    rollouts = subject.probe.rollouts
    for name in ("grpo", "positive_only"):
        shifts = subject.probe.shifts(name)
        shares = []
        for sign in (1, -1):
            moved = [shifts[place].item() for place in places(subject) if rollouts.advantages[place[0]] * sign > 0]
            boosted, suppressed = sum(change > 1e-4 for change in moved), sum(change < -1e-4 for change in moved)
            shares.append(boosted / (boosted + suppressed))
        assert found["variants"][name]["dissimilarity"] == pytest.approx(abs(shares[0] - shares[1]))
        assert shares[0] != shares[1]
    probe = subject.training()
    trained = probe.shifts("positive_only")[probe.active]
    ratios = found["variants"]["positive_only, AdamW"]["all"]
    assert ratios["mean"] == pytest.approx(trained.mean().item())
    for response in found["responses"]:
        assert len(response["tokens"]) == len(response["shifts"])


def test_kinds_of_pairs(subject):
    """All tokens, so that nothing is drawn."""
    probe = subject.probe
    count = len(probe.token_ids)
    kinds = measurements.kernel_by_kind(probe, num_tokens=count, low_confidence=0.5)
    logps, weight = probe.before[probe.active], probe.model.lm_head.weight.detach()
    probabilities = (probe.hidden @ weight.T / probe.rollouts.temperature).softmax(1)
    errors = (torch.nn.functional.one_hot(probe.token_ids, len(weight)) - probabilities) / probe.rollouts.temperature
    low = logps <= logps.quantile(0.5)
    couplings = {(same, both): [] for same in (True, False) for both in (True, False)}
    for a, b in itertools.combinations(range(count), 2):
        kernel = (probe.hidden[a] @ probe.hidden[b]) * (errors[a] @ errors[b])
        kind = bool(probe.token_ids[a] == probe.token_ids[b]), bool(low[a] and low[b])
        couplings[kind].append(abs(kernel.item()))
    total = sum(map(sum, couplings.values()))
    for kind in kinds:
        expected = couplings[kind["same"], kind["low"]]
        assert kind["pairs"] == len(expected)
        assert kind["mean_magnitude"] == pytest.approx(statistics.mean(expected), rel=1e-4)
        assert kind["share_of_coupling"] == pytest.approx(sum(expected) / total, rel=1e-4)


def test_displacement(subject):
    """Each prompt's own part of the batch's update, and no push at all on what NTHR selects."""
    found, probe = measurements.measure_displacement(subject), subject.probe
    rollouts = probe.rollouts
    prompts = iter(found["prompts"])
    weights = {
        "grpo": probe.weights("grpo"),
        "positive_only": probe.weights("grpo") * (rollouts.advantages > 0).unsqueeze(1),
        "nthr": probe.weights("grpo") * (probe.weights(Variant("nthr", nthr_eta=0.5)) == probe.weights("grpo")),
    }
    assert (weights["nthr"] != weights["grpo"]).any()
    for first in range(0, len(rollouts.mask), 4):
        rows = slice(first, first + 4)
        right = [row for row in range(first, first + 4) if rollouts.advantages[row] > 0]
        if len(right) in (0, 4):
            continue
        prompt = next(prompts)
        assert prompt["right"] == len(right)
        for name, of_all in weights.items():
            own = torch.zeros_like(of_all)
            own[rows] = of_all[rows]
            with probe.updated(own):
                changes = (probe.log_probs() - probe.before).sum(1)
            assert prompt[name] == pytest.approx(changes[right].mean().item(), abs=1e-6)
        assert prompt["linearity"] == pytest.approx(1, abs=0.2)
    assert next(prompts, None) is None
    of = {name: [prompt[name] for prompt in found["prompts"]] for name in found["prompts"][0] if name != "prompt"}
    count = len(found["prompts"])
    pairs = list(zip(of["grpo"], of["positive_only"], of["nthr"], of["nthr_random"], strict=True))
    assert found["below_positive_only"] == pytest.approx(sum(g < p for g, p, _, _ in pairs) / count)
    assert found["nthr_above_grpo"] == pytest.approx(sum(n > g for g, _, n, _ in pairs) / count)
    assert found["nthr_above_random"] == pytest.approx(sum(n > r for _, _, n, r in pairs) / count)
    assert found["nthr_gain"] == pytest.approx(statistics.mean(n - g for g, _, n, _ in pairs), abs=1e-6)
    assert found["random_gain"] == pytest.approx(statistics.mean(r - g for g, _, _, r in pairs), abs=1e-6)
    # With no ties Spearman's is 1 - 6 sum d^2 / (n (n^2 - 1)): the least displaced first, the highest score first.
    by_displacement = sorted(range(count), key=lambda index: of["grpo"][index])
    by_score = sorted(range(count), key=lambda index: -of["gwhes"][index])
    squares = sum((by_displacement.index(index) - by_score.index(index)) ** 2 for index in range(count))
    assert found["rank_correlation"] == pytest.approx(1 - 6 * squares / (count * (count**2 - 1)))


def test_values(subject, monkeypatch):
    """Where a token is worth 1 if and only if its shift is positive, the gap is 1; and each kind is what it is called."""
    shifts = subject.shifts("grpo")
    probabilities = subject.probe.before.exp()

    def known(model, tokenizer, rollouts, where, reward, given, **settings):
        assert torch.equal(given, probabilities[where[:, 0], where[:, 1]])
        assert (given <= 0.95).all()
        values = (shifts[where[:, 0], where[:, 1]] > 0).double()
        return TokenValues(values, values, values)

    monkeypatch.setattr(measurements, "token_values", known)
    found = measurements.measure_values(subject, num_tokens=5, max_probability=0.95)
    assert found["gap"] == {"positive": 1.0, "negative": 1.0, "all": 1.0}
    assert found["mean"]["all"] == {"boosted": 1.0, "suppressed": 0.0}
    for token in found["tokens"]:
        assert (token["shift"] > 1e-4) == (token["kind"] == "boosted")
        assert abs(token["shift"]) > 1e-4
    counts = {
        (sign, kind): sum(token["sign"] == sign and token["kind"] == kind for token in found["tokens"])
        for sign in ("positive", "negative")
        for kind in ("boosted", "suppressed")
    }
    for sign, of_sign in (("positive", 1), ("negative", -1)):
        assert 0 < counts[sign, "boosted"] == counts[sign, "suppressed"] <= 5
        moved = {
            round(shifts[place].item(), 12)
            for place in places(subject)
            if subject.probe.rollouts.advantages[place[0]] * of_sign > 0
        }
        assert {round(token["shift"], 12) for token in found["tokens"] if token["sign"] == sign} <= moved


def test_residual(subject):
    found = measurements.measure_residual(subject)
    steps = off_policy_steps(subject.training(), "gspo", num_iterations=2, seed=subject.seed)
    run = found["runs"]["gspo"]
    assert run["residual"] == [step.residual for step in steps]
    assert run["mean_residual"] == pytest.approx(statistics.mean(step.residual for step in steps[4:]))
    assert run["mean_asymmetry"] == pytest.approx(statistics.mean(step.asymmetry for step in steps[4:]))
    assert found["runs"]["grpo"]["residual"][0] < 1e-6 < 0.1 < found["runs"]["grpo, shuffled"]["residual"][0]


def test_asymmetry_of_steps(subject):
    """The variance over a group of the mean weight of each rollout's tokens."""
    probe = subject.training()
    (step,) = off_policy_steps(probe, "delta", num_steps=1)
    weights, mask = probe.weights("delta"), probe.rollouts.mask
    means = [(row[counts.bool()].sum() / counts.sum()).item() for row, counts in zip(weights, mask, strict=True)]
    variances = [statistics.pvariance(means[first : first + 4]) for first in range(0, len(means), 4)]
    assert step.asymmetry == pytest.approx(statistics.mean(variances), rel=1e-5)


def test_energy(subject):
    found, probe = measurements.measure_energy(subject), subject.probe
    assert sum(found["variants"]["grpo"]["energy"]) == pytest.approx(1)
    rollouts = probe.rollouts
    # At equal size of the pushes, weights that are all alike leave the variance of the advantages.
    groups = rollouts.by_group(rollouts.advantages)
    expected = groups.var(1, correction=0)[(groups != 0).any(1)].mean().item()
    for scale in (1.0, 0.1):
        relative = measurements._relative_asymmetry(rollouts, scale * rollouts.advantages)
        assert relative == pytest.approx(expected)


def test_coefficients(subject):
    found, probe = measurements.measure_coefficients(subject), subject.probe
    weights = probe.weights("delta")
    for entry in (found["delta"]["highest"][0], found["delta"]["lowest"][0]):
        (token,) = subject.tokenizer.encode(entry["token"], add_special_tokens=False)
        lambdas = [
            (weights[place] / probe.rollouts.advantages[place[0]]).item()
            if probe.rollouts.advantages[place[0]]
            else 1.0
            for place in places(subject)
            if probe.rollouts.completion_ids[place] == token
        ]
        assert entry["count"] == len(lambdas) >= 5
        assert entry["mean"] == pytest.approx(statistics.mean(lambdas), rel=1e-4)
    assert {response["advantage"] > 0 for response in found["responses"]} == {True, False}
