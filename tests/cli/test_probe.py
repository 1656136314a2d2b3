"""`trl-cancel probe`: what it measures and writes, that a browser shows it, and its errors."""

import json
import math
from decimal import Decimal
from functools import partial

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.cli.test_cli import flags
from tests.diagnostics.test_page import BROWSER, Elements, in_browser
from trl_cancel.cli import main
from trl_cancel.cli import probe as probing_command
from trl_cancel.cli.probe import MEASUREMENTS as NAMES
from trl_cancel.cli.probing import ProbeArguments, load_model
from trl_cancel.cli.settings import Parser
from trl_cancel.diagnostics.probing import measurements
from trl_cancel.diagnostics.probing.masking import masking_effects
from trl_cancel.diagnostics.probing.report import SECTIONS
from trl_cancel.playground import CHECKPOINT


QUICK = {
    "model_name_or_path": "playground",
    "dataset_name": "playground",
    "num_generations": 8,
    "max_completion_length": 64,
    "learning_rate": 3e-4,
    "disable_tqdm": True,
    "probe_prompts": 6,
    "probe_batch_size": 16,
}
FIGURES = ("flipping", "coupling", "displacement", "energy", "residual", "values")


def probe(name, folder, **settings):
    return main(["probe", name, *flags(**{**QUICK, "probe_output": folder, **settings})])


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All measurements, once, and of few tokens."""
    folder = tmp_path_factory.mktemp("probe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurements, "masking_effects", partial(masking_effects, num_candidates=12))
        few = partial(measurements.measure_values, num_tokens=8, num_continuations=4)
        patch.setitem(measurements.MEASUREMENTS, "values", few)
        assert probe("all", folder) == 0
    return folder


def test_one_list_of_measurements():
    assert tuple(measurements.MEASUREMENTS) == NAMES == tuple(SECTIONS)


def test_numbers(everything):
    results = json.loads((everything / "probe.json").read_text())
    assert results["facts"]["prompts a seed"] == 6
    (seed,) = results["seeds"]
    assert set(NAMES) < set(seed)
    variants = seed["shifts"]["variants"]
    assert set(variants) > {"grpo", "positive_only", "negative_only", "nthr", "nthr_random", "delta", "dfpo"}
    for of_variant in variants.values():
        for ratios in (of_variant["positive"], of_variant["negative"], of_variant["all"]):
            assert ratios["boosted"] + ratios["suppressed"] + ratios["stable"] == pytest.approx(1)
    assert variants["grpo"] == variants["dfpo"]  # on policy
    assert seed["coupling"]["predicted_and_head"]["correlation"] > 0.99
    assert seed["coupling"]["pairs"][0]["mean_magnitude"] > seed["coupling"]["pairs"][3]["mean_magnitude"]
    assert sum(kind["share_of_coupling"] for kind in seed["coupling"]["pairs"]) == pytest.approx(1)
    assert seed["prompts_with_both_signs"] == len(seed["displacement"]["prompts"])
    assert all(math.isfinite(prompt["gwhes"]) for prompt in seed["displacement"]["prompts"])
    for of_variant in seed["energy"]["variants"].values():
        assert sum(of_variant["energy"]) == pytest.approx(1)
    assert len(seed["residual"]["runs"]["grpo"]["residual"]) == 8
    assert seed["residual"]["runs"]["grpo-fix"]["mean_residual"] < 1e-6
    assert seed["residual"]["runs"]["grpo, shuffled"]["mean_residual"] > 0.1
    kinds = [token["kind"] for token in seed["values"]["tokens"]]
    assert kinds.count("boosted") == kinds.count("suppressed") > 0
    assert seed["coefficients"]["delta"]["highest"][0]["mean"] >= seed["coefficients"]["delta"]["lowest"][0]["mean"]
    for responses in (seed["shifts"]["responses"], seed["coefficients"]["responses"]):
        assert {response["advantage"] > 0 for response in responses} == {True, False}


def test_page(everything):
    assert sorted(file.stem for file in everything.glob("*.png")) == sorted(FIGURES)
    elements = Elements((everything / "index.html").read_text())
    assert [tag for tag, _ in elements.tags].count("svg") == len(FIGURES)
    headings = [tag for tag, _ in elements.tags if tag == "h2"]
    assert len(headings) == len(NAMES)
    assert not [link for link in elements.attributes("src") if "://" in link]
    for expected in ("66.2%", "74.1%"):  # the paper's table beside ours
        assert expected in elements.texts


@pytest.mark.skipif(not BROWSER, reason="no Chromium to look at the page with")
@pytest.mark.parametrize("width", [360, 1200])
def test_page_in_a_browser(everything, tmp_path, width):
    source = (everything / "index.html").read_text()
    light, dark = (in_browser(source, tmp_path, width, scheme) for scheme in ("light", "dark"))
    for seen in (light, dark):
        assert seen["content"] <= seen["width"] == width
        assert seen["loaded"] == []
    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(17, 17, 17)")
    assert light["ink"] != dark["ink"]


@pytest.mark.slow
def test_seeds_have_prompts_of_their_own(tmp_path):
    assert probe("displacement", tmp_path, probe_seeds=2, probe_prompts=3) == 0
    first, second = json.loads((tmp_path / "probe.json").read_text())["seeds"]
    prompts = [{prompt["prompt"] for prompt in seed["displacement"]["prompts"]} for seed in (first, second)]
    assert prompts[0]
    assert not prompts[0] & prompts[1]
    assert "shifts" not in first
    assert [file.stem for file in tmp_path.glob("*.png")] == ["displacement"]


@pytest.mark.slow
def test_twice_the_same(tmp_path):
    for folder in ("a", "b"):
        assert probe("shifts", tmp_path / folder, probe_prompts=3) == 0
    for name in ("probe.json", "index.html"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


def test_the_model_is_left_alone(tmp_path):
    before = AutoModelForCausalLM.from_pretrained(CHECKPOINT).state_dict()
    assert probe("energy", tmp_path / "out", probe_prompts=4) == 0
    after = AutoModelForCausalLM.from_pretrained(CHECKPOINT).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_an_adapter(tmp_path, capsys):
    """A saved adapter is probed in its own weights."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, base_model_name_or_path=str(CHECKPOINT))
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    settings = {"model_name_or_path": tmp_path / "adapter", "temperature": 0.5}  # with the tokenizer of its base
    assert probe("shifts", tmp_path / "out", **settings) == 0
    assert probe("shifts", tmp_path / "out", **settings, use_peft=True) == 2
    assert "is an adapter already" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert results["seeds"][0]["trained_parameters"] == sum(
        parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name
    )


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_new_adapter(tmp_path, load_in_4bit):
    assert probe("shifts", tmp_path, use_peft=True, load_in_4bit=load_in_4bit, probe_prompts=3) == 0
    (seed,) = json.loads((tmp_path / "probe.json").read_text())["seeds"]
    assert seed["shifts"]["variants"]["grpo, AdamW"]["all"]["mean_magnitude"] > 1e-6


