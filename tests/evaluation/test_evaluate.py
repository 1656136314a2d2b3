"""Answers, the file of them, and what they come to."""

import json
import sys
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from tests.runs import load
from trl_cancel.evaluation import (
    ContinuousEngine,
    EvaluationSettings,
    SampleLog,
    TransformersEngine,
    VllmEngine,
    answer_problems,
    evaluate,
    math_verify_reward,
    mean_with_interval,
    summarize,
)
from trl_cancel.evaluation.engines import Request, SeededChoice, seed_of, warpers
from trl_cancel.evaluation.models import load_end_tokens, load_tokenizer
from trl_cancel.playground import CHECKPOINT
from trl_cancel.playground.data import load_prompts
from trl_cancel.playground.reward import answer_reward


# What a model may ask for itself.
OWN = {
    "num_beams": 2,
    "min_length": 200,
    "min_new_tokens": 6,
    "suppress_tokens": list(range(3, 20)),
    "sequence_bias": [[[5], 20.0]],
    "forced_eos_token_id": 2,
    "exponential_decay_length_penalty": (1, 5.0),
    "encoder_no_repeat_ngram_size": 1,
    "return_dict_in_generate": True,
    "stop_strings": ["1"],
}
SHORT = EvaluationSettings(num_samples=3, max_completion_length=8, score_truncated=True)


def even(completion_ids, **_):
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return load(tiny_model), AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def problems():
    return load_prompts("test", 7)


def answers(tiny, problems, settings=SHORT, reward=even, batch_size=4, log=None):
    return answer_problems(TransformersEngine(*tiny, batch_size), problems, reward, settings, log=log)


# Drawing tokens


def test_tokens_are_drawn_from_the_distribution():
    """Each row by its own uniform number: the token where the cumulative probability exceeds it."""
    torch.manual_seed(0)
    scores = torch.randn(50).masked_fill(torch.rand(50) < 0.4, -torch.inf)
    seeds = list(range(20_000))
    choice = SeededChoice(seeds, prompt_length=3, max_new_tokens=2)
    chosen = choice(torch.zeros(len(seeds), 4), scores.expand(len(seeds), -1)).argmax(1)
    frequencies = torch.bincount(chosen, minlength=50) / len(seeds)
    expected = scores.double().softmax(0)
    torch.testing.assert_close(frequencies.double(), expected, rtol=0, atol=0.01)
    assert (frequencies[expected == 0] == 0).all()
    uniform = torch.rand(2, generator=torch.Generator().manual_seed(7))[1].double()
    assert chosen[7] == (expected.cumsum(0) > uniform).nonzero()[0]


def test_the_last_possible_token_is_one_that_has_probability():
    """Where rounding takes the uniform number up to the sum of all probabilities."""
    choice = SeededChoice([0], 0, 1)
    choice.uniform = torch.ones(1, 1)
    assert choice(torch.zeros(1, 0), torch.tensor([[0.0, 1.0, -torch.inf]])).argmax() == 1


@pytest.mark.parametrize(("uniform", "chosen"), [(0.0, 1), (0.25, 3), (0.5, 4)])
def test_a_token_without_probability_is_never_drawn(uniform, chosen):
    """Not where the uniform number equals a cumulative probability either."""
    choice = SeededChoice([0], 0, 1)
    choice.uniform = torch.tensor([[uniform]])
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.25, 0.5, 0.0]])
    assert choice(torch.zeros(1, 0), probabilities.log()).argmax() == chosen


def test_settings_shape_the_distribution():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    settings = EvaluationSettings(temperature=0.5, top_k=3, top_p=0.9)
    probabilities = (scores / 0.5).softmax(1)
    kept = torch.tensor([[True, True, False, False]])  # 0.867 and 0.117: the second reaches 0.9
    expected = probabilities * kept / (probabilities * kept).sum()
    torch.testing.assert_close(warpers(settings)(None, scores).softmax(1), expected)
    assert warpers(EvaluationSettings()) == []


def test_answers_do_not_depend_on_their_batch(tiny, problems):
    alone, together = (answers(tiny, problems, batch_size=size) for size in (1, 21))
    assert [sample["completion"] for sample in alone] == [sample["completion"] for sample in together]
    assert len({sample["completion"] for sample in alone}) > len(problems)
    other = answers(tiny, problems, EvaluationSettings(**{**vars(SHORT), "seed": 1}))
    assert [sample["completion"] for sample in other if sample["sample"] is not None] != [
        sample["completion"] for sample in alone if sample["sample"] is not None
    ]


