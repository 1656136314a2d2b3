"""What is logged of each token's shift is what two passes over saved weights say, and measuring it changes nothing."""

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from trl_cancel import TokenShiftCallback
from trl_cancel.batch.states import without_dropout
from trl_cancel.playground.data import load_prompts
from trl_cancel.playground.tokenizer import build_tokenizer
from trl_cancel.playground.warm_start import build_model

from .methods import METHODS, SHIFT_METRICS, settings_of
from .runs import OFF_POLICY, assert_same_weights, build, noisy_reward, repeatable, train, weights_of, without


ADAPTER = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False)
LONG = {"max_completion_length": 20, "max_steps": 4}  # so that some rollouts end by themselves
ROWS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 3},
    "several-steps-a-generation": OFF_POLICY,
    "several-steps-accumulated": {**OFF_POLICY, "gradient_accumulation_steps": 2},
    "a-step-of-several-generations": {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    "the-end-of-an-epoch": {"gradient_accumulation_steps": 3, "steps_per_generation": 1, "max_steps": 8},
    "temperature": {"temperature": 0.6},
    "everything-off": {"query_preserved": False, "cancellation_metrics": False},
    "truncated": {"mask_truncated_completions": True, "per_device_train_batch_size": 16},
    "checkpointing": {"gradient_checkpointing": True},
    "credit": {**OFF_POLICY, "nthr": True, "nthr_eta": "0.5", "delta_credit": True},
    "credit-in-the-loss": {"nthr": True, "nthr_eta": "0.5"},
    "group-weights": settings_of(METHODS["dfpo-spread"], max_steps=4),
    "rounds": settings_of(METHODS["reward-balanced"], max_steps=4),
    "lora": {**OFF_POLICY, "arguments": {"peft_config": ADAPTER}},
}

SLOW = (
    "accumulated",
    "several-steps-a-generation",
    "temperature",
    "everything-off",
    "truncated",
)  # others have it too


def mostly_noisy_reward(prompts, completion_ids, **kwargs):
    """Some prompts have no advantages, so that micro-batches without either sign occur."""
    rewards = noisy_reward(completion_ids)
    return [reward * (len(str(prompt)) % 3 > 0) for reward, prompt in zip(rewards, prompts, strict=True)]


def with_dropout(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attention_dropout=0.5)


