"""Names from outside: nothing unseen reaches a terminal or a file, nothing becomes markup or code, nothing is lost."""

import ast
import io
import json
import logging
import re
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.table import Table
from rich.text import Text

import trl_cancel
from trl_cancel.cli import main
from trl_cancel.cli._console import plain_console
from trl_cancel.evaluation import Evaluation
from trl_cancel.evaluation.samples import SampleLog
from trl_cancel.publishing.hub import push_failed
from trl_cancel.publishing.model_card import rename_in_card
from trl_cancel.running.checkpoints import last_whole
from trl_cancel.running.fit import fitting_states
from trl_cancel.running.run_lock import LOCK, FolderInUse, check_free
from trl_cancel.texts import markdown, plain, python_string, write_text

from .cli.test_compare import rising, write_run
from .runs import build


UNSEEN = "\x1b[31m\u202e\x07\u2066\x9b\u2028"  # a terminal's escapes, marks that turn the direction, a bell
HALF = "\udc80"  # of a surrogate pair, as a name of a file that is no UTF-8 has it
MARKUP = "*a* _b_ `c` [d](http://e.org) <img src=x> | # f & ~~g~~ \\h $i$"


def shows_nothing_unseen(text):
    return all(character.isprintable() or character in "\n\t\xa0" for character in text)


@given(text=st.text(st.characters(exclude_categories=())))
@example(text=UNSEEN + HALF)
def test_plain_texts_can_be_seen_and_encoded(text):
    shown = plain(text)
    shown.encode("utf-8")
    assert "\n" not in shown
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u061c\u2028\u2029]", shown)
    assert plain(text, lines=True).count("\n") == text.count("\n")


@pytest.mark.parametrize("text", ["simple", "Grüße, 世界", "\U0001f469\u200d\U0001f4bb", "مرحبا", "1\xa0000", "a  b"])
def test_texts_of_all_scripts_stay_as_they_are(text):
    assert plain(text) == text
    assert python_string(text) in (f'"{text}"', ascii(text).replace("'", '"'), repr(text).replace("'", '"'))


@given(text=st.text(st.characters(exclude_categories=())))
@example(text='"; import os; os.remove("x") #')
@example(text="a\\'\"\n```\n")
def test_literals_of_python(text):
    literal = python_string(text)
    assert ast.literal_eval(literal) == text
    assert (literal[0], literal.count("\n")) == ('"', 0)


@given(text=st.text(st.sampled_from("ab_*`[]()<>|#&~\\!:/.-+=1 ")))
@example(text=MARKUP)
@example(text="www.e.org")
def test_markdown_shows_a_name_as_it_is(text):
    """In a paragraph and in a table, by a parser of its own."""
    name = " ".join(text.split())
    parsed = MarkdownIt("gfm-like", {"linkify": False}).parse(
        f"x {markdown(text)}\n\n| a |\n|---|\n| {markdown(text)} |\n"
    )
    paragraph, *_, cell = (token for token in parsed if token.type == "inline")
    for inline, shown in ((paragraph, f"x {name}".strip()), (cell, name)):
        assert inline.content is not None
        assert {child.type for child in inline.children} <= {"text", "text_special"}
        assert "".join(child.content for child in inline.children) == shown
    assert sum(token.type == "tr_open" for token in parsed) == 2


def test_lines_do_not_begin_lists_or_headings():
    for name in ("# h", "- x", "+ x", "===", "---"):
        [_, inline, _] = MarkdownIt().parse(markdown(name))
        assert inline.children[0].type in ("text", "text_special")


def test_consoles_write_escapes_of_their_own_only():
    written = io.StringIO()
    console = plain_console(file=written, force_terminal=True, width=60)
    table = Table(title=UNSEEN)
    table.add_column(Text(UNSEEN))
    table.add_row(Text(UNSEEN + HALF), style="red")
    console.print(table)
    console.print(f"a{UNSEEN}b\nc", markup=False)
    own = re.sub(r"\x1b\[[\d;]*m", "", written.getvalue().replace(r"\x1b[31m", ""))
    assert shows_nothing_unseen(own)
    assert r"\u202e" in own
    assert "\nc\n" in own


