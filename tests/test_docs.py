"""The documentation: every Python snippet runs, every command is one, every link leads somewhere."""

import json
import re
import shlex
from pathlib import Path

import datasets
import pytest

from tests import tables
from tests.versions import table as versions
from trl_cancel import CancelGRPOTrainer
from trl_cancel.cli import main
from trl_cancel.cli.probe import MEASUREMENTS
from trl_cancel.cli.probing import probe_settings
from trl_cancel.cli.settings import Parser
from trl_cancel.playground import CHECKPOINT
from trl_cancel.playground.data import load_prompts


ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "examples/README"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def blocks(language):
    """Code blocks of the documentation, with the page they are on."""
    return [
        pytest.param(code, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL))
    ]


def commands():
    return [
        pytest.param(line, id=line[:60])
        for block in blocks("bash")
        for line in block.values[0].splitlines()
        if line.startswith("trl-cancel")
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_snippet_runs(code, tmp_path, monkeypatch):
    """As it is written, on the playground where it names a model or a data set of the Hub, for two steps on the CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: load_prompts("train", 64))
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    init = CancelGRPOTrainer.__init__

    def small(self, *args, **kwargs):
        settings = kwargs["args"]
        settings.max_steps, settings.max_completion_length, settings.report_to = 2, 16, []
        init(self, *args, **kwargs)

    monkeypatch.setattr(CancelGRPOTrainer, "__init__", small)
    exec(compile(code.replace("Qwen/Qwen3-0.6B", str(CHECKPOINT)), "snippet", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", commands())
def test_command_is_one(command, monkeypatch, capsys):
    """Each command's settings are read; those that only explain are run."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    _, name, *arguments = shlex.split(command)
    if name == "explain":
        assert main([name, *arguments]) == 0
    elif name == "train":
        assert Parser("test", "").read(arguments)
    elif name == "probe":
        assert arguments[0] in ("all", *MEASUREMENTS)
        probe_settings("", arguments[1:]).run.check()
    else:
        flags = re.findall(r"--\w+", command)
        with pytest.raises(SystemExit):
            main([name, "--help"])
        printed = capsys.readouterr().out
        assert all(flag in printed for flag in flags)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]*)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_there_is_something_to_test():
    assert len(blocks("python")) >= 6
    assert len(commands()) >= 6


def test_versions_are_those_that_were_tested():
    page = versions.PAGE.read_text(encoding="utf-8")
    results = json.loads(versions.RESULTS.read_text())
    assert versions.rewritten(page, results) == page, "run tests/versions/run"
    assert not any(result["failed"] for result in results.values())


def test_readme_says_of_the_methods_what_their_files_say():
    readme = tables.README.read_text(encoding="utf-8")
    assert tables.rewritten(readme) == readme, "run python -m tests.tables"
