"""The comparison of learning: its protocol, its statistics, and that the committed results are what the page says."""

import json
import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from trl_cancel.playground.tasks import task_named
from trl_cancel.playground.tokenizer import build_tokenizer


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import learning  # noqa: E402
import learning_report  # noqa: E402
import learning_run  # noqa: E402
import oracle  # noqa: E402
from runs import RunsFailedError, _key, chosen, run_all  # noqa: E402


STRANDS = [
    learning.Strand(task, regime)
    for task in learning.SETTINGS
    for regime in learning.REGIMES
    if learning.Strand(task, regime).file.exists()
]


def strands(function):
    return pytest.mark.parametrize("strand", STRANDS, ids=lambda strand: f"{strand.task}-{strand.regime}")(function)


def result(name, seed, sampled, split="test", rate=1e-4, rewards=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)):
    """A run as `learning_run.run` returns it."""
    return {
        "name": name,
        "seed": seed,
        "split": split,
        "settings": {"learning_rate": rate},
        "sampled": sampled,
        "greedy": 0.8,
        "pass": 0.9,
        "distinct": 3.0,
        "variety": 0.5,
        "blame": {"gross": [0.5, 0.1, 0.4], "net": None},
        "steps": 6,
        "rollouts": 768,
        "generated_tokens": 600,
        "entropy": 0.3,
        "seconds": {"training": 10.0, "all": 20.0},
        "logs": {
            "reward": list(rewards),
            "generated_tokens": [100.0 * step for step in range(1, 7)],
            "cancel/shared_prefix_residual": [0.1] * 6,
        },
    }


@pytest.fixture
def comparison():
    runs = [result("untrained", seed, 0.4, rate=0.0) for seed in range(6)]
    runs += [result("GRPO", seed, 0.50 + 0.01 * seed) for seed in range(6)]
    runs += [result("better", seed, 0.55 + 0.01 * seed + 0.001 * (seed % 2)) for seed in range(6)]
    runs += [result("undecided", seed, 0.5 + 0.04 * (seed % 2)) for seed in range(6)]
    runs += [result("worse", seed, 0.30 + 0.01 * seed, rewards=[0.1] * 6) for seed in reversed(range(6))]
    runs += [result("GRPO", 100, 0.45, "tune"), result("GRPO", 101, 0.55, "tune")]
    controls = {"worse": "undecided", "better": "worse", "not run": "GRPO", "undecided": "not run"}
    return learning_report.Comparison("Title", "here", runs, "GRPO", "untrained", controls)


def cells_of(table, name):
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return dict(zip(header, next(row for row in rows if row[0] == name), strict=True))


def test_differences_are_paired_by_seed(comparison):
    assert comparison.ranked() == ["better", "GRPO", "undecided", "worse"]
    assert comparison.differences("worse") == pytest.approx([-0.2] * 6)
    assert comparison.differences("better") == pytest.approx([0.05, 0.051] * 3)
    assert comparison.differences("better", "worse") == pytest.approx([0.25, 0.251] * 3)


def test_runs_that_are_there_twice_are_refused(comparison):
    runs = [*comparison.runs, result("GRPO", 3, 0.9, rate=2e-4)]
    with pytest.raises(ValueError, match=r"Title has several runs of \('GRPO', 3\)"):
        learning_report.Comparison("Title", "here", runs, "GRPO", "untrained")


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2 / 64),
        ([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], 2 / 64),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2 / 32),
        ([-1.0, 2.0, 3.0], 4 / 8),  # sums 4 and 6, and their opposites
        ([0.0, 0.0], 1.0),
        ([0.1, 0.2, 0.3], 2 / 8),
        ([-0.009, 0.008, -0.009, 0.003, -0.003, 0.004], 50 / 64),  # where float32 takes equal sums for unequal
    ],
)
def test_sign_flips(differences, expected):
    assert learning_report.p_value(differences) == expected


def test_a_collapsed_run_does_not_spoil_the_page(comparison):
    """Where no problem has two right answers, there is no variety."""
    comparison.methods["worse"][0]["variety"] = None
    assert cells_of(learning_report.variety_table(comparison), "worse")["variety"] == "0.50"
    for run in comparison.methods["worse"]:
        run["variety"] = None
    assert cells_of(learning_report.variety_table(comparison), "worse")["variety"] == "nan"


