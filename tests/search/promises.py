"""
What must be true of a run, by code of its own: nothing here asks the package what it did.

Each promise is a function of the settings and of what was watched that yields the checks it made: `None` for one that
held, a text for one that did not. A promise that yields nothing was not exercised.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from math import isclose, isfinite
from typing import Any

import torch
import trl

from trl_cancel.batch.clipping import CLIPPED_LOSSES
from trl_cancel.methods import METHODS
from trl_cancel.methods.method import Method

from ..references import consistent
from .runs import PROCESSES, ROUNDING, MicroBatch, Run, Watched, value_of


Checks = Iterator[str | None]


class Of:
    """The settings of a run as attributes, with defaults for those that are not named."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings

    def __getattr__(self, name: str) -> Any:
        return value_of(self.settings, name)

    @property
    def micro_batches_a_generation(self) -> int:
        if self.generation_batch_size is not None:
            return self.generation_batch_size // self.per_device_train_batch_size // PROCESSES
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def spreads_generation(self) -> bool:
        """Whether a generation batch is trained on in several optimizer steps."""
        return self.gradient_accumulation_steps % self.micro_batches_a_generation != 0

    @property
    def on_policy(self) -> bool:
        return self.gradient_accumulation_steps % (self.micro_batches_a_generation * self.num_iterations) == 0

    @property
    def epsilons(self) -> tuple[float, float]:
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return self.epsilon, high

    @property
    def corrects(self) -> bool:
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def has_credits(self) -> bool:
        give_credit = [method for method in METHODS if type(method).credit is not Method.credit]
        return bool(self.credits) or any(method.is_on(self) for method in give_credit)

    @property
    def level(self) -> str:
        return self.importance_sampling_level

    @property
    def dropout(self) -> bool:
        return self.model == "dropout"  # of the attention, which `disable_dropout` does not reach


Place = tuple[int, int]  # an optimizer step, and how often it had met the rollout before
Row = tuple[MicroBatch, int]


def by_place(watched: Watched) -> dict[Place, dict[int, Row]]:
    """Where each rollout was trained on: for each place, its micro-batch and its row there."""
    places: dict[Place, dict[int, Row]] = defaultdict(dict)
    met: Counter[tuple[int, int]] = Counter()
    for micro_batch in watched.micro_batches:
        for row, tag in enumerate(micro_batch.tags):
            step = micro_batch.step
            places[step, met[step, tag]][tag] = micro_batch, row
            met[step, tag] += 1
    return places


def groups_at(watched: Watched) -> Iterator[tuple[Place, dict[int, Row]]]:
    """The members of each group at each place where there is one of them."""
    for place, rollouts in by_place(watched).items():
        groups: dict[int, dict[int, Row]] = defaultdict(dict)
        for tag, row in sorted(rollouts.items()):
            groups[watched.rollouts[tag].group][tag] = row
        for group in groups.values():
            yield place, group


def one_prompt_a_group(of: Of, watched: Watched) -> Checks:
    prompts = defaultdict(set)
    for rollout in watched.rollouts.values():
        prompts[rollout.group].add(rollout.prompt)
    yield from ("a group holds several prompts" if len(found) > 1 else None for found in prompts.values())


def whole_groups(of: Of, watched: Watched) -> Checks:
    """All rollouts of a prompt in one optimizer step, for `query_preserved` and for group weights."""
    if not (of.query_preserved and of.spreads_generation) and of.group_weights == "none":
        return
    for (step, _), group in groups_at(watched):
        missing = of.num_generations - len(group)
        yield f"optimizer step {step} holds {len(group)} of {of.num_generations} of a group" if missing else None


def whole_in_micro_batches(of: Of, watched: Watched) -> Checks:
    """Where the micro-batch is a multiple of the group, the group lies in one of them."""
    fits = of.per_device_train_batch_size % of.num_generations == 0
    if not (fits and of.query_preserved and of.spreads_generation):
        return
    for (step, _), group in groups_at(watched):
        parts = {id(micro_batch) for micro_batch, _ in group.values()}
        yield f"step {step}: a group lies in {len(parts)} micro-batches" if len(parts) > 1 else None


def each_rollout_as_often(of: Of, watched: Watched) -> Checks:
    """A generation batch that is used up has been trained on as often as `num_iterations` says, every rollout alike."""
    used: Counter[int] = Counter(tag for micro_batch in watched.micro_batches for tag in micro_batch.tags)
    generations = defaultdict(list)
    for tag, times in used.items():
        generations[watched.rollouts[tag].generation].append(times)
    for generation in sorted(generations)[:-1]:
        times = set(generations[generation])
        yield None if times == {of.num_iterations} else f"rollouts of one generation are trained on {times} times"