class Recorder(TrainerCallback):
    """Weights before and after every optimizer step, and the micro-batches of its loss."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, []
        self.loss, trainer.compute_loss = trainer.compute_loss, self.compute_loss
        trainer.add_callback(self)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.steps[-1][1].append(dict(inputs))
        return self.loss(model, inputs, *args, **kwargs)

    def on_step_begin(self, *args, **kwargs):
        self.steps.append((weights_of(self.trainer.model), []))

    def on_step_end(self, *args, **kwargs):
        self.steps[-1] += (weights_of(self.trainer.model),)


def plain_logps(model, weights, rows, temperature):
    """By a model of its own, in float64, from all logits."""
    model.load_state_dict(weights)
    model = model.double().eval()
    ids, length = torch.cat([rows["prompt_ids"], rows["completion_ids"]], 1), rows["completion_ids"].size(1)
    mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1] / temperature
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)[:, -length:]


def expected_metrics(model, before, micro_batches, after, temperature, threshold=1e-4):
    """A loop over all tokens of an optimizer step."""
    shifts = {"positive_": [], "negative_": [], "": []}
    for rows in micro_batches:
        change = plain_logps(model, after, rows, temperature) - plain_logps(model, before, rows, temperature)
        for row, rollout in enumerate(change):
            advantage = rows["advantages"][row].sum()
            tokens = [
                shift.item() for shift, counts in zip(rollout, rows["completion_mask"][row], strict=True) if counts
            ]
            shifts[""] += tokens
            if advantage:
                shifts["positive_" if advantage > 0 else "negative_"] += tokens
    # The logged ones are in float32.
    assert all(abs(abs(shift) - threshold) > 1e-6 for shift in shifts[""])
    metrics = {}
    for sign, found in shifts.items():
        if found:
            metrics[f"shift/{sign}boosted"] = sum(shift > threshold for shift in found) / len(found)
            metrics[f"shift/{sign}suppressed"] = sum(shift < -threshold for shift in found) / len(found)
            metrics[f"shift/{sign}mean"] = sum(found) / len(found)
    if shifts[""]:
        metrics["shift/mean_magnitude"] = sum(map(abs, shifts[""])) / len(shifts[""])
    return metrics


def logged_shifts(entry):
    return {name: value for name, value in entry.items() if name.startswith("shift/")}


@pytest.mark.parametrize("row", [pytest.param(row, marks=[pytest.mark.slow] * (row in SLOW)) for row in ROWS])
def test_logs_what_two_plain_passes_say(tiny_model, row):
    settings = {**LONG, **ROWS[row], "token_shift_steps": 1}
    arguments = {"reward_funcs": mostly_noisy_reward, **settings.pop("arguments", {})}
    if row == "the-end-of-an-epoch":
        arguments["train_dataset"] = load_prompts("train", 8)
    trainer = build(with_dropout(tiny_model), arguments=arguments, **settings)
    record = Recorder(trainer)
    trainer.train()

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(model, ADAPTER) if row == "lora" else model
    assert len(record.steps) == settings["max_steps"]
    for entry, step in zip(trainer.state.log_history, record.steps, strict=False):
        expected = expected_metrics(model, *step, temperature=trainer.temperature)
        assert logged_shifts(entry) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert {name for entry in trainer.state.log_history for name in logged_shifts(entry)} == set(SHIFT_METRICS)
    assert max(entry["shift/mean_magnitude"] for entry in trainer.state.log_history[:-1]) > 1e-2
    sizes = [[int(rows["completion_mask"].sum()) for rows in step[1]] for step in record.steps]
    assert any(len(set(size)) > 1 for size in sizes) == (trainer.args.gradient_accumulation_steps > 1)


IDENTICAL = {
    **{row: ROWS[row] for row in ("accumulated", "several-steps-a-generation", "checkpointing", "credit", "lora")},
    "everything-off": {**OFF_POLICY, **ROWS["everything-off"], "beta": 0.1},
    "group-weights": ROWS["group-weights"],
    "rounds": ROWS["rounds"],
    "half-precision": {**OFF_POLICY, "bf16": True},
    "evaluation": {**OFF_POLICY, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4},
}


@pytest.mark.parametrize("row", IDENTICAL, ids=str)
def test_measuring_changes_nothing(tiny_model, row):
    """Weights, losses, samples and order, with dropout in the model: to the last bit."""
    settings = {**IDENTICAL[row], "max_steps": 4}
    arguments = settings.pop("arguments", {})
    if row == "evaluation":
        arguments = {"eval_dataset": load_prompts("test", 4)}
    runs = [
        train(with_dropout(tiny_model), **settings, token_shift_steps=steps, arguments=arguments) for steps in (0, 2)
    ]
    assert [without(entry, ("shift/",)) for entry in runs[1].logs] == runs[0].logs
    assert_same_weights(runs[1].weights, runs[0].weights)
    measured = [entry["step"] for entry in runs[1].logs if logged_shifts(entry)]
    assert measured == [2, 4]
    assert not any(logged_shifts(entry) for entry in runs[0].logs)


@pytest.mark.slow
def test_measuring_changes_nothing_in_4_bit(tmp_path):
    """Not even the quantized weights, which a CPU may pack for good when they are not training."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    tokenizer, sizes = build_tokenizer(), {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    build_model(tokenizer, **sizes, head_dim=64, intermediate_size=64).save_pretrained(tmp_path)
    arguments = {"peft_config": ADAPTER, "processing_class": tokenizer}
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    runs = []
    for steps in (0, 1):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
        )
        runs.append(train(model, **OFF_POLICY, token_shift_steps=steps, arguments=arguments))
    assert_same_weights(runs[1].weights, runs[0].weights)
    assert [without(entry, ("shift/",)) for entry in runs[1].logs] == runs[0].logs
    assert all(entry["shift/mean_magnitude"] > 1e-4 for entry in runs[1].logs[:-1])