def test_accuracy_table(comparison):
    table = learning_report.accuracy_table(comparison)
    better, grpo, worse = (cells_of(table, name) for name in ("better", "GRPO", "worse"))
    assert better["minus GRPO"] == "**+5.0% [+5.0%, +5.1%]**"
    assert worse["minus GRPO"] == "**-20.0% [-20.0%, -20.0%]**"
    assert grpo["minus GRPO"] == ""
    assert (better["greedy"], better["greedy minus GRPO"]) == ("80.0% [80.0%, 80.0%]", "+0.0% [+0.0%, +0.0%]")
    undecided = cells_of(table, "undecided")
    assert undecided["minus GRPO"].startswith("-0.5% [-2.")
    assert (better["p"], undecided["p"]) == ("0.031", "0.750")


def test_variety_table(comparison):
    better = cells_of(learning_report.variety_table(comparison), "better")
    assert (better["pass@8"], better["collapsed"]) == ("90.0% [90.0%, 90.0%]", "0 of 6")
    collapsed = [result("collapsed", seed, 0.19 + 0.02 * (seed % 2)) for seed in range(6)]
    comparison.methods["collapsed"] = collapsed
    assert cells_of(learning_report.variety_table(comparison), "collapsed")["collapsed"] == "3 of 6", "half of 0.4"


def test_control_table(comparison):
    table = learning_report.control_table(comparison)
    assert len(table.splitlines()) == 4, "only where both were run"
    better = cells_of(table, "better")
    assert (better["its control"], better["p"]) == ("worse", "0.031")
    assert better["minus its control"] == "**+25.0% [+25.0%, +25.1%]**"
    assert better["learning rates"] == "0.0001 / 0.0001"
    assert better["blame on the first wrong token"] == "+0.00% [+0.00%, +0.00%]"
    for run in comparison.methods["better"]:
        run["blame"] = {**run["blame"], "gross": [0.4, 0.2, 0.4]}
    better = cells_of(learning_report.control_table(comparison), "better")
    assert better["blame on the first wrong token"] == "**+10.00% [+10.00%, +10.00%]**"
    assert cells_of(table, "worse")["minus its control"].startswith("**-")


def test_table_of_fresh_seeds(comparison):
    """Against the baseline at its tuned rate, and against the control at the same one."""
    accuracies = {("GRPO", 1e-4): 0.5, ("GRPO", 2e-4): 0.4, ("better", 1e-4): 0.6, ("better", 2e-4): 0.7}
    fresh = [
        {**result(name, seed, accuracy + 0.01 * seed, "fresh", rate), "flawed": 0.09}
        for seed in range(10, 16)
        for (name, rate), accuracy in accuracies.items()
    ]
    controls = {"better": "not there"}
    made = learning_report.Comparison("Title", "here", [*comparison.runs, *fresh], "GRPO", "untrained", controls)
    assert made.differences("better") == comparison.differences("better")
    table = learning_report.fresh_table(made)
    assert [row.split("|")[1:3] for row in table.splitlines()[2:]] == [
        [" better ", " 0.0002 "],
        [" better ", " 0.0001, tuned "],
        [" GRPO ", " 0.0001, tuned "],
        [" GRPO ", " 0.0002 "],
    ]
    cells = cells_of(table, "better")
    assert cells["minus GRPO"] == "**+20.0% [+20.0%, +20.0%]**"
    assert cells["minus its control at this rate"] == "**+30.0% [+30.0%, +30.0%]**"
    assert (cells["seeds"], cells["p"], cells["its p"], cells["right by wrong work"]) == (
        "6",
        "0.031",
        "0.031",
        "9.0%",
    )
    baseline, other = ([cell.strip() for cell in row.split("|")[5:9]] for row in table.splitlines()[4:])
    assert baseline == ["", "", "", ""]
    assert other == ["**-10.0% [-10.0%, -10.0%]**", "0.031", "", ""]
    assert "### Fresh seeds" in learning_report.section(made, "figure.png")
    assert "### Fresh seeds" not in learning_report.section(comparison, "figure.png")