def cancels(of: Of, watched: Watched) -> Checks:
    """Σ w·A = 0 within each group of an optimizer step, of what is really multiplied."""
    if of.group_weights in ("none", "identity") or not of.group_weights_stop_gradient:
        return
    for (step, _), group in groups_at(watched):
        pushes = [push_of(of, *row) for row in group.values()]
        advantages = [advantage_of(watched, tag) for tag in group]
        if None in pushes or not any(advantages):
            continue
        # `min` has nothing to go by but the advantages, where they do not sum to zero.
        if of.group_weights == "min" and abs(sum(advantages)) > 1e-3 * sum(map(abs, advantages)):
            continue
        net, gross = abs(sum(pushes)), sum(map(abs, pushes))
        slack = tolerance(of) * (sum(map(abs, advantages)) * of.group_weights_scale + gross)
        yield None if net <= slack else f"step {step}: Σ w·A = {net:.2g}, Σ |w·A| = {gross:.2g}"


def push_of(of: Of, micro_batch: MicroBatch, row: int) -> float | None:
    """What multiplies a rollout's score, w·A, averaged over its tokens as `loss_type="grpo"` does; token credits and
    the choice of tokens by entropy taken out, which come after the weights. `None` if they leave nothing to see."""
    mask = micro_batch.mask[row]
    if not mask.any():
        return 0.0
    factor = micro_batch.coefficients[row] * micro_batch.kept_tokens[row]
    if not of.group_weights_include_sampling_ratio:
        factor = factor * correction_of(of, micro_batch, row)
    total = factor[mask].sum()  # whether the loss gives each token its own factor or all of them the mean
    return (micro_batch.pushes[row][mask].sum() / total).item() if total > 1e-6 else None


def correction_of(of: Of, micro_batch: MicroBatch, row: int) -> torch.Tensor:
    """What corrects a rollout's tokens for the sampling: the mean of all where they share a ratio but no advantage."""
    correction, mask = micro_batch.correction[row], micro_batch.mask[row]
    shared = micro_batch.spread and of.level == "sequence" and of.loss_type in CLIPPED_LOSSES
    return correction[mask].mean().expand_as(correction) if shared else correction


def advantage_of(watched: Watched, tag: int) -> float:
    """TRL's advantage, 0 where it is but the rounding of a mean."""
    rollout = watched.rollouts[tag]
    return rollout.advantage if abs(rollout.advantage) > ROUNDING and rollout.group not in watched.idle else 0.0


def tolerance(of: Of) -> float:
    return 2e-2 if of.bf16 else 1e-3


def multiplied_as_stated(of: Of, watched: Watched) -> Checks:
    """What multiplies each token is the weight of the stated surrogate, times the credits, times the advantage."""
    if of.bf16 or (of.group_weights != "none" and (not of.group_weights_stop_gradient or of.dropout)):
        return
    weighs = of.group_weights != "none"
    weights = _group_weights(of, watched) if weighs else {}
    for place, rollouts in by_place(watched).items():
        for tag, (micro_batch, row) in rollouts.items():
            mask = micro_batch.mask[row]
            if not mask.any() or (weighs and (place, tag) not in weights) or _is_at_an_edge(of, micro_batch, row):
                continue
            leaves_trls = of.group_weights == "none" and not of.has_credits
            advantage = watched.rollouts[tag].advantage if leaves_trls else advantage_of(watched, tag)
            advantages = advantage * micro_batch.coefficients[row]
            expected = (
                advantages * weights[place, tag]
                if weighs
                else advantages * surrogate_weights(of, micro_batch, row, advantages)
            )
            expected = expected * micro_batch.kept_tokens[row]
            if of.corrects and of.loss_type != "vespo" and not (weighs and of.group_weights_include_sampling_ratio):
                expected = expected * correction_of(of, micro_batch, row)
            found, expected = micro_batch.pushes[row][mask], expected[mask]
            if of.level == "sequence":  # one ratio for all tokens spreads what differs between them
                found, expected = found.mean(), expected.mean()
            slack = 2e-3 * max(1.0, abs(watched.rollouts[tag].advantage)) * max(1.0, expected.abs().max().item())
            off = (found - expected).abs().max().item()
            yield (
                None
                if off <= slack
                else (
                    f"step {place[0]}: a rollout with A = {watched.rollouts[tag].advantage:.3g} is multiplied by "
                    f"{found.flatten()[:4].tolist()}, stated is {expected.flatten()[:4].tolist()}"
                )
            )


