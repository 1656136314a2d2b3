"""The measurements as one page that is read from top to bottom: figures, tables and coloured responses."""

from collections.abc import Callable, Sequence
from textwrap import shorten
from typing import Any

import torch

from ...evaluation import mean_with_interval
from ..reports.figures import COLOURS, new_figure
from ..reports.page import Page


NOT_MEASURED = "not_measured"  # stands in place of the numbers, with the reason
Seeds = list[dict[str, Any]]  # what the measurement has found, by seed
# Table 1 of 2605.08666: boost rates by condition, for updates of the output layer alone and of all parameters.
PAPER_MASKING = {
    "random": (0.506, 0.502),
    "same": (0.662, 0.664),
    "low": (0.442, 0.430),
    "same and low": (0.741, 0.750),
}
TABLEAU = [COLOURS[name] for name in ("neutral", "suppressed", "green", "boosted", "purple", "gold")]


def write_report(page: Page, results: dict[str, Any]) -> None:
    """
    Fills a page with measurements.

    Args:
        page ([`~trl_cancel.diagnostics.reports.page.Page`]):
            The page.
        results (`dict`):
            What `trl-cancel probe` writes as JSON: a list `seeds` of measurements by name.
    """
    for name, write in SECTIONS.items():
        found = [seed[name] for seed in results["seeds"] if name in seed]
        measured = [of_seed for of_seed in found if NOT_MEASURED not in of_seed]
        if measured:
            write(page, measured)
        for of_seed in found:
            if NOT_MEASURED in of_seed:
                page.text(f"{name.capitalize()}: not measured for one seed. {of_seed[NOT_MEASURED]}")
    for seed in results["seeds"]:
        if NOT_MEASURED in seed:
            page.text(f"One seed was not measured. {seed[NOT_MEASURED]}")


def shifts_section(page: Page, seeds: Seeds) -> None:
    """Token flipping."""
    page.section(
        "Token flipping",
        "One update changes the probability of every token. If each token followed the advantage of its rollout, right "
        "rollouts would only be boosted and wrong ones only suppressed; bars of like heights for both are token "
        f"flipping. A token counts as moved when its log-probability changes by more than {seeds[0]['threshold']:g}.",
    )
    figure, axes = new_figure(7.2, 3.4)
    variants = list(seeds[0]["variants"])
    bars = [
        (sign, kind, direction)
        for sign in ("positive", "negative")
        for kind, direction in (("boosted", 1), ("suppressed", -1))
    ]
    for sign, kind, direction in bars:
        offset = -0.2 if sign == "positive" else 0.2
        heights = [_mean(seeds, "variants", variant, sign, kind) for variant in variants]
        axes.bar(
            [index + offset for index in range(len(variants))],
            [direction * height for height in heights],
            0.36,
            color=COLOURS[kind],
            alpha=1.0 if sign == "positive" else 0.5,
            label=f"{kind}, {'right' if sign == 'positive' else 'wrong'} rollouts",
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(variants)), [name.replace("_", "\n").replace(", ", "\n") for name in variants])
    axes.set_ylabel("fraction of tokens")
    _legend_above(axes, 2)
    page.figure(
        "flipping",
        figure,
        caption="Tokens boosted (up) and suppressed (down) by one update of each variant, in right (full colour) and in "
        "wrong rollouts (pale): the more alike full and pale bars, the less the rollout's sign decides.",
        alt="Bars of boosted and suppressed tokens for right and wrong rollouts by variant",
    )
    page.table(
        ["variant", "right: boosted", "suppressed", "wrong: boosted", "suppressed", "dissimilarity"],
        [
            [
                variant,
                *(
                    _percent(seeds, "variants", variant, sign, kind)
                    for sign in ("positive", "negative")
                    for kind in ("boosted", "suppressed")
                ),
                _interval(seeds, "variants", variant, "dissimilarity"),
            ]
            for variant in variants
        ],
        caption="Dissimilarity: difference between right and wrong rollouts in the share of boosted tokens among those "
        "that move. 0 is perfect flipping.",
    )
    _responses(page, seeds[0]["responses"], "shifts", "shift by one GRPO update, in nats", ("suppressed", "boosted"))