def test_small_p_values_are_not_0():
    assert learning_report.p_shown([1.0] * 8) == "0.008"
    assert learning_report.p_shown([1.0] * 12) == "<0.001"
    assert learning_report.p_shown([1.0]) == ""


def test_table_of_superseded_runs():
    runs = [{**result("GRPO", seed, 0.5 + 0.01 * seed), "strand": "here", "why": "a reason"} for seed in range(3)]
    runs += [{**result("GRPO", 0, 0.7, rate=2e-4), "strand": "here", "why": "another"}]
    assert learning_report.superseded_table(runs).splitlines()[2:] == [
        "| here | GRPO | 0.0001 | 3 | 51.0% [50.0%, 52.0%] | a reason |",
        "| here | GRPO | 0.0002 | 1 | 70.0% | another |",
    ]


def test_training_table(comparison):
    # The baseline goes from 0.1 to 0.6, so the threshold is 0.55, which means over three rewards (of 128 rollouts)
    # never reach.
    assert comparison.threshold == pytest.approx(0.55)
    rising = [result("fast", seed, 0.5, rewards=[0.1, 0.5, 0.6, 0.7, 0.8, 0.9]) for seed in range(4)]
    assert learning_report.window(rising[0]) == 3
    rising[3]["logs"]["reward"] = [0.1] * 6
    comparison.methods["fast"] = rising
    cells = cells_of(learning_report.training_table(comparison), "fast")
    assert cells["steps to reward 0.55"] == "4 (3 of 4 seeds)"
    assert cells["tokens to it"] == "0k (3 of 4 seeds)"
    assert cells_of(learning_report.training_table(comparison), "worse")["tokens to it"] == "not reached"
    assert cells_of(learning_report.training_table(comparison), "worse")["Jitter₂"] == "0.000"


def test_two_generation_batches_are_too_few_for_jitter(comparison):
    """As a method that generates further rounds may end off policy."""
    comparison.methods["short"] = [
        result("short", seed, 0.5, rewards=[None, 0.2, None, 0.3, None, None]) for seed in range(2)
    ]
    cells = cells_of(learning_report.training_table(comparison), "short")
    assert (cells["Jitter₂"], cells["residual"]) == ("nan", "0.1")


def test_a_baseline_that_learns_nothing_sets_no_threshold():
    runs = [result("GRPO", seed, 0.5, rewards=[0.6, 0.5, 0.4, 0.3, 0.2, 0.1]) for seed in range(2)]
    collapsed = learning_report.Comparison("Title", "here", runs, "GRPO", "untrained")
    assert cells_of(learning_report.training_table(collapsed), "GRPO")["steps to the reward"] == "not reached"


def test_summary(comparison):
    other = learning_report.Comparison("Other", "there", comparison.runs[:12], "GRPO", "untrained")
    summary = learning_report.summary([comparison, other])
    assert cells_of(summary, "better") == {"": "better", "Title": "**+5.0 [+5.0, +5.1]**", "Other": ""}
    assert cells_of(summary, "worse")["Title"] == "**-20.0 [-20.0, -20.0]**"