def fails(subject):
    raise ValueError("nothing <b>there</b>")


def test_what_cannot_be_measured_is_noted(tmp_path, monkeypatch, capsys):
    """The rest is measured."""
    monkeypatch.setattr(probing_command, "MEASUREMENTS", ("energy", "values"))
    monkeypatch.setitem(measurements.MEASUREMENTS, "energy", fails)
    monkeypatch.setitem(measurements.MEASUREMENTS, "values", partial(measurements.measure_values, num_tokens=2))
    assert probe("all", tmp_path) == 0
    (seed,) = json.loads((tmp_path / "probe.json").read_text())["seeds"]
    assert seed["energy"] == {"not_measured": "nothing <b>there</b>"}
    assert seed["values"]["tokens"]
    assert "energy: not measured: nothing" in capsys.readouterr().out
    assert "nothing &lt;b&gt;there" in (tmp_path / "index.html").read_text()
    assert probe("energy", tmp_path / "alone") == 2
    assert "nothing <b>there</b>" in capsys.readouterr().err


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch):
    def interrupted(subject):
        raise KeyboardInterrupt

    monkeypatch.setattr(probing_command, "MEASUREMENTS", ("energy", "values"))
    monkeypatch.setitem(measurements.MEASUREMENTS, "values", interrupted)
    assert probe("all", tmp_path) == 130
    (seed,) = json.loads((tmp_path / "probe.json").read_text())["seeds"]
    assert seed["energy"]["variants"]
    assert (tmp_path / "energy.png").exists()


