"""`trl-cancel eval`: what it writes, how it goes on, and one line for every mistake."""

import errno
import json
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.runs import load
from trl_cancel.cli import UsageError, main
from trl_cancel.cli.evaluating import check_folders
from trl_cancel.evaluation import PRESETS, SampleLog, TransformersEngine, presets
from trl_cancel.evaluation.models import fingerprint
from trl_cancel.evaluation.presets import INSTRUCTION, DataSource, load_problems


QUICK = ["--num_problems", "4", "--num_samples", "2", "--max_completion_length", "8", "--score_truncated", "true"]


def evaluate(model, *arguments, output):
    return main(["eval", "--model_name_or_path", str(model), "--output", str(output), *arguments])


def playground(model, *arguments, output):
    return evaluate(model, "--dataset_name", "playground", *QUICK, *arguments, output=output)


def results_of(folder):
    return {path.parent.parent.name: json.loads(path.read_text()) for path in folder.glob("*/*/results.json")}


@pytest.mark.parametrize("name", ["playground", "playground-varied"])
def test_playground(tmp_path, capsys, name):
    arguments = ["--dataset_name", name, "--num_problems", "8", "--num_samples", "2"]
    assert evaluate(name, *arguments, output=tmp_path) == 0
    printed = capsys.readouterr().out
    for expected in (f"{name} (8)", "greedy", "avg@2", "pass@1", "pass@2", "truncated", "%"):
        assert expected in printed
    (results,) = results_of(tmp_path).values()
    assert results["metrics"]["greedy"]["low"] <= results["metrics"]["greedy"]["mean"] <= 1
    assert results["metrics"]["avg@2"]["mean"] > 0
    assert (results["problems"], results["answers"]) == (8, 24)
    assert results["versions"]["trl"]
    assert results["settings"]["temperature"] == 1
    samples = [json.loads(line) for line in (tmp_path / name / name / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 24


def test_goes_on_and_refuses_other_settings(tiny_model, tmp_path, capsys):
    assert playground(tiny_model, output=tmp_path) == 0
    (folder,) = tmp_path.glob("*/*")
    samples, results = folder / "samples.jsonl", folder / "results.json"
    whole, first = samples.read_bytes(), json.loads(results.read_text())
    samples.write_bytes(whole[: len(whole) // 2])
    results.unlink()
    assert playground(tiny_model, output=tmp_path) == 0
    assert samples.read_bytes() == whole
    assert json.loads(results.read_text()) == first
    capsys.readouterr()
    for argument, said in (
        (["--temperature", "0.5"], "temperature=1.0, and this one has temperature=0.5"),
        (["--seed", "1"], "seed=0, and this one has seed=1"),
        (["--dtype", "float32"], "dtype='auto', and this one has dtype='float32'"),
        (["--num_problems", "5"], "num_problems=4, and this one has num_problems=5"),
    ):
        assert playground(tiny_model, *argument, output=tmp_path) == 2
        assert said in capsys.readouterr().err
    assert samples.read_bytes() == whole
    assert playground(tiny_model, "--pass_at_k", "2", "--batch_size", "3", output=tmp_path) == 0  # the same answers
    assert samples.read_bytes() == whole


def test_another_model_in_the_same_folder_is_another_model(tiny_model, tmp_path, capsys):
    """Weights that were trained on under the same name."""
    model, tokenizer = load(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    for scale in (1.0, 1.1):
        model.lm_head.weight.data *= scale
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / "model")
        status = playground(tmp_path / "model", output=tmp_path / "out")
    assert status == 2
    assert "fingerprint of the model" in capsys.readouterr().err


@pytest.fixture
def own(tiny_model, tmp_path, monkeypatch):
    """A model, data and a reward function of one's own in a folder, and the command that evaluates them."""
    for part in (load(tiny_model), AutoTokenizer.from_pretrained(tiny_model)):
        part.save_pretrained(tmp_path / "model")
    row = {"prompt": [{"role": "user", "content": "Compute 1+1."}], "solution": "2", "hint": "one"}
    Dataset.from_list([row]).to_json(tmp_path / "data" / "test.jsonl")
    (tmp_path / "own_judge.py").write_text("BEST = 1.0\n\n\ndef judge(hint, **_):\n    return [BEST] * len(hint)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_judge", raising=False)  # another test's
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return lambda: evaluate(
        "model", "--dataset_name", "data", "--reward_funcs", "own_judge.judge", *QUICK, output="out"
    )


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, None),
        (("model/chat_template.jinja", "{", "Listen. {"), "fingerprint of the prompts' tokens="),
        (("model/generation_config.json", '"eos_token_id": ', '"eos_token_id": 1'), "end tokens=["),
        (("data/test.jsonl", '"one"', '"two"'), "fingerprint of the problems="),
        (("own_judge.py", "BEST = 1.0", "BEST = 0.5"), "fingerprint of the reward function's file="),
    ],
)
def test_whatever_answers_depend_on_is_noticed(own, tmp_path, capsys, change, said):
    assert own() == 0
    capsys.readouterr()
    if change is None:
        assert own() == 0
    else:
        file, old, new = change
        rewrite(tmp_path / file, old, new)
        assert own() == 2
        assert said in capsys.readouterr().err


def test_the_fingerprint_of_a_model_on_the_hub_is_its_commit(tmp_path, monkeypatch):
    """In a cache as the Hub's client makes it, before and after `main` has moved."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commits = ["a" * 40, "b" * 40]
    folder = tmp_path / "models--my--model"
    (folder / "refs").mkdir(parents=True)
    for commit in commits:
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
        (folder / "refs" / "main").write_text(commit)
        assert fingerprint("my/model", "main") == commit
    assert fingerprint("my/model", commits[0]) == commits[0]


def test_adapters_and_several_models(tiny_model, tmp_path, capsys):
    """An adapter's answers are those of the model that it makes with its base."""
    adapted = get_peft_model(load(tiny_model), LoraConfig(r=2, lora_alpha=200, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")  # without a tokenizer: its base has one
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "merged")
    more = ["--more_models", str(tmp_path / "merged"), tiny_model]
    assert playground(tmp_path / "adapter", *more, output=tmp_path / "out") == 0
    texts = {
        folder.parent.name.rpartition("-")[2]: [
            json.loads(line)["completion"] for line in (folder / "samples.jsonl").read_text().splitlines()
        ]
        for folder in (tmp_path / "out").glob("*/*")
    }
    adapter, merged_texts, base = (
        next(value for name, value in texts.items() if part in name) for part in ("adapter", "merged", "tiny")
    )
    assert adapter == merged_texts != base
    assert len(results_of(tmp_path / "out")) == 3
    four_bit = ["--load_in_4bit", "true"]
    assert playground(tmp_path / "adapter", *four_bit, output=tmp_path / "four") == 0
    assert "adapter" in capsys.readouterr().out


def test_presets(tiny_model, tmp_path, monkeypatch, capsys):
    """Their data, prompts and settings; given settings beat theirs."""
    asked = []

    def load_dataset(path, name=None, split=None):
        asked.append((path, split))
        return Dataset.from_dict({"problem": ["Compute 1+1.", "Compute 2+3."], "answer": ["2", "5"]})

    monkeypatch.setattr(presets, "load_dataset", load_dataset)
    length = ["--max_completion_length", "8", "--num_samples", "2"]
    assert evaluate(tiny_model, "--preset", "aime24", "aime25-dfpo", *length, output=tmp_path) == 0
    assert asked == [("HuggingFaceH4/aime_2024", "train"), ("math-ai/aime25", "test")]
    (folder,) = tmp_path.glob("*/aime25-dfpo")
    settings = json.loads((folder / "results.json").read_text())["settings"]
    assert (settings["temperature"], settings["top_p"], settings["top_k"]) == (0.6, 0.95, 20)
    assert (settings["num_samples"], settings["max_completion_length"], settings["greedy"]) == (2, 8, False)
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"][0]["content"] in {f"Compute {sum}.\n\n{INSTRUCTION}" for sum in ("1+1", "2+3")}
    assert "aime24 (2)" in capsys.readouterr().out


def test_list_presets(capsys, monkeypatch):
    from trl_cancel.cli import training

    monkeypatch.setattr(training.console, "_width", 200)
    assert main(["eval", "--list_presets"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in PRESETS)
    assert all(preset.source.path in printed for preset in PRESETS.values())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "lower --batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "lower --batch_size"),
        (RuntimeError("CUDA error: device-side assert triggered"), "CUDA error: device-side assert triggered"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Make room"),
    ],
)
def test_what_fails_from_outside_is_one_line_and_can_go_on(tiny_model, tmp_path, monkeypatch, capsys, error, said):
    """After the first of two batches, or in the middle of writing the second."""
    arguments = ["--batch_size", "4"]
    assert playground(tiny_model, *arguments, output=tmp_path / "whole") == 0
    target, method = (SampleLog, "append") if isinstance(error, OSError) else (TransformersEngine, "generate")
    real, calls = getattr(target, method), []

    def fails(self, *given):
        calls.append(1)
        if len(calls) > 1:
            if target is SampleLog:
                with open(self.path, "a") as file:
                    file.write('{"problem": 0, "sam')
            raise error
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(target, method, fails)
        capsys.readouterr()
        assert playground(tiny_model, *arguments, output=tmp_path / "part") == 1
    printed = capsys.readouterr().err
    last = printed.splitlines()[-1]  # after those of the progress bar
    assert last.startswith("trl-cancel eval: ")
    assert said in last
    assert f"The answers so far are in {tmp_path / 'part'}; the same command goes on from there" in last
    assert "Traceback" not in printed
    assert playground(tiny_model, *arguments, output=tmp_path / "part") == 0
    (whole,), (part,) = (list((tmp_path / name).glob("*/*/samples.jsonl")) for name in ("whole", "part"))
    assert part.read_bytes() == whole.read_bytes()


def test_models_that_would_share_a_folder(tiny_model, tmp_path, capsys):
    """Are refused before anything is answered."""
    models = [tmp_path / experiment / "run" / "checkpoint-100" for experiment in ("exp1", "exp2")]
    for model in models:
        for part in (load(tiny_model), AutoTokenizer.from_pretrained(tiny_model)):
            part.save_pretrained(model)
    assert playground(models[0], "--more_models", str(models[1]), output=tmp_path / "out") == 2
    assert f"{models[0]} and {models[1]} would share the folder run-checkpoint-100" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="org/model-x and org-model/x would share"):
        check_folders("model_name_or_path", ["org/model-x", "org-model/x"])


def test_rewards_of_ones_own(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "my_judge.py").write_text("def short(completions, **_):\n    return [0.25] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    assert playground(tiny_model, "--reward_funcs", "my_judge.short", output=tmp_path / "out") == 0
    (results,) = results_of(tmp_path / "out").values()
    assert results["metrics"]["avg@2"]["mean"] == 0.25
    assert results["settings"]["reward_funcs"] == "my_judge.short"


def test_data_of_ones_own(tiny_model, tmp_path):
    """A folder of JSON lines with columns of other names, judged by Math-Verify."""
    rows = Dataset.from_dict({"question": ["Compute 1+1.", "Compute 2+3."], "result": [2, 5]})
    (tmp_path / "data").mkdir()
    rows.to_json(tmp_path / "data" / "test.jsonl")
    arguments = [
        "--dataset_name",
        str(tmp_path / "data"),
        "--prompt_column",
        "question",
        "--solution_column",
        "result",
    ]
    arguments += ["--instruction", "Box it.", *QUICK]
    assert evaluate(tiny_model, *arguments, output=tmp_path / "out") == 0
    (results,) = results_of(tmp_path / "out").values()
    assert results["settings"]["reward_funcs"] == "Math-Verify"
    assert results["problems"] == 2


def test_data_without_solutions(tiny_model, tmp_path, monkeypatch, capsys):
    """Math-Verify needs them, and whoever names their column; a reward function of one's own may not."""
    Dataset.from_dict({"prompt": ["Compute 1+1."] * 2}).to_json(tmp_path / "data" / "test.jsonl")
    (tmp_path / "no_judge.py").write_text(
        "def scale(completions, trainer_state, log_metric, log_extra, **_):\n"
        "    log_metric('a', 1.0), log_extra('b', completions)\n"
        "    return [-7.25] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    data, own = ["--dataset_name", "data", *QUICK], ["--reward_funcs", "no_judge.scale"]
    for arguments in ([], [*own, "--solution_column", "solution"]):
        assert evaluate(tiny_model, *data, *arguments, output="out") == 2
        assert "it has the columns prompt but no 'solution'" in capsys.readouterr().err
    assert evaluate(tiny_model, *data, *own, output="out") == 0
    assert "-7.25 [-7.25, -7.25]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either --preset (aime24, "),
        (["--preset", "aime24", "--dataset_name", "playground"], "give either --preset"),
        (["--preset", "aime24", "aime24"], "preset=aime24: it is given twice"),
        (["--dataset_name", "playground", "--more_models", "playground"], "playground: it is given twice"),
        (["--preset", "aime23"], "preset=aime23: unknown; use one of aime24, "),
        (["--dataset_name", "no/where"], "data set no/where, split 'test': cannot load it"),
        (["--preset", "aime24"], "data set HuggingFaceH4/aime_2024, split 'train': cannot load it"),
        (["--dataset_name", "playground", "--temperature", "0"], "temperature=0.0: must be positive"),
        (["--dataset_name", "playground", "--pass_at_k", "9"], "pass_at_k=9: must be between 1 and num_samples=8"),
        (
            ["--dataset_name", "playground", "--reward_funcs", "tests.cli.test_cli.wants_answer"],
            "'wants_answer' needs 'answer', but data set playground has the columns prompt, solution",
        ),
        (["--dataset_name", "playground", "--batch_size", "0"], "batch_size=0: must be at least 1"),
        (["--dataset_name", "playground", "--reward_funcs", "no.such"], "reward_funcs=no.such: not found"),
        (["--dataset_name", "playground", "--chat_template_kwargs", "{a}"], "chat_template_kwargs={a}: is not JSON"),
        (
            ["--dataset_name", "playground", "--chat_template_kwargs", "[1]"],
            "chat_template_kwargs=[1]: must be a dict",
        ),
        (["--dataset_name", "playground", "--learning_rate", "1"], "learning_rate: unknown setting"),
        (["--dataset_name", "playground", "--engine", "vllm"], "pip install 'trl-cancel[vllm]'"),
        (["--dataset_name", "playground", "--engine", "continuous"], "engine=continuous is for GPUs"),
        (["--dataset_name", "playground", "--engine", "fast"], "invalid choice: 'fast'"),
        (["--dataset_name", "playground", "--more_models", "./none"], "model_name_or_path=./none: there is no such"),
    ],
)
def test_mistakes(arguments, said, tmp_path, capsys):
    assert evaluate("playground", *arguments, output=tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert playground("no/model", output=tmp_path) == 2
    assert "model_name_or_path=no/model: cannot load it" in capsys.readouterr().err
    assert main(["eval", "--dataset_name", "playground", "--output", str(tmp_path)]) == 2
    assert "model_name_or_path is missing" in capsys.readouterr().err


def test_the_row_without_a_prompt_is_named(tmp_path, capsys):
    """Before the model is loaded."""
    (tmp_path / "test.jsonl").write_text('{"prompt": "1+1"}\n{"prompt": null}\n')
    arguments = ["--dataset_name", str(tmp_path / "test.jsonl"), "--reward_funcs", "tests.cli.test_cli.one_in_two"]
    assert evaluate("playground", *arguments, output=tmp_path / "out") == 2
    assert "test.jsonl[1]['prompt'] is None. A prompt must be a text or a conversation" in capsys.readouterr().err


def test_columns_of_several_types(tiny_model, tmp_path):
    """As files of JSON may hold them; and an instruction, a column of another name, a template for the conversation."""
    rows = [{"prompt": "1+1", "right": 2, "of": {"a": 1}}, {"prompt": "1+2", "right": "3", "of": {"a": [1]}}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--dataset_name", str(tmp_path / "data"), "--solution_column", "right", "--instruction", "Box it."]
    assert evaluate(tiny_model, *arguments, *QUICK, output=tmp_path / "out") == 0
    (results,) = results_of(tmp_path / "out").values()
    assert results["problems"] == 2
    rows = [
        {"prompt": [{"role": "user", "content": text}], "right": "3"}
        for text in ("one", [{"type": "text", "text": "one"}])
    ]
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = load_problems(DataSource(str(tmp_path / "data"), "test", "prompt", "right"), None, None, True)
    assert [row["prompt"][0]["content"] for row in problems] == ["one", [{"type": "text", "text": "one"}]]


def test_one_of_a_list_in_a_file(tiny_model, tmp_path):
    (tmp_path / "eval.yaml").write_text(
        "dataset_name: playground\npass_at_k: 2\nmore_models: playground\n"
        "chat_template_kwargs: {enable_thinking: false}\n"
    )
    assert evaluate(tiny_model, "--config", str(tmp_path / "eval.yaml"), *QUICK, output=tmp_path / "out") == 0
    assert len(results_of(tmp_path / "out")) == 2
    for results in results_of(tmp_path / "out").values():
        assert "pass@2" in results["metrics"]
        assert "pass@1" not in results["metrics"]
        assert results["settings"]["chat_template_kwargs"] == {"enable_thinking": False}


def test_names_are_not_markup(tiny_model, tmp_path, capsys):
    folder = tmp_path / "runs[" / "a]"
    load(tiny_model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    assert playground(folder, output=tmp_path / "[/b]") == 0
    assert f"{tmp_path}/[/b]" in capsys.readouterr().out


def test_code_of_a_model_is_run_if_it_is_trusted(tiny_model, tmp_path, monkeypatch):
    asked = []

    def watch(cls):
        load_it = cls.from_pretrained

        def from_pretrained(path, *arguments, trust_remote_code=False, **settings):
            asked.append((cls.__name__, trust_remote_code))
            return load_it(path, *arguments, **settings)

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)

    watch(AutoTokenizer)
    watch(AutoModelForCausalLM)
    for trusted in (False, True):
        asked.clear()
        assert playground(tiny_model, "--trust_remote_code", str(trusted), output=tmp_path / str(trusted)) == 0
        assert asked == [("AutoTokenizer", trusted), ("AutoModelForCausalLM", trusted)]