def test_text_between_marks(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("before <!-- a --> old <!-- b --> after")
    learning_report.write_between(file, "<!-- a -->", "new", "<!-- b -->")
    assert file.read_text() == "before <!-- a -->new<!-- b --> after"
    for begin, end in (("<!-- a -->", "<!-- c -->"), ("<!-- c -->", "<!-- b -->")):
        with pytest.raises(ValueError, match=r"page.md has no <!-- . --> with <!-- . --> after it"):
            learning_report.write_between(file, begin, "lost", end)
    assert file.read_text() == "before <!-- a -->new<!-- b --> after"


def test_what_a_method_gave(comparison):
    other = learning_report.Comparison("Other", "there", comparison.runs[:18], "GRPO", "untrained")
    assert learning_report.gave("better", [comparison, other]) == "+5.1 (here), +5.1 (there)"
    assert learning_report.gave("worse", [comparison, other]) == "-20.0 (here)"
    comparison.controls["better"] = "level"
    comparison.methods["level"] = [result("level", seed, 0.55 + 0.01 * seed) for seed in range(6)]
    assert learning_report.gave("better", [comparison]) == "+5.1 (here; not found to differ from its control)"
    assert learning_report.gave("undecided", [comparison, other]) == "no difference found"
    assert learning_report.gave("not run", [comparison, other]) == "not compared yet"
    comparison.methods["better"] = comparison.methods["better"][:5]
    assert learning_report.gave("better", [comparison]) == "not compared yet"


def test_blame_and_tuning_tables(comparison):
    comparison.methods["GRPO"][0]["blame"]["gross"] = [0.1, 0.5, 0.4]  # of six seeds
    blame = cells_of(learning_report.blame_table(comparison), "GRPO")
    assert (blame["gross: before"], blame["gross: on"], blame["net: on"]) == ("43.33%", "16.67%", "none")
    assert cells_of(learning_report.tuning_table(comparison), "GRPO") == {
        "learning rate": "GRPO",
        "0.0001": "50.0% (45.0%)",
    }
    shift = "gross: on, minus GRPO"
    assert blame[shift] == ""
    comparison.methods["worse"][1]["blame"]["gross"] = None
    worse = cells_of(learning_report.blame_table(comparison), "worse")
    assert worse[shift].startswith("-8.00% [")
    comparison.methods["worse"] = comparison.methods["worse"][:1]
    assert cells_of(learning_report.blame_table(comparison), "worse")[shift] == ""


def test_models_that_are_not_embedded_are_told_apart(tmp_path):
    """Runs from another warm start are other runs."""
    short = learning.Strand(learning.RICH, "off-policy", tmp_path, warm_start_steps=3)
    whole = learning.Strand(learning.RICH, "off-policy", tmp_path)
    assert (short.start, whole.start) == ("playground-rich-3", "playground-rich-4000")
    assert learning.Strand(learning.VARIED, "off-policy", tmp_path).start == ""
    one = learning.cell(learning.RICH, "off-policy", "GRPO", 1e-5, 0, "test")
    others = [replace(one, start=short.start), replace(one, start=whole.start), replace(one, problems=8)]
    assert len({_key(asdict(each)) for each in [one, *others]}) == 4
    assert learning_run.checkpoint_of(replace(one, start=short.start)) == learning_run.MADE / "playground-rich-3"


def test_learning_rates_are_tried_until_the_best_is_between_two():
    assert learning.best_rate({1e-4: [0.1, 0.3], 2e-4: [0.15, 0.35]}) == 2e-4
    assert learning.next_rate({1e-4: [0.1], 2e-4: [0.3], 4e-4: [0.2]}) is None
    assert learning.next_rate({1e-4: [0.1], 2e-4: [0.2], 4e-4: [0.3]}) == 8e-4
    assert learning.next_rate({1e-4: [0.3], 2e-4: [0.2], 4e-4: [0.1]}) == 5e-5
    assert learning.next_rate({learning.LIMITS[0]: [0.3], 2e-4: [0.2]}) is None


def test_the_best_learning_rate_and_those_beside_it_are_tried_with_more_seeds():
    """So that two unlucky seeds of the best do not hide it."""
    more = (102, 103, 104, 105)
    few = {5e-5: [0.1, 0.1], 1e-4: [0.3, 0.4], 2e-4: [0.2, 0.2], 4e-4: [0.3, 0.3]}
    assert learning.next_runs(few) == [(rate, seed) for rate in (5e-5, 1e-4, 2e-4) for seed in more]
    tried = {5e-5: [0.1] * 6, 1e-4: [0.3] * 6, 2e-4: [0.4] * 6}
    assert learning.next_runs({**tried, 4e-4: [0.3, 0.3]}) == [(4e-4, seed) for seed in more], "now it is another"
    assert learning.next_runs({**tried, 4e-4: [0.3] * 6}) == []
    assert learning.next_runs({**tried, 4e-4: [0.5] * 6}) == [(8e-4, 100), (8e-4, 101)], "now it is at the end"


def test_a_run_that_fails_is_no_candidate(tmp_path, monkeypatch):
    """A learning rate with which training breaks down counts as nothing right, and the rest goes on."""

    def run_all(cells, file, jobs, kept, run):
        results = [
            {"sampled": 0.5 - 100 * one.settings["learning_rate"]} if one.settings["learning_rate"] > 1e-4 else None
            for one in cells
        ]
        if None in results:
            raise RunsFailedError("broken", results)
        return results

    monkeypatch.setattr(learning, "run_all", run_all)
    strand = learning.Strand(learning.VARIED, "off-policy", tmp_path)
    assert strand.tune(["GRPO"]) == {"GRPO": 2e-4}
    assert set(strand.failures) == {"broken"}


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"a": [1.0, None, 0.30001]}, True),
        ({"a": [1.0, None, 0.302]}, False),
        ({"a": [1.0, 0.0, 0.3]}, False),
        ({"a": [1.0, None]}, False),
        ({"b": [1.0, None, 0.3]}, False),
    ],
)
def test_results_are_the_same_but_for_rounding(other, same):
    assert learning.same({"a": [1.0, None, 0.3]}, other) is same
    assert not learning.same({"a": 3}, {"a": 4})
    assert learning.same({"a": 1e-8}, {"a": 3e-8}), "rounding"


