"""Free forms of a response: what the teacher writes, what is right, and the first wrong token."""

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_cancel.playground import CHECKPOINTS, RICH, VARIED
from trl_cancel.playground.data import load_demonstrations, load_prompts
from trl_cancel.playground.forms import Forms
from trl_cancel.playground.task import Problem, Slips, careless_totals, first_wrong_token, sample_problems, solve
from trl_cancel.playground.tasks import TASKS, task_named
from trl_cancel.playground.tokenizer import build_tokenizer


FREE = TASKS[VARIED].forms
PROBLEM = Problem(8, (("-", 4), ("+", 8)))


def all_right_responses(problem, forms):
    """Every right response without filler, written out one by one."""
    lines, total = [], problem.start
    for (sign, operand), result in zip(problem.steps, problem.totals, strict=True):
        work = f"{total}{sign}{operand}"
        lines.append([f"{opener}{work}{verb}{result}" for opener in forms.openers for verb in forms.verbs])
        total = result
    lines.append([f"{ending}\\boxed{{{total}}}." for ending in forms.endings])
    return {"\n".join(choice) for choice in itertools.product(*lines)}


def test_right_responses():
    listed, pattern = all_right_responses(PROBLEM, FREE), FREE.right_responses(PROBLEM)
    assert len(listed) == 2 * 2 * 2 * 2 * 3
    assert all(pattern.fullmatch(text) for text in listed)
    for text in list(listed)[:20]:
        assert all(pattern.fullmatch(f"({filler})\n{text}") for filler in ("", "725", "123456")), "none does harm"
        assert not pattern.fullmatch("(7+2=9)\n" + text)
        for index, symbol in itertools.product(range(len(text)), "09+=x\n"):
            changed = text[:index] + symbol + text[index + 1 :]
            assert bool(pattern.fullmatch(changed)) == (changed in listed)


@given(st.data())
def test_first_wrong_token(data):
    """Against all right responses, written out: the first character after which none of them begins like this."""
    listed = all_right_responses(PROBLEM, FREE)
    text = data.draw(st.sampled_from(sorted(listed)))
    index = data.draw(st.integers(0, len(text)))
    text = text[:index] + data.draw(st.sampled_from(["", "1", "=", "4+8", "Then "])) + text[index + 1 :]
    beginnings = (place for place in range(len(text)) if not any(one.startswith(text[: place + 1]) for one in listed))
    expected = None if text in listed else next(beginnings, len(text))
    without_filler = Forms(FREE.openers, FREE.verbs, FREE.endings)
    assert without_filler.first_wrong_token(PROBLEM, list(text)) == expected


def test_first_wrong_token_of_the_plain_form_is_where_it_leaves_the_solution():
    tokenizer, rng = build_tokenizer(), random.Random(0)
    for problem in sample_problems("train", 100):
        response = TASKS["playground"].imitate(problem, rng)
        ids, right = (tokenizer(text)["input_ids"] for text in (response, solve(problem)))
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert Forms().first_wrong_token(problem, tokens) == first_wrong_token(ids, right)


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("8-4=4\n4+8=12\nThe answer is \\boxed{12}.", None),
        ("8-4=4\n4+8=2\nThe answer is \\boxed{2}.", 10),
        ("(402817)\nThen 8-4 is 4\n4+8=12\n\\boxed{12}.", None),
        ("8-4=4\n4+8=12\nSo \\boxed{12}", 26),  # ends too early: the token that ends it is wrong
        ("", 0),
    ],
)
def test_first_wrong_character(text, index):
    assert FREE.first_wrong_token(PROBLEM, list(text)) == index


@pytest.mark.parametrize(("name", "share"), [(VARIED, 0.4), (RICH, 0.3)])
def test_teacher(name, share):
    task, rng = task_named(name), random.Random(0)
    tokenizer, lengths, right = build_tokenizer(task.words), [], 0
    for problem in task.problems("warm_start", 400):
        response = task.imitate(problem, rng)
        ids = tokenizer(response)["input_ids"]
        assert tokenizer.unk_token_id not in tokenizer(task.prompt(problem))["input_ids"] + ids
        assert tokenizer.decode(ids) == response
        assert Problem.parse(task.prompt(problem)) == problem
        wrong = task.forms.first_wrong_token(problem, tokenizer.convert_ids_to_tokens(ids))
        assert wrong is not None or response.endswith(f"\\boxed{{{problem.answer}}}.")  # two slips may cancel
        right += wrong is None
        lengths.append(len(ids) + 1)
    assert right / 400 == pytest.approx(share, abs=0.06)
    assert max(lengths) <= task.max_completion_length


def test_multiplication():
    problem = Problem(3, (("+", 4), ("*", 6), ("-", 5)))
    assert problem.prompt == "Compute from left to right 3+4*6-5."
    assert problem.totals == [7, 42, 37]
    assert problem.answer == 37
    forgotten = careless_totals(problem, random.Random(0), Slips(borrow=0, carry=1, other=0))
    assert forgotten == [7, 32, 27]


def test_other_prompts_are_refused():
    with pytest.raises(ValueError, match="prompt='What is 2\\+2\\?' poses no problem of the playground"):
        Problem.parse("What is 2+2?")


def test_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task='hard' is not a task of the playground; use one of playground, "):
        task_named("hard")


def test_every_embedded_model_has_a_task():
    assert set(CHECKPOINTS) <= set(TASKS)


def test_distractors():
    """Expressions of the same operations before the problem, the same whenever it is posed."""
    task = task_named(RICH)
    problem = task.problems("train", 1)[0]
    prompt = task.prompt(problem)
    assert re.fullmatch(r"(Ignore \d([-+*]\d){2,4}\. ){2}Compute from left to right .*", prompt)
    assert prompt.endswith(problem.prompt)
    assert prompt == task.prompt(Problem.parse(prompt))
    assert load_prompts("train", 1, task=RICH)[0]["prompt"][0]["content"] == prompt
    assert load_demonstrations(1, task=RICH)[0]["prompt"][0]["content"].startswith("Ignore ")
    assert task_named(VARIED).prompt(problem) == problem.prompt
