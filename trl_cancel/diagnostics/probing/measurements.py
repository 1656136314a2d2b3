"""
The papers' measurements, each on one set of rollouts: functions from a [`Subject`] to numbers that can be written as
JSON.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.optim import AdamW
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ...batch.rollouts import Rollouts
from ...evaluation import RewardFunction
from ...methods.nthr import nthr_scores
from ..coupling import coupling_kernel, prediction_errors, sign_agreement
from ..displacement import gwhes, likelihood_displacement, top_k_overlap
from ..energy import asymmetry_by_group, energy_by_frequency, gradient_asymmetry, output_row_energy
from ..shifts import THRESHOLD, token_shifts
from .masking import CONDITIONS, boost_rate, masking_effects
from .off_policy import logps_after_one_use, off_policy_steps
from .probe import UpdateProbe
from .values import token_values
from .variants import Variant


SHIFTED = ("grpo", "positive_only", "negative_only", "nthr", "nthr_random", "delta", "dfpo")
TRAINED = ("grpo", "positive_only")  # measured with the optimizer of the training too
# The paper's measurement takes the whole push off the selected tokens (2505.18830, section 5.3).
DISPLACED = {
    "grpo": Variant("grpo"),
    "positive_only": Variant("positive_only"),
    "nthr": Variant("nthr", nthr_eta=0.0),
    "nthr_random": Variant("nthr_random", nthr_eta=0.0),
}
WEIGHED = ("grpo", "positive_only", "nthr", "delta", "gspo", "dfpo")
OFF_POLICY = {
    "grpo, shuffled": ("grpo", False),
    "grpo": ("grpo", True),
    "grpo-fix": ("grpo-fix", True),
    "gspo": ("gspo", True),
    "dfpo-min": ("dfpo-min", True),
    "dfpo-orth": ("dfpo-orth", True),
    "dfpo-positive-orth": ("dfpo-positive-orth", True),
    "dfpo-rebalance": ("dfpo-rebalance", True),
}
OVERLAPS = (5, 10, 15)  # prompts to find by their GWHES


@dataclass
class Subject:
    """
    What is measured.

    Args:
        probe ([`UpdateProbe`]):
            Model and rollouts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        reward (`Callable`):
            Reward function in TRL's form.
        threshold (`float`, *optional*, defaults to `1e-4`):
            Shift beyond which a token is boosted or suppressed, in nats.
        learning_rate (`float`, *optional*, defaults to `1e-6`):
            Learning rate of the training that is imitated where a batch is used for several optimizer steps (AdamW).
        max_completion_length (`int`, *optional*, defaults to `256`):
            Longest completion, in tokens.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all draws.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show progress bars.
    """

    probe: UpdateProbe
    tokenizer: PreTrainedTokenizerBase
    reward: RewardFunction
    threshold: float = THRESHOLD
    learning_rate: float = 1e-6
    max_completion_length: int = 256
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        self._shifts: dict[str, torch.Tensor] = {}

    def shifts(self, variant: str) -> torch.Tensor:
        """The shifts of all tokens by a variant, of shape `(B, T)`, computed once."""
        if variant not in self._shifts:
            self._shifts[variant] = self.probe.shifts(variant)
        return self._shifts[variant]

    def training(self) -> UpdateProbe:
        """The probe with the optimizer of a training run."""
        probe = copy.copy(self.probe)
        probe.optimizer = AdamW(probe.parameters, lr=self.learning_rate)
        return probe

    def watch(self, items: Iterable[Any], label: str) -> Any:
        """The items, with a progress bar."""
        return tqdm(items, desc=label, disable=not self.progress)

    def response(self, row: int, **values: torch.Tensor) -> dict[str, Any]:
        """One response as text by token, with values for each."""
        rollouts = self.probe.rollouts
        active = rollouts.mask[row].bool()
        ids = rollouts.completion_ids[row][active].tolist()
        return {
            "prompt": self.prompt(row),
            "advantage": rollouts.advantages[row].item(),
            "tokens": self._texts(ids),
            **{name: of_tokens[row][active].tolist() for name, of_tokens in values.items()},
        }

    def _texts(self, ids: list[int]) -> list[str]:
        """The text of each token as it stands in its response: some tokenizers drop the space of a single one."""
        texts = [str(self.tokenizer.decode(ids[:length])) for length in range(len(ids) + 1)]
        added = [text[len(before) :] for before, text in itertools.pairwise(texts)]
        whole = texts[-1] == "".join(added)
        return added if whole else self.tokenizer.batch_decode([[token] for token in ids])

    def prompt(self, row: int) -> str:
        """The last thing that the prompt of a rollout says."""
        prompt = self.probe.rollouts.examples[row]["prompt"]
        return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])

    def telling(self, values: torch.Tensor, count: int = 2) -> list[int]:
        """
        Rollouts to show: of the groups with both signs in which most happens, the right and the wrong one in which most
        does.
        """
        rollouts = self.probe.rollouts
        amounts = (values.abs() * rollouts.mask).sum(1)
        by_group, signs = rollouts.by_group(amounts), rollouts.by_group(rollouts.advantages.sign())
        mixed = (signs.amax(1) > 0) & (signs.amin(1) < 0)
        order = by_group.sum(1).masked_fill(~mixed, -1.0).argsort(descending=True)[:count].tolist()
        chosen = []
        for group in order:
            if mixed[group]:
                for sign in (1, -1):
                    within = by_group[group].masked_fill(signs[group] != sign, -1.0).argmax().item()
                    chosen.append(group * rollouts.num_generations + int(within))
        return chosen


def measure_shifts(subject: Subject) -> dict[str, Any]:
    """Token flipping: boosted and suppressed tokens of right and wrong rollouts, by variant."""
    probe = subject.probe

    def ratios(shifts: torch.Tensor) -> dict[str, Any]:
        rollouts = probe.rollouts
        found = token_shifts(
            probe.before, probe.before + shifts, rollouts.mask, rollouts.advantages, subject.threshold
        )
        by_sign = {name: asdict(getattr(found, name)) for name in ("positive", "negative", "all")}
        return {**by_sign, "dissimilarity": _dissimilarity(by_sign)}

    variants = {variant: ratios(subject.shifts(variant)) for variant in subject.watch(SHIFTED, "Shifts")}
    for variant in TRAINED:
        variants[f"{variant}, AdamW"] = ratios(subject.training().shifts(variant))
    shifts_of_grpo = subject.shifts("grpo")
    rows = subject.telling(shifts_of_grpo)
    return {
        "threshold": subject.threshold,
        "variants": variants,
        "responses": [subject.response(row, shifts=shifts_of_grpo) for row in rows],
    }


def _dissimilarity(ratios: dict[str, dict[str, float]]) -> float:
    """How far apart right and wrong rollouts are in the share of boosted tokens among those that move."""
    shares = []
    for sign in ("positive", "negative"):
        moved = ratios[sign]["boosted"] + ratios[sign]["suppressed"]
        shares.append(ratios[sign]["boosted"] / moved if moved else float("nan"))
    return abs(shares[0] - shares[1])


def measure_coupling(subject: Subject) -> dict[str, Any]:
    """Coupling: the kernel of the output layer, how well it predicts, and the masking experiment."""
    probe = subject.probe
    weights = probe.weights("grpo")
    predicted, head = probe.predicted_shifts(weights), probe.head_shifts(probe.head_step(weights))
    full = subject.shifts("grpo")[probe.active]
    effects = masking_effects(probe, seed=subject.seed, description="Masking" if subject.progress else None)
    return {
        "predicted_and_head": _agreement(head, predicted, subject.threshold),
        "head_and_full": _agreement(full, head, subject.threshold),
        "pairs": kernel_by_kind(probe, subject.seed),
        "masking": {
            name: {
                **{
                    scope: {
                        "boost_rate": boost_rate(getattr(effects, scope)[name]),
                        "mean_boost": getattr(effects, scope)[name].mean().item(),
                    }
                    for scope in ("head", "full")
                },
                "agreement": sign_agreement(effects.full[name], effects.head[name]),
            }
            for name in CONDITIONS
        },
        "candidates": len(effects.full["same"]),
    }


def _agreement(first: torch.Tensor, second: torch.Tensor, threshold: float) -> dict[str, float]:
    return {
        "correlation": torch.corrcoef(torch.stack([first, second]).double())[0, 1].item(),
        "sign_agreement": sign_agreement(first, second, threshold),
    }


def kernel_by_kind(
    probe: UpdateProbe, seed: int = 0, num_tokens: int = 400, low_confidence: float = 0.2
) -> list[dict[str, Any]]:
    """
    The coupling between pairs of tokens drawn at random, by whether they are the same and how sure the model is of
    them.

    Args:
        probe ([`UpdateProbe`]):
            Model and rollouts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        num_tokens (`int`, *optional*, defaults to `400`):
            Tokens that are paired with one another.
        low_confidence (`float`, *optional*, defaults to `0.2`):
            Fraction of the tokens, the least probable ones, that count as of low confidence.
    """
    count = len(probe.token_ids)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:num_tokens]
    hidden, token_ids = probe.hidden[chosen].float(), probe.token_ids[chosen]
    logps = probe.before[probe.active]
    low = (logps <= logps.quantile(low_confidence))[chosen]
    with torch.no_grad():
        errors = prediction_errors(hidden, token_ids, probe.head, probe.rollouts.temperature)
        kernel = coupling_kernel(hidden, errors, hidden, errors)
        cosine = torch.nn.functional.normalize(hidden, dim=1)
        cosine = cosine @ cosine.T
    upper = torch.ones_like(kernel, dtype=torch.bool).triu(1)  # each pair once, none with itself
    same = token_ids.unsqueeze(0) == token_ids.unsqueeze(1)
    both = low.unsqueeze(0) & low.unsqueeze(1)
    total = kernel[upper].abs().sum()
    kinds = []
    for is_same in (True, False):
        for is_low in (True, False):
            pairs = upper & (same == is_same) & (both == is_low)
            kinds.append(
                {
                    "same": is_same,
                    "low": is_low,
                    "pairs": int(pairs.sum()),
                    "mean_magnitude": kernel[pairs].abs().mean().item(),
                    "share_of_coupling": (kernel[pairs].abs().sum() / total).item(),
                    "mean_cosine": cosine[pairs].mean().item(),
                }
            )
    return kinds


def measure_displacement(subject: Subject) -> dict[str, Any]:
    """Likelihood displacement of each prompt with right and wrong responses, by variant, and its prediction by GWHES."""
    probe = subject.probe
    rollouts, size = probe.rollouts, probe.rollouts.num_generations
    weights = {name: probe.weights(variant) for name, variant in DISPLACED.items()}
    prompts = []

    def displacement(gradient: Sequence[torch.Tensor], rows: torch.Tensor, positive: torch.Tensor) -> float:
        with probe.restored():
            probe.step(gradient)
            after = probe.log_probs(rows)
        return likelihood_displacement(probe.before[rows], after, rollouts.mask[rows], positive).item()

    for first in subject.watch(range(0, len(rollouts.mask), size), "Displacement"):
        rows = torch.arange(first, first + size)
        positive = rollouts.advantages[rows] > 0
        if not positive.any() or positive.all():
            continue
        prompt: dict[str, Any] = {"prompt": subject.prompt(first), "right": int(positive.sum())}
        for name in DISPLACED:
            own = torch.zeros_like(weights[name])
            own[rows] = weights[name][rows]
            gradient = probe.gradient(own)
            prompt[name] = displacement(gradient, rows, positive)
            if name == "grpo":
                tenth = displacement([part / 10 for part in gradient], rows, positive)
                prompt["linearity"] = prompt[name] / (10 * tenth) if tenth else float("nan")
        states = rollouts.states[first : first + size]
        prompt["gwhes"] = gwhes(
            states, rollouts.completion_ids[rows], rollouts.mask[rows], positive, probe.head, rollouts.temperature
        ).item()
        prompts.append(prompt)
    of = {name: torch.tensor([prompt[name] for prompt in prompts]) for name in (*DISPLACED, "gwhes")}
    return {
        "prompts": prompts,
        "linearity": torch.tensor([prompt["linearity"] for prompt in prompts]).nanmedian().item(),
        "below_positive_only": _fraction(of["grpo"] < of["positive_only"]),
        "nthr_above_grpo": _fraction(of["nthr"] > of["grpo"]),
        "nthr_above_random": _fraction(of["nthr"] > of["nthr_random"]),
        "rank_correlation": _rank_correlation(-of["grpo"], of["gwhes"]),
        "nthr_gain": _mean(of["nthr"] - of["grpo"]),
        "random_gain": _mean(of["nthr_random"] - of["grpo"]),
        "overlap": {
            str(k): {"gwhes": top_k_overlap(of["grpo"], of["gwhes"], k), "random": k / len(prompts)}
            for k in OVERLAPS
            if k < len(prompts)
        },
    }


def _rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (first, second)])
    return torch.corrcoef(ranks)[0, 1].item() if len(first) > 1 else float("nan")


def measure_energy(subject: Subject) -> dict[str, Any]:
    """
    The share of an off-policy update's energy that goes to frequent and to rare tokens, and how unevenly the rollouts
    of a group weigh in it: by variant, all at the same weights.
    """
    probe, active = subject.probe, subject.probe.active
    logps = logps_after_one_use(subject.training(), seed=subject.seed)
    lengths = probe.rollouts.lengths.clamp(min=1)
    variants = {}
    for variant in subject.watch(WEIGHED, "Energy"):
        weights = probe.weights(variant, logps)
        energies = output_row_energy(weights[active], logps[active], probe.hidden.float())
        energy, tokens = energy_by_frequency(energies, probe.token_ids)
        pushes = weights.sum(1) / lengths
        variants[variant] = {
            "energy": energy.tolist(),
            "tokens": tokens.tolist(),
            "asymmetry": asymmetry_by_group(pushes, probe.rollouts.group_ids).mean().item(),
            "relative_asymmetry": _relative_asymmetry(probe.rollouts, pushes),
        }
    return {"variants": variants}


def _relative_asymmetry(rollouts: Rollouts, pushes: torch.Tensor) -> float:
    """Asymmetry with the pushes of each group scaled to the size of its advantages; mean over groups that have any."""
    pushes, advantages = rollouts.by_group(pushes), rollouts.by_group(rollouts.advantages)
    pushing = (pushes != 0).any(1)
    scale = advantages[pushing].abs().sum(1, keepdim=True) / pushes[pushing].abs().sum(1, keepdim=True)
    return _mean(gradient_asymmetry(scale * pushes[pushing], torch.ones_like(pushes[pushing])))


def measure_residual(subject: Subject) -> dict[str, Any]:
    """What is left on shared tokens in the steps of an off-policy run, by variant."""
    runs = {}
    for name, (variant, whole_groups) in subject.watch(OFF_POLICY.items(), "Residual"):
        steps = off_policy_steps(
            subject.training(), variant, num_iterations=2, whole_groups=whole_groups, seed=subject.seed
        )
        later = steps[len(steps) // 2 :]  # the second use of the rollouts
        runs[name] = {
            "residual": [step.residual for step in steps],
            "asymmetry": [step.asymmetry for step in steps],
            "mean_residual": _mean(torch.tensor([step.residual for step in later])),
            "mean_asymmetry": _mean(torch.tensor([step.asymmetry for step in later])),
        }
    return {"learning_rate": subject.learning_rate, "runs": runs}


def measure_values(
    subject: Subject, num_tokens: int = 32, num_continuations: int = 16, max_probability: float = 0.9
) -> dict[str, Any]:
    """
    Monte-Carlo values of boosted and suppressed tokens.

    Args:
        subject ([`Subject`]):
            What is measured.
        num_tokens (`int`, *optional*, defaults to `32`):
            Tokens of each kind: boosted and suppressed, of right and of wrong rollouts.
        num_continuations (`int`, *optional*, defaults to `16`):
            Continuations for either estimate of a token.
        max_probability (`float`, *optional*, defaults to `0.9`):
            Most probable token that is taken: its alternatives are too rare to be sampled beyond.
    """
    probe, shifts = subject.probe, subject.shifts("grpo")
    generator = torch.Generator().manual_seed(subject.seed)
    probabilities = probe.before.exp()
    eligible = probe.active & (probabilities <= max_probability)
    kinds: list[tuple[str, str]] = []
    places = []
    for sign, of_sign in (("positive", probe.rollouts.advantages > 0), ("negative", probe.rollouts.advantages < 0)):
        boosted, suppressed = (
            (eligible & of_sign.unsqueeze(1) & (shifts * direction > subject.threshold)).nonzero()
            for direction in (1, -1)
        )
        count = min(num_tokens, len(boosted), len(suppressed))
        for kind, found in (("boosted", boosted), ("suppressed", suppressed)):
            places.append(found[torch.randperm(len(found), generator=generator)[:count].to(found.device)])
            kinds += [(sign, kind)] * count
    where = torch.cat(places)
    if not len(where):
        raise ValueError("values: no token was shifted enough to be valued; lower the threshold or take more prompts.")
    estimated = token_values(
        probe.model,
        subject.tokenizer,
        probe.rollouts,
        where,
        subject.reward,
        probabilities[where[:, 0], where[:, 1]],
        num_continuations=num_continuations,
        max_completion_length=subject.max_completion_length,
        seed=subject.seed,
        description="Values" if subject.progress else None,
    )
    tokens = [
        {
            "token": subject.tokenizer.decode([int(probe.rollouts.completion_ids[row, position])]),
            "sign": sign,
            "kind": kind,
            "shift": shifts[row, position].item(),
            "probability": probabilities[row, position].item(),
            "value": value,
        }
        for (row, position), (sign, kind), value in zip(where.tolist(), kinds, estimated.values.tolist(), strict=True)
    ]
    return {
        "tokens": tokens,
        "mean": {
            sign: {kind: _mean(_values_of(tokens, sign, kind)) for kind in ("boosted", "suppressed")}
            for sign in ("positive", "negative", "all")
        },
        "gap": {
            sign: _mean(_values_of(tokens, sign, "boosted")) - _mean(_values_of(tokens, sign, "suppressed"))
            for sign in ("positive", "negative", "all")
        },
    }


def _values_of(tokens: list[dict[str, Any]], sign: str, kind: str) -> torch.Tensor:
    return torch.tensor(
        [token["value"] for token in tokens if token["kind"] == kind and sign in (token["sign"], "all")]
    )


def measure_coefficients(subject: Subject, count: int = 12) -> dict[str, Any]:
    """
    The token credits: which tokens DelTA and NTHR raise and lower, over the vocabulary and within responses.

    Args:
        subject ([`Subject`]):
            What is measured.
        count (`int`, *optional*, defaults to `12`):
            Tokens of the vocabulary to list at either end.
    """
    probe = subject.probe
    lambdas = _credit_of(probe, Variant("delta"))
    kept = _credit_of(probe, Variant("nthr"))
    rows = subject.telling((lambdas - 1) * probe.rollouts.mask)
    return {
        "delta": _by_token(subject, lambdas, probe.active, count),
        "nthr": _by_token(subject, kept, probe.active & (probe.rollouts.advantages < 0).unsqueeze(1), count),
        "nthr_selected": _mean((kept < 1)[probe.active & (probe.rollouts.advantages < 0).unsqueeze(1)].double()),
        "responses": [
            subject.response(row, **{"lambda": lambdas, "nthr_score": _scores_of_group(probe, row)}) for row in rows
        ],
    }


def _credit_of(probe: UpdateProbe, variant: Variant) -> torch.Tensor:
    """The coefficients of a variant's token credit, of shape `(B, T)`; 1 where there is no advantage to multiply."""
    advantages = probe.rollouts.advantages.unsqueeze(1)
    credited = probe.credited_advantages(variant)
    credited = credited.unsqueeze(1) if credited.dim() == 1 else credited
    return (credited / advantages).where(advantages != 0, 1.0).expand_as(probe.before)


