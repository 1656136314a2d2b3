"""
Every public function, at any precision, magnitude and mask: the right value, or a `ValueError` that names the argument.

`HYPOTHESIS_PROFILE=search pytest -n0 tests/test_functions.py` draws other examples, and many more.
"""

import inspect
import math
import re
from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import trl_cancel
from tests.functions import ELSEWHERE, ROWS, Draw
from trl_cancel import CancelGRPOConfig, batching, credit, diagnostics, evaluation
from trl_cancel.credit import NTHR, DelTA, SignControl
from trl_cancel.diagnostics import Variant
from trl_cancel.evaluation import EvaluationSettings


INF, NAN = math.inf, math.nan

FEW = settings(max_examples=max(4, settings.default.max_examples // 2))
each = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@st.composite
def arguments_of(draw, row):
    found = row.draw(Draw(draw(st.integers(0, 2**32 - 1))))
    assume(row.fits(**found))
    return found


def precision(arguments):
    """Of what was drawn."""
    return next(
        (value.dtype for value in arguments.values() if isinstance(value, torch.Tensor) and value.is_floating_point()),
        torch.float32,
    )


def as_lists(arguments):
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in arguments.items()}


def assert_right(row, found, arguments):
    expected = row.expected(**as_lists(arguments))
    if callable(expected):
        lists = (
            [part.tolist() if isinstance(part, torch.Tensor) else part for part in found]
            if isinstance(found, tuple) and isinstance(found[0], torch.Tensor)
            else found
        )
        assert expected(lists.tolist() if isinstance(lists, torch.Tensor) else lists)
        return
    values, sizes = expected if isinstance(expected, tuple) else (expected, expected)
    drawn = next(value.dtype for value in arguments.values() if isinstance(value, torch.Tensor))
    parts = zip(found, values, sizes, strict=True) if isinstance(found, tuple) else [(found, values, sizes)]
    for result, value, size in parts:
        tensor = result if isinstance(result, torch.Tensor) else torch.tensor(result, dtype=torch.float64)
        assert_close(
            row, tensor, torch.tensor(value, dtype=torch.float64), torch.tensor(size, dtype=torch.float64), drawn
        )


def assert_close(row, found, value, size, drawn):
    if not found.is_floating_point():
        assert found.tolist() == value.to(found.dtype).tolist()
        return
    assert found.dtype == drawn if row.keeps else found.dtype.itemsize >= 4
    computed = torch.promote_types(drawn, torch.float32) if drawn.is_floating_point else torch.float32
    limits = torch.finfo(found.dtype)
    value = value.reshape(found.shape)
    bound = row.tolerance * torch.finfo(computed).eps * size.reshape(found.shape).abs()
    bound += (limits.eps if row.keeps else 0.0) * value.abs() + 4 * limits.smallest_normal * limits.eps
    found = found.double()
    right = (found - value).abs() <= bound
    right |= (found == value) | (found.isnan() & value.isnan())
    right |= (found == value.sign() * INF) & (value.abs() + bound > limits.max)  # too large for the type
    assert right.all(), f"{found.tolist()} instead of {value.tolist()}"


def counting(row, name, arguments):
    """The places of an argument whose numbers count."""
    counts = torch.ones_like(arguments[name], dtype=torch.bool)
    if name in row.hidden:
        hidden = row.hidden[name](**arguments)
        counts &= ~(hidden if hidden.dim() == counts.dim() else hidden.unsqueeze(-1))
    return counts


def parts_of(found):
    if isinstance(found, diagnostics.TokenShifts):
        return found.shifts, *(torch.tensor(astuple(of)) for of in (found.positive, found.negative, found.all))
    return found if isinstance(found, tuple) else (found,)


@each
@FEW
@given(data=st.data())
def test_right_value(row, data):
    arguments = data.draw(arguments_of(row))
    assert_right(row, row.function(**arguments), arguments)


@pytest.mark.parametrize("row", [row for row in ROWS if row.hidden], ids=lambda row: row.name)
@FEW
@given(data=st.data())
def test_what_does_not_count_has_no_effect(row, data):
    arguments = data.draw(arguments_of(row))
    spoiled = dict(arguments)
    for name, where in row.hidden.items():
        places = where(**arguments)
        spoiled[name] = arguments[name].masked_fill(
            places if places.dim() == arguments[name].dim() else places.unsqueeze(-1),
            data.draw(st.sampled_from([NAN, INF, -INF] if arguments[name].is_floating_point() else [-100, 2**40])),
        )
    for name in row.gradient:
        spoiled[name] = spoiled[name].clone().requires_grad_()
    found, expected = row.function(**spoiled), row.function(**arguments)
    for of_spoiled, of_whole in zip(parts_of(found), parts_of(expected), strict=True):
        torch.testing.assert_close(of_spoiled, of_whole, rtol=0, atol=0, equal_nan=True)
    if row.gradient and found.requires_grad:
        found[found.isfinite()].sum().backward()
        for name in row.gradient:
            assert not spoiled[name].grad.isnan().any()
            if name in row.hidden:
                assert not spoiled[name].grad[row.hidden[name](**arguments)].any()


@pytest.mark.parametrize(
    ("row", "name"), [(row, name) for row in ROWS for name in row.nan], ids=lambda of: getattr(of, "name", of)
)
@FEW
@given(data=st.data())
def test_what_is_not_a_number_is_not_taken_for_one(row, name, data):
    arguments = data.draw(arguments_of(row))
    tensor = arguments[name] if arguments[name].is_floating_point() else arguments[name].double()
    counts = counting(row, name, arguments)
    if not counts.any():
        return  # nothing counts
    place = data.draw(st.sampled_from(counts.nonzero().tolist()))
    arguments[name] = tensor.clone()
    arguments[name][tuple(place)] = NAN
    if row.nan[name] == "refused":
        with pytest.raises(ValueError, match=name):
            row.function(**arguments)
    else:
        found = row.function(**arguments)
        assert (found[0] if isinstance(found, tuple) else found).isnan().any()


@pytest.mark.parametrize(
    ("row", "name"), [(row, name) for row in ROWS for name in row.forbidden], ids=lambda of: getattr(of, "name", of)
)
@FEW
@given(data=st.data())
def test_what_a_number_may_not_be_is_refused(row, name, data):
    """One number of a mask, a probability or a token that there cannot be, anywhere among right ones."""
    arguments = data.draw(arguments_of(row))
    wrong = data.draw(st.sampled_from(row.forbidden[name]))
    tensor = arguments[name]
    if not tensor.is_floating_point():
        tensor = tensor.long() if float(wrong).is_integer() else tensor.float()
    counts = counting(row, name, arguments)
    if not counts.any():
        return  # nothing counts
    arguments[name] = tensor.clone()
    arguments[name][tuple(data.draw(st.sampled_from(counts.nonzero().tolist())))] = wrong
    with pytest.raises(ValueError, match=name):
        row.function(**arguments)


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        pytest.param(row, changes, id=f"{row.name}-{','.join(changes)}-{i}")
        for row in ROWS
        for i, changes in enumerate(row.senseless)
    ],
)
@settings(max_examples=4)
@given(data=st.data())
def test_what_makes_no_sense_is_refused(row, changes, data):
    arguments = {**data.draw(arguments_of(row)), **changes}
    with pytest.raises(ValueError, match="|".join(map(re.escape, changes))):
        row.function(**arguments)


