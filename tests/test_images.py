"""Vision-language models: off is off, and images stay with their rollouts wherever these go."""

from itertools import pairwise

import pytest
import torch
import trl
from peft import LoraConfig
from torch.nn.functional import pad
from trl.data_utils import prepare_multimodal_messages

from trl_cancel.pipeline.prompts import FreshPrompts
from trl_cancel.pipeline.scoring import Scoring
from trl_cancel.pipeline.weights import WeightStage

from .methods import ON_POLICY, SEQUENCE
from .runs import OFF_POLICY, assert_same_weights, train
from .test_token_credit import DELTA, NTHR, delta_expected, nthr_expected
from .test_token_credit import Watch as CreditWatch
from .vision import FAMILIES, build, load_pictures


SETTINGS = {**OFF_POLICY, "max_steps": 4, "num_iterations": 1}
ROUNDS = {**SETTINGS, "filter_zero_variance": True, "reward_balance": 0.25}
LORA = {"peft_config": LoraConfig(r=2, target_modules="all-linear")}
MANY = load_pictures((1, 3, 2, 1))


# One or two families in the default suite, all in the slow one.
SLOW = ("gemma", "idefics")
TWO_AND_ALL = [pytest.param(family, marks=[pytest.mark.slow] * (family in SLOW)) for family in FAMILIES]
ONE_AND_ALL = ["qwen", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family != "qwen")]


def reward_of_first(completion_ids, **kwargs):
    """Tells only the rollouts of the first group apart, so that of each round this one is kept."""
    return [float(row < 4 and row % 2) for row in range(len(completion_ids))]


def arguments_of(family, dataset=MANY, **arguments):
    model, processor = build(family)
    return model, {"processing_class": processor, "train_dataset": dataset, **arguments}


def run(family, *args, arguments=None, **settings):
    model, arguments = arguments_of(family, **(arguments or {}))
    return train(model, *args, arguments=arguments, **{**SETTINGS, **settings})


def draw_from(monkeypatch, *datasets):
    """Lets each further round of generation come from another data set."""
    left = list(datasets)
    monkeypatch.setattr(FreshPrompts, "draw", lambda prompts, number: list(left.pop(0).take(number)))


@torch.no_grad()
def pass_alone(model, processor, example, completion_ids):
    """Last hidden states and logits of one completion, from its row of the data set: no batch, no padding."""
    prompt = prepare_multimodal_messages(example["prompt"], example["images"])
    inputs = processor.apply_chat_template(
        conversation=[prompt], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = len(completion_ids)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completion_ids.unsqueeze(0)], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in {"token_type_ids", "mm_token_type_ids"} & inputs.keys():
        inputs[name] = pad(inputs[name], (0, length))
    output = model(**inputs, output_hidden_states=True)
    return output.hidden_states[-1][0, -length - 1 : -1], output.logits[0, -length - 1 : -1]