def test_with_all_else_off_it_trains_as_trl_does(tiny_model):
    theirs = train(with_dropout(tiny_model), trl.GRPOTrainer, **OFF_POLICY)
    ours = train(with_dropout(tiny_model), **OFF_POLICY, **ROWS["everything-off"], token_shift_steps=1)
    assert [without(entry, ("shift/",)) for entry in ours.logs] == theirs.logs
    assert_same_weights(ours.weights, theirs.weights)


def test_logs_average_the_steps_since_the_last_log(tiny_model):
    every, averaged = (
        train(tiny_model, **OFF_POLICY, token_shift_steps=2, logging_steps=steps).logs for steps in (1, 4)
    )
    for entry, pair in zip(averaged, ((1, 3), (5, 7)), strict=False):
        for name in SHIFT_METRICS:
            assert entry[name] == pytest.approx(sum(every[step][name] for step in pair) / 2)


def test_by_hand_and_with_another_threshold(tiny_model):
    trainer = build(tiny_model, **OFF_POLICY)
    trainer.add_callback(TokenShiftCallback(trainer, steps=4, threshold=1e3))
    trainer.train()
    logs = [repeatable(entry) for entry in trainer.state.log_history]
    configured = train(tiny_model, **OFF_POLICY, token_shift_steps=4).logs
    assert [without(entry, ("shift/",)) for entry in logs] == [without(entry, ("shift/",)) for entry in configured]
    for step in (3, 7):
        assert logs[step]["shift/mean"] == configured[step]["shift/mean"]
        assert logs[step]["shift/boosted"] == logs[step]["shift/suppressed"] == 0 < configured[step]["shift/boosted"]


def test_nothing_is_kept_after_a_step(tiny_model):
    trainer = train(tiny_model, max_steps=2, token_shift_steps=1).trainer
    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, TokenShiftCallback))
    assert callback._measured == []


def test_a_step_that_failed_leaves_nothing_behind(tiny_model):
    """Training again after a failure measures only the micro-batches of its own steps."""
    fails = [False, True, *([False] * 20)]

    def reward(completion_ids, **kwargs):
        if fails.pop(0):
            raise RuntimeError("the reward failed")
        return noisy_reward(completion_ids)

    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "token_shift_steps": 1, "max_steps": 1}
    trainer = build(tiny_model, **settings, arguments={"reward_funcs": reward})
    with pytest.raises(RuntimeError, match="the reward failed"):
        trainer.train()
    trainer._step, trainer._buffered_inputs = 0, None
    record = Recorder(trainer)
    trainer.train()
    expected = expected_metrics(AutoModelForCausalLM.from_pretrained(tiny_model), *record.steps[0], temperature=1.0)
    assert logged_shifts(trainer.state.log_history[0]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_modes_of_modules_are_kept():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1, 1)))
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with without_dropout(model):
        assert not any(module.training for module in model.modules() if not isinstance(module, torch.nn.Linear))
    assert [module.training for module in model.modules()] == before == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"steps": True}, "steps=True must be a whole number"),
        ({"steps": 2, "threshold": -1.0}, r"threshold=-1.0 must not be negative"),
        ({"steps": 2, "threshold": float("nan")}, r"threshold=nan must not be negative"),
    ],
)
def test_refusals_by_hand(tiny_model, settings, message):
    with pytest.raises(ValueError, match=message):
        TokenShiftCallback(build(tiny_model), **settings)


def test_refuses_what_could_not_be_measured(tiny_model):
    with pytest.raises(TypeError, match=r"trainer is a GRPOTrainer; pass a trainer of trl_cancel"):
        TokenShiftCallback(build(tiny_model, trl.GRPOTrainer), steps=1)
    trainer = build(tiny_model, token_shift_steps=10)
    with pytest.raises(ValueError, match=r"has a TokenShiftCallback already.*token_shift_steps=0.*remove_callback"):
        TokenShiftCallback(trainer, steps=1)
    trainer.remove_callback(TokenShiftCallback)
    TokenShiftCallback(trainer, steps=1)