def test_protocol(tmp_path, monkeypatch):
    """What is run for a strand: the same grid for all, other seeds and problems for the report, the best rate."""
    asked = []

    def run_all(cells, file, jobs, kept, run):
        asked.extend(cells)
        peak = {"GRPO": 1e-4, "NTHR": 8e-4}
        return [
            {
                "name": one.name,
                "settings": one.settings,
                "sampled": -abs(one.settings["learning_rate"] - peak[one.name]),
            }
            if one.name in peak
            else {}
            for one in cells
        ]

    monkeypatch.setattr(learning, "run_all", run_all)
    monkeypatch.setattr(learning, "CONFIRMED", ("GRPO", "NTHR", "not asked for"))
    learning.Strand(learning.VARIED, "off-policy", tmp_path).compare(["GRPO", "NTHR"], seeds=8, fresh_seeds=3)
    tuning, reported, fresh = ([one for one in asked if one.split == split] for split in ("tune", "test", "fresh"))
    tried = Counter((one.name, one.settings["learning_rate"]) for one in tuning)
    assert tried == {
        **dict.fromkeys([("GRPO", rate) for rate in (5e-5, 1e-4, 2e-4)], 6),
        **dict.fromkeys([("NTHR", rate) for rate in (4e-4, 8e-4, 16e-4)], 6),
        **dict.fromkeys([("GRPO", 4e-4), ("NTHR", 1e-4), ("NTHR", 2e-4)], 2),
    }
    assert {one.seed for one in tuning}.isdisjoint({one.seed for one in reported})
    assert {(one.name, one.settings["learning_rate"]) for one in reported} == {
        ("untrained", 0.0),
        ("GRPO", 1e-4),
        ("NTHR", 8e-4),
    }
    assert len(reported) == 3 * 8
    assert Counter((one.name, one.settings["learning_rate"]) for one in fresh) == {
        (name, rate): 3 for name in ("GRPO", "NTHR") for rate in (1e-4, 8e-4)
    }
    assert {one.seed for one in fresh}.isdisjoint({one.seed for one in asked if one.split != "fresh"})


@pytest.mark.parametrize("regime", learning.REGIMES)
def test_compute_is_matched(regime):
    """No method changes what a regime or a task sets."""
    for name, settings in learning.COMPARED.items():
        made = learning.cell(learning.VARIED, regime, name, 1e-4, 200, "test").settings
        assert learning.REGIMES[regime].items() - {("max_completion_length", 64)} <= made.items()
        assert made["max_completion_length"] == task_named(learning.VARIED).max_completion_length
        assert settings.items() <= made.items()