def half(completion_ids, **columns):
    return [0.5 * (len(set(ids)) % 2) for ids in completion_ids]


def constant(completion_ids, **columns):
    return [0.1] * len(completion_ids)


async def half_later(completion_ids, **columns):
    return [Decimal(value) for value in half(completion_ids, **columns)]


def test_several_rewards_are_added_up(tmp_path):
    rewards = ["tests.cli.test_probe.half_later", "trl_cancel.playground.reward.answer_reward"]
    means = []
    for functions, weights in ((rewards[:1], [1.0]), (rewards[1:], [1.0]), (rewards, [4.0, 0.5])):
        arguments = ["--reward_funcs", *functions, "--reward_weights", *map(str, weights)]
        settings = {**QUICK, "probe_output": tmp_path, "probe_prompts": 4}
        assert main(["probe", "energy", *flags(**settings), *arguments]) == 0
        means.append(json.loads((tmp_path / "probe.json").read_text())["seeds"][0]["mean_reward"])
    assert means[2] == pytest.approx(4 * means[0] + 0.5 * means[1])


def test_a_seed_without_mixed_rewards_is_noted(tmp_path, capsys, monkeypatch):
    from trl_cancel.cli import probing

    sample, seeds = probing.sample_rollouts, []

    def sampled(model, tokenizer, rows, reward, **settings):
        seeds.append(settings["seed"])
        return sample(model, tokenizer, rows, constant if len(seeds) == 1 else reward, **settings)

    monkeypatch.setattr(probing, "sample_rollouts", sampled)
    assert probe("energy", tmp_path, probe_seeds=2) == 0
    first, second = json.loads((tmp_path / "probe.json").read_text())["seeds"]
    assert "equal rewards" in first["not_measured"]
    assert second["energy"]
    assert "equal rewards" in (tmp_path / "index.html").read_text()
    assert "not measured: All 8 rollouts" in capsys.readouterr().out


MISTAKES = {
    "no measurement": ([], "name a measurement first: all, shifts"),
    "unknown": (["shift"], "'shift' is not a measurement; use all, shifts"),
    "no model": (["shifts", "--dataset_name", "playground"], "model_name_or_path is missing"),
    "no data": (["shifts", "--model_name_or_path", "playground"], "dataset_name is missing"),
    "prompts": (["shifts", *flags(**QUICK, probe_seeds=2000)], "probe_prompts=6 with probe_seeds=2000 needs 12000"),
    "none": (["shifts", *flags(**{**QUICK, "probe_prompts": 0})], "probe_prompts=0: must be at least 1"),
    "rate": (["shifts", *flags(**QUICK, probe_learning_rate=-1)], "probe_learning_rate=-1.0: must be positive"),
    "threshold": (["shifts", *flags(**QUICK, probe_threshold=-1)], "probe_threshold=-1.0: must not be negative"),
    "setting": (
        ["shifts", *flags(**QUICK, probe_prompt=3)],
        "probe_prompt: unknown setting; did you mean probe_prompts",
    ),
    "group": (["shifts", *flags(**{**QUICK, "num_generations": 1})], "num_generations"),
    "length": (["shifts", *flags(**{**QUICK, "max_completion_length": 1})], "equal rewards"),
    "constant": (["shifts", *flags(**QUICK, reward_funcs="tests.cli.test_probe.constant")], "equal rewards"),
    "weights": (["shifts", *flags(**QUICK, reward_weights="1 2")], "reward_weights"),
    "few groups": (["residual", *flags(**{**QUICK, "probe_prompts": 2})], "num_steps=4 needs at least as many groups"),
    "folder": (["shifts", *flags(**QUICK, probe_output="/dev/null/x")], "probe_output=/dev/null/x"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[mistake]
    assert main(["probe", *arguments]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert message in printed[-1]
    assert printed[-1].startswith("trl-cancel probe: ")
    assert not (tmp_path / "trl-cancel-probe").exists()


def test_quantized_models_compute_in_float32(tmp_path):
    """In bfloat16 its rounding would be measured, whatever the recipe trains in."""
    arguments = flags(**QUICK, load_in_4bit=True, use_peft=True, dtype="bfloat16", trust_remote_code=True)
    model, _ = load_model(Parser("test", "", ProbeArguments).read(arguments))
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
