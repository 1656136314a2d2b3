"""`trl-cancel compare`: what it writes and prints, and one line for every mistake."""

import html
import json
import re
import shutil
import subprocess
import sys

import pytest

from trl_cancel.cli import UsageError, main
from trl_cancel.cli.compare import named_paths
from trl_cancel.cli.demo import SETTINGS


def write_run(folder, rewards, every=4, residual=None, **results):
    """A run as TRL's trainer and `trl-cancel train` leave it."""
    logs = [
        {
            "step": (index + 1) * every,
            "reward": reward,
            "reward_std": 0.4,
            "completions/mean_length": 40.0 + index,
            "entropy": 0.1,
            "num_tokens": 1000.0 * (index + 1),
            **({} if residual is None else {"cancel/shared_prefix_residual": residual * (1 + index)}),
        }
        for index, reward in enumerate(rewards)
    ]
    logs.append({"step": len(rewards) * every, "train_loss": 0.1, "train_runtime": 33.3})
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": logs[-1]["step"], "log_history": logs}))
    if results:
        (folder / "all_results.json").write_text(json.dumps(results))
    return folder


def rising(slope, length=40, offset=0.0):
    return [0.2 + offset + slope * index / length for index in range(length)]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two methods of two seeds, the first without a residual, as TRL's trainer logs none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    for seed in (1, 2):
        after = {"after": {"greedy": [0.8, 0.7, 0.9], "sampled": [0.5 + seed / 10, 0.4, 0.8]}, "seconds": 10.0 * seed}
        write_run(tmp_path / f"plain-{seed}", rising(0.3, offset=seed / 100))
        write_run(tmp_path / f"whole-{seed}", rising(0.7, offset=seed / 50), residual=1e-8, **after)
    return tmp_path