def test_right_answers_are_counted_without_filler(monkeypatch):
    """Of two problems: three right answers in two forms, and none."""
    task = task_named(learning.VARIED)
    tokenizer = build_tokenizer(task.words)
    texts = ["(123456)\n1+2=3\n\\boxed{3}.", "(654321)\n1+2=3\n\\boxed{3}.", "(1)\nThen 1+2=3\n\\boxed{3}.", "1+2=4"]
    several = [tokenizer(text)["input_ids"] for text in texts]
    rewards = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0] * 4])
    monkeypatch.setattr(learning_run, "SAMPLES", 4)
    monkeypatch.setattr(learning_run, "answers", lambda *arguments: ([several, several], rewards))
    one = replace(learning.cell(learning.VARIED, "on-policy", "GRPO", 1e-4, 0, "tune"), problems=2)
    found = learning_run.evaluated(SimpleNamespace(processing_class=tokenizer), one, task)
    assert (found["distinct"], found["sampled"], found["pass"]) == ((2 + 0) / 2, 3 / 8, 1 / 2)
    assert found["variety"] == pytest.approx(2 / 3)


def test_right_answers_with_wrong_work():
    task, tokenizer = task_named(learning.NAME), build_tokenizer()
    lines = ("8-4=4\n4+8=12\n", "8-4=3\n3+8=12\n", "8-4=3\n3+8=11\n")
    answers = [tokenizer(f"{line}The answer is \\boxed{{12}}.<|im_end|>")["input_ids"] for line in lines]
    problems = Dataset.from_list([{"prompt": [{"role": "user", "content": "Compute 8-4+8."}]}] * 2)
    right = torch.tensor([[True, True, False], [False, True, False]])
    assert learning_run.flawed(task, tokenizer, problems, [answers] * 2, right) == pytest.approx(2 / 3)
    assert learning_run.flawed(task, tokenizer, problems, [answers] * 2, ~right & right) is None


def test_variety():
    """How often two right answers to a problem differ, over all pairs of all problems."""
    assert learning_run.variety([["a", "a", "b"], ["c", "c"], ["d"], []]) == 2 / 4
    assert learning_run.variety([["a"], []]) is None


@pytest.mark.parametrize(
    ("rounds", "generations", "spent"),
    [
        ([1] * 20, 8, 8),
        ([2] * 20, 4, 8),
        ([3] * 20, 3, 9),  # nearer than 6
        ([1, 4, 4, 4], 3, 9),
        ([4, 4, 4], 2, 8),
        ([7] * 20, 1, 7),  # nearer than 14
    ],
)
def test_budget_of_methods_that_generate_more(rounds, generations, spent):
    """Training ends at the generation batch with which it has generated most nearly what the others have."""
    budget = learning_run.Budget(rounds=8, rollouts=64, updates=2)
    control = SimpleNamespace(should_training_stop=False)
    for made, number in enumerate(rounds, 1):
        logs = {"balance/rounds": number, "completions/mean_length": 10.0}
        budget.on_log(None, SimpleNamespace(global_step=2 * made - 1), control, logs)
        assert not control.should_training_stop, "what is paid for is trained on"
        budget.on_log(None, SimpleNamespace(global_step=2 * made), control, {})
        if control.should_training_stop:
            break
    assert (made, budget.spent) == (generations, spent)
    assert budget.tokens[-1] == spent * 64 * 10
    assert len(budget.tokens) == 2 * generations


def test_trials_do_not_reach_the_page(monkeypatch, capsys):
    for arguments, message in ((["--steps", "2"], "--steps is for trying"), (["--check", "GRPO"], "takes one of")):
        monkeypatch.setattr(sys, "argv", ["learning.py", *arguments])
        with pytest.raises(SystemExit):
            learning.main()
        assert message in capsys.readouterr().err


def raises(cell, kept):
    if cell.seed == 1:
        raise ValueError("no luck")
    return {**asdict(cell), "sampled": 0.5}


def test_a_run_that_fails_takes_no_other_with_it(tmp_path):
    cells = [learning.Cell("GRPO", {}, seed) for seed in range(4)]
    with pytest.raises(
        RunsFailedError, match=r"1 of 4 runs failed; the others are kept. GRPO seed 1: .*no luck"
    ) as failed:
        run_all(cells, tmp_path / "runs.json", 1, run=raises)
    assert [run and run["seed"] for run in failed.value.results] == [0, None, 2, 3]
    assert [run["seed"] for run in json.loads((tmp_path / "runs.json").read_text())["runs"]] == [0, 2, 3]


