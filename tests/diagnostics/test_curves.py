"""Reading runs, and their curves as numbers, against slow explicit loops."""

import json
import math

import numpy as np
import pytest
import torch

from trl_cancel.diagnostics import jitter2
from trl_cancel.diagnostics.reports.comparison import compare, short_count
from trl_cancel.diagnostics.reports.curves import (
    band,
    default_threshold,
    default_window,
    estimate,
    first_reaching,
    moving_average,
    smoothed,
    summarize,
)
from trl_cancel.diagnostics.reports.runs import Run, Series, distinguish, find_state, read_run


def run(rewards=(), source="run", every=1, results=None, steps=None, **metrics):
    """A run that has logged these values, 100 tokens a step."""
    logs = [
        {"step": (index + 1) * every, "num_tokens": 100.0 * (index + 1) * every, "reward": reward}
        | {name: values[index] for name, values in metrics.items()}
        for index, reward in enumerate(rewards)
    ]
    return Run(source, steps or len(logs) * every, logs, results or {})


def noisy(seed, length=50, low=0.2, high=0.8):
    noise = torch.rand(length, generator=torch.Generator().manual_seed(seed)).tolist()
    return [low + (high - low) * index / length + 0.1 * value for index, value in enumerate(noise)]


def write(folder, logs, name="trainer_state.json", **state):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"global_step": len(logs), "log_history": logs, **state}))
    return folder


# Jitter2


@pytest.mark.parametrize("length", [3, 4, 50])
def test_jitter2_is_its_formula(length):
    series = noisy(0, length)
    total = 0.0
    for t in range(length - 2):
        total += abs(series[t + 2] - 2 * series[t + 1] + series[t])
    expected = total / (length - 2)
    assert jitter2(series) == pytest.approx(expected, rel=1e-12)
    assert jitter2(torch.tensor(series, dtype=torch.double)) == pytest.approx(expected, rel=1e-12)
    assert jitter2(np.array(series)) == pytest.approx(expected, rel=1e-12)


def test_jitter2_of_known_curves():
    assert jitter2([0, 5, 10, 15]) == 0  # straight
    assert jitter2([0, 1, 0, 1, 0]) == 2  # as rough as it gets
    assert jitter2(torch.tensor([1, 4, 9, 16])) == 2


@pytest.mark.parametrize("series", [[], [1.0], [1.0, 2.0], torch.zeros(3, 3)])
def test_jitter2_refuses(series):
    with pytest.raises(ValueError, match="at least 3 values"):
        jitter2(series)


# Smoothing and thresholds


@pytest.mark.parametrize("window", [1, 2, 7, 50])
def test_moving_average_is_its_definition(window):
    values = noisy(1)
    expected = []
    for end in range(window, len(values) + 1):
        total = 0.0
        for index in range(end - window, end):
            total += values[index]
        expected.append(total / window)
    assert moving_average(values, window) == pytest.approx(expected, rel=1e-12)


def test_a_mean_belongs_to_its_last_log():
    series = Series([2, 4, 6, 8], [0.0, 1.0, 0.0, 1.0], [20.0, 40.0, 60.0, 80.0])
    assert smoothed(series, 2) == Series([4, 6, 8], [0.5, 0.5, 0.5], [40.0, 60.0, 80.0])
    assert smoothed(series, 1) == series
    assert smoothed(series, 3) == series  # shorter than two windows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.95])
def test_first_step_at_the_threshold(seed, window, threshold):
    values = noisy(seed)
    expected = None
    for end in range(window, len(values) + 1):
        if expected is None and sum(values[end - window : end]) / window >= threshold:
            expected = 3 * end
    summary = summarize(run(values, every=3), [], window, threshold)
    assert summary["steps_to_threshold"] == expected
    assert summary["tokens_to_threshold"] == (expected and 100 * expected)
    assert (expected is None) == (threshold == 0.95)


def test_reaching_is_not_crossing():
    constant = Series([1, 2, 3, 4], [0.7] * 4, None)
    assert first_reaching(smoothed(constant, 2), 0.7) == 0
    assert first_reaching(constant, 0.71) is None