def test_what_is_written_and_printed(runs, capsys):
    assert main(["compare", "plain-1", "whole-1", "--metric", "reward_std"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in printed.splitlines() if "│" in line}
    shown = {label: [cell.strip() for cell in row] for label, row in rows.items()}
    assert shown["optimizer steps"] == ["160", "160"]
    assert shown["tokens, with prompts"] == ["40k", "40k"]
    assert shown["shared-prefix residual at the end"] == ["—", "3.85e-07"]
    assert shown["test score, greedy"] == ["—", "0.8 [0.7, 0.9]"]
    assert shown["training time"] == ["33 s", "10 s"]
    assert shown["steps to reward 0.811"] == ["not reached", "148"]
    assert shown["tokens to reward 0.811"] == ["not reached", "37k"]
    assert "Threshold: 0.811, nine tenths of the way from the lowest start (0.221, plain-1)" in printed
    assert "Reached where the mean of the last 4 logged values is there" in printed
    assert "Curves: trl-cancel-compare/index.html" in printed

    folder = runs / "trl-cancel-compare"
    names = {"reward", "reward-by-tokens", "length", "entropy", "residual", "reward-std"}
    assert {file.name for file in folder.iterdir()} == {
        "index.html",
        "compare.json",
        *(f"{name}.png" for name in names),
    }
    page = (folder / "index.html").read_text()
    assert "Comparison of plain-1, whole-1" in page
    assert page.count("<svg") == len(names)
    for title in ("Reward", "Tokens a completion", "Entropy", "Shared-prefix residual", "reward_std"):
        assert f">{title}</h2>" in page
    written = json.loads((folder / "compare.json").read_text())
    assert list(written["methods"]) == ["plain-1", "whole-1"]
    assert written["methods"]["plain-1"]["runs"][0]["series"]["reward"]["values"] == rising(0.3, offset=0.01)
    assert written["methods"]["whole-1"]["mean"]["steps_to_threshold"]["value"] == 148


@pytest.mark.slow
def test_the_same_every_time(runs):
    for output in ("a", "b"):
        assert main(["compare", "plain-1", "plain=plain-2", "--output", output]) == 0
    for file in (runs / "a").iterdir():
        assert file.read_bytes() == (runs / "b" / file.name).read_bytes(), file.name


def test_seeds_of_one_method(runs, capsys):
    names = ["plain=plain-1", "whole=whole-1", "plain=plain-2", "whole=whole-2"]
    assert main(["compare", *names, "--threshold", "0.6", "--smooth", "2", "--output", "out"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"test score, sampled +│ +— │ +0.65 \[0.6, 0.7\] │", printed)
    assert "Threshold: 0.6, as given. Reached where the mean of the last 2 logged values is there." in printed
    assert "95% bootstrap intervals over seeds" in printed
    page = (runs / "out" / "index.html").read_text()
    assert "plain (2 seeds)" in page
    assert "from the lowest to the highest" in page
    written = json.loads((runs / "out" / "compare.json").read_text())
    assert [len(method["runs"]) for method in written["methods"].values()] == [2, 2]


def test_narrow_terminals(runs, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    assert (
        main(["compare", *(f"a-rather-long-name={name}-{seed}" for name in ("plain", "whole") for seed in (1, 2))])
        == 0
    )
    assert all(len(line) <= 60 for line in capsys.readouterr().out.splitlines() if "│" in line)


def test_checkpoints_and_files(runs, capsys):
    write_run(runs / "parts" / "checkpoint-80", rising(0.1, 20))
    write_run(runs / "parts" / "checkpoint-160", rising(0.1))
    for path in ("parts", "parts/checkpoint-160", "parts/checkpoint-160/trainer_state.json"):
        assert main(["compare", path, "plain-1"]) == 0
        written = json.loads((runs / "trl-cancel-compare" / "compare.json").read_text())
        assert next(iter(written["methods"].values()))["runs"][0]["steps"] == 160


@pytest.mark.slow
def test_zeros_of_a_residual(runs):
    """A residual of exactly 0 cannot stand on a logarithmic axis, and the page says so."""
    write_run(runs / "zero", rising(0.5), residual=0.0)
    assert main(["compare", "zero"]) == 0
    assert main(["compare", "zero", "plain-1", "whole-1"]) == 0
    assert "does not show 0" in (runs / "trl-cancel-compare" / "index.html").read_text()


def test_odd_names(runs):
    page = runs / "trl-cancel-compare" / "index.html"
    for name in ("[bold]", "<script>", r"$\frac$", "_hidden"):
        assert main(["compare", f"{name}=plain-1"]) == 0
        assert name in html.unescape(re.search("<svg.*?</svg>", page.read_text(), re.DOTALL)[0])
    shutil.copytree(runs / "plain-1", runs / "lr=1e-4")
    assert main(["compare", "lr=1e-4"]) == 0
    assert list(json.loads((runs / "trl-cancel-compare" / "compare.json").read_text())["methods"]) == ["lr=1e-4"]


def test_metrics_whose_names_look_alike(runs):
    state = json.loads((runs / "plain-1" / "trainer_state.json").read_text())
    for entry in state["log_history"]:
        entry |= {"a/b": 1.0, "a_b": 2.0, "length": 3.0, "%": 4.0}
    (runs / "plain-1" / "trainer_state.json").write_text(json.dumps(state))
    metrics = [part for name in ("a/b", "a_b", "length", "%") for part in ("--metric", name)]
    assert main(["compare", "plain-1", *metrics]) == 0
    assert len(list((runs / "trl-cancel-compare").glob("*.png"))) == 8


def test_many_methods(runs):
    for index in range(15):
        write_run(runs / f"run-{index}", rising(index / 20, 3))
    assert main(["compare", *(f"run-{index}" for index in range(15))]) == 0


def test_names_and_paths(runs):
    def names(*arguments):
        return [(name, str(path)) for name, path in named_paths(arguments)]

    assert names("plain-1", "x=plain-2") == [("plain-1", "plain-1"), ("x", "plain-2")]
    assert names("x=plain-1", "x=plain-2") == [("x", "plain-1"), ("x", "plain-2")]
    assert names("x=lr=3/run") == [("x", "lr=3/run")]
    assert names("no/such/lr=3") == [("lr=3", "no/such/lr=3")]
    with pytest.raises(UsageError, match="would be called x, as another run is; give it a name with NAME=runs/x"):
        named_paths(["x=plain-1", "runs/x"])


MISTAKES = {
    "nothing": ([], "the following arguments are required: RUN"),
    "path": (["no/such"], "no/such: there is no such file or folder"),
    "named path": (["x=no/such"], "no/such: there is no such file or folder"),
    "folder of runs": (["."], "did you mean empty, plain-1, plain-2?"),
    "no name": (["=plain-1"], "RUN '=plain-1': write NAME=PATH"),
    "no path": (["plain="], "RUN 'plain=': write NAME=PATH"),
    "twice": (["plain-1", "a=plain-1/trainer_state.json"], "this run is given twice"),
    "metric": (["plain-1", "--metric", "entropie"], "metric=entropie: no run has logged it; did you mean entropy?"),
    "no metric at all": (["empty"], "has logged none of reward, "),
    "no JSON": (["broken.json"], "broken.json: not valid JSON"),
    "no logs": (["silent.json"], "silent.json: nothing was logged"),
    "smooth": (["plain-1", "--smooth", "0"], "--smooth 0: must be at least 1"),
    "smooth much": (["plain-1", "--smooth", "21"], "has logged the reward 40 times; use at most 20"),
    "threshold": (["plain-1", "--threshold", "inf"], "--threshold inf: must be a finite number"),
    "no number": (["plain-1", "--threshold", "high"], "argument --threshold: invalid float value: 'high'"),
    "flag": (["plain-1", "--smoth", "3"], "unrecognized arguments: --smoth"),
    "output": (
        ["plain-1", "--output", "broken.json/x"],
        "--output broken.json/x: cannot write there: Not a directory",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, runs, capsys):
    write_run(runs / "empty", [])
    (runs / "broken.json").write_text("{")
    (runs / "silent.json").write_text('{"log_history": []}')
    before = sorted(runs.rglob("*"))
    arguments, message = MISTAKES[mistake]
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(runs.rglob("*")) == before


def test_without_matplotlib(runs):
    code = (
        "import sys; sys.modules['matplotlib'] = None; from trl_cancel.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    run = subprocess.run([sys.executable, "-c", code, "compare", "plain-1"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "optimizer steps" in run.stdout
    assert "No page of curves" in run.stdout
    assert "pip install matplotlib jinja2" in run.stdout
    assert [path.name for path in (runs / "trl-cancel-compare").iterdir()] == ["compare.json"]


@pytest.mark.slow
def test_runs_of_the_command_line(tmp_path, monkeypatch, capsys):
    """As `trl-cancel train` leaves them."""
    settings = {**SETTINGS, "max_steps": 4, "logging_steps": 1, "eval_problems": 0}
    for method in ("grpo", "grpo-fix"):
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        assert main(["train", *flags, "--output_dir", str(tmp_path / method), "--method", method]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "grpo"), str(tmp_path / "grpo-fix"), "--output", str(tmp_path / "c")]) == 0
    printed = capsys.readouterr().out
    assert "grpo-fix" in printed
    assert "shared-prefix residual at the end" in printed
    written = json.loads((tmp_path / "c" / "compare.json").read_text())["methods"]
    assert written["grpo"]["runs"][0]["last/cancel/shared_prefix_residual"] > 0.01
    assert written["grpo-fix"]["runs"][0]["last/cancel/shared_prefix_residual"] < 1e-6
