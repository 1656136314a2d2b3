"""What reward functions may return, and what is said of the rest."""

import math
import traceback
from decimal import Decimal
from fractions import Fraction

import numpy
import pandas
import pyarrow
import pytest
import torch
import trl
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen3Config

from trl_cancel.running.rewards import RewardError, check_values

from .runs import assert_same_weights, noisy_reward, train


NAN, INF = math.nan, math.inf
# What a function returns for four completions, and what is said of it.
REFUSED = {
    "too few": ([1.0, 2.0], "returned 2 values, but 4 were expected"),
    "too many": ([1.0] * 5, "returned 5 values, but 4 were expected"),
    "empty": ([], "returned 0 values"),
    "nan": ([1.0, NAN, 2.0, 3.0], "returned nan for completion 1 of 4: it is not a number"),
    "infinite": ([1.0, 2.0, -INF, 3.0], "returned -inf for completion 2 of 4: it is not finite"),
    "too large": ([1e39, 0.0, 0.0, 0.0], "returned 1e.39 for completion 0 of 4: it is not finite in single precision"),
    "huge": ([10**400, 0, 0, 0], r"returned 10+\.\.\. for completion 0 of 4: it is not finite in single precision"),
    "a book": ([10**5000, 0, 0, 0], "returned a number of 16610 bits for completion 0 of 4: it is not finite"),
    "text": (["1.0"] * 4, "returned '1.0' for completion 0 of 4: a str is not a number"),
    "nested": ([[1.0], [1.0], [1.0], [1.0]], r"returned \[1.0\] for completion 0 of 4: a list is not a number"),
    "tensor of nan": (torch.tensor([1.0, 2.0, 3.0, NAN]), r"returned tensor\(nan\) for completion 3 of 4"),
    "array of nan": (numpy.array([NAN, 2.0, 3.0, 4.0]), "returned .*nan.* for completion 0 of 4"),
    "matrix": (torch.ones(4, 2), "for completion 0 of 4: a Tensor is not a number"),
    "column of nan": (torch.tensor([[1.0], [NAN], [2.0], [3.0]]), r"returned tensor\(\[nan\]\) for completion 1 of 4"),
    "complex tensor": (torch.ones(4, dtype=torch.complex64), "a Tensor is not a number"),
    "masked": (
        numpy.ma.array([1.0] * 4, mask=[0, 0, 1, 0]),
        "returned masked for completion 2 of 4: it is not a number",
    ),
    "endless Decimal": ([Decimal("Infinity")] * 4, "returned Decimal.* for completion 0 of 4: it is not finite"),
    "Decimal that signals": ([Decimal("sNaN")] * 4, "a Decimal is not a number"),
    "complex": ([1j, 0, 0, 0], "a complex is not a number"),
    "nothing": (None, "returned None, but a list of 4 numbers was expected"),
    "one number": (1.0, "returned 1.0, but a list of 4 numbers"),
    "one scalar": (torch.tensor(1.0), "returned a single number, but 4 were expected"),
    "string": ("1234", "returned '1234', but a list of 4 numbers"),
    "dictionary": ({1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}, "but a list of 4 numbers"),
}
ACCEPTED = {
    "floats": [0.5, 1.5, 2.5, 3.5],
    "whole numbers and truths": [1, 0, True, False],
    "some None": [1.0, None, 2.0, None],
    "scalars of NumPy": list(numpy.arange(4.0)),
    "scalars of PyTorch": list(torch.arange(4.0)),
    "truths of NumPy": list(numpy.array([True, False, True, False])),
    "tuple": (1.0, 2.0, 3.0, 4.0),
    "array": numpy.arange(4),
    "tensor": torch.arange(4.0),
}
# Further values of which TRL makes numbers.
CONVERTED = {
    "column": torch.arange(4.0).view(4, 1),
    "tensors of one element": [torch.tensor([0.5]), 1.5, None, torch.tensor([[2.5]])],
    "Decimals": [Decimal("0.1"), Decimal(1), None, 2.0],
    "Fractions": [Fraction(1, 3), Fraction(1), 0.5, 1],
    "halves of NumPy": list(numpy.arange(4, dtype=numpy.float16)),
    "bfloat16": torch.arange(4.0).bfloat16() / 3,
    "of a table": pandas.Series([0.5, 1.5, 2.5, 3.5]),
    "of an Arrow table": pyarrow.array([0.5, 1.5, 2.5, 3.5]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    values, message = REFUSED[case]
    with pytest.raises(RewardError, match=f"The reward function 'graded' .*{message}"):
        check_values(values, 4, "graded")


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_as_it_is(case):
    values = ACCEPTED[case]
    assert all(
        kept is value or kept == value for kept, value in zip(check_values(values, 4, "f"), values, strict=True)
    )


@pytest.mark.parametrize("case", [*ACCEPTED, *CONVERTED])
def test_numbers_are_those_that_trl_makes(case):
    """Which makes a tensor of the list, in single precision."""
    values = {**ACCEPTED, **CONVERTED}[case]
    theirs = torch.tensor([NAN if value is None else value for value in values], dtype=torch.float32)
    ours = torch.tensor([NAN if value is None else value for value in check_values(values, 4, "f")])
    assert torch.equal(ours.nan_to_num(9.0), theirs.nan_to_num(9.0))


def test_arrays_of_one_element_are_numbers():
    """TRL takes tensors of this kind, but no arrays."""
    for values in (numpy.arange(4.0).reshape(4, 1), [numpy.array([row]) for row in range(4)]):
        assert check_values(values, 4, "f") == [0.0, 1.0, 2.0, 3.0]


def test_generators_are_accepted():
    assert check_values((float(row) for row in range(4)), 4, "f") == [0.0, 1.0, 2.0, 3.0]


def test_long_values_are_shortened():
    with pytest.raises(RewardError) as raised:
        check_values(["text " * 1000] * 4, 4, "f")
    assert len(str(raised.value)) < 250


# In a run


def spoiled(row, value):
    def reward(completion_ids, trainer_state, **kwargs):
        rewards = noisy_reward(completion_ids)
        if trainer_state.global_step == 1:
            rewards[row] = value
        return rewards

    return reward


async def awaited_reward(completion_ids, **kwargs):
    return noisy_reward(completion_ids)


class Grader:
    """An object that is called, as functions with a state of their own are."""

    def __call__(self, completion_ids, **kwargs):
        return noisy_reward(completion_ids)


class AsyncGrader:
    async def __call__(self, completion_ids, **kwargs):
        return noisy_reward(completion_ids)


FORMS = {"async": awaited_reward, "object": Grader(), "async object": AsyncGrader()}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_functions_train_as_with_trl(tiny_model, form):
    arguments = {"reward_funcs": [FORMS[form], noisy_reward]}
    ours, trls = (train(tiny_model, *cls, arguments=arguments, max_steps=1) for cls in ((), (trl.GRPOTrainer,)))
    assert_same_weights(ours.weights, trls.weights)
    rewards = {name for name in trls.logs[0] if name.startswith("rewards/")}
    assert len(rewards) == 4
    assert rewards <= ours.logs[0].keys()
    assert ours.trainer.reward_funcs == arguments["reward_funcs"], "the functions themselves stay where they were"


def test_none_is_left_to_trl(tiny_model, caplog):
    """Where another function applies, that one decides; where none does, there is no advantage, and TRL warns."""
    for functions in ([spoiled(1, None), noisy_reward], spoiled(1, None)):
        runs = [
            train(tiny_model, *cls, arguments={"reward_funcs": functions}, max_steps=2)
            for cls in ((), (trl.GRPOTrainer,))
        ]
        assert_same_weights(runs[0].weights, runs[1].weights)
        assert runs[0].logs[1]["reward"] == runs[1].logs[1]["reward"]
    assert "All reward functions returned None" in caplog.text


def test_a_spoiled_reward_ends_the_run(tiny_model, tmp_path):
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 500}
    for function in (spoiled(2, NAN), spoiled_async):
        with pytest.raises(RewardError, match=f"'{function.__name__}' returned nan for completion 2 of 4") as raised:
            train(tiny_model, **settings, arguments={"reward_funcs": [noisy_reward, function]})
    assert "progress up to step 1 is saved" in raised.value.__notes__[-1]


async def spoiled_async(completion_ids, trainer_state, **kwargs):
    return spoiled(2, NAN)(completion_ids, trainer_state)


def test_a_forgotten_async_is_told(tiny_model):
    with pytest.raises(RewardError, match="returned a coroutine: define it with `async def`"):
        train(tiny_model, arguments={"reward_funcs": lambda **kwargs: awaited_reward(**kwargs)})


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_whose_exception_it_is(tiny_model, kind):
    async def failing_async(**kwargs):
        raise KeyError("answer")

    def failing(**kwargs):
        raise KeyError("answer")

    function = failing_async if kind == "async" else failing
    with pytest.raises(KeyError) as raised:
        train(tiny_model, arguments={"reward_funcs": [noisy_reward, function]})
    assert f"Raised by the reward function '{function.__name__}'." in raised.value.__notes__
    assert 'raise KeyError("answer")' in "".join(traceback.format_exception(raised.value)), "where it was raised"


def test_scores_of_models_are_checked(tiny_model):
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=1, num_labels=1, pad_token_id=0, **sizes)
    model = AutoModelForSequenceClassification.from_config(config)
    arguments = {"reward_funcs": [noisy_reward, model], "reward_processing_classes": [None, tokenizer]}
    ours, trls = (train(tiny_model, *cls, arguments=arguments, max_steps=1) for cls in ((), (trl.GRPOTrainer,)))
    assert_same_weights(ours.weights, trls.weights)
    torch.nn.init.constant_(model.score.weight, NAN)
    with pytest.raises(RewardError, match=r"The reward model .* scored completion 0 of 4 with nan"):
        train(tiny_model, arguments=arguments)
