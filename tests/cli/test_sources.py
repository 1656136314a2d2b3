"""Data sets from files and folders, names that lead nowhere, and a Hub that cannot be reached."""

import bz2
import gzip
import json
import time

import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import constants

from tests.cli.test_cli import QUICK, flags
from trl_cancel.cli import main
from trl_cancel.cli.settings import Parser
from trl_cancel.cli.training import load_data
from trl_cancel.evaluation.presets import DataSource, load_problems
from trl_cancel.running import sources


ROWS = [{"prompt": f"{number}+1=", "solution": str(number + 1)} for number in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "prompt,solution\n" + "".join(f"{row['prompt']},{row['solution']}\n" for row in ROWS)
FILES = {
    "a.jsonl": lambda path: path.write_text(LINES),
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "of [1] and *.jsonl": lambda path: path.write_text(LINES),
    "a.csv": lambda path: path.write_text(TABLE),
    "a.tsv": lambda path: path.write_text(TABLE.replace(",", "\t")),
    "a.parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "a.csv.bz2": lambda path: path.write_bytes(bz2.compress(TABLE.encode())),
    "saved": lambda path: Dataset.from_list(ROWS).save_to_disk(path),
    "splits": lambda path: DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS)).save_to_disk(path),
}


def loaded(**settings):
    return load_data(Parser("test", "").read(flags(**{**QUICK, **settings})))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder that is the current one, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_files_and_folders(name, home):
    FILES[name](home / name)
    for path in (name, f"~/{name}", str(home / name)):
        rows = loaded(dataset_name=path)["train"]
        assert [(row["prompt"], str(row["solution"])) for row in rows] == [tuple(row.values()) for row in ROWS]
    problems = load_problems(DataSource(f"~/{name}", "test", "prompt", "solution"), conversational=False)
    assert problems["prompt"][:] == [row["prompt"] for row in ROWS]


def test_a_file_is_read_as_a_stream_and_as_a_part(home):
    FILES["a.jsonl"](home / "a.jsonl")
    assert next(iter(loaded(dataset_name="a.jsonl", dataset_streaming=True)["train"])) == ROWS[0]
    assert len(load_problems(DataSource("a.jsonl", "test[:2]", "prompt", "solution"))) == 2


def test_a_file_in_a_mixture(home):
    FILES["a.jsonl"](home / "a.jsonl")
    recipe = home / "recipe.yaml"
    recipe.write_text("datasets:\n- path: a.jsonl\n- path: ~/a.jsonl\n")
    given = {name: value for name, value in QUICK.items() if name != "dataset_name"}
    settings = Parser("test", "").read(["--config", str(recipe), *flags(**given)])
    assert len(load_data(settings)["train"]) == 12


MISSING = {
    "none.jsonl": "there is no such file or folder",
    "./none": "there is no such file or folder",
    "~/none": "there is no such file or folder",
    "data/none.csv.gz": "there is no such file or folder",
    "empty.jsonl": "it is empty",
    "broken.jsonl": "JSON",
    "nameless": "its name tells no kind of file; use one of .json",
    "a.xlsx": "files of the kind .xlsx are not read; make it one of .json, .jsonl,",
    "https://example.org/a.jsonl": "it is an address; download what is there and give the file or folder",
    "https://huggingface.co/datasets/a/b": "it is an address; give the Hub id, a/b",
}


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("command", ["train", "eval", "probe"])
def test_files_that_cannot_be_read(name, command, home, capsys, monkeypatch):
    monkeypatch.setattr(sources, "_why_unreachable", lambda: pytest.fail("the Hub was asked"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (home / "data").mkdir()
    for file, text in (("empty.jsonl", ""), ("broken.jsonl", "{a\n"), ("nameless", LINES), ("a.xlsx", "x")):
        (home / file).write_text(text)
    assert run(command, dataset_name=name) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert name in said
    assert "cannot load it (" in said
    assert MISSING[name] in said
    assert len(said) < 400


def run(command, **settings):
    if command == "eval":
        named = {"model_name_or_path": "playground", "dataset_name": "playground", "output": "out"}
        return main(["eval", *flags(**{**named, **settings})])
    return main(
        [command, *(["all"] if command == "probe" else []), *flags(**{**QUICK, "output_dir": "out", **settings})]
    )


# The Hub


@pytest.fixture
def no_network(monkeypatch, home):
    """The Hub's address does not lead anywhere, and offline mode is off."""
    for switch in sources.constants, sources.datasets.config:
        monkeypatch.setattr(switch, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: attempts.append(seconds))
    attempts: list[float] = []
    return attempts


@pytest.mark.parametrize("setting", ["model_name_or_path", "dataset_name"])
@pytest.mark.parametrize("command", ["train", "eval", "probe"])
def test_a_hub_that_cannot_be_reached(setting, command, no_network, capsys):
    assert run(command, **{setting: "no-such/thing"}) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no-such/thing" in said
    assert "cannot load it: http://127.0.0.1:9 cannot be reached (" in said
    assert "of that name nor the cache holds it." in said
    assert sum(no_network) <= 1, "no further attempts are made for each file"
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("setting", ["model_name_or_path", "dataset_name"])
@pytest.mark.parametrize("command", ["train", "eval", "probe"])
def test_the_playground_is_suggested(setting, command, no_network, capsys):
    assert run(command, **{setting: "playgrund"}) == 1
    assert capsys.readouterr().err.strip().endswith("Did you mean playground?")


def test_which_of_two_models_it_is(no_network, capsys):
    assert (
        run("train", reward_model_name_or_path="no-such/judge", reward_funcs="accuracy_reward", eval_problems=0) == 1
    )
    assert "reward_model_name_or_path=no-such/judge: cannot load it: http" in capsys.readouterr().err


def test_what_is_here_needs_no_hub(no_network, tiny_model, home, monkeypatch):
    monkeypatch.setattr(sources, "_why_unreachable", lambda: pytest.fail("the Hub was asked"))
    (home / "adapter").mkdir()
    (home / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": tiny_model}))
    with sources.within_reach(tiny_model, "adapter", "~/adapter", None, "./none") as out_of_reach:
        assert out_of_reach is None


def test_an_adapter_whose_base_model_is_elsewhere_needs_it(no_network, home):
    (home / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "no/model"}))
    with sources.within_reach(str(home)) as out_of_reach:
        assert "cannot be reached" in out_of_reach


class ReadTimeout(Exception):
    pass


class ConnectTimeout(Exception):
    pass


@pytest.mark.parametrize(
    ("answer", "reached"), [(ReadTimeout(), True), (ConnectTimeout(), False), (ValueError(), True), ("any", True)]
)
def test_slow_networks_are_left_alone(answer, reached, no_network, monkeypatch):
    """An answer that takes its time is one; only what cannot be connected to, twice, is out of reach."""

    class Session:
        def head(self, url, timeout):
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(sources, "get_session", Session)
    with sources.within_reach("no-such/thing") as out_of_reach:
        assert (out_of_reach is None) == reached
        assert constants.HF_HUB_OFFLINE is not reached