def _ratios(of: Of, micro_batch: MicroBatch, row: int) -> torch.Tensor:
    mask, difference = micro_batch.mask[row], micro_batch.logps[row] - micro_batch.old_logps[row]
    if of.level == "sequence":
        return difference[mask].mean().exp().expand_as(difference)
    return difference.exp()


def _is_at_an_edge(of: Of, micro_batch: MicroBatch, row: int) -> bool:
    """Whether rounding decides on which side of a bound the ratio of a rollout is."""
    if of.level != "sequence" or not micro_batch.mask[row].any():
        return False
    ratio, (low, high) = _ratios(of, micro_batch, row)[0].item(), of.epsilons
    return any(isclose(ratio, bound, rel_tol=1e-6) for bound in (1 - low, 1 + high, of.delta) if bound is not None)


def surrogate_weights(of: Of, micro_batch: MicroBatch, row: int, advantages: torch.Tensor) -> torch.Tensor:
    """The derivative of the surrogate by the log-ratio, over the advantage, for each token of a rollout."""
    ratios, (low, high) = _ratios(of, micro_batch, row), of.epsilons
    kept = _kept_by_off_policy_mask(of, micro_batch, row, advantages)
    if of.loss_type == "vespo":
        phi = trl.GRPOTrainer.get_gamma_weights(
            advantages.unsqueeze(0),
            (micro_batch.logps - micro_batch.old_logps)[row].unsqueeze(0),
            micro_batch.mask[row].unsqueeze(0).long(),
            micro_batch.correction[row].unsqueeze(0) if of.corrects else None,
            of.vespo_k_pos,
            of.vespo_lambda_pos,
            of.vespo_k_neg,
            of.vespo_lambda_neg,
        )
        return phi.squeeze(0) * kept
    if of.loss_type == "cispo":
        return ratios.clamp(max=high) * kept
    if of.symmetric_clip and of.symmetric_clip_gradient == "score":
        return ratios.clamp(0, 1 + high) * kept
    sign = torch.where(advantages < 0, -1.0, 1.0)
    r = ratios.clone().requires_grad_()
    if of.symmetric_clip:
        surrogate = r.clamp(max=1 + high) * sign
    elif of.loss_type == "sapo":
        temperature = torch.where(advantages > 0, of.sapo_temperature_pos, of.sapo_temperature_neg)
        surrogate = torch.sigmoid(temperature * (r - 1)) * 4 / temperature * sign
    else:
        bounded = r if of.delta is None else r.clamp(max=of.delta)
        surrogate = torch.min(bounded * sign, r.clamp(1 - low, 1 + high) * sign)
    (slope,) = torch.autograd.grad(surrogate.sum(), r)
    return slope * ratios * sign * kept


def _kept_by_off_policy_mask(of: Of, micro_batch: MicroBatch, row: int, advantages: torch.Tensor) -> float:
    if of.off_policy_mask_threshold is None:
        return 1.0
    mask = micro_batch.mask[row]
    drift = (micro_batch.sampling_logps - micro_batch.logps)[row][mask].nan_to_num(0.0).mean()
    return float((advantages >= 0).all() or drift <= of.off_policy_mask_threshold)


def _group_weights(of: Of, watched: Watched) -> dict[tuple[Place, int], float]:
    """
    Weight of each rollout of each whole group by the loops of `tests/references.py`, with the correction for sampling
    in it, that of tokens as its mean.
    """
    weights: dict[tuple[Place, int], float] = {}
    for place, group in groups_at(watched):
        advantages = [advantage_of(watched, tag) for tag in group]
        at_an_edge = any(_is_at_an_edge(of, *rollout) for rollout in group.values())
        if len(group) < of.num_generations or not any(advantages) or at_an_edge:
            continue
        before, takes_part, outside = [], [], []
        for advantage, (micro_batch, row) in zip(advantages, group.values(), strict=True):
            mask = micro_batch.mask[row]
            if not mask.any():
                before.append(0.0), takes_part.append(False), outside.append(False)
                continue
            ratio = _ratios(of, micro_batch, row)[0].item()
            clipped, flat, beyond = clipped_ratio(of, ratio, advantage)
            correction = micro_batch.correction[row][mask].mean().item()
            active = correction != 0 and bool(
                _kept_by_off_policy_mask(of, micro_batch, row, torch.tensor([advantage]))
            )
            correction = correction if of.group_weights_include_sampling_ratio else 1.0
            before.append(clipped * correction)
            outside.append(active and beyond)
            takes_part.append(active and not (flat and of.group_weights_trust_region == "mask"))
        if of.group_weights_trust_region == "group" and any(outside):
            takes_part = [False] * len(group)
        present = [pair for pair, part in zip(zip(before, advantages, strict=True), takes_part, strict=True) if part]
        consistent_weights = iter(consistent(of.group_weights, [w for w, _ in present], [a for _, a in present]))
        for tag, part in zip(group, takes_part, strict=True):
            weights[place, tag] = of.group_weights_scale * next(consistent_weights) if part else 0.0
    return weights