def test_every_public_function_has_a_row():
    functions = {
        name
        for package in (trl_cancel, credit, batching, diagnostics, evaluation)
        for name in package.__all__
        if inspect.isfunction(getattr(package, name))
    }
    rows = {row.name for row in ROWS}
    assert functions == rows | ELSEWHERE.keys()
    assert not rows & ELSEWHERE.keys()


def test_numbers_and_whole_numbers_are_taken_as_tensors():
    assert credit.nthr_eta(0.75, "balanced") == 0.5
    assert credit.nthr_eta(torch.tensor([0, 1]), 0.5).tolist() == [0.5, 0.5]
    assert credit.nthr_eta(1, "1-p") == 0
    whole, half = torch.tensor([1, 1, 2]), torch.tensor([1.0, -1.0, 0.0])
    assert torch.equal(credit.orthogonal_projection(whole, half), credit.orthogonal_projection(whole.float(), half))
    assert credit.symmetric_clip(torch.tensor([0, 3]), 0.2).tolist() == pytest.approx([0.0, 1.2])
    assert diagnostics.counterfactual_value(1, 0, 0.5) == 2
    third = torch.tensor(1.0, dtype=torch.float64) / 3
    assert diagnostics.counterfactual_value(third, 0, 0.1).item() == pytest.approx(1 / 3 / 0.9, rel=1e-12)
    assert evaluation.pass_at_k([[1, 0]], 2).tolist() == [1.0]