@pytest.mark.parametrize("name", [f"run{UNSEEN}", f"run{HALF}", "run\nnew\tline"])
def test_runs_in_folders_of_odd_names_are_compared(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    folder = write_run(tmp_path / name, rising(0.5))
    state = json.loads((folder / "trainer_state.json").read_text())
    for entry in state["log_history"]:
        entry[f"metric{UNSEEN}{HALF}"] = 1.0
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert main(["compare", name, "--metric", f"metric{UNSEEN}{HALF}"]) == 0
    printed = capfd.readouterr().out
    assert shows_nothing_unseen(printed)
    assert plain(name) in printed
    page = (tmp_path / "trl-cancel-compare" / "index.html").read_text(encoding="utf-8")
    assert shows_nothing_unseen(page)
    assert page.count(plain(name)) > 3
    assert list(json.loads((tmp_path / "trl-cancel-compare" / "compare.json").read_text())["methods"]) == [plain(name)]
    for arguments in (["compare", f"no{UNSEEN}"], ["eval", "--model_name_or_path", f"./no{UNSEEN}"], [UNSEEN]):
        assert main(arguments) == 2
        error = capfd.readouterr().err
        assert shows_nothing_unseen(error)
        assert r"\u202e" in error


def test_line_feeds_of_a_folder_can_be_seen(tmp_path, monkeypatch, capfd):
    """In messages on one line, and where a run says where its results are."""
    monkeypatch.chdir(tmp_path)
    assert main(["push", "no\nrun\there", "--hub_model_id=me/a"]) == 2
    assert r"no\nrun\there: there is no such folder." in capfd.readouterr().err
    common = ["--model_name_or_path", "playground", "--dataset_name", "playground", "--num_problems", "1"]
    assert main(["eval", *common, "--num_samples", "0", "--max_completion_length", "4", "--output=a\nb"]) == 0
    assert r"Samples and results: a\nb." in capfd.readouterr().out


def test_no_module_logs_what_is_not_seen(caplog):
    """In a line each, whatever module it is of and whoever handles it; names of folders may hold line feeds."""
    folder = Path(trl_cancel.__file__).parent
    loggers = [
        f"trl_cancel.{'.'.join(file.relative_to(folder).with_suffix('').parts)}"
        for file in folder.rglob("*.py")
        if "get_logger(__name__)" in file.read_text() or "getLogger(__name__)" in file.read_text()
    ]
    assert len(loggers) > 8
    for name in loggers:
        logging.getLogger(name).warning("%s is left out.", f"run\n{UNSEEN}{HALF}")
    assert [record.name for record in caplog.records] == loggers
    for record in caplog.records:
        assert record.getMessage() == f"{plain('run' + chr(10) + UNSEEN + HALF)} is left out."


def unfitting(checkpoint):
    with fitting_states(str(checkpoint)):
        raise KeyError("momentum")


def test_checkpoints_and_samples_in_folders_of_odd_names(tmp_path, caplog):
    folder = tmp_path / f"run\n{UNSEEN}"
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "checkpoint-1" / "trainer_state.json").write_text("{")
    assert last_whole(folder) is None
    assert f"{plain(folder / 'checkpoint-1')} is left out: " in caplog.text
    for broken in (
        lambda: unfitting(folder),
        lambda: SampleLog(folder, {"name": 1}).append([{}]) or SampleLog(folder, {"name": 2}),
        lambda: SampleLog(folder, {"name": 1}),
    ):
        with pytest.raises(ValueError, match=re.escape(plain(folder))) as raised:
            broken()
        assert shows_nothing_unseen(str(raised.value))
    with FileLock(folder / LOCK), pytest.raises(FolderInUse) as in_use:
        check_free(folder)
    assert shows_nothing_unseen(str(in_use.value))
    assert "\n" not in str(in_use.value)
    failed = str(push_failed(OSError(f"no {UNSEEN}"), str(folder), "me/a", None, False))
    assert shows_nothing_unseen(failed)
    assert "\n" not in failed