def clipped_ratio(of: Of, ratio: float, advantage: float) -> tuple[float, bool, bool]:
    """The ratio as the surrogate clips it, whether its gradient is cut off, and whether it is outside the range."""
    low, high = of.epsilons
    if of.loss_type == "cispo":
        return min(ratio, high), False, ratio > high
    if of.symmetric_clip:
        return min(ratio, 1 + high), ratio > 1 + high, ratio > 1 + high
    bounded = ratio if of.delta is None else min(ratio, of.delta)
    pick = min if advantage >= 0 else max
    clipped = pick(bounded, min(max(ratio, 1 - low), 1 + high))
    top = 1 + high if of.delta is None or advantage < 0 else min(of.delta, 1 + high)
    return clipped, clipped != ratio, not 1 - low <= ratio <= top


def credits_as_stated(of: Of, watched: Watched) -> Checks:
    """DelTA's mean, NTHR's values, and the sign control's zeros, over the tokens that the loss counts."""
    if watched.unclear:
        return
    masks = {
        tag: micro_batch.mask[row] for micro_batch in watched.micro_batches for row, tag in enumerate(micro_batch.tags)
    }
    generations: dict[Any, list[tuple[float, float]]] = defaultdict(list)  # DelTA's, with their advantages
    whole: dict[Any, bool] = defaultdict(lambda: True)
    for call in watched.credits:
        if call.name == "SignControl":
            yield from _signs(of, watched, call)
        elif call.name == "NTHR":
            yield from _etas(of, watched, call, masks)
        elif call.name == "DelTA":
            for tag, row in call.rows:
                generation = watched.rollouts[tag].generation
                whole[generation] &= tag in masks  # the last generation may not be trained on to its end
                if tag in masks:
                    counted = masks[tag].nonzero().squeeze(1).tolist()
                    generations[generation] += [(row[place], advantage_of(watched, tag)) for place in counted]
    for generation, pairs in generations.items():
        if whole[generation] and pairs:
            yield _delta_values(of, pairs)


def _signs(of: Of, watched: Watched, call: Any) -> Checks:
    silenced = {"positive": -1, "negative": 1}[of.advantage_sign]
    for tag, row in call.rows:
        expected = 0.0 if advantage_of(watched, tag) * silenced > 0 else 1.0
        yield None if set(row) == {expected} else f"A = {watched.rollouts[tag].advantage:.3g} gets {set(row)}"


def _etas(of: Of, watched: Watched, call: Any, masks: dict[int, torch.Tensor]) -> Checks:
    members = defaultdict(list)
    for rollout in watched.rollouts.values():
        members[rollout.group].append(rollout.advantage)
    for tag, row in call.rows:
        if tag not in masks:
            continue
        rollout = watched.rollouts[tag]
        share = sum(value > ROUNDING for value in members[rollout.group]) / of.num_generations
        share = 0.0 if rollout.group in watched.idle else share
        eta = {"balanced": 2 * abs(0.5 - share), "p": share, "1-p": 1 - share}.get(of.nthr_eta)
        eta = float(of.nthr_eta) if eta is None else eta
        values = {row[place] for place in masks[tag].nonzero().squeeze(1).tolist()}
        allowed = (1.0, eta) if rollout.advantage < -ROUNDING and share > 0 else (1.0,)
        fits = all(any(isclose(value, one, abs_tol=1e-5) for one in allowed) for value in values)
        yield None if fits else f"NTHR gives {values} to a rollout with A = {rollout.advantage:.3g}, allowed {allowed}"