def coupling_section(page: Page, seeds: Seeds) -> None:
    """The kernel and the masking experiment."""
    page.section(
        "Coupling",
        "A push on one token moves others, as far as their hidden states and their prediction errors are alike. By the "
        "papers that should be mostly the same token where the model is unsure of it.",
    )
    figure, axes = new_figure(6.4, 3.2)
    kinds = seeds[0]["pairs"]
    labels = [
        f"{'same' if kind['same'] else 'other'} token,\n{'both unsure' if kind['low'] else 'not both unsure'}"
        for kind in kinds
    ]
    heights = [_mean_of([seed["pairs"][index]["mean_magnitude"] for seed in seeds]) for index in range(len(kinds))]
    axes.bar(labels, heights, color=[COLOURS["boosted"], TABLEAU[0], COLOURS["suppressed"], TABLEAU[0]])
    axes.set_yscale("log")
    axes.set_ylabel("mean |K|")
    page.figure(
        "coupling",
        figure,
        caption="How strongly two tokens drawn at random are coupled in the output layer (log scale), by whether "
        "they are the same and both among the fifth that the model is least sure of: the taller, the stronger.",
        alt="Bars of the mean coupling of pairs of tokens by kind",
    )
    page.table(
        ["pairs", "mean |K|", "share of all coupling"],
        [
            [
                label.replace("\n", " "),
                *(
                    _interval([seed["pairs"][index] for seed in seeds], name, form=form)
                    for name, form in (("mean_magnitude", "{:.3g}"), ("share_of_coupling", "{:.1%}"))
                ),
            ]
            for index, label in enumerate(labels)
        ],
    )
    conditions = list(seeds[0]["masking"])
    page.table(
        ["left out", "output layer", "paper", "all weights", "paper"],
        [
            [
                condition,
                _percent(seeds, "masking", condition, "head", "boost_rate"),
                f"{PAPER_MASKING[condition][0]:.1%}",
                _percent(seeds, "masking", condition, "full", "boost_rate"),
                f"{PAPER_MASKING[condition][1]:.1%}",
            ]
            for condition in conditions
        ],
        caption="The masking experiment, beside Table 1 of arXiv 2605.08666. Boost rate: how often a few tokens of "
        "right rollouts, had they not been left out of the update, would have boosted another token. Tokens without "
        "any coupling give 50%. Updates of the output layer alone, and of all weights.",
    )
    page.table(
        ["left out", "output layer, nats", "all weights, nats"],
        [
            [condition, *(_interval(seeds, "masking", condition, scope, "mean_boost") for scope in ("head", "full"))]
            for condition in conditions
        ],
        caption="Mean boost in the same experiment.",
    )
    page.table(
        ["compared", "correlation", "same sign"],
        [
            [label, _interval(seeds, key, "correlation"), _percent(seeds, key, "sign_agreement")]
            for label, key in (
                ("kernel's prediction and update of the output layer", "predicted_and_head"),
                ("update of the output layer and of all weights", "head_and_full"),
            )
        ],
        caption="How far the output layer stands for the model: shifts of all tokens by one GRPO update.",
    )


