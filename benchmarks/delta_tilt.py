"""
How DelTA tilts an update towards one side: `python benchmarks/delta_tilt.py`.

Samples rollouts of the playground's embedded model and takes the mean of DelTA's coefficients over the tokens of right
rollouts and over those of wrong ones, with each normalisation. Prints the table of docs/delta.md; a quarter of a minute
on one core.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cancel.batch.rollouts import Rollouts
from trl_cancel.credit import DelTA
from trl_cancel.diagnostics import UpdateProbe, sample_rollouts
from trl_cancel.playground import CHECKPOINT
from trl_cancel.playground.data import load_prompts
from trl_cancel.playground.reward import answer_reward


NORMALIZATIONS = ("batch", "side")


def sampled(seed: int, num_prompts: int) -> Rollouts:
    """A generation batch of the embedded model, with its states."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT)
    rows = load_prompts("train", num_prompts, seed=seed).to_list()
    rollouts = sample_rollouts(model, tokenizer, rows, answer_reward, max_completion_length=72, seed=seed)
    return UpdateProbe(model, rollouts).rollouts


def means_by_side(rollouts: Rollouts, normalize: str) -> list[float]:
    """Mean coefficient over the tokens of positive and of negative rollouts."""
    coefficients, active = DelTA(normalize=normalize).coefficients(rollouts), rollouts.mask.bool()
    sides = (rollouts.advantages > 0, rollouts.advantages < 0)
    return [coefficients[active & side.unsqueeze(1)].mean().item() for side in sides]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=16)
    args = parser.parse_args()
    heads = [f'`"{name}"`, {side}' for name in NORMALIZATIONS for side in ("right", "wrong")]
    print(f"| seed | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for seed in args.seeds:
        rollouts = sampled(seed, args.prompts)
        cells = [f"{mean:.2f}" for name in NORMALIZATIONS for mean in means_by_side(rollouts, name)]
        print(f"| {seed} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
