"""The tables and figures of `docs/results.md`, from the runs of `learning.py`."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from runs import interval

from trl_cancel.diagnostics.blame import PLACES
from trl_cancel.diagnostics.reports.curves import WAY, band, first_tenth, last_tenth, smoothed, summarize
from trl_cancel.diagnostics.reports.figures import COLOURS, new_figure
from trl_cancel.diagnostics.reports.runs import Run
from trl_cancel.evaluation import mean_with_interval


PAGE = Path(__file__).parents[1] / "docs" / "results.md"
README = PAGE.parents[1] / "README.md"
SUMMARY = (
    "Sampled accuracy (avg@8) minus that of GRPO with the same seed, in points: means and 95% paired bootstrap intervals "
    "over seeds; bold where a sign-flip test finds a difference (p < 0.05)."
)
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
SMOOTHED = 384  # rollouts of the moving average of rewards
LEVEL, FEWEST = 0.05, 6  # of the sign-flip tests, and the pairs it takes to find something
COLLAPSE = 0.5  # of the accuracy before the training: a run that ends below has collapsed
Result = dict[str, Any]


def on_first_wrong(run: Result) -> float | None:
    """The share of the push downwards, before it cancels, that lands on the first wrong token."""
    return run["blame"]["gross"] and run["blame"]["gross"][PLACES.index("on")]


def rate_of(run: Result) -> float:
    return run["settings"]["learning_rate"]


def paired(
    runs: Sequence[Result], others: Sequence[Result], measure: Callable[[Result], float | None] = itemgetter("sampled")
) -> list[float]:
    """What a measure of some runs is more than that of others, seed by seed, where both have a value."""
    first, second = (
        {run["seed"]: value for run in several if (value := measure(run)) is not None} for several in (runs, others)
    )
    return [value - second[seed] for seed, value in first.items() if seed in second]


class Comparison:
    """
    The finished runs of one task in one regime.

    Args:
        title, short (`str`):
            What they are called, in a heading and in a cell of a table.
        runs (`list[dict]`):
            All runs, those of the tuning and the untrained ones too.
        baseline, untrained (`str`):
            Names of the method that the others are compared with, and of the runs without training.
        controls (`dict[str, str]`, *optional*):
            Of some methods, the one that lacks just what they add.
    """

    def __init__(
        self,
        title: str,
        short: str,
        runs: list[Result],
        baseline: str,
        untrained: str,
        controls: dict[str, str] | None = None,
    ):
        self.title, self.short, self.runs, self.baseline = title, short, runs, baseline
        reported = [run for run in runs if run["split"] == "test"]
        twice = [one for one, count in Counter((run["name"], run["seed"]) for run in reported).items() if count > 1]
        if twice:
            raise ValueError(f"{title} has several runs of {twice[0]}; keep those of one learning rate and setting.")
        self.before = {run["seed"]: run["sampled"] for run in reported if run["name"] == untrained}
        self.methods: dict[str, list[Result]] = {}
        for run in sorted(reported, key=lambda run: run["seed"]):
            if run["name"] != untrained:
                self.methods.setdefault(run["name"], []).append(run)
        # Those with fresh seeds, by name and learning rate.
        self.fresh: dict[tuple[str, float], list[Result]] = {}
        for run in sorted(runs, key=lambda run: run["seed"]):
            if run["split"] == "fresh":
                self.fresh.setdefault((run["name"], rate_of(run)), []).append(run)
        self.controls = {
            name: control
            for name, control in (controls or {}).items()
            if name in self.methods and control in self.methods
        }
        self.threshold = self._threshold()

    def _threshold(self) -> float | None:
        """Nine tenths of the way from the first to the last rewards of the baseline, if that goes up."""
        rewards = [series for run in self.methods[self.baseline] if (series := as_run(run).series("reward"))]
        start = statistics.mean(map(first_tenth, rewards))
        end = statistics.mean(map(last_tenth, rewards))
        return start + WAY * (end - start) if end > start else None

    def differences(
        self, name: str, other: str | None = None, measure: Callable[[Result], float | None] = itemgetter("sampled")
    ) -> list[float]:
        """
        What a measure of a method, its sampled accuracy if none is given, is more than that of another one or the
        baseline, seed by seed.
        """
        return paired(self.methods[name], self.methods[other or self.baseline], measure)

    def ranked(self) -> list[str]:
        """The methods, the best first."""
        return sorted(self.methods, key=lambda name: -mean(self.methods[name], "sampled"))


def as_run(result: Result) -> Run:
    """As what a training has logged; `learning.py` logs every optimizer step."""
    names = ["num_tokens" if name == "generated_tokens" else name for name in result["logs"]]
    logs = [
        {"step": step, **dict(zip(names, values, strict=True))}
        for step, values in enumerate(zip(*result["logs"].values(), strict=True), 1)
    ]
    return Run(Path(), result["steps"], logs, {})


def mean(runs: Sequence[Result], measure: str) -> float:
    """Over the runs that have a value; not a number if none has."""
    values = [run[measure] for run in runs if run[measure] is not None]
    return statistics.mean(values) if values else math.nan


def p_value(differences: Sequence[float]) -> float:
    """
    The exact two-sided sign-flip test of paired differences (Fisher's randomization test): how often their mean would be
    as far from 0, if the sign of each were a coin's. It keeps its level with few pairs, which percentile bootstrap
    intervals do not; with fewer than six it finds nothing at 5%.
    """
    values = torch.tensor(differences, dtype=torch.double)
    pairs = torch.arange(len(values))
    flips = 1 - 2 * (torch.arange(2 ** len(values)).unsqueeze(1) >> pairs & 1)
    sums = flips.double() @ values
    return (sums.abs() >= values.sum().abs() * (1 - 1e-9)).double().mean().item()


def p_shown(differences: Sequence[float]) -> str:
    if len(differences) < 2:
        return ""
    p = p_value(differences)
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def found(differences: Sequence[float]) -> bool:
    return p_value(differences) < LEVEL


def shown(differences: Sequence[float], form: str = "{:+.1%}") -> str:
    """Their mean and interval, bold where a difference is found; nothing if there are less than two."""
    if len(differences) < 2:
        return ""
    cell = interval(list(differences), form)
    return f"**{cell}**" if found(differences) else cell


def window(run: Result) -> int:
    """How many logged rewards the moving average takes."""
    rewards = sum(reward is not None for reward in run["logs"]["reward"])
    return max(1, round(SMOOTHED * rewards / run["rollouts"]))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def accuracy_table(comparison: Comparison) -> str:
    minus = f"minus {comparison.baseline}"
    header = ["", "learning rate", "seeds", "sampled, avg@8", minus, "p", "greedy", f"greedy {minus}"]
    rows = []
    for name in comparison.ranked():
        runs = comparison.methods[name]
        sampled, greedy = comparison.differences(name), comparison.differences(name, measure=itemgetter("greedy"))
        compared = name != comparison.baseline and len(sampled) > 1
        rows.append(
            [
                name,
                f"{rate_of(runs[0]):g}",
                str(len(runs)),
                interval([run["sampled"] for run in runs]),
                *((shown(sampled), p_shown(sampled)) if compared else ("", "")),
                interval([run["greedy"] for run in runs]),
                shown(greedy) if compared else "",
            ]
        )
    return table(header, rows)


def fresh_table(comparison: Comparison) -> str:
    """What came out best, with seeds of its own and at the learning rates of all that are compared here."""
    minus = f"minus {comparison.baseline}"
    header = ["", "learning rate", "seeds", "sampled, avg@8", minus, "p", "minus its control at this rate", "its p"]
    header += ["greedy", f"greedy {minus}", "right by wrong work"]
    tuned = {name: rate_of(runs[0]) for name, runs in comparison.methods.items()}
    baseline = comparison.fresh[comparison.baseline, tuned[comparison.baseline]]
    rows = []
    for (name, rate), runs in sorted(comparison.fresh.items(), key=lambda item: -mean(item[1], "sampled")):
        control = None
        if name != comparison.baseline:
            control = comparison.fresh.get((comparison.controls.get(name, comparison.baseline), rate))
        more = paired(runs, baseline) if runs is not baseline else []
        than_control = paired(runs, control) if control else []
        rows.append(
            [
                name,
                f"{rate:g}{', tuned' if rate == tuned[name] else ''}",
                str(len(runs)),
                interval([run["sampled"] for run in runs]),
                shown(more),
                p_shown(more),
                shown(than_control),
                p_shown(than_control),
                interval([run["greedy"] for run in runs]),
                "" if runs is baseline else shown(paired(runs, baseline, itemgetter("greedy"))),
                f"{mean(runs, 'flawed'):.1%}",
            ]
        )
    return table(header, rows)


def variety_table(comparison: Comparison) -> str:
    header = ["", "pass@8", "distinct right answers of 8", "variety", "collapsed"]
    rows = []
    for name in comparison.ranked():
        runs = comparison.methods[name]
        paired = [(run["sampled"], comparison.before[run["seed"]]) for run in runs if run["seed"] in comparison.before]
        rows.append(
            [
                name,
                interval([run["pass"] for run in runs]),
                f"{mean(runs, 'distinct'):.2f}",
                f"{mean(runs, 'variety'):.2f}",
                f"{sum(after < COLLAPSE * before for after, before in paired)} of {len(paired)}",
            ]
        )
    return table(header, rows)


def control_table(comparison: Comparison) -> str:
    """What a method has more than the one that lacks just what it adds."""
    header = ["", "its control", "learning rates", "minus its control", "p", "blame on the first wrong token"]
    rows = []
    for name, control in comparison.controls.items():
        differences = comparison.differences(name, control)
        if len(differences) > 1:
            rates = [f"{rate_of(comparison.methods[one][0]):g}" for one in (name, control)]
            blame = shown(comparison.differences(name, control, on_first_wrong), "{:+.2%}")
            rows.append([name, control, " / ".join(rates), shown(differences), p_shown(differences), blame])
    return table(header, rows)


def training_table(comparison: Comparison) -> str:
    reward = "the reward" if comparison.threshold is None else f"reward {comparison.threshold:.2f}"
    header = ["", "rollouts", "tokens generated", "steps", f"steps to {reward}", "tokens to it"]
    header += ["Jitter₂", "entropy at the end", "residual"]
    rows = []
    for name in comparison.ranked():
        runs = comparison.methods[name]
        summaries = [
            summarize(as_run(run), ("cancel/shared_prefix_residual",), window(run), comparison.threshold)
            for run in runs
        ]
        rows.append(
            [
                name,
                f"{mean(runs, 'rollouts'):.0f}",
                f"{mean(runs, 'generated_tokens') / 1000:.0f}k",
                f"{mean(runs, 'steps'):.0f}",
                reached(summaries, "steps_to_threshold", "{:.0f}".format),
                reached(summaries, "tokens_to_threshold", lambda tokens: f"{tokens / 1000:.0f}k"),
                f"{mean(summaries, 'jitter2'):.3f}",
                f"{mean(runs, 'entropy'):.3f}",
                f"{mean(summaries, 'last/cancel/shared_prefix_residual'):.2g}",
            ]
        )
    return table(header, rows)


def reached(summaries: list[dict[str, Any]], name: str, form: Callable[[float], str]) -> str:
    """The mean over the seeds that reached the threshold, and how many did."""
    there = [summary[name] for summary in summaries if summary[name] is not None]
    if not there:
        return "not reached"
    some = f" ({len(there)} of {len(summaries)} seeds)" if len(there) < len(summaries) else ""
    return form(statistics.mean(there)) + some


def blame_table(comparison: Comparison) -> str:
    header = ["", *(f"{kind}: {place}" for kind in ("gross", "net") for place in PLACES)]
    header += [f"gross: on, minus {comparison.baseline}"]
    rows = []
    for name in comparison.ranked():
        cells = [name]
        for kind in ("gross", "net"):
            shares = [run["blame"][kind] for run in comparison.methods[name] if run["blame"][kind]]
            means = [statistics.mean(place) for place in zip(*shares, strict=True)] if shares else []
            cells += [f"{share:.2%}" for share in means] or ["none"] * len(PLACES)
        compared = name != comparison.baseline
        cells += [shown(comparison.differences(name, measure=on_first_wrong), "{:+.2%}") if compared else ""]
        rows.append(cells)
    return table(header, rows)


def tuning_table(comparison: Comparison) -> str:
    """Mean accuracies over the tuning seeds, and in parentheses the lowest."""
    tuning: dict[str, dict[float, list[float]]] = {}
    for run in comparison.runs:
        if run["split"] == "tune":
            rates = tuning.setdefault(run["name"], {})
            rates.setdefault(rate_of(run), []).append(run["sampled"])
    tried = sorted({rate for rates in tuning.values() for rate in rates})
    rows = [
        [
            name,
            *(
                f"{statistics.mean(rates[rate]):.1%} ({min(rates[rate]):.1%})" if rate in rates else ""
                for rate in tried
            ),
        ]
        for name, rates in tuning.items()
    ]
    return table(["learning rate", *(f"{rate:g}" for rate in tried)], rows)


def draw(comparison: Comparison, file: Path, followed: Sequence[str]) -> None:
    """The differences from the baseline with their intervals, and the rewards of some methods during training."""
    names = [
        name
        for name in reversed(comparison.ranked())
        if name != comparison.baseline and len(comparison.methods[name]) > 1
    ]
    figure, (left, right) = new_figure(11, 1.2 + 0.26 * max(len(names), 10), columns=2)
    for row, name in enumerate(names):
        differences = comparison.differences(name)
        middle, low, high = mean_with_interval(torch.tensor(differences).unsqueeze(1))
        colour = COLOURS["neutral" if not found(differences) else "green" if middle > 0 else "boosted"]
        left.plot([100 * low, 100 * high], [row, row], color=colour, linewidth=2)
        left.plot(100 * middle, row, "o", color=colour)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(range(len(names)), names)
    left.set_xlabel(f"sampled accuracy minus that of {comparison.baseline}, points, 95% intervals")
    for name, colour in zip([name for name in followed if name in comparison.methods], COLOURS.values(), strict=False):
        rewards = [(run, as_run(run).series("reward")) for run in comparison.methods[name]]
        series = [smoothed(one, window(run)) for run, one in rewards if one]
        curve = band([(one.tokens or one.steps, one.values) for one in series])
        right.plot(curve.x / 1000, curve.mean, color=colour, label=name)
        right.fill_between(curve.x / 1000, curve.low, curve.high, color=colour, alpha=0.12, linewidth=0)
    if comparison.threshold is not None:
        right.axhline(comparison.threshold, color="black", linewidth=0.8, linestyle=":")
    right.set_xlabel("thousand tokens generated")
    right.set_ylabel("reward: mean and range of the seeds")
    right.legend(frameon=False, fontsize="small")
    figure.suptitle(comparison.title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100, facecolor="white", metadata={"Software": None})


def section(comparison: Comparison, figure: str) -> str:
    """Its part of the page."""
    before = statistics.mean(comparison.before.values()) if comparison.before else math.nan
    seconds = sum(run["seconds"]["all"] for run in comparison.runs)
    alt = "differences from the baseline with intervals, and rewards during training"
    parts = [
        f"## {comparison.title}",
        f"Sampled accuracy before the training: {before:.1%}. {len(comparison.runs)} runs took "
        f"{seconds / 3600:.1f} hours, added up, tuning and evaluation included.",
        f"![{comparison.title}: {alt}]({figure})",
        accuracy_table(comparison),
        *(("### Fresh seeds", fresh_table(comparison)) if comparison.fresh else ()),
        "### Variety and collapses",
        variety_table(comparison),
        "### Against its own control",
        control_table(comparison),
        "### The training",
        training_table(comparison),
        "### Blame",
        blame_table(comparison),
        "### Tuning",
        tuning_table(comparison),
    ]
    return "\n\n".join(parts)


def summary(comparisons: Sequence[Comparison]) -> str:
    """What each method has more than the baseline, one column a comparison; bold where a difference is found."""
    names = list(dict.fromkeys(name for one in comparisons for name in one.methods if name != one.baseline))
    rows = []
    for name in names:
        cells = [name]
        for one in comparisons:
            differences = one.differences(name) if name in one.methods else []
            cells.append(shown([100 * value for value in differences], "{:+.1f}"))
        rows.append(cells)
    return table(["", *(one.title for one in comparisons)], rows)


def superseded_table(runs: Sequence[Result]) -> str:
    """Runs that were reported once and are no longer, with the reason."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for run in runs:
        groups.setdefault((run["strand"], run["name"], f"{rate_of(run):g}", run["why"]), []).append(run)
    rows = [
        [strand, name, rate, str(len(several)), interval([run["sampled"] for run in several]), why]
        for (strand, name, rate, why), several in groups.items()
    ]
    return table(["", "", "learning rate", "seeds", "sampled, avg@8", "no longer reported, since it was made"], rows)


def gave(name: str, comparisons: Sequence[Comparison]) -> str:
    """What a method has more than the baseline, where a difference was found, and whether its control has it too."""
    compared = [one for one in comparisons if name in one.methods and len(one.differences(name)) >= FEWEST]
    told = []
    for one in compared:
        if found(one.differences(name)):
            control = one.controls.get(name)
            unproven = control is not None and not found(one.differences(name, control))
            beside = "; not found to differ from its control" if unproven else ""
            told.append(f"{100 * statistics.mean(one.differences(name)):+.1f} ({one.short}{beside})")
    return ", ".join(told) or ("no difference found" if compared else "not compared yet")


def write_between(file: Path, begin: str, text: str, end: str) -> None:
    """Replaces what stands between two marks."""
    before, begun, rest = file.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise ValueError(f"{file.name} has no {begin} with {end} after it.")
    file.write_text(f"{before}{begin}{text}{end}{after}")


def write_gains(comparisons: Sequence[Comparison]) -> None:
    """Fills in the cells of the README's table of methods that are marked with a method's name."""
    for name in re.findall(r"<!-- gave: (.+?) -->", README.read_text()):
        write_between(README, f"<!-- gave: {name} -->", gave(name, comparisons), "<!-- / -->")


def write_page(comparisons: Sequence[Comparison], figures: Sequence[str], superseded: Sequence[Result] = ()) -> None:
    """Puts the summary and the sections between the page's marks, and what they say into the README."""
    short = summary(comparisons)
    parts = ["## Summary", SUMMARY, short, *map(section, comparisons, figures)]
    if superseded:
        parts += ["## Superseded runs", superseded_table(superseded)]
    write_between(PAGE, BEGIN, "\n\n{}\n\n".format("\n\n".join(parts)), END)
    write_between(README, BEGIN, f"\n\n{short}\n\n", END)
    write_gains(comparisons)