def _delta_values(of: Of, pairs: list[tuple[float, float]]) -> str | None:
    values = [value for value, _ in pairs]
    mean = sum(values) / len(values)
    normalises = {True: "batch", False: "none"}.get(of.delta_normalize, of.delta_normalize)
    if normalises == "batch" and max(values) > 0 and not isclose(mean, 1, abs_tol=1e-3):
        return f"DelTA's coefficients have mean {mean:.4f}, and not 1"
    if normalises == "side":
        for sign in (-1, 1):
            side = [value for value, advantage in pairs if advantage * sign > 0]
            if side and max(side) > 0 and not isclose(sum(side) / len(side), 1, abs_tol=1e-3):
                return f"DelTA's coefficients of side {sign} have mean {sum(side) / len(side):.4f}, and not 1"
    low, high = of.delta_lambda_min, of.delta_lambda_max
    if (
        normalises == "none"
        and of.delta_top_fraction is None
        and not low - 1e-5 <= min(values) <= max(values) <= high + 1e-5
    ):
        return f"DelTA's coefficients are {min(values):.3f} to {max(values):.3f}, and not {low} to {high}"
    if of.delta_top_fraction is not None:
        pushed = [value > 0 for value, advantage in pairs if advantage]
        if sum(pushed) < of.delta_top_fraction * len(pushed) - 1e-6:
            return f"DelTA keeps {sum(pushed)} of {len(pushed)} tokens, delta_top_fraction={of.delta_top_fraction}"
    return None


def chosen_as_asked(of: Of, run: Run) -> Checks:
    """Where `balance/satisfied` is 1, each optimizer step is balanced and no group is idle; elsewhere rounds ran out."""
    if not (of.reward_balance or of.filter_zero_variance):
        return
    watched = run.watched
    assert watched is not None
    if watched.unclear:
        return
    logs = {entry["step"] - 1: entry for entry in run.logs if "balance/satisfied" in entry}
    parts: dict[Any, list[float]] = defaultdict(list)
    groups: dict[Any, list[bool]] = defaultdict(list)
    for (step, occurrence), rollouts in by_place(watched).items():
        for tag, (micro_batch, _) in rollouts.items():
            rollout = watched.rollouts[tag]
            parts[rollout.step, rollout.generation, step, occurrence, micro_batch.process].append(
                advantage_of(watched, tag)
            )
            groups[rollout.step, rollout.group].append(rollout.group not in watched.idle)
    generations = Counter(step for step, _ in {(r.step, r.generation) for r in watched.rollouts.values()})
    for step, entry in logs.items():
        if entry["balance/satisfied"] < 1 and generations[step] == 1:
            yield (
                None
                if entry["balance/rounds"] == of.max_generation_rounds
                else (f"not satisfied after {entry['balance/rounds']} of {of.max_generation_rounds} rounds")
            )
    for (step, *_), advantages in parts.items():
        if of.reward_balance and logs.get(step, {}).get("balance/satisfied") == 1:
            least = min(sum(a > 0 for a in advantages), sum(a < 0 for a in advantages)) / len(advantages)
            yield (
                None
                if least >= of.reward_balance - 1e-9
                else (
                    f"{least:.2f} of the rollouts of an optimizer step have the rarer sign, reward_balance={of.reward_balance}"
                )
            )
    for (step, _), differ in groups.items():
        if of.filter_zero_variance and logs.get(step, {}).get("balance/satisfied") == 1:
            yield None if all(differ) else "a group whose rewards are equal is trained on"


def finite(of: Of, run: Run) -> Checks:
    for entry in run.logs:
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in entry:
                yield None if isfinite(entry[name]) else f"{name} is {entry[name]} at step {entry['step']}"
    yield None if all(value.isfinite().all() for value in run.weights.values()) else "weights are not finite"


def metrics_tell_the_truth(of: Of, run: Run) -> Checks:
    """What is logged of cancellation, against what was seen."""
    # What it measures holds the credits, and a correction that stays outside the weights.
    weighs = of.group_weights not in ("none", "identity") and of.group_weights_stop_gradient and not of.has_credits
    weighs = weighs and (of.group_weights_include_sampling_ratio or not of.corrects)
    for entry in run.logs:
        for name in ("cancel/shared_prefix_residual", "cancel/positive_fraction", "nthr/selected_fraction"):
            if name in entry:
                most = 2 if "residual" in name else 1
                yield None if -1e-5 <= entry[name] <= most + 1e-5 else f"{name} is {entry[name]}"
        if weighs and of.group_weights != "min" and "group_weights/orthogonality" in entry:
            value = entry["group_weights/orthogonality"]
            yield None if value < tolerance(of) else f"group_weights/orthogonality is {value:.2g}"


# Promises about one run, by name.
OF_A_RUN: dict[str, Callable[[Of, Run], Checks]] = {
    **{
        promise.__name__: (lambda of, run, promise=promise: promise(of, run.watched))
        for promise in (
            one_prompt_a_group,
            whole_groups,
            whole_in_micro_batches,
            each_rollout_as_often,
            cancels,
            multiplied_as_stated,
            credits_as_stated,
        )
    },
    **{promise.__name__: promise for promise in (chosen_as_asked, finite, metrics_tell_the_truth)},
}