def _scores_of_group(probe: UpdateProbe, row: int) -> torch.Tensor:
    """NTHR scores of the rollouts of a group, of shape `(B, T)`; 0 for those of other groups."""
    rollouts = probe.rollouts
    first = row - row % rollouts.num_generations
    rows = slice(first, first + rollouts.num_generations)
    scores, _ = nthr_scores(
        rollouts.states[rows],
        probe.before[rows],
        rollouts.completion_ids[rows],
        rollouts.mask[rows],
        rollouts.advantages[rows] > 0,
        probe.head,
        rollouts.temperature,
    )
    spread = torch.zeros_like(probe.before, dtype=scores.dtype)
    spread[rows] = scores
    return spread


def _by_token(subject: Subject, values: torch.Tensor, counted: torch.Tensor, count: int) -> dict[str, Any]:
    """Tokens of the vocabulary with the highest and the lowest mean, among those that occur at least five times."""
    ids, index, occurrences = subject.probe.rollouts.completion_ids[counted].unique(
        return_inverse=True, return_counts=True
    )
    means = values.new_zeros(len(ids)).index_add_(0, index, values[counted]) / occurrences
    table = [
        {"token": subject.tokenizer.decode([token]), "mean": mean, "count": number}
        for token, mean, number in sorted(
            zip(ids.tolist(), means.tolist(), occurrences.tolist(), strict=True), key=lambda entry: -entry[1]
        )
        if number >= 5
    ]
    return {"highest": table[:count], "lowest": table[::-1][:count]}


def _fraction(condition: torch.Tensor) -> float:
    return condition.double().mean().item()


def _mean(values: torch.Tensor) -> float:
    return values.double().nanmean().item()


MEASUREMENTS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "shifts": measure_shifts,
    "coupling": measure_coupling,
    "displacement": measure_displacement,
    "energy": measure_energy,
    "residual": measure_residual,
    "values": measure_values,
    "coefficients": measure_coefficients,
}
