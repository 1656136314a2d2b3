"""
The papers' claims, tried on the playground: `python benchmarks/claims.py`.

Runs every measurement of `trl-cancel probe` for several seeds, each with prompts and rollouts of its own, and writes
`benchmarks/results/claims.json`, where it also takes up again what was interrupted. From that it writes the table of
`docs/claims.md`: each claim with what was measured, its 95% bootstrap interval over seeds, and whether it holds here.
About ten minutes on two cores.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path(__file__).parent / "results" / "claims.json"
PAGE = Path(__file__).parents[1] / "docs" / "claims.md"
ARGUMENTS = {
    "model_name_or_path": "playground",
    "dataset_name": "playground",
    "num_generations": 8,
    "max_completion_length": 64,
    "learning_rate": 3e-4,  # of the demo, for the steps off policy
    "probe_prompts": 32,
    "probe_batch_size": 32,
    "disable_tqdm": True,
    "report_to": "none",
}
Seed = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """
    One number that a claim rests on.

    Args:
        part (`str`):
            The claim it belongs to.
        text (`str`):
            What is measured, so that the claim says it is above `bound`.
        measure (`Callable`):
            The number of one seed.
        bound (`float`, *optional*, defaults to `0.0`):
            The claim holds if the whole interval lies above it, and fails if the whole interval lies below.
        form (`str`, *optional*):
            How the number is written.
    """

    part: str
    text: str
    measure: Callable[[Seed], float]
    bound: float = 0.0
    form: str = "{:.3g}"


def dissimilarity(seed: Seed, variant: str) -> float:
    return seed["shifts"]["variants"][variant]["dissimilarity"]


def boost(seed: Seed, condition: str, scope: str = "full") -> float:
    return seed["coupling"]["masking"][condition][scope]["boost_rate"]


def residual(seed: Seed, run: str) -> float:
    return seed["residual"]["runs"][run]["mean_residual"]


def asymmetry(seed: Seed, variant: str, measure: str = "asymmetry") -> float:
    return seed["energy"]["variants"][variant][measure]


def mean_of(seed: Seed, variant: str) -> float:
    return statistics.mean(prompt[variant] for prompt in seed["displacement"]["prompts"])


def overlap(seed: Seed, k: str) -> float:
    found = seed["displacement"]["overlap"][k]
    return found["gwhes"] - found["random"]


A = "(a) Right and wrong rollouts have similar shares of boosted tokens under GRPO, not under positive-only"
B = "(b) Coupling is strongest between equal tokens of low confidence, and the output layer stands for the model"
C = "(c) Wrong rollouts hold back the likelihood of right responses; NTHR gives it back, better than at random"
D = "(d) DFPO lowers asymmetry and residual off policy"
E = "(e) Symmetric clipping and query preservation lower the residual"
F = "(f) GWHES finds the prompts with the least displacement better than chance"
G = "(g) Boosted tokens are worth more than suppressed ones"
MASKED = ("random", "same", "low", "same and low")
PERCENT = "{:.1%}"
CLAIMS = [
    Claim(
        A,
        "likeness under GRPO: 1 minus the dissimilarity (above 0.9)",
        lambda seed: 1 - dissimilarity(seed, "grpo"),
        0.9,
    ),
    Claim(
        A,
        "dissimilarity under positive-only minus that under GRPO",
        lambda seed: dissimilarity(seed, "positive_only") - dissimilarity(seed, "grpo"),
    ),
    Claim(
        A,
        "the same for a step of AdamW",
        lambda seed: dissimilarity(seed, "positive_only, AdamW") - dissimilarity(seed, "grpo, AdamW"),
    ),
    Claim(
        B, "boost rate of same tokens minus random ones", lambda s: boost(s, "same") - boost(s, "random"), 0, PERCENT
    ),
    Claim(
        B,
        "boost rate of same and low confidence minus same",
        lambda seed: boost(seed, "same and low") - boost(seed, "same"),
        0,
        PERCENT,
    ),
    Claim(
        B,
        "boost rates of all weights and of the output layer: 5% minus their largest difference",
        lambda seed: 0.05 - max(abs(boost(seed, name) - boost(seed, name, "head")) for name in MASKED),
        0,
        PERCENT,
    ),
    Claim(
        B,
        "tokens that both updates shift the same way (above 50%)",
        lambda seed: seed["coupling"]["head_and_full"]["sign_agreement"],
        0.5,
        PERCENT,
    ),
    Claim(
        B,
        "share of all coupling between equal tokens of low confidence (above 50%)",
        lambda seed: seed["coupling"]["pairs"][0]["share_of_coupling"],
        0.5,
        PERCENT,
    ),
    Claim(
        C,
        "prompts where Δ(x) is smaller under GRPO than under positive-only (above 50%)",
        lambda seed: seed["displacement"]["below_positive_only"],
        0.5,
        PERCENT,
    ),
    Claim(
        C,
        "Δ(x) under positive-only minus that under GRPO, mean over prompts, nats",
        lambda seed: mean_of(seed, "positive_only") - mean_of(seed, "grpo"),
    ),
    Claim(
        C,
        "prompts where NTHR raises Δ(x) (above 50%)",
        lambda seed: seed["displacement"]["nthr_above_grpo"],
        0.5,
        PERCENT,
    ),
    Claim(
        C,
        "what NTHR gains in Δ(x) minus what its random control gains, nats",
        lambda seed: seed["displacement"]["nthr_gain"] - seed["displacement"]["random_gain"],
    ),
    Claim(D, "asymmetry of GSPO minus DFPO (min)", lambda seed: asymmetry(seed, "gspo") - asymmetry(seed, "dfpo")),
    Claim(
        D,
        "the same at equal size of the pushes",
        lambda seed: asymmetry(seed, "gspo", "relative_asymmetry") - asymmetry(seed, "dfpo", "relative_asymmetry"),
    ),
    *(
        Claim(
            D, f"residual of GSPO minus {name}", lambda seed, name=name: residual(seed, "gspo") - residual(seed, name)
        )
        for name in ("dfpo-min", "dfpo-orth", "dfpo-positive-orth", "dfpo-rebalance")
    ),
    Claim(
        E,
        "residual of GRPO minus symmetric clipping",
        lambda seed: residual(seed, "grpo") - residual(seed, "grpo-fix"),
    ),
    Claim(
        E,
        "residual of shuffled rollouts minus whole groups",
        lambda seed: residual(seed, "grpo, shuffled") - residual(seed, "grpo"),
    ),
    *(
        Claim(F, f"overlap of the first {k} prompts minus chance", lambda seed, k=k: overlap(seed, k), 0, PERCENT)
        for k in ("5", "10", "15")
    ),
    Claim(F, "rank correlation of GWHES and -Δ(x)", lambda seed: seed["displacement"]["rank_correlation"]),
    *(
        Claim(G, f"value of boosted minus suppressed tokens, {sign}", lambda s, name=name: s["values"]["gap"][name])
        for name, sign in (("all", "all rollouts"), ("positive", "right ones"), ("negative", "wrong ones"))
    ),
]


def run(seed: int, seeds: int) -> Seed:
    """The measurements of one seed, without the responses that a page would show."""
    from trl_cancel.cli._quiet import quiet
    from trl_cancel.cli.probing import MEASUREMENTS, measurements, probe_settings

    given = {**ARGUMENTS, "probe_seeds": seeds}
    with quiet():
        settings = probe_settings("", [part for name, value in given.items() for part in (f"--{name}", str(value))])
        measured = dict(measurements(settings, list(MEASUREMENTS), seed))
    for name in ("shifts", "coefficients"):
        del measured[name]["responses"]
    return measured


def run_all(seeds: int, file: Path, jobs: int) -> list[Seed]:
    """All seeds, those taken from `file` that it holds already."""
    done = {int(seed): found for seed, found in json.loads(file.read_text()).items()} if file.exists() else {}
    missing = [seed for seed in range(seeds) if seed not in done]
    if done:
        print(f"{len(done)} seeds are in {file.name}; give --output a new file to make them again.", flush=True)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(run, seed, seeds): seed for seed in missing}
        for future in as_completed(running):
            done[running[future]] = future.result()
            text = json.dumps({str(seed): _short(done[seed]) for seed in sorted(done)}, separators=(",", ":"))
            file.write_text(text)
            print(f"seed {running[future]} done", flush=True)
    return [done[seed] for seed in range(seeds)]


def table(seeds: list[Seed]) -> str:
    """The claims with intervals and verdicts."""
    from runs import interval

    lines = ["| claim | measured, and its 95% interval | | verdict |", "|---|---|---|---|"]
    part = ""
    for claim in CLAIMS:
        values = [claim.measure(seed) for seed in seeds]
        shown = claim.part if claim.part != part else ""
        part = claim.part
        lines.append(f"| {shown} | {claim.text} | {interval(values, claim.form)} | {verdict(values, claim.bound)} |")
    return "\n".join(lines)


def verdict(values: list[float], bound: float) -> str:
    """Whether the interval over seeds lies above the bound."""
    import torch

    from trl_cancel.evaluation import mean_with_interval

    _, low, high = mean_with_interval(torch.tensor(values).unsqueeze(1))
    return "holds" if low > bound else "does not hold here" if high < bound else "undecided here"


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the results (default: %(default)s)")
    options = parser.parse_args()
    claims = table(run_all(options.seeds, options.output, options.jobs))
    print(f"\n{claims}")
    if options.output == RESULTS:
        before, _, rest = PAGE.read_text().partition("<!-- claims -->")
        after = rest.partition("<!-- end of claims -->")[2]
        PAGE.write_text(f"{before}<!-- claims -->\n{claims}\n<!-- end of claims -->{after}")


if __name__ == "__main__":
    main()
