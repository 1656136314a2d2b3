"""The model card: what it states, cites and shows, that the Hub can read it, and what it must not hold."""

import re
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig

from tests.methods import FirstTokens
from tests.runs import DEFAULTS, OFF_POLICY, build, load
from trl_cancel import CancelGRPOConfig, NTHRConfig, NTHRTrainer, papers
from trl_cancel.evaluation import Evaluation, EvaluationCallback, EvaluationSettings
from trl_cancel.methods import NAMED, delta, nthr
from trl_cancel.papers import Paper
from trl_cancel.playground.data import load_prompts
from trl_cancel.publishing.active_methods import active_methods, cited, tags_of
from trl_cancel.publishing.model_card import datasets_of, hub_id, rename_in_card


PAPERS = [paper for paper in vars(papers).values() if isinstance(paper, Paper)]


def config(**settings):
    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "steps_per_generation": 4}
    return CancelGRPOConfig("unused", **{**sizes, "use_cpu": True, "bf16": False, **settings})


def card_of(trainer, **arguments):
    trainer.create_model_card(**arguments)
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md")


# Which methods are on


@pytest.mark.parametrize("name", NAMED)
def test_named_methods_are_tagged_and_cited(name):
    methods = active_methods(config(**NAMED[name].settings))
    assert (name in tags_of(methods)) == (name != "grpo")  # that tag is on every model
    assert NAMED[name].paper in {None, *(paper.id for paper in cited(methods))}
    assert papers.GRPO in cited(methods)


def test_only_what_is_on_is_tagged_and_cited():
    methods = active_methods(config(query_preserved=False))
    assert tags_of(methods) == []
    assert cited(methods) == [papers.GRPO, papers.DAPO]  # DAPO's is TRL's default loss
    whole = active_methods(config(steps_per_generation=1, gradient_accumulation_steps=1))
    assert [method.name for method in whole] == [method.name for method in methods], "where batches are TRL's"


@pytest.mark.parametrize(
    ("settings", "tag"),
    [
        ({"query_preserved": True}, "query-preserved"),
        ({"symmetric_clip": True}, "grpo-fix"),
        ({"group_weights": "min", "importance_sampling_level": "sequence", "loss_type": "grpo"}, "dfpo"),
    ],
)
def test_what_changes_nothing_is_neither_tagged_nor_cited(settings, tag):
    assert tag in tags_of(active_methods(config(**settings)))
    on_policy = active_methods(config(**settings, steps_per_generation=1))
    assert tag not in tags_of(on_policy)
    assert not {papers.CANCELLATION, papers.DESIGN_CONDITIONS} & {*cited(on_policy)}


@pytest.mark.parametrize(
    ("settings", "paper"),
    [
        ({"loss_type": "dr_grpo"}, papers.DR_GRPO),
        ({"loss_type": "cispo"}, papers.MINIMAX),
        ({"loss_type": "sapo"}, papers.SAPO),
        ({"loss_type": "vespo"}, papers.VESPO),
        ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, papers.LUSPO),
        ({"importance_sampling_level": "sequence"}, papers.GSPO),
        ({"loss_type": "grpo", "epsilon_high": 0.28}, papers.DAPO),
        ({"loss_type": "grpo", "mask_truncated_completions": True}, papers.DAPO),
        ({"loss_type": "grpo", "filter_zero_variance": True}, papers.DAPO),
        ({"scale_rewards": False}, papers.DR_GRPO),
        ({"scale_rewards": "batch"}, papers.LITE_PPO),
        ({"top_entropy_quantile": 0.2}, papers.HIGH_ENTROPY),
        ({"multi_objective_aggregation": "normalize_then_sum"}, papers.GDPO),
    ],
    ids=str,
)
def test_methods_of_trl_are_cited(settings, paper):
    assert paper in cited(active_methods(config(**settings)))
    assert paper not in cited(active_methods(config(loss_type="grpo")))


def test_every_paper_has_its_citation():
    assert len({paper.id for paper in PAPERS}) == len({paper.key for paper in PAPERS}) == len(PAPERS)
    for paper in PAPERS:
        assert re.fullmatch(r"\d{4}\.\d{5}", paper.id)
        assert f"year   = 20{paper.id[:2]}," in paper.bibtex
        assert paper.bibtex.count("{") == paper.bibtex.count("}")
        assert len(paper.authors) > 5