def displacement_section(page: Page, seeds: Seeds) -> None:
    """Likelihood displacement by prompt."""
    page.section(
        "Likelihood displacement",
        "A prompt's own part of the update should raise the likelihood of its right responses. Pushing the wrong ones "
        "down can undo some of it; NTHR takes that push off the tokens which would do most harm.",
    )
    prompts = sorted(seeds[0]["prompts"], key=lambda prompt: prompt["grpo"])
    figure, axes = new_figure(7.2, 3.4)
    places = range(len(prompts))
    axes.bar(
        places,
        [prompt["positive_only"] for prompt in prompts],
        0.9,
        color=TABLEAU[0],
        alpha=0.45,
        label="positive_only",
    )
    axes.bar(places, [prompt["grpo"] for prompt in prompts], 0.55, color=COLOURS["suppressed"], label="grpo")
    for name, marker, colour in (("nthr", "^", COLOURS["green"]), ("nthr_random", "x", COLOURS["boosted"])):
        axes.plot(places, [prompt[name] for prompt in prompts], marker, markersize=4, color=colour, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("prompts, by their displacement under GRPO")
    axes.set_ylabel("Δ(x), nats")
    axes.set_xticks([])
    _legend_above(axes, 4)
    page.figure(
        "displacement",
        figure,
        caption="Change of the log-likelihood of each prompt's right responses (first seed): where blue bars end below "
        "grey ones, wrong rollouts cost right ones likelihood; where triangles lie above blue bars, NTHR gives it back.",
        alt="Bars of the change of log-likelihood of right responses by prompt and variant",
    )
    page.table(
        ["", "mean over seeds"],
        [
            [
                "prompts where GRPO raises right responses less than positive-only does",
                _percent(seeds, "below_positive_only"),
            ],
            ["prompts where NTHR raises them more than GRPO", _percent(seeds, "nthr_above_grpo")],
            ["prompts where NTHR raises them more than its random control", _percent(seeds, "nthr_above_random")],
            [
                "Δ(x) over ten times that of a tenth of the step, median (1: first order)",
                _interval(seeds, "linearity"),
            ],
            ["what NTHR gains over GRPO, nats", _interval(seeds, "nthr_gain")],
            ["what its random control gains, nats", _interval(seeds, "random_gain")],
        ],
    )
    sizes = [k for k in seeds[0]["overlap"] if all(k in seed["overlap"] for seed in seeds)]
    if sizes:
        page.table(
            ["k", "found by GWHES", "by chance"],
            [[k, _percent(seeds, "overlap", k, "gwhes"), _percent(seeds, "overlap", k, "random")] for k in sizes],
            caption="How many of the k prompts with the least displacement GWHES, computed before the update, finds.",
        )


def energy_section(page: Page, seeds: Seeds) -> None:
    """Energy by frequency."""
    page.section(
        "Energy by frequency",
        "How much of an off-policy update's energy goes to the most frequent tokens, which rarely decide anything, and "
        "how unevenly the rollouts of a group weigh.",
    )
    figure, axes = new_figure(6.8, 3.2)
    variants = list(seeds[0]["variants"])
    buckets = len(seeds[0]["variants"]["grpo"]["energy"])
    bottom = [0.0] * len(variants)
    for bucket in range(buckets):
        shares = [_mean_of([seed["variants"][variant]["energy"][bucket] for seed in seeds]) for variant in variants]
        label = "most frequent" if bucket == 0 else "rarest" if bucket == buckets - 1 else f"quarter {bucket + 1}"
        axes.bar(variants, shares, 0.7, bottom=bottom, color=TABLEAU[bucket], label=label)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.set_ylabel("share of energy")
    _legend_above(axes, buckets)
    page.figure(
        "energy",
        figure,
        caption="Share of each quarter of the tokens in the update's energy, most frequent tokens below: the lower "
        "that part, the less is spent on them.",
        alt="Stacked bars of the share of energy by frequency of the tokens and by variant",
    )
    page.table(
        ["variant", "energy of the most frequent quarter", "asymmetry", "at equal size"],
        [
            [
                variant,
                _percent([{"energy": seed["variants"][variant]["energy"][0]} for seed in seeds], "energy"),
                _interval(seeds, "variants", variant, "asymmetry"),
                _interval(seeds, "variants", variant, "relative_asymmetry"),
            ]
            for variant in variants
        ],
        caption="Asymmetry: variance of weight times advantage within a group, mean over groups; and the same with the "
        "pushes of each group scaled to the size of its advantages, so that small weights alone do not lower it.",
    )


def residual_section(page: Page, seeds: Seeds) -> None:
    """The residual off policy."""
    page.section(
        "Cancellation residual",
        "Rollouts that are used for several optimizer steps are off policy in all but the first, and clipping, torn "
        "groups and weights of whole sequences then leave pushes on shared tokens that should have cancelled.",
    )
    figure, axes = new_figure(6.8, 3.4)
    for colour, (name, run) in zip([*TABLEAU, *TABLEAU], seeds[0]["runs"].items(), strict=False):
        steps = range(1, len(run["residual"]) + 1)
        values = [max(_mean_of([seed["runs"][name]["residual"][step - 1] for seed in seeds]), 1e-9) for step in steps]
        axes.plot(
            steps, values, marker="o", markersize=3, color=colour, label=name, linestyle="--" if "-" in name else "-"
        )
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step; the second half uses the rollouts again")
    axes.set_ylabel("residual")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    page.figure(
        "residual",
        figure,
        caption="Shared-prefix residual of each optimizer step (log scale, 0 drawn at 1e-9): lower is better cancelled.",
        alt="Lines of the residual over optimizer steps by variant",
    )
    page.table(
        ["variant", "residual", "asymmetry"],
        [
            [name, _interval(seeds, "runs", name, "mean_residual"), _interval(seeds, "runs", name, "mean_asymmetry")]
            for name in seeds[0]["runs"]
        ],
        caption=f"Means over the second use of the rollouts, with AdamW at a learning rate of {seeds[0]['learning_rate']:g}.",
    )


def values_section(page: Page, seeds: Seeds) -> None:
    """Values of tokens."""
    page.section(
        "Token values",
        "If cancellation leaves credit for what made the difference, tokens that the update boosts should be worth "
        "more than tokens it suppresses: the reward gained by taking them rather than another, estimated by sampling.",
    )
    figure, axes = new_figure(6.0, 3.2)
    signs = ("positive", "negative", "all")
    for kind, offset in (("boosted", -0.18), ("suppressed", 0.18)):
        intervals = [_numbers(seeds, "mean", sign, kind) for sign in signs]
        axes.bar(
            [index + offset for index in range(len(signs))],
            [mean for mean, _, _ in intervals],
            0.32,
            yerr=[[mean - low for mean, low, _ in intervals], [high - mean for mean, _, high in intervals]],
            ecolor="black",
            color=COLOURS[kind],
            label=kind,
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(signs)), ["right rollouts", "wrong rollouts", "all"])
    axes.set_ylabel("value, reward")
    _legend_above(axes, 2)
    page.figure(
        "values",
        figure,
        caption="Mean Monte-Carlo value of boosted and suppressed tokens: a taller orange bar says that the update "
        "boosts what is worth more. Lines are 95% intervals over seeds.",
        alt="Bars of the mean value of boosted and suppressed tokens by sign of the rollout",
    )
    page.table(
        ["rollouts", "boosted", "suppressed", "gap"],
        [
            [
                sign,
                _interval(seeds, "mean", sign, "boosted"),
                _interval(seeds, "mean", sign, "suppressed"),
                _interval(seeds, "gap", sign),
            ]
            for sign in signs
        ],
    )