def tenth(values, last=False):
    count = max(1, len(values) // 10)
    part = values[-count:] if last else values[:count]
    return sum(part) / count


def test_default_threshold_is_its_definition():
    """Means over seeds of the first and the last tenth; the lowest start and the highest end."""
    curves = {"a": [noisy(0), noisy(1)], "b": [noisy(2, high=0.9), noisy(3, high=0.7)], "c": [noisy(4, high=0.3)]}
    starts, ends = [], []
    for several in curves.values():
        starts.append(sum(tenth(values) for values in several) / len(several))
        ends.append(sum(tenth(values, last=True) for values in several) / len(several))
    threshold = default_threshold({name: [run(values) for values in several] for name, several in curves.items()})
    assert threshold.value == pytest.approx(min(starts) + 0.9 * (max(ends) - min(starts)), rel=1e-12)
    assert f"{min(starts):.3g}" in threshold.reason
    assert f"{max(ends):.3g}" in threshold.reason


@pytest.mark.parametrize("rewards", [[0.5] * 20, [0.9 - index / 30 for index in range(20)], [0.5], []])
def test_no_threshold_without_progress(rewards):
    assert default_threshold({"a": [run(rewards, loss=[1.0] * len(rewards))]}) is None


def test_default_window():
    assert default_window([run(noisy(0, 80)), run(noisy(0, 45)), run()]) == 4
    assert default_window([run(noisy(0, 5))]) == 1
    assert default_window([run()]) == 1


# Seeds


def test_band_of_curves_on_the_same_steps():
    values = np.array([noisy(seed) for seed in range(3)])
    steps = list(range(1, 51))
    found = band([(steps, row) for row in values])
    assert found.x.tolist() == steps
    assert found.mean == pytest.approx(values.mean(0))
    assert found.low == pytest.approx(values.min(0))
    assert found.high == pytest.approx(values.max(0))


def test_band_interpolates_over_the_shared_range():
    found = band([([0, 10, 20], [0.0, 1.0, 2.0]), ([5, 15, 25], [1.0, 1.0, 1.0])])
    assert found.x.tolist() == [5, 10, 15, 20]
    assert found.mean.tolist() == [0.75, 1.0, 1.25, 1.5]
    assert found.low.tolist() == [0.5, 1.0, 1.0, 1.0]
    assert found.high.tolist() == [1.0, 1.0, 1.5, 2.0]
    assert band([([1, 2], [0.0, 0.0]), ([3, 4], [0.0, 0.0])]).x.size == 0


def test_estimate_over_seeds():
    mean, low, high = estimate([0.1, 0.2, 0.6])
    assert mean == pytest.approx(0.3)
    assert 0.1 <= low < mean < high <= 0.6
    assert estimate([0.1, 0.2, 0.6]) == (mean, low, high)


# One run


def test_summary_is_its_definition():
    rewards, entropies = noisy(0, 40), noisy(1, 40)
    results = {"after": {"greedy": [0.8, 0.7, 0.9], "sampled": [0.5, 0.4, 0.6]}, "seconds": 12.5}
    summary = summarize(run(rewards, entropy=entropies, every=4, results=results), ["reward", "entropy", "kl"], 4, 0.5)
    assert summary["steps"] == 160
    assert summary["tokens"] == 16000
    assert summary["last/reward"] == pytest.approx(sum(rewards[-4:]) / 4)
    assert summary["last/entropy"] == pytest.approx(sum(entropies[-4:]) / 4)
    assert summary["last/kl"] is None
    assert (summary["greedy"], summary["sampled"], summary["seconds"]) == (0.8, 0.5, 12.5)
    assert summary["jitter2"] == jitter2(rewards)


def test_summary_of_a_run_that_logs_little():
    bare = Run("run", 3, [{"step": 3, "train_loss": 0.1, "train_runtime": 7.5}], {"after": None})
    summary = summarize(bare, ["reward"], 1, 0.5)
    assert summary["seconds"] == 7.5
    assert {name for name, value in summary.items() if value is not None} == {"steps", "seconds"}


def test_series_leave_out_what_is_no_number():
    logs = [
        {"step": 1, "reward": 0.1},
        {"step": 2, "reward": float("nan"), "num_tokens": 5},
        {"step": 3, "reward": None},
        {"step": 4, "reward": "high", "done": True},
        {"step": 6, "reward": 0.3, "num_tokens": 9},
        {"step": 5, "reward": 1},
        {"step": 5, "reward": 2},
        {"step": 7, "loss": float("inf")},
    ]
    found = Run("run", 7, logs, {})
    assert found.series("reward") == Series([1, 5, 6], [0.1, 2.0, 0.3], None)  # not all of them know their tokens
    assert found.series("loss") is None
    assert found.series("done") is None
    assert found.metrics() == {"reward", "num_tokens"}
    assert found.tokens == 9


def test_where_logs_are_found(tmp_path):
    logs = [{"step": 1, "reward": 0.5}]
    whole = write(tmp_path / "whole", logs)
    write(tmp_path / "parts" / "checkpoint-9", logs)
    latest = write(tmp_path / "parts" / "checkpoint-10", logs)
    write(tmp_path / "parts" / "checkpoint-old", logs)
    state = "trainer_state.json"
    assert find_state(whole) == find_state(whole / state) == whole / state
    assert find_state(tmp_path / "parts") == find_state(latest) == latest / state
    assert read_run(tmp_path / "parts").source == latest / state


def test_results_of_a_run(tmp_path):
    write(tmp_path, [{"step": 1, "reward": 0.5}])
    assert read_run(tmp_path).results == {}
    for results, score in (
        ({"after": {"greedy": [0.8, 0.7, 0.9]}}, (0.8, 0.7, 0.9)),
        ({"after": None}, None),
        ({"after": 0.5}, None),
        ({"after": {"greedy": 0.5}}, None),
        ({"after": {"greedy": [0.5, None, None]}}, None),
        ([], None),
    ):
        (tmp_path / "all_results.json").write_text(json.dumps(results))
        assert read_run(tmp_path).score("greedy") == score


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no log_history"),
        ("{}", "no log_history"),
        ('{"log_history": 3}', "no log_history"),
        ('{"log_history": [{"reward": 1}]}', "no log_history"),
        ('{"log_history": [1]}', "no log_history"),
        ('{"log_history": []}', "nothing was logged; train with smaller logging_steps"),
    ],
)
def test_logs_that_cannot_be_read(text, message, tmp_path):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_run(tmp_path)
    assert str(tmp_path / "trainer_state.json") in str(raised.value)