def test_seeds_are_distinct():
    assert len({seed_of(seed, p, s) for seed in range(3) for p in range(50) for s in range(20)}) == 3000


def test_greedy_answers_are_the_models_own(tiny, problems):
    model, tokenizer = tiny
    found = answers(tiny, problems, EvaluationSettings(num_samples=0, max_completion_length=8, score_truncated=True))
    for row, sample in zip(problems, found, strict=True):
        text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        ids = output[0, inputs["input_ids"].size(1) :]
        assert sample["completion"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert (sample["tokens"], sample["seed"], sample["sample"]) == (len(ids), None, None)
        assert sample["finish_reason"] == ("stop" if ids[-1] == tokenizer.eos_token_id else "length")


def test_a_models_own_generation_config_does_not_count(tiny_model, problems):
    """Qwen2.5 penalises repetitions, Qwen3 wants top-k 20: what was asked for here counts."""
    model, tokenizer = load(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    before = answers((model, tokenizer), problems)
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k, config.repetition_penalty = True, 0.3, 2, 1.8
    assert answers((model, tokenizer), problems) == before
    adapted = get_peft_model(model, LoraConfig(r=2))  # which does nothing yet, and hands the config on
    for name, value in OWN.items():
        model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, **{name: value})
        own = model.generation_config
        assert answers((model, tokenizer), problems) == before, name
        assert answers((adapted, tokenizer), problems) == before, name
        assert model.generation_config is adapted.generation_config is own


def test_the_callers_state_stays(tiny, problems):
    model, _ = tiny
    model.train()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    answers(tiny, problems)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    model.eval()


@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_and_nf4(tmp_path, problems, quantized):
    """Answers are those of the adapter, with its dropout off; a 4-bit model still trains afterwards."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, dtype=torch.float32, quantization_config=config if quantized else None
    )
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    settings = EvaluationSettings(num_samples=0, max_completion_length=12, score_truncated=True)
    before = answers((model, tokenizer), problems, settings)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=64, lora_dropout=0.5, init_lora_weights=False)).train()
    first, second = (answers((adapted, tokenizer), problems, settings) for _ in range(2))
    assert first == second
    assert first != before
    adapted(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(weight.grad is not None for weight in adapted.parameters() if weight.requires_grad)


# What they come to


def test_estimates(tiny, problems):
    found = answers(tiny, problems)
    evaluation = summarize(found, len(problems), SHORT, "set", step=5)
    by_problem = torch.tensor(
        [[s["reward"] for s in found if s["problem"] == p and s["sample"] is not None] for p in range(7)]
    )
    greedy = torch.tensor(
        [[s["reward"] for s in found if s["problem"] == p and s["sample"] is None] for p in range(7)]
    )
    assert evaluation.metrics["greedy"] == mean_with_interval(greedy)
    assert evaluation.metrics["avg@3"][0] == pytest.approx(by_problem.mean().item())
    assert evaluation.metrics["pass@3"][0] == pytest.approx(by_problem.any(1).double().mean().item())
    assert list(evaluation.metrics) == ["greedy", "avg@3", "pass@1", "pass@2", "pass@3", "truncated"]
    assert (evaluation.name, evaluation.problems, evaluation.step) == ("set", 7, 5)
    assert evaluation.settings["num_samples"] == 3
    again = evaluate(TransformersEngine(*tiny, 4), problems, even, SHORT, name="set", step=5)
    assert again == evaluation


def test_a_right_answer_is_one_from_the_threshold_on(tiny, problems):
    def half(completions, **_):
        return [0.5] * len(completions)

    for threshold, expected in ((0.5, 1.0), (1.0, 0.0)):
        settings = EvaluationSettings(**{**vars(SHORT), "pass_threshold": threshold})
        metrics = evaluate(TransformersEngine(*tiny), problems, half, settings, name="set").metrics
        assert metrics["pass@2"] == (expected,) * 3
        assert metrics["avg@3"] == (0.5,) * 3


def test_answers_that_were_cut_off_are_wrong_and_counted(tiny, problems):
    def right(completions, **_):
        return [1.0] * len(completions)

    scored = answers(tiny, problems, reward=right)
    strict = answers(tiny, problems, EvaluationSettings(num_samples=3, max_completion_length=8), right)
    cut = [sample["finish_reason"] == "length" for sample in scored]
    assert 0 < sum(cut) < len(cut)
    assert [sample["reward"] for sample in scored] == [1.0] * len(cut)
    assert [sample["reward"] for sample in strict] == [float(not was) for was in cut]
    evaluation = summarize(strict, 7, SHORT, "set")
    assert evaluation.metrics["truncated"][0] == pytest.approx(sum(cut) / len(cut))


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_what_is_cut_off_or_without_a_reward_is_wrong_whatever_the_threshold(threshold):
    samples = [
        {"problem": problem, "sample": 0, "reward": reward, "finish_reason": reason}
        for problem, (reward, reason) in enumerate([(None, "stop"), (0.0, "length"), (threshold, "stop")])
    ]
    for scored, passed in ((False, 1), (True, 2)):
        settings = EvaluationSettings(
            num_samples=1, greedy=False, pass_threshold=threshold, score_truncated=scored, max_completion_length=8
        )
        assert summarize(samples, 3, settings, "set").metrics["pass@1"][0] == pytest.approx(passed / 3)


def test_answers_that_were_cut_off_get_no_more_than_they_earn(tiny, problems):
    """Being cut off must not pay where wrong answers cost something."""
    found = answers(
        tiny,
        problems,
        EvaluationSettings(num_samples=3, max_completion_length=8),
        lambda completions, **_: [-1.0] * len(completions),
    )
    assert {sample["finish_reason"] for sample in found} == {"stop", "length"}
    assert {sample["reward"] for sample in found} == {-1.0}


def test_a_reward_that_is_none_counts_as_wrong(tiny, problems):
    def none(completions, **_):
        return [None] + [1.0] * (len(completions) - 1)

    found = answers(tiny, problems, reward=none, batch_size=4)
    missing = sum(sample["reward"] is None for sample in found)
    assert missing == 8  # one a batch: 7 greedy answers and 21 sampled ones in batches of four
    total = sum(summarize(found, 7, SHORT, "set").metrics[name][0] * n for name, n in (("greedy", 7), ("avg@3", 21)))
    assert total == pytest.approx(28 - missing)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda completions, **_: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda completions, **_: [float("nan")] * len(completions), "returned nan"),
        (lambda completions, **_: [1.0], "returned 1 rewards for 4 completions"),
    ],
)
def test_broken_rewards(tiny, problems, reward, said):
    with pytest.raises(ValueError, match=said):
        answers(tiny, problems, reward=reward)


def test_no_problems(tiny, problems):
    with pytest.raises(ValueError, match="no problems to answer"):
        answers(tiny, problems.select([]))


def test_no_token_that_ends_an_answer(tiny_model, problems):
    model, tokenizer = load(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    model.generation_config.eos_token_id = tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(ValueError, match="No token ends an answer"):
        answers((model, tokenizer), problems)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_samples": -1}, "num_samples=-1: must be at least 0"),
        ({"max_completion_length": 0}, "max_completion_length=0: must be at least 1"),
        ({"num_samples": 0, "greedy": False}, "nothing to evaluate"),
        ({"temperature": 0.0}, "temperature=0.0: must be positive"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"num_samples": 2.5}, "num_samples=2.5: must be a whole number"),
        ({"num_samples": True}, "num_samples=True: must be a whole number"),
        ({"max_completion_length": 8.0}, "max_completion_length=8.0: must be a whole number"),
        ({"seed": None}, "seed=None: must be a whole number"),
        ({"pass_at_k": (2.0,)}, "pass_at_k=2.0: must be a whole number"),
        ({"pass_threshold": float("nan")}, "pass_threshold=nan: must be a finite number"),
        ({"num_samples": 4, "pass_at_k": (2, 5)}, "pass_at_k=5: must be between 1 and num_samples=4"),
    ],
)
def test_settings_that_make_no_sense(settings, said):
    with pytest.raises(ValueError, match=said):
        EvaluationSettings(**settings)


def test_default_tries():
    assert EvaluationSettings(num_samples=12).tries == [1, 2, 4, 8, 12]
    assert EvaluationSettings(num_samples=0).tries == []
    assert EvaluationSettings(num_samples=4, pass_at_k=(4, 3)).tries == [3, 4]


# The file


class Interrupted(Exception):
    """In the place of a cut power line."""


@pytest.mark.parametrize("stop_after", [1, 2, 5])
@pytest.mark.parametrize("torn", [0, 40])
def test_an_interrupted_evaluation_ends_with_the_file_of_an_uninterrupted_one(
    tiny, problems, tmp_path, stop_after, torn
):
    whole = SampleLog(tmp_path / "whole", {"seed": 0})
    expected = answers(tiny, problems, log=whole)
    calls = []

    def until_then(**columns):
        calls.append(1)
        if len(calls) > stop_after:
            raise Interrupted
        return even(**columns)

    def once_more(**columns):
        calls.append(1)
        return even(**columns)

    part = SampleLog(tmp_path / "part", {"seed": 0})
    with pytest.raises(ValueError, match="Interrupted"):
        answers(tiny, problems, reward=until_then, log=part)
    size = part.path.stat().st_size
    with open(part.path, "r+b") as file:
        file.truncate(size - torn)  # in the middle of its last line
    calls.clear()
    found = answers(tiny, problems, reward=once_more, log=SampleLog(tmp_path / "part", {"seed": 0}))
    assert found == expected
    assert part.path.read_bytes() == whole.path.read_bytes()
    assert len(calls) == 8 - stop_after + (torn > 0)  # batches: only what is missing is generated
    calls.clear()
    assert answers(tiny, problems, reward=once_more, log=SampleLog(tmp_path / "part", {"seed": 0})) == expected
    assert not calls


def test_samples_say_everything(tiny, problems, tmp_path):
    log = SampleLog(tmp_path, {"temperature": 1.0})
    found = answers(tiny, problems, log=log)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert sorted(map(json.dumps, lines)) == sorted(map(json.dumps, found))
    fields = {"problem", "sample", "seed", "reward", "finish_reason", "tokens", "prompt", "completion"}
    assert all(set(line) == fields for line in lines)
    assert lines[0]["prompt"] == problems[lines[0]["problem"]]["prompt"]


def test_other_settings_are_named(tmp_path):
    SampleLog(tmp_path, {"temperature": 0.5})  # without samples
    SampleLog(tmp_path, {"temperature": 1.0, "top_k": 0}).append([{"problem": 0, "sample": 0}])
    assert SampleLog(tmp_path, {"temperature": 1.0, "top_k": 0}).samples == [{"problem": 0, "sample": 0}]
    with pytest.raises(ValueError, match=r"with top_k=0, and this one has top_k=20"):
        SampleLog(tmp_path, {"temperature": 1.0, "top_k": 20})
    with pytest.raises(ValueError, match=r"with min_p=None, and this one has min_p=0.1"):
        SampleLog(tmp_path, {"temperature": 1.0, "top_k": 0, "min_p": 0.1})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"no settings.json"):
        SampleLog(tmp_path, {})


@pytest.mark.parametrize("damaged", ['{"temperature": 1', "[]", "\0\0"])
def test_damaged_settings_are_named(tmp_path, damaged):
    SampleLog(tmp_path, {"temperature": 1.0}).append([{"problem": 0, "sample": 0}])
    (tmp_path / "settings.json").write_text(damaged)
    with pytest.raises(ValueError, match=r"settings.json: these are no settings \("):
        SampleLog(tmp_path, {"temperature": 1.0})


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\r", "\r\n", "\n"])
def test_answers_may_hold_any_end_of_a_line(tmp_path, end):
    samples = [{"problem": number, "sample": None, "completion": f"one{end}two"} for number in range(2)]
    SampleLog(tmp_path, {}).append(samples)
    assert SampleLog(tmp_path, {}).samples == samples


@pytest.mark.parametrize("broken", [b'{"problem": 1, "sam', b"\0" * 20, b"\xff", b"7", b"{}"])
def test_a_broken_line_is_named(tmp_path, broken):
    log = SampleLog(tmp_path, {})
    log.append([{"problem": number, "sample": None} for number in range(3)])
    lines = log.path.read_bytes().split(b"\n")
    log.path.write_bytes(b"\n".join([lines[0], broken, *lines[2:]]))
    with pytest.raises(ValueError, match=r"samples.jsonl, line 2: this is no sample"):
        SampleLog(tmp_path, {})


# The judge


@pytest.mark.parametrize(
    ("solution", "answer", "reward"),
    [
        ("42", "So \\boxed{42}.", 1),
        (204, "\\boxed{204}", 1),
        ("\\frac{1}{3}", "\\boxed{1/3}", 1),
        ("$\\frac{1}{3}$", "\\boxed{0.3333}", 0),
        ("p - q", "\\boxed{p-q}", 1),
        ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", 1),
        (["$2$", "$3$"], "\\boxed{2, 3}", 1),
        (["$2$", "$3$"], "\\boxed{2}", 0),
        ("Twice the half is \\boxed{7}.", "\\boxed{7}", 1),
        ("42", "The answer is 42.", 0),  # no box
        ("42", "First I add \\boxed{", 0),
        ("42", "", 0),
        ("", "\\boxed{42}", None),  # nothing to compare with
    ],
)
def test_math_verify(solution, answer, reward):
    assert math_verify_reward([answer], [solution]) == [reward]
    assert math_verify_reward([[{"role": "assistant", "content": answer}]], [solution]) == [reward]


def test_a_judge_that_fails_says_so(monkeypatch):
    def fail(*_, **__):
        raise RecursionError

    monkeypatch.setattr("trl_cancel.evaluation.rewards.accuracy_reward", fail)
    assert math_verify_reward(["\\boxed{1}"], ["1"]) == [None]


@pytest.mark.slow  # on a CPU it is many times slower than plain batches
def test_continuous_batching(tiny, problems):
    """Greedy answers are those of plain batches; sampled ones are others, which the seed decides."""
    model, tokenizer = tiny
    state = torch.get_rng_state()
    settings = EvaluationSettings(num_samples=1, max_completion_length=4, score_truncated=True)
    expected = answers(tiny, problems.select(range(3)), settings)
    first, second = (
        answer_problems(
            ContinuousEngine(model, tokenizer, num_blocks=8, max_batch_tokens=256),
            problems.select(range(3)),
            even,
            settings,
        )
        for _ in range(2)
    )
    assert first == second
    assert [s for s in first if s["sample"] is None] == [s for s in expected if s["sample"] is None]
    assert [(s["problem"], s["seed"]) for s in first] == [(s["problem"], s["seed"]) for s in expected]
    assert torch.equal(torch.get_rng_state(), state)


def test_vllm_gets_the_revision_of_an_adapter(monkeypatch):
    """On stand-ins: what is asked of the Hub and of vLLM."""
    made, asked = [], []
    vllm, request = ModuleType("vllm"), ModuleType("vllm.lora.request")
    vllm.LLM = lambda **arguments: made.append(arguments)
    request.LoRARequest = lambda name, number, folder: folder
    for module in (vllm, ModuleType("vllm.lora"), request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda path, revision=None: asked.append((path, revision)) or "folder"
    )
    of_adapter = VllmEngine("my/adapter", None, base="my/base", revision="v1", base_revision="v0")
    assert of_adapter.adapter == "folder"
    VllmEngine("my/model", None, revision="v2")
    assert asked == [("my/adapter", "v1")]
    assert made[0] == {"model": "my/base", "revision": "v0", "enable_lora": True, "max_lora_rank": 16}
    assert made[1] == {"model": "my/model", "revision": "v2"}


def test_the_base_model_of_an_adapter_has_its_own_revision(tiny, tmp_path, monkeypatch):
    """What is read of it is asked for at the revision that the adapter names, not at the newest."""
    LoraConfig(base_model_name_or_path="my/base", revision="v0").save_pretrained(tmp_path)
    asked = []

    def asked_for(found):
        def from_pretrained(path, revision=None, **_):
            asked.append((path, revision))
            if path != "my/base":
                raise OSError("The adapter brings none.")
            return found

        return from_pretrained

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", asked_for(tiny[1]))
    monkeypatch.setattr(GenerationConfig, "from_pretrained", asked_for(GenerationConfig(eos_token_id=5)))
    tokenizer = load_tokenizer(str(tmp_path), "v1")
    assert tokenizer is tiny[1]
    assert load_end_tokens(str(tmp_path), tokenizer, "v1") == [tokenizer.eos_token_id, 5]
    assert asked == [(str(tmp_path), "v1"), ("my/base", "v0"), ("my/base", "v0")]


# The embedded model


def test_playground(problems):
    engine = TransformersEngine(load(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT), 128)
    settings = EvaluationSettings(num_samples=4, max_completion_length=64)
    evaluation = evaluate(engine, load_prompts("test", 64), answer_reward, settings, name="playground")
    _, low, high = evaluation.metrics["avg@4"]
    assert low < 0.4 < high
    assert evaluation.metrics["greedy"][0] > 0.6
    assert evaluation.metrics["truncated"][0] < 0.02


def test_text_prompts(tiny):
    problems = Dataset.from_dict({"prompt": ["Compute 1+1.\n", "Compute 2+2+2+2.\n"]})
    found = answers(tiny, problems)
    assert [sample["prompt"] for sample in found] == [row["prompt"] for row in problems for _ in range(4)]
    assert all(isinstance(sample["completion"], str) for sample in found)


def test_requests_are_greedy_or_sampled(tiny):
    """A seed makes an answer a sampled one."""
    engine = TransformersEngine(*tiny)
    settings = EvaluationSettings(temperature=5.0, max_completion_length=8)
    greedy, sampled = ([Request([5, 6, 7], seed)] * 2 for seed in (None, 3))
    first, second = engine.generate(greedy, settings)
    assert first == second
    assert engine.generate(sampled, settings)[0] != first