class Watch:
    """Compares the log-probs that each loss and each round has computed with those of each rollout alone."""

    def __init__(self, monkeypatch):
        self.examples, self.rounds, self.losses, self.seen = {}, 0, 0, set()
        score, weigh = Scoring.score, WeightStage.apply

        def watched_score(scoring, generate, inputs):
            scored = score(scoring, generate, inputs)
            self.rounds += 1
            self.examples |= dict(zip(scored.group_ids.tolist(), scored.examples, strict=True))
            return scored

        def watched_weigh(stage, inputs, logps, is_measured):
            self.losses += 1
            self.compare(stage.trainer, inputs, logps.detach())
            return weigh(stage, inputs, logps, is_measured)

        monkeypatch.setattr(Scoring, "score", watched_score)
        monkeypatch.setattr(WeightStage, "apply", watched_weigh)

    def compare(self, trainer, inputs, logps):
        self.seen |= set(inputs["group_ids"].tolist())
        for row, group in enumerate(inputs["group_ids"].tolist()):
            mask = inputs["completion_mask"][row].bool()
            completion_ids = inputs["completion_ids"][row][mask]
            _, logits = pass_alone(trainer.model, trainer.processing_class, self.examples[group], completion_ids)
            expected = logits.log_softmax(-1).gather(1, completion_ids.unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(logps[row][mask], expected, rtol=1e-3, atol=1e-4)
            if "old_per_token_logps" in inputs and not trainer.args.learning_rate:
                torch.testing.assert_close(inputs["old_per_token_logps"][row][mask], expected, rtol=1e-3, atol=1e-4)


class AloneWatch(CreditWatch):
    """Compares token credits with those from passes over each rollout alone."""

    def pass_over(self, rollouts):
        model, processor = self.trainer.model, self.trainer.processing_class
        found = [
            pass_alone(model, processor, example, ids[mask.bool()])
            for example, ids, mask in zip(rollouts.examples, rollouts.completion_ids, rollouts.mask, strict=True)
        ]
        return tuple(
            torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True).double() for part in zip(*found, strict=True)
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_images_matter(family):
    """Otherwise nothing here would tell whose images a rollout has been given."""
    model, processor = build(family)
    rows = [{**MANY[0], "images": example["images"][:1]} for example in MANY.take(4)]
    logits = [pass_alone(model, processor, row, torch.arange(4))[1] for row in rows]
    assert min((first - second).abs().max() for first, second in pairwise(logits)) > 0.1


@pytest.mark.parametrize(
    ("family", "settings"),
    [*((family, {}) for family in FAMILIES), ("qwen", {"beta": 0.1, "num_iterations": 2, "arguments": LORA})],
)
def test_off_is_off(family, settings):
    theirs = run(family, trl.GRPOTrainer, **settings)
    ours = run(family, query_preserved=False, cancellation_metrics=False, **settings)
    assert ours.logs == theirs.logs
    assert_same_weights(ours.weights, theirs.weights)


@pytest.mark.parametrize("family", TWO_AND_ALL)
def test_images_stay_with_their_rollouts(monkeypatch, family):
    watch = Watch(monkeypatch)
    run(family)
    assert watch.losses == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"symmetric_clip": True, "num_iterations": 2},
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 8,
            "arguments": LORA,
            "beta": 0.05,
            "use_bias_correction_kl": False,
        },
    ],
    ids=["in the loss", "ahead"],
)
@pytest.mark.parametrize("family", ONE_AND_ALL)
def test_images_stay_with_weighted_groups(monkeypatch, family, settings):
    watch = Watch(monkeypatch)
    run(family, **SEQUENCE, group_weights="min", **settings)
    assert watch.losses == 4 * settings.get("gradient_accumulation_steps", 1)


@pytest.mark.parametrize("family", TWO_AND_ALL)
def test_rounds_of_other_images(monkeypatch, family):
    """One small image, then none, then many; each prompt in its round has images or none does, as TRL wants it."""
    watch = Watch(monkeypatch)
    text = [] if family == "idefics" else [load_pictures((0,))]
    draw_from(monkeypatch, load_pictures(sizes=(8,)), *text, load_pictures((4,)), load_pictures((2,)))
    run(family, **ROUNDS, learning_rate=0.0, arguments={"reward_funcs": reward_of_first})
    assert watch.rounds == 4
    assert watch.losses == 4
    assert {group // 4 for group in watch.seen} == {0, 1, 2, 3}, "some groups of each round"


def test_rounds_with_and_without_images_may_not_fit(monkeypatch):
    """Where a processor pads the images of a batch to one number."""
    draw_from(monkeypatch, *[load_pictures((0,))] * 3)
    with pytest.raises(
        ValueError, match=r"Only some rounds of generation have pixel_values.* Give all prompts images"
    ):
        run("idefics", **ROUNDS, arguments={"reward_funcs": reward_of_first})


@pytest.mark.parametrize(
    ("method", "expected", "settings"),
    [
        (NTHR, nthr_expected, {**ROUNDS, "state_cache_gib": 0.0, "max_steps": 8}),
        (DELTA, delta_expected, {**ROUNDS, "max_steps": 8}),
        (NTHR, nthr_expected, {**SETTINGS, **ON_POLICY, "per_device_train_batch_size": 8, "arguments": LORA}),
        (
            DELTA,
            delta_expected,
            {**SETTINGS, "gradient_accumulation_steps": 4, "state_cache_gib": 0.0, "max_steps": 2},
        ),
    ],
    ids=["nthr", "delta", "nthr in the loss", "delta in a pass of its own"],
)
@pytest.mark.parametrize("family", ONE_AND_ALL)
def test_states_are_those_of_prompts_with_images(monkeypatch, family, method, expected, settings):
    watch = AloneWatch(monkeypatch, expected)
    settings = {**settings, **method}
    reward = {"reward_funcs": reward_of_first} if "filter_zero_variance" in settings else {}
    draw_from(monkeypatch, *[load_pictures((1,), sizes=(8,)), load_pictures((4,))] * 4)
    model, arguments = arguments_of(family, **reward, **settings.pop("arguments", {}))
    watch.train(model, **settings, arguments=arguments)
