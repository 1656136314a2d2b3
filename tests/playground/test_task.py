"""The playground's problems, their answers and the teacher's slips."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_cancel.playground.task import (
    SPLITS,
    Problem,
    Slips,
    first_wrong_token,
    imitate,
    sample_problem,
    sample_problems,
    solve,
    write_response,
)
from trl_cancel.playground.tokenizer import build_tokenizer


NO_SLIPS = Slips(borrow=0, carry=0, other=0)


@given(seed=st.integers(0, 10**6), num_steps=st.integers(1, 8))
def test_problems(seed, num_steps):
    problem = sample_problem(random.Random(seed), num_steps)
    assert problem.prompt == f"Compute {problem.expression}."
    assert problem.answer == eval(problem.expression)
    assert len(problem.steps) == num_steps
    running = [eval(problem.expression[: len(problem.expression) - 2 * rest]) for rest in range(num_steps + 1)]
    assert min(running) >= 0


def test_response():
    problem = Problem(8, (("-", 4), ("+", 8), ("+", 7), ("-", 1)))
    assert problem.expression == "8-4+8+7-1"
    assert solve(problem) == "8-4=4\n4+8=12\n12+7=19\n19-1=18\nThe answer is \\boxed{18}."
    assert imitate(problem, random.Random(0), NO_SLIPS) == solve(problem)


@pytest.mark.parametrize(
    ("problem", "slips", "wrong"),
    [
        (Problem(9, (("+", 3), ("-", 5))), Slips(borrow=1, carry=0, other=0), [12, 17]),  # a forgotten borrow
        (Problem(8, (("+", 7), ("-", 1))), Slips(borrow=0, carry=1, other=0), [5, 4]),  # a forgotten carry, carried on
        (Problem(2, (("+", 7), ("-", 1))), Slips(borrow=1, carry=1, other=0), [9, 8]),  # where neither can happen
    ],
)
def test_slips(problem, slips, wrong):
    assert imitate(problem, random.Random(0), slips) == write_response(problem, wrong)


def test_totals_never_turn_negative():
    rng = random.Random(0)
    for problem in sample_problems("warm_start", 300):
        assert "=-" not in imitate(problem, rng, Slips(borrow=0.3, carry=0.9, other=0.3))


def test_the_teacher_is_right_four_times_in_ten():
    rng, problems = random.Random(0), sample_problems("warm_start", 2000)
    right = sum(imitate(problem, rng, Slips()) == solve(problem) for problem in problems)
    assert 0.35 < right / len(problems) < 0.45


def test_splits_never_overlap():
    drawn = {split: set(sample_problems(split, 500, seed)) for split in SPLITS for seed in (0, 1)}
    assert all(problem.split == split for split, problems in drawn.items() for problem in problems)
    assert sorted(bucket for buckets in SPLITS.values() for bucket in buckets) == list(range(100))


def test_draws_are_distinct_and_repeatable():
    problems = sample_problems("train", 400, seed=3)
    assert len(set(problems)) == 400
    assert problems == sample_problems("train", 400, seed=3) != sample_problems("train", 400, seed=4)
    assert sample_problems("train", 400, seed=3)[:100] == sample_problems("train", 100, seed=3)
    assert {len(problem.steps) for problem in sample_problems("train", 8)} == {3, 4, 5, 6}


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="split='dev' is not a playground split; use one of warm_start, train"):
        sample_problems("dev", 1)
    with pytest.raises(ValueError, match="num_problems=0"):
        sample_problems("train", 0)
    with pytest.raises(ValueError, match=r"num_problems=500 is more than the 'test' split has: .* of 2 operations"):
        sample_problems("test", 500, num_steps=(2, 3))


@pytest.mark.parametrize(
    ("response", "solution", "index"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 9, 3], [1, 2, 3], 1), ([1, 2], [1, 2, 3], 2), ([1, 2, 3, 4], [1, 2, 3], 3)],
)
def test_first_wrong_token(response, solution, index):
    assert first_wrong_token(response, solution) == index


def test_tokenizer_loses_nothing():
    tokenizer = build_tokenizer()
    for problem in sample_problems("train", 50):
        for text in (problem.prompt, solve(problem)):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids
    longest = max(len(tokenizer(solve(problem))["input_ids"]) for problem in sample_problems("train", 2000))
    assert longest < 64, "what the recipes allow a completion"