def test_tracebacks_show_nothing_unseen(monkeypatch, capsys):
    def fails(arguments):
        raise KeyError(1) from RuntimeError(f"in {UNSEEN}")

    monkeypatch.setattr("trl_cancel.cli.explain.run", fails)
    assert main(["explain"]) == 1
    error = capsys.readouterr().err
    assert shows_nothing_unseen(error)
    assert error.startswith("RuntimeError: in \\x1b[31m\\u202e")


def odd(name):
    def rewarding(completion_ids, **kwargs):
        return [float(len(set(ids))) for ids in completion_ids]

    rewarding.__name__ = name
    return rewarding


def test_cards_show_odd_names_and_lose_nothing(tiny_model, tmp_path):
    folder = tmp_path / f'my "model"\\ {UNSEEN}{HALF} {MARKUP}'.replace("/", "")
    trainer = build(
        tiny_model, output_dir=str(folder), max_steps=1, arguments={"reward_funcs": odd(f"good{HALF}{UNSEEN}{MARKUP}")}
    )
    trainer.train()
    trainer.evaluations.append(Evaluation(f"set {HALF}{MARKUP}", 2, {f"m{HALF}{UNSEEN}": (0.5, 0.5, 0.5)}, {}, 1))
    trainer.create_model_card(tags=f"tag{HALF}")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert shows_nothing_unseen(text)
    card = ModelCard.load(folder / "README.md")
    assert yaml.safe_load(text.split("---\n")[1])["model-index"][0]["name"] == plain(folder.name)
    assert f"tag{plain(HALF)}" in card.data.tags
    assert f"# {markdown(folder.name)}\n" in card.text
    assert f"| rewards/{markdown('good' + HALF + UNSEEN + MARKUP)}/mean |" in card.text
    parsed = MarkdownIt("gfm-like", {"linkify": False}).parse(card.text)
    headings = [parsed[index + 1].content for index, token in enumerate(parsed) if token.type == "heading_open"]
    assert headings[1:4] == ["Quick start", "Evaluation", "Training"]
    assert not any("<img src=x>" in token.content for token in parsed if token.type.startswith("html"))
    code = next(token.content for token in parsed if token.type == "fence" and token.info == "python")
    named = next(node for node in ast.parse(code).body if isinstance(node, ast.Assign))
    assert ast.literal_eval(named.value) == folder.name


@pytest.mark.parametrize("name", ['x"; import os  # ', "x\nimport os", "x\\", 'x"""'])
def test_quick_starts_run_no_code_of_a_name(name, tiny_model, tmp_path):
    trainer = build(tiny_model, output_dir=str(tmp_path))
    trainer.create_model_card(model_name=name)
    rename_in_card(tmp_path / "README.md", "old")
    rename_in_card(tmp_path / "README.md", name)
    text = (tmp_path / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    lines = {node.targets[0].id: node.value for node in ast.parse(code).body if isinstance(node, ast.Assign)}
    assert ast.literal_eval(lines["model_id"]) == name
    assert "import os" not in [line.strip() for line in code.splitlines()]
    assert ModelCard.load(tmp_path / "README.md").data.model_name == plain(name)


def test_a_card_that_cannot_be_written_leaves_the_one_before(tiny_model, tmp_path, monkeypatch):
    trainer = build(tiny_model, output_dir=str(tmp_path))
    trainer.create_model_card()
    before = (tmp_path / "README.md").read_text()
    trainer.model.config._name_or_path = f"of/{HALF}"  # which TRL writes as it is
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == before


def test_files_of_evaluations_take_every_text(tmp_path):
    sample = {"problem": 0, "sample": None, "text": f"a{HALF}{UNSEEN}"}
    SampleLog(tmp_path, {"name": HALF}).append([sample])
    log = SampleLog(tmp_path, {"name": HALF})
    assert log.samples == [sample]
    with pytest.raises(ValueError, match="name="):
        SampleLog(tmp_path, {"name": "other"})
    write_text(tmp_path / "text", f"ü{HALF}")
    assert (tmp_path / "text").read_bytes() == "ü\\udc80".encode()