def test_blame_of_a_step(tmp_path):
    """
    Two micro-batches of one group: a right rollout, the end of which is pushed down nevertheless, and one whose first
    wrong token is the fifth.
    """
    tokenizer = build_tokenizer()
    trainer = SimpleNamespace(
        processing_class=tokenizer,
        _monitor=SimpleNamespace(observers=[]),
        state=SimpleNamespace(global_step=0),
        accelerator=SimpleNamespace(sync_gradients=False),
    )
    watched = learning_run.Blame(trainer, task_named(learning.NAME))
    (observe,) = trainer._monitor.observers

    def micro_batch(answer, advantage):
        prompt, ids = (tokenizer(text, return_tensors="pt")["input_ids"] for text in ("Compute 8-4.", answer))
        rows = {"prompt_ids": prompt, "completion_ids": ids, "completion_mask": torch.ones_like(ids)}
        rows |= {"group_ids": torch.tensor([0]), "rollout_advantages": torch.tensor([advantage])}
        return torch.full(ids.shape, advantage), rows

    right = micro_batch("8-4=4\nThe answer is \\boxed{4}.<|im_end|>", 1.0)
    wrong = micro_batch("8-4=5\nThe answer is \\boxed{5}.<|im_end|>", -1.0)
    right[0][0, -1] = -1.0
    length = right[0].numel()
    observe(*right)
    assert watched.shares() == {"gross": None, "net": None}, "the step is not over"
    trainer.accelerator.sync_gradients = True
    observe(*wrong)
    after = length - 5
    assert watched.shares()["gross"] == pytest.approx([4 / length, 1 / length, after / length], abs=1e-4)
    net = torch.tensor([1.0, 1.0, after])
    assert watched.shares()["net"] == pytest.approx((net / net.sum()).tolist(), abs=1e-4)
    trainer.state.global_step = 1
    observe(*wrong)
    assert not watched.waiting, "not every step is looked at"


def test_oracle_credits_what_decides():
    """The results of right rollouts, the first wrong token of wrong ones, nothing of one that is cut off."""
    task = task_named(learning.VARIED)
    tokenizer = build_tokenizer(task.words)
    advantages = torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0])
    texts = (
        "(123456)\nThen 9-4 is 5\n5+8=13\nThe answer is \\boxed{13}.<|im_end|>",
        "(123456)\n9-4=5\n(65)\n5+8=3\nSo \\boxed{3}.<|im_end|>",
        "9-4=5\n5+8=13\n\\boxed{13}<|im_end|>",
        "9-4=5\n5+8=",
        "9-4=6\n6+8=13\n\\boxed{13}.<|im_end|>",  # two slips cancel
    )
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right")
    prompts = tokenizer(["Compute 9-4+8."] * len(texts), return_tensors="pt")["input_ids"]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rollouts = SimpleNamespace(prompt_ids=prompts, completion_ids=ids, mask=mask, advantages=advantages)
    credit = oracle.Oracle(task, tokenizer).coefficients(rollouts)
    credited = [
        tokenizer.convert_ids_to_tokens(row[one == 1]) for row, one in zip(batch["input_ids"], credit, strict=True)
    ]
    assert credited == [["5", "1", "3"], ["3"], ["<|im_end|>"], ["<|pad|>"], []]
    before = tokenizer.decode(batch["input_ids"][1, : credit[1].argmax()])
    assert before == "(123456)\n9-4=5\n(65)\n5+8="
    assert set(credit.unique().tolist()) == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", learning.SAME_ON_POLICY)
def test_left_out_on_policy_because_it_is_the_same(tmp_path, name):
    """The methods that are not run on policy would train what another one trains."""
    from trl_cancel import CancelGRPOConfig, CancelGRPOTrainer
    from trl_cancel.playground.data import load_prompts
    from trl_cancel.playground.reward import answer_reward

    def weights(of):
        one = learning.cell(learning.NAME, "on-policy", of, 1e-3, 0, "test")
        settings = {**one.settings, "max_steps": 2}
        trainer = CancelGRPOTrainer(
            learning_run.checkpoint_of(one),
            answer_reward,
            CancelGRPOConfig(output_dir=tmp_path, **settings),
            load_prompts("train", 64),
        )
        trainer.train()
        return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}

    for (key, value), other in zip(
        weights(name).items(), weights(learning.SAME_ON_POLICY[name]).values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=0, atol=2e-4, msg=key)