def test_tags_follow_the_settings_and_not_the_class(tiny_model, tmp_path):
    settings = NTHRConfig(str(tmp_path), **DEFAULTS)
    settings.nthr = False
    off = build(tiny_model, NTHRTrainer, arguments={"args": settings})
    assert off.model.model_tags == ["trl", "grpo", "trl-cancel", "dynamic-sampling"]
    trainer = build(tiny_model, nthr=True, output_dir=str(tmp_path))
    assert trainer.model.model_tags == ["trl", "grpo", "trl-cancel", "nthr"]
    assert build(tiny_model, output_dir=str(tmp_path)).model.model_tags == ["trl", "grpo", "trl-cancel"]


# What the card says


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A run that is done, with evaluations before and after, and its card."""
    folder = tmp_path_factory.mktemp("secret place") / "my-model"
    trainer = build(
        tiny_model,
        output_dir=str(folder),
        **{**OFF_POLICY, "max_steps": 4},
        nthr=True,
        symmetric_clip=True,
        hub_token="hf_SecretOfTheTests",
        model_init_kwargs={"token": "hf_SecretOfTheTests"},
        log_completions=False,
        arguments={"credits": [FirstTokens()]},
    )
    for step, mean in ((0, 0.25), (4, 0.5)):
        metrics = {"greedy": (mean, mean - 0.1, mean + 0.1), "pass@8": (0.75, 0.7, 0.8)}
        trainer.evaluations.append(Evaluation("openai/gsm8k", 64, metrics, {"temperature": 0.6}, step))
    trainer.train()
    return trainer, card_of(trainer, dataset_name=["openai/gsm8k", str(folder)], tags="extra")


def test_card_states_methods_settings_and_versions(finished):
    _, card = finished
    for expected in (
        "**Query-preserved mini-batching**",
        "**Symmetric clipping**: ratios above 1.2 are clipped",
        "**NTHR**",
        "coefficients of `FirstTokens`",
        "Groups          Whole in every optimizer step",  # what explain() says
        "| nthr | True |",
        "| num_iterations | 2 |",
        "| reward functions | noisy_reward |",
        "- trl-cancel: ",
        "- TRL: 1.16",
        "- Transformers: ",
        "- Pytorch: ",
        "trained on [openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k).",
    ):
        assert expected in card.text
    assert "| delta_credit" not in card.text
    assert "| loss_type" not in card.text


def test_card_shows_results(finished):
    trainer, card = finished
    assert "| openai/gsm8k | 64 | greedy | 0 and 4 | 25.0% [15.0%, 35.0%] | 50.0% [40.0%, 60.0%] |" in card.text
    assert "temperature=0.6" in card.text
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert f"| reward | {rewards[0]:.4g} | {rewards[-1]:.4g} |" in card.text
    assert "| cancel/shared_prefix_residual |" in card.text


def test_card_of_a_trainer_that_went_back_to_its_best_weights(tiny_model, tmp_path):
    trainer = build(
        tiny_model,
        output_dir=str(tmp_path / "model"),
        max_steps=3,
        arguments={"eval_dataset": load_prompts("tune", 4)},
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_set_greedy",
    )
    scores = {0: [1.0, 0.0], 1: [0.0, 0.0], 2: [1.0, 1.0], 3: [0.0, 1.0]}

    def reward(completions, **_):
        return [scores[trainer.state.global_step][problem] for problem in range(len(completions))]

    settings = EvaluationSettings(num_samples=0, max_completion_length=4, score_truncated=True)
    trainer.add_callback(
        EvaluationCallback(trainer, load_prompts("test", 2), reward, settings, name="set", at_start=True)
    )
    trainer.train()
    card = card_of(trainer)
    assert "The training went on for 3 steps; these are the weights after 2, the best by eval_set_greedy." in card.text
    assert re.search(r"\| set \| 2 \| greedy \| 0 and 2 \| 50.0% .*\| 100.0% ", card.text)
    assert [result.metric_value for result in card.data.eval_results if result.metric_type == "greedy"] == [1.0]
    trainer.evaluate()
    assert [evaluation.step for evaluation in trainer.evaluations] == [0, 1, 2, 3, 2]


def test_card_cites_papers_and_trl(finished):
    trainer, card = finished
    for paper in (papers.GRPO, papers.CANCELLATION, papers.DESIGN_CONDITIONS, nthr.PAPER):
        assert paper in cited(trainer.active_methods)
        assert card.text.count(paper.bibtex) == 1
    assert delta.PAPER.key not in card.text
    assert "TRL: Transformers Reinforcement Learning" in card.text


def test_metadata_as_the_hub_reads_it(finished):
    _, card = finished
    assert {"trl", "grpo", "trl-cancel", "nthr", "grpo-fix", "query-preserved", "custom-credit", "extra"} <= {
        *card.data.tags
    }
    assert card.data.datasets == ["openai/gsm8k"]
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None
    assert "licence" not in card.data.to_dict()
    results = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert results == {("openai/gsm8k", "greedy"): 0.5, ("openai/gsm8k", "pass@8"): 0.75}
    assert card.data.to_dict()["model-index"][0]["name"] == "my-model"


def test_card_holds_neither_paths_nor_secrets(finished, tiny_model):
    trainer, card = finished
    for secret in ("hf_Secret", str(tiny_model), "secret place", str(Path.home()), str(Path.cwd())):
        assert secret not in str(card)
    assert trainer.args.hub_token == "hf_SecretOfTheTests"


def test_adapter_of_a_model_of_the_hub(tiny_model, tmp_path):
    adapter = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    trainer = build(tiny_model, output_dir=str(tmp_path), arguments={"peft_config": adapter})
    trainer.model.base_model.model.config._name_or_path = "Qwen/Qwen3-0.6B"
    card = card_of(trainer)
    assert card.data.base_model == "Qwen/Qwen3-0.6B"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.library_name == "peft"
    assert "lora" in card.data.tags
    assert "An adapter (LoRA) for [Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B)." in card.text
    assert "AutoPeftModelForCausalLM" in card.text
    for expected in ("| r | 2 |", "| lora_alpha | 4 |", "| target_modules | q_proj, v_proj |", "- PEFT: "):
        assert expected in card.text


def test_license_is_that_of_a_local_base_model(tiny_model, tmp_path):
    base = tmp_path / "base"
    load(tiny_model).save_pretrained(base)
    for name in [*Path(tiny_model).glob("*token*"), *Path(tiny_model).glob("*.jinja")]:
        (base / name.name).write_bytes(name.read_bytes())
    assert card_of(build(str(base), output_dir=str(tmp_path / "out"))).data.license is None
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert card_of(build(str(base), output_dir=str(tmp_path / "out"))).data.license == "apache-2.0"


def test_names_cannot_break_the_tables(tiny_model, tmp_path):
    def rewarding(completion_ids, **kwargs):
        return [0.0] * len(completion_ids)

    rewarding.__name__ = "a|b<script>"
    trainer = build(
        tiny_model,
        output_dir=str(tmp_path),
        max_steps=1,
        arguments={"reward_funcs": rewarding},
    )
    trainer.train()
    trainer.args.generation_kwargs = {"API-Key": "sk-secret", "seed": 1}
    trainer.evaluations.append(Evaluation("x|y\n# h", 2, {"greedy": (0.5, 0.5, 0.5)}, {"note": "<b>"}, 100))
    text = card_of(trainer).text
    assert "| rewards/a\\|b\\<script\\>/mean |" in text
    assert "| x\\|y # h | 2 | greedy | 100 | 50.0% [50.0%, 50.0%] |" in text
    assert "note=\\<b\\>" in text
    assert "sk-secret" not in text


def test_every_checkpoint_writes_the_card(tiny_model, tmp_path):
    build(tiny_model, output_dir=str(tmp_path), max_steps=1, save_strategy="steps", save_steps=1).train()
    assert "trl-cancel" in ModelCard.load(tmp_path / "README.md").data.tags


@pytest.mark.parametrize("name", ["openai/gsm8k", "gsm8k", "Qwen/Qwen3-0.6B"])
def test_names_of_the_hub(name):
    assert hub_id(name) == name


@pytest.mark.parametrize("name", [None, "", "playground", "/data/mine", "./mine", "a/b/c", "~/x", "C:\\data", "tests"])
def test_names_that_are_not_of_the_hub(name):
    assert hub_id(name) is None


def test_data_set_that_says_where_it_comes_from():
    dataset = Dataset.from_dict({"prompt": ["x"]})
    assert datasets_of(dataset) == []
    dataset.info.download_checksums = {"hf://datasets/openai/gsm8k@abc/main/train.parquet": {"num_bytes": 1}}
    assert datasets_of(dataset) == ["openai/gsm8k"]
    assert datasets_of(None) == []


def test_renaming_changes_only_the_quick_start(tmp_path):
    card = tmp_path / "README.md"
    card.write_text('---\nmodel_id: x\n---\n    model_id = "kept"\nmodel_id = "old"\nmodel_id = "kept"\n')
    rename_in_card(card, r"some\one/new")
    assert card.read_text() == (
        '---\nmodel_id: x\n---\n    model_id = "kept"\nmodel_id = "some\\\\one/new"\nmodel_id = "kept"\n'
    )