def test_logs_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="there is no such file or folder"):
        find_state(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="Give the output folder of a training run"):
        find_state(tmp_path)
    write(tmp_path / "inside", [{"step": 1, "reward": 0.5}])
    with pytest.raises(ValueError, match=r"did you mean .*inside\?"):
        find_state(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_run(tmp_path / "binary.json")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a"], ["a"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["runs/a/out", "runs/b/out"], ["a", "b"]),
        (["x/a/1/out", "x/b/2/out"], ["a/1", "b/2"]),
        (["runs", "runs/a"], ["runs", "runs/a"]),
        (["x/a", "x/a/a"], ["a", "a/a"]),
        (["x/a/b", "x/a/c/b"], ["b", "c/b"]),
        (["x/a/b", "x/c/b", "x/a/d"], ["a/b", "c/b", "a/d"]),
        ([], []),
    ],
)
def test_names_of_paths(paths, names, tmp_path):
    assert distinguish([tmp_path / path for path in paths]) == names


def test_names_of_files(tmp_path):
    for name in ("trainer_state.json", "other.json"):
        write(tmp_path / "a", [], name=name)
    assert distinguish([tmp_path / "a" / "trainer_state.json", tmp_path / "b"]) == ["a", "b"]
    assert distinguish([tmp_path / "a" / "other.json", tmp_path / "b"]) == ["a/other", "b"]


# Comparison


def cells(comparison):
    """The table, by row and column."""
    header, rows = comparison.table()
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def test_table_of_single_runs():
    results = {"after": {"greedy": [0.8, 0.7, 0.9]}}
    fast = run([0.0, *[1.0] * 39], "fast", results=results, entropy=[0.5] * 40)
    slow = run([0.0] * 40, "slow")
    table = cells(compare({"fast": [fast], "slow": [slow]}, threshold=0.5))
    assert table["reward at the end"] == {"fast": "1", "slow": "0"}
    assert table["entropy at the end"] == {"fast": "0.5", "slow": "—"}
    assert table["test score, greedy"] == {"fast": "0.8 [0.7, 0.9]", "slow": "—"}
    assert table["steps to reward 0.5"] == {"fast": "4", "slow": "not reached"}  # a window of 4 logs
    assert table["tokens to reward 0.5"] == {"fast": "400", "slow": "not reached"}
    assert "test score, sampled" not in table
    assert "shared-prefix residual at the end" not in table


def test_table_of_seeds():
    seeds = [run(noisy(seed), f"seed {seed}") for seed in range(3)]
    comparison = compare({"same": [seeds[0], run(noisy(0), "again")], "three": seeds}, threshold=0.6)
    table = cells(comparison)
    assert table["reward at the end"]["same"].count("[") == 0  # equal seeds have no spread
    mean = sum(tenth(noisy(seed), last=True) for seed in range(3)) / 3
    assert table["reward at the end"]["three"].startswith(f"{mean:.3g} [")
    assert table["optimizer steps"] == {"same": "50", "three": "50"}
    assert "[" in table["steps to reward 0.6"]["three"]
    assert any("intervals over seeds" in note for note in comparison.notes())