@pytest.mark.slow
def test_a_cell_repeats_itself():
    one = learning.cell(learning.NAME, "off-policy", "DelTA", 1e-4, 0, "test")
    one = replace(one, settings={**one.settings, "max_steps": 9})
    first, second = (json.loads(json.dumps(learning_run.run(one, learning.KEPT))) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert first["steps"] == 9
    assert sum(first["blame"]["gross"]) == pytest.approx(1, abs=1e-3)
    assert 0 < first["blame"]["gross"][1] < 0.2
    assert len(first["logs"]["reward"]) == 9


@strands
def test_reported_runs_follow_the_protocol(strand):
    """
    Each method's learning rate is the best of a finished tuning, no seed is in both, and the same seeds and the same
    compute are reported of all.
    """
    runs = strand.runs()
    tuning: dict = {}
    for run in runs:
        if run["split"] == "tune":
            rates = tuning.setdefault(run["name"], {})
            rates.setdefault(run["settings"]["learning_rate"], []).append(run["sampled"])
    for run in runs:
        assert (run["seed"] in learning.TUNING_SEEDS) == (run["split"] == "tune")
        assert run["task"] == strand.task
        if not strand.start:
            assert run["model"] == learning_run.digest(learning.CHECKPOINTS[strand.task]), "of another checkpoint"
        assert run.get("problems") is None
        if run["split"] == "test" and run["name"] != learning.UNTRAINED:
            made = learning.cell(
                strand.task, strand.regime, run["name"], learning.best_rate(tuning[run["name"]]), run["seed"], "test"
            )
            assert chosen(run["settings"]) == chosen(json.loads(json.dumps(made.settings)))
            assert learning.next_runs(tuning[run["name"]]) == [], "tuned"
    fresh = [run for run in runs if run["split"] == "fresh"]
    best = {name: learning.best_rate(rates) for name, rates in tuning.items()}
    asked = {(name, best[other]) for name in learning.CONFIRMED for other in learning.CONFIRMED if other in best}
    made = Counter((run["name"], run["settings"]["learning_rate"]) for run in fresh)
    assert made == dict.fromkeys(asked if fresh else (), len({run["seed"] for run in fresh}))
    assert {run["seed"] for run in fresh}.isdisjoint({run["seed"] for run in runs if run["split"] != "fresh"})
    reported = [run for run in runs if run["split"] == "test"]
    seeds = {name: sorted(run["seed"] for run in reported if run["name"] == name) for name in tuning}
    assert all(of_method == seeds[learning.BASELINE] for of_method in seeds.values() if of_method)
    one_round = [
        run for run in reported if run["name"] not in (learning.UNTRAINED, "reward-balanced", "dynamic sampling")
    ]
    assert len({(run["steps"], run["rollouts"]) for run in one_round}) == bool(one_round)


@pytest.mark.skipif(not STRANDS, reason="no results yet")
def test_pages_are_what_the_results_say(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for name in ("PAGE", "README"):
        committed = getattr(learning_report, name)
        copy = tmp_path / committed.relative_to(BENCHMARKS.parent)
        emptied = re.sub(r"(<!-- gave: .+? -->).*?(<!-- / -->)", r"\1\2", committed.read_text())
        copy.write_text(re.sub(r"(?s)(<!-- results -->).*(<!-- end of results -->)", r"\1\2", emptied))
        assert copy.read_text() != committed.read_text()
        monkeypatch.setattr(learning_report, name, copy)
    monkeypatch.setattr(learning, "PAGE", learning_report.PAGE)
    learning.write_results(learning.RESULTS)
    for name in ("README.md", "docs/results.md"):
        assert (tmp_path / name).read_text() == (BENCHMARKS.parent / name).read_text()