def coefficients_section(page: Page, seeds: Seeds) -> None:
    """Token credits."""
    page.section(
        "Token credit",
        "What DelTA and NTHR make of the tokens: λ above 1 gives a token more of its rollout's advantage; an NTHR "
        "coefficient below 1 spares a token of a wrong rollout.",
    )
    first = seeds[0]
    page.table(
        ["token", "mean λ", "count", "token", "mean λ", "count"],
        _side_by_side(first["delta"]["highest"], first["delta"]["lowest"]),
        caption="Tokens with the highest and with the lowest mean λ (first seed; at least 5 occurrences).",
    )
    page.table(
        ["token", "mean coefficient", "count"],
        [_entry(token) for token in first["nthr"]["lowest"]],
        caption=f"Tokens of wrong rollouts that NTHR spares most; it selects "
        f"{_percent(seeds, 'nthr_selected')} of all.",
    )
    shown = [{**response, "over": [value - 1 for value in response["lambda"]]} for response in first["responses"]]
    _responses(page, shown, "over", "DelTA's λ, over or under 1", ("less credit", "more credit"))
    wrong = [response for response in shown if response["advantage"] < 0]
    _responses(
        page,
        wrong,
        "nthr_score",
        "NTHR score, what pushing the token down takes from the right responses",
        ("helps them", "harms them"),
    )


def _legend_above(axes: Any, columns: int) -> None:
    axes.legend(fontsize="small", ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _side_by_side(left: Sequence[dict[str, Any]], right: Sequence[dict[str, Any]]) -> list[list[Any]]:
    return [[*_entry(one), *_entry(other)] for one, other in zip(left, right, strict=False)]


def _entry(token: dict[str, Any]) -> list[Any]:
    return [repr(token["token"]), f"{token['mean']:.3f}", token["count"]]


def _responses(
    page: Page,
    responses: Sequence[dict[str, Any]],
    name: str,
    label: str,
    legend: tuple[str, str],
    diverging: bool = True,
) -> None:
    """The most telling responses with their tokens coloured; those of one prompt share a scale."""
    for response in responses:
        kind = "right" if response["advantage"] > 0 else "wrong"
        together = [
            abs(value) for other in responses if other["prompt"] == response["prompt"] for value in other[name]
        ]
        limit = torch.tensor(together).quantile(0.98).item() or max(together) or 1.0
        page.tokens(
            response["tokens"],
            response[name],
            caption=f"A {kind} response to “{shorten(response['prompt'], 200)}”: {label}.",
            limit=limit,
            legend=legend,
            diverging=diverging,
        )


def _get(seed: Any, *path: str) -> float:
    for name in path:
        seed = seed[name]
    return float("nan") if seed is None else float(seed)


def _numbers(seeds: Seeds, *path: str) -> tuple[float, float, float]:
    """Mean over seeds and its 95% bootstrap interval."""
    return mean_with_interval(torch.tensor([_get(seed, *path) for seed in seeds]).unsqueeze(1))


def _mean(seeds: Seeds, *path: str) -> float:
    return _numbers(seeds, *path)[0]


def _mean_of(values: Sequence[float | None]) -> float:
    return torch.tensor([float("nan") if value is None else value for value in values]).nanmean().item()


def _interval(seeds: Seeds, *path: str, form: str = "{:.3g}") -> str:
    mean, low, high = _numbers(seeds, *path)
    if mean != mean:
        return "—"
    return form.format(mean) if len(seeds) == 1 else f"{form.format(mean)} [{form.format(low)}, {form.format(high)}]"


def _percent(seeds: Seeds, *path: str) -> str:
    return _interval(seeds, *path, form="{:.1%}")


SECTIONS: dict[str, Callable[[Page, Seeds], None]] = {
    "shifts": shifts_section,
    "coupling": coupling_section,
    "displacement": displacement_section,
    "energy": energy_section,
    "residual": residual_section,
    "values": values_section,
    "coefficients": coefficients_section,
}