def test_no_mean_over_the_seeds_that_got_there():
    seeds = [run([0.0] * 5 + [1.0] * 5, "a"), run([0.0] * 10, "b")]
    table = cells(compare({"method": seeds, "other": [run([0.0] * 10, "c")]}, threshold=0.5))
    assert table["steps to reward 0.5"] == {"method": "1 of 2 seeds", "other": "not reached"}


def test_a_metric_that_some_seeds_have():
    seeds = [run(noisy(0), "a", entropy=[0.5] * 50), run(noisy(1), "b")]
    assert cells(compare({"method": seeds}))["entropy at the end"]["method"] == "0.5 (1 of 2 seeds)"


def test_runs_without_rewards():
    comparison = compare({"a": [Run("a", 1, [{"step": 1, "loss": 0.5}], {})]}, metrics=["loss"])
    assert comparison.threshold is None
    assert not any("hreshold" in note for note in comparison.notes())
    assert cells(comparison)["loss at the end"] == {"a": "0.5"}


def test_notes_say_what_differs():
    methods = {"a": [run(noisy(0), "a")], "b": [run(noisy(0, 25), "b", every=4)]}
    notes = " ".join(compare(methods).notes())
    assert "The runs have 50 to 100 steps" in notes
    assert "The reward is logged every 1 to 4 steps: Jitter2 cannot be compared" in notes
    assert "nine tenths of the way from the lowest start" in notes
    assert "as given" in " ".join(compare(methods, threshold=0.3).notes())
    assert "No threshold" in " ".join(compare({"a": [run([0.5] * 9, "a")]}).notes())


def test_everything_as_json():
    methods = {
        "a": [run(noisy(seed), f"seed {seed}") for seed in range(2)],
        "b": [run([0.5] * 3, "b", loss=[1, 2, 3])],
    }
    written = json.loads(json.dumps(compare(methods, ["loss"], window=1).as_dict(), allow_nan=False))
    assert written["smooth"] == 1
    assert written["methods"]["a"]["runs"][1]["series"]["reward"]["values"] == noisy(1)
    assert written["methods"]["a"]["mean"]["last/reward"]["runs"] == 2
    assert len(written["methods"]["a"]["mean"]["last/reward"]["interval"]) == 2
    assert written["methods"]["b"]["mean"]["last/reward"] == {"value": 0.5, "interval": None, "runs": 1}
    assert written["methods"]["b"]["runs"][0]["series"]["loss"]["steps"] == [1, 2, 3]
    assert written["methods"]["a"]["mean"]["last/loss"] == {"value": None, "interval": None, "runs": 0}


@pytest.mark.parametrize(
    ("metrics", "window", "message"),
    [
        (["entropie"], None, r"metric=entropie: no run has logged it; did you mean entropy\?"),
        (["zzz"], None, "metric=zzz: no run has logged it; there are entropy, num_tokens, reward"),
        ([], 26, "smooth=26: name has logged the reward 50 times; use at most 25"),
    ],
)
def test_what_cannot_be_compared(metrics, window, message):
    with pytest.raises(ValueError, match=message):
        compare({"a": [run(noisy(0), "name", entropy=noisy(1))]}, metrics, window)


def test_usual_metrics_may_be_named_too():
    methods = {"a": [run([0.5], "a", **{"completions/mean_length": [40.0]})]}
    assert compare(methods, ["completions/mean_length", "reward"], window=1).metrics == compare(methods).metrics


def test_a_run_with_none_of_the_metrics():
    runs = {"a": [run(noisy(0), "a")], "b": [Run("b", 1, [{"step": 1, "train_loss": 1.0}], {})]}
    with pytest.raises(ValueError, match="b: has logged none of reward"):
        compare(runs)
    with pytest.raises(ValueError, match="b: has logged none of reward, completions/mean_length"):
        compare({"b": runs["b"]})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (53.4, "53"),
        (9999, "9999"),
        (16600, "16.6k"),
        (999999, "1M"),
        (130146.5, "130k"),
        (1234567, "1.23M"),
        (2e9, "2B"),
    ],
)
def test_short_counts(value, text):
    assert short_count(value) == text


def test_infinite_values_never_reach_the_numbers():
    found = run([0.1, math.inf, 0.3, math.nan, 0.5], "a")
    assert found.series("reward").values == [0.1, 0.3, 0.5]
    json.dumps(compare({"a": [found]}).as_dict(), allow_nan=False)