SETTINGS = {
    "nthr_": (
        NTHR,
        {"nthr": True},
        [
            {"beta": INF},
            {"beta": "1"},
            {"beta": -1.0},
            {"beta": -1e-9},
            {"eta": "half"},
            {"eta": -1},
            {"selection": "rand"},
        ],
    ),
    "delta_": (
        DelTA,
        {"delta_credit": True},
        [
            {"assignment": "harrd"},
            {"proxy": "row"},
            {"top_fraction": 7.0},
            {"top_fraction": 0.5, "assignment": "hard"},
            {"lambda_min": 1.3},
            {"lambda_max": INF},
            {"refinements": 0.5},
            {"gamma": -1.0},
        ],
    ),
}


@pytest.mark.parametrize(
    ("prefix", "kind", "chosen", "wrong"),
    [(prefix, kind, chosen, wrong) for prefix, (kind, chosen, cases) in SETTINGS.items() for wrong in cases],
)
def test_a_credit_refuses_what_its_configuration_refuses(prefix, kind, chosen, wrong):
    """In the same words, but for the prefix of the configuration."""
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}=|and {next(iter(wrong))}=") as by_hand:
        kind(**wrong)
    with pytest.raises(ValueError, match=prefix) as configured:
        CancelGRPOConfig(bf16=False, **chosen, **{prefix + name: value for name, value in wrong.items()})
    assert str(configured.value).replace(prefix, "") == str(by_hand.value)
    if isinstance(wrong.get("eta"), int):
        with pytest.raises(ValueError, match="eta=-1"):
            Variant("nthr", nthr_eta=-1)


def test_a_beta_or_sign_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="beta=nan must be a number"):
        NTHR(beta=NAN)
    with pytest.raises(ValueError, match="sign='postive' is not one of 'both', 'positive', 'negative'"):
        SignControl("postive")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: EvaluationSettings(temperature="hot"), "temperature='hot'"),
        (lambda: EvaluationSettings(top_p=None), "top_p=None"),
        (lambda: EvaluationSettings(pass_threshold="right"), "pass_threshold='right'"),
        (lambda: evaluation.TransformersEngine(None, None, batch_size=0), "batch_size=0"),
        (lambda: evaluation.load_problems(None, num_problems=-1), "num_problems=-1"),
        (lambda: diagnostics.sample_rollouts(None, None, [], None, num_generations=2.5), "num_generations=2.5"),
        (lambda: diagnostics.sample_rollouts(None, None, [], None, batch_size=0), "batch_size=0"),
        (lambda: diagnostics.sample_rollouts(None, None, [], None, temperature=INF), "temperature=inf"),
        (lambda: diagnostics.UpdateProbe(None, None, learning_rate=NAN), "learning_rate=nan"),
        (lambda: diagnostics.UpdateProbe(None, None, batch_size=0), "batch_size=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_needs_a_model_checks_its_numbers_first(call, name):
    with pytest.raises(ValueError, match=re.escape(name)):
        call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probabilities": [0.5, 1.0]}, r"probabilities\[1\]=1.0 must be at least 0 and below 1"),
        ({"probabilities": [0.5]}, "probabilities of shape"),
        ({"places": [[0, 0], [-1, 0]]}, r"places\[1\]=-1 must be between 0 and 1"),
        ({"places": [[0, 0], [0, 9]]}, r"places\[1\]=9 must be between 0 and 2"),
        ({"num_continuations": 0}, "num_continuations=0"),
    ],
)
def test_values_of_tokens_are_refused_before_anything_is_sampled(changes, message):
    places, probabilities = torch.tensor([[0, 0], [1, 2]]), torch.tensor([0.5, 0.9])
    given = {"places": places, "probabilities": probabilities, "num_continuations": 2, **changes}
    rollouts = SimpleNamespace(completion_ids=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=message):
        diagnostics.token_values(None, None, rollouts, given.pop("places"), None, given.pop("probabilities"), **given)
