"""
The table of the public functions that `tests/test_functions.py` puts through the same tests.

A function is a row of `ROWS`: how its arguments are drawn, what a slow reference makes of them in float64, which values
do not count (they are replaced by the worst there is, and must reach neither the result nor a gradient), what a `nan`
that counts leads to, and settings that make no sense.
"""

import inspect
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tests import references
from trl_cancel import batching, credit, diagnostics, evaluation
from trl_cancel.batch.states import LMHead


INF, NAN = math.inf, math.nan
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Sizes whose squares overflow or vanish, and subnormal numbers.
MAGNITUDES = {
    torch.float64: [1.0, 1e150, 1e-150, 1e-310],
    torch.float32: [1.0, 1e30, 1e-30, 1e-40],
    torch.bfloat16: [1.0, 1e30, 1e-30, 1e-39],
    torch.float16: [1.0, 6e4, 1e-4, 1e-6],
}


class Draw:
    """
    Draws arguments of one precision.

    From a seed alone, so that sizes, precisions and magnitudes meet evenly: left to itself, Hypothesis tries small and
    simple ones, on which little can go wrong.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.of(DTYPES)

    def number(self, least: int, most: int) -> int:
        return self.random.randint(least, most)

    def of(self, choices: list) -> Any:
        return self.random.choice(choices)

    def magnitude(self, most: float = INF) -> float:
        return self.of([size for size in MAGNITUDES[self.dtype] if 1 / most <= size <= most])

    def floats(self, *shape: int, size: float | None = None, coarse: bool = True) -> torch.Tensor:
        """Of a size; if `coarse`, sometimes with zeros and equal ones among them, or some far smaller than others."""
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        if coarse:
            values = self.of([values, (2 * values).round() / 2])
            smaller = self.of([1.0, 1.0, 2.0**-14, 2.0**-40, 2.0**-100])
            values = torch.where(torch.rand(*shape, generator=self.generator) < 0.5, values, values * smaller)
        values, most = values * (self.magnitude() if size is None else size), torch.finfo(self.dtype).max
        return values.clamp(-most, most).to(self.dtype)

    def logps(self, *shape: int) -> torch.Tensor:
        return -self.floats(*shape, size=self.of([1.0, 0.01, 10.0])).abs()

    def mask(self, *shape: int) -> torch.Tensor:
        """Of any type; sometimes of nothing."""
        mask = torch.rand(*shape, generator=self.generator) < self.of([0.7, 1.0, 0.2, 0.0])
        return mask.to(self.of([torch.bool, torch.long, torch.float32]))

    def integers(self, least: int, above: int, *shape: int) -> torch.Tensor:
        return torch.randint(least, above, shape, generator=self.generator)

    def signs(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator) < self.of([0.5, 0.0, 1.0])


@dataclass(frozen=True, repr=False)
class Row:
    """
    A public function.

    Args:
        function: The function.
        draw: Draws its arguments.
        expected: What a reference makes of them as lists, and how large the numbers are that it adds up, to which
            rounding is relative; `None` for that of the result itself.
        hidden: For arguments whose values do not all count, those that do not.
        nan: What a `nan` that counts does, by argument: `"refused"`, or `"passed on"`.
        senseless: Arguments that make no sense, each to be refused by name.
        outside: Numbers that one of an argument's may not be where it counts, to be refused by the argument's name;
            what is neither 0 nor 1 in a mask need not be said.
        tolerance: In units of the precision in which it computes.
        keeps: Whether the result is rounded to the precision of the arguments, or at least single.
        fits: Whether a draw can be judged: not where rounding decides.
        gradient: Arguments that have gradients, which must be finite.
    """

    function: Callable
    draw: Callable[[Draw], dict[str, Any]]
    expected: Callable[..., Any]
    hidden: dict[str, Callable[..., torch.Tensor]] = field(default_factory=dict)
    nan: dict[str, str] = field(default_factory=dict)
    senseless: tuple[dict[str, Any], ...] = ()
    outside: dict[str, tuple[float, ...]] = field(default_factory=dict)
    tolerance: float = 20.0
    keeps: bool = False
    fits: Callable[..., bool] = lambda **arguments: True
    gradient: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def forbidden(self) -> dict[str, tuple[float, ...]]:
        """Those of `outside`, and of all masks."""
        masks = {"mask", "positive", "counted"} & inspect.signature(self.function).parameters.keys()
        return {**dict.fromkeys(sorted(masks), (0.5, 2.0, -1.0, NAN)), **self.outside}

    def __repr__(self) -> str:
        return self.name


ROWS: list[Row] = []


def row(function: Callable, **kwargs: Any) -> Callable:
    """Makes a row of a reference that stands below it."""

    def add(expected: Callable) -> Callable:
        ROWS.append(Row(function, expected=expected, **kwargs))
        return expected

    return add


def largest(values: Any) -> float:
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def by_group(formula: Callable[..., list[float]]) -> Callable:
    """Of formulas for one group, applied to lists of groups; rounding is relative to the largest weight."""

    def of_groups(*columns: list[list[float]]) -> Any:
        found = [formula(*group) if group[0] else [] for group in zip(*columns, strict=True)]
        return found, [[largest(group)] * len(group) for group in columns[0]]

    return of_groups


def to_one(values: list[float]) -> tuple[list[float], float]:
    size = largest(values) or 1.0
    return [value / size for value in values], size


def exact(formula: Callable[..., list]) -> Callable[..., list[float]]:
    """Of a formula for one group, in fractions, which neither round nor overflow."""

    def of_group(*columns: list[float]) -> list[float]:
        return [float(value) for value in formula(*([Fraction(value) for value in column] for column in columns))]

    return of_group


# --- credit


def exp(value: float) -> float:
    return math.exp(value) if value < 709.7 else INF


def two_policies(draw: Draw) -> dict[str, Any]:
    shape = draw.number(0, 3), draw.number(1, 5)
    return {"logps": draw.logps(*shape), "old_logps": draw.logps(*shape)}


@row(credit.token_ratios, draw=two_policies, keeps=True, nan={"logps": "passed on", "old_logps": "passed on"})
def _(logps, old_logps):
    logs = [[new - old for new, old in zip(*pair, strict=True)] for pair in zip(logps, old_logps, strict=True)]
    # An error of the difference is one of the ratio, relative to it.
    return [[exp(log) for log in row] for row in logs], [[exp(log) * (1 + abs(log)) for log in row] for row in logs]


def masked_policies(draw: Draw) -> dict[str, Any]:
    arguments = two_policies(draw)
    return {**arguments, "mask": draw.mask(*arguments["logps"].shape)}


def off(mask, **_):
    return mask == 0


@row(
    credit.sequence_ratios,
    draw=masked_policies,
    keeps=True,
    hidden={"logps": off, "old_logps": off},
    nan={"logps": "passed on", "old_logps": "passed on"},
    gradient=("logps", "old_logps"),
)
def _(logps, old_logps, mask):
    rows = zip(logps, old_logps, mask, strict=True)
    ratios = [references.ratio(*_counted(*row), "sequence")[0] for row in rows]
    return ratios, [ratio * 20 for ratio in ratios]


def _counted(*columns):
    """The columns where the last of them, the mask, counts; at least one value."""
    kept = [values for values in zip(*columns, strict=True) if values[-1]] or [(0.0,) * len(columns)]
    return [list(column) for column in zip(*kept, strict=True)]


BOUNDS = (
    {"epsilon_low": NAN},
    {"epsilon_high": -0.1},
    {"epsilon_high": "0.2"},
    {"epsilon_low": None},
)


def clipped(draw: Draw) -> dict[str, Any]:
    shape = draw.number(0, 3), draw.number(1, 5)
    ratios, advantages = draw.floats(*shape, size=draw.magnitude()).abs(), draw.floats(*shape)
    bounds = [(0.2, 0.2), (0.2, 0.28), (1.0, 0.5), (0.0, 0.0)]
    low, high = draw.of(bounds)
    return {"ratios": ratios, "advantages": advantages, "epsilon_low": low, "epsilon_high": high}


@row(
    credit.symmetric_clip,
    draw=lambda draw: {"ratios": draw.floats(3, 2), "epsilon": draw.of([0.0, 0.2, 5.0, INF])},
    keeps=True,
    nan={"ratios": "passed on"},
    senseless=({"epsilon": NAN}, {"epsilon": -0.2}, {"epsilon": "0.2"}, {"ratios": "x"}),
)
def _(ratios, epsilon):
    low, high = references.symmetric_bounds(epsilon)(1.0)
    return [[min(max(ratio, low), high) for ratio in row] for row in ratios]


def away_from_bounds(ratios, epsilon_low, epsilon_high, delta=None, **_):
    bounds = [1 - epsilon_low, 1 + epsilon_high, *([] if delta is None else [delta])]
    return not any(((ratios.double() - bound).abs() < 0.02).any() for bound in bounds)


@row(
    credit.surrogate_weight,
    draw=lambda draw: {**clipped(draw), "delta": draw.of([None, 0.5, 1.1, 1.6, 4.0])},
    keeps=True,
    fits=away_from_bounds,
    nan={"ratios": "passed on", "advantages": "passed on"},
    senseless=(*BOUNDS, {"delta": NAN}, {"delta": -1.0}, {"ratios": torch.ones(3), "advantages": torch.ones(2)}),
)
def _(ratios, advantages, epsilon_low, epsilon_high, delta):
    pairs = [zip(*rows, strict=True) for rows in zip(ratios, advantages, strict=True)]
    return [[references.surrogate_slope(*pair, epsilon_low, epsilon_high, delta) for pair in row] for row in pairs]


@row(
    credit.post_clip_weights,
    draw=lambda draw: {**clipped(draw), "delta": draw.of([None, 0.5, 1.1, 1.6, 4.0])},
    keeps=True,
    nan={"ratios": "passed on", "advantages": "passed on"},
    senseless=(*BOUNDS, {"delta": NAN}, {"advantages": torch.zeros(1)}),
)
def _(ratios, advantages, epsilon_low, epsilon_high, delta):
    pairs = [zip(*rows, strict=True) for rows in zip(ratios, advantages, strict=True)]
    return [[references.post_clip_weight(*pair, epsilon_low, epsilon_high, delta) for pair in row] for row in pairs]


def group_of(draw: Draw) -> dict[str, Any]:
    """Weights and advantages, some of them of sizes of their own."""
    shape = draw.number(0, 3), draw.number(0, 4)
    return {"weights": draw.floats(*shape).abs(), "advantages": draw.floats(*shape)}


PASSED_ON = {"weights": "passed on", "advantages": "passed on"}
OTHER_GROUP = ({"advantages": torch.zeros(1)}, {"advantages": torch.zeros(3, 7)}, {"weights": "light"})


@row(
    credit.min_replace,
    draw=lambda draw: {"weights": group_of(draw)["weights"]},
    keeps=True,
    nan={"weights": "passed on"},
    senseless=({"weights": torch.tensor(1.0)}, {"weights": None}),
)
def _(weights):
    return [[min(group)] * len(group) if group else [] for group in weights]


@row(credit.orthogonal_projection, draw=group_of, keeps=True, nan=PASSED_ON, senseless=OTHER_GROUP)
def _(weights, advantages):
    return by_group(exact(references.orthogonal_projection))(weights, advantages)


@row(credit.positive_orthogonal_projection, draw=group_of, keeps=True, nan=PASSED_ON, senseless=OTHER_GROUP)
def _(weights, advantages):
    return by_group(exact(references.positive_orthogonal_projection))(weights, advantages)


@row(
    credit.truncate_and_rebalance,
    draw=lambda draw: {**group_of(draw), "floor": draw.of([0.0, 1e-6, 0.5])},
    keeps=True,
    nan=PASSED_ON,
    senseless=(*OTHER_GROUP, {"floor": -1.0}, {"floor": NAN}, {"floor": "low"}),
)
def _(weights, advantages, floor):
    def formula(weights, advantages):
        return references.truncate_and_rebalance(weights, advantages, Fraction(floor))

    found, size = by_group(exact(formula))(weights, advantages)
    return found, [[max(value, floor) for value in group] for group in size]


def scored_group(draw: Draw, rollouts: int = 3, length: int = 3, vocabulary: int = 4, dim: int = 2) -> dict[str, Any]:
    """Hidden states and an output layer whose logits are of size one, whatever the size of the states."""
    size = draw.magnitude(1e10) if draw.dtype.itemsize > 2 else 1.0
    states = draw.floats(rollouts, length, dim, size=size, coarse=False)
    weight = draw.floats(vocabulary, dim, size=1 / size, coarse=False)
    ids = draw.integers(0, vocabulary, rollouts, length)
    return {"hidden": states, "token_ids": ids, "mask": draw.mask(rollouts, length), "head": weight}


def probabilities(hidden, head, temperature=1.0):
    """For each token the probabilities of the whole vocabulary."""
    if isinstance(hidden[0], list):
        return [probabilities(states, head, temperature) for states in hidden]
    logits = [references.dot(hidden, weight) / temperature for weight in head]
    return [math.exp(logp) for logp in references.log_softmax(logits)]


def for_nthr(draw: Draw) -> dict[str, Any]:
    arguments = scored_group(draw)
    temperature = draw.of([1.0, 0.7])
    logits = arguments["hidden"].double() @ arguments["head"].double().T / temperature
    logps = logits.log_softmax(-1).gather(-1, arguments["token_ids"].unsqueeze(-1)).squeeze(-1)
    positive = draw.signs(3).to(draw.of([torch.bool, torch.long]))
    dtype = torch.promote_types(draw.dtype, torch.float32)  # as the trainer has them
    return {**arguments, "logps": logps.to(dtype), "positive": positive, "temperature": temperature}


@row(
    credit.nthr_scores,
    draw=for_nthr,
    tolerance=100,
    hidden={"hidden": off, "logps": off, "token_ids": off},
    nan={"hidden": "refused", "logps": "refused", "head": "refused"},
    outside={"hidden": (INF, -INF), "logps": (0.5, INF), "token_ids": (-1, 4, 99), "head": (INF,)},
    senseless=(
        {"temperature": 0.0},
        {"temperature": NAN},
        {"head": torch.ones(4, 5)},
        {"head": LMHead(torch.ones(4, 5))},
        {"head": LMHead(torch.nn.Linear(5, 4))},
        {"head": torch.ones(4)},
        {"head": torch.ones(4, 2, 1)},
        {"head": "lm_head"},
        {"token_ids": torch.rand(3, 3)},
        {"positive": torch.ones(2)},
        {"mask": torch.ones(3, 4)},
        {"hidden": torch.ones(3, 3)},
        {"logps": torch.ones(1, 3)},
    ),
)
def _(hidden, logps, token_ids, mask, positive, head, temperature):
    chances = probabilities(hidden, head, temperature)
    scores, threshold = references.nthr_scores(hidden, chances, token_ids, mask, positive)
    sizes = [
        references.dot(state, state)
        for row, kept in zip(hidden, mask, strict=True)
        for state, m in zip(row, kept, strict=True)
        if m
    ]
    size = 4 * sum(sizes)
    return (scores, threshold), ([[size] * 3] * 3, size)


@row(
    credit.nthr_eta,
    draw=lambda draw: {
        "success_rate": draw.floats(4, size=1.0).abs().clamp(max=1),
        "mode": draw.of(["balanced", "p", "1-p", 0.5, "0.25", 0, 2]),
    },
    keeps=True,
    nan={"success_rate": "refused"},
    outside={"success_rate": (1.5, -0.5, INF)},
    senseless=tuple({"mode": mode} for mode in ("half", -0.5, NAN, INF, None, True)),
)
def _(success_rate, mode):
    formulas = {"balanced": lambda p: 2 * abs(0.5 - p), "p": lambda p: p, "1-p": lambda p: 1 - p}
    return [formulas.get(mode, lambda p: float(mode))(p) for p in success_rate], [1.0] * len(success_rate)


def for_delta(draw: Draw) -> dict[str, Any]:
    tokens, dim = draw.of([0, 1, 4, 6, 8, 8]), draw.number(1, 3)
    advantages = draw.floats(tokens, coarse=False) * draw.of([1.0] * 7 + [0.0])
    advantages[: draw.number(0, 1)] = 0
    if draw.number(0, 7) == 0:
        advantages = advantages.abs()  # one side only
    size = draw.magnitude(1e140) / 8
    proxies = draw.floats(tokens, dim, size=1.0, coarse=False) + advantages.unsqueeze(1).sign()
    settings = {
        "refinements": draw.number(0, 2),
        "gamma": draw.of([None, 2.0]),
        "normalize": draw.of([True, False, "side"]),
    }
    return {"proxies": (proxies.double() * size).to(draw.dtype), "advantages": advantages, **settings}


@row(
    credit.delta_coefficients,
    draw=for_delta,
    tolerance=1e4,  # margins are differences of squares, over their spread
    nan={"proxies": "refused", "advantages": "refused"},
    senseless=(
        {"refinements": 1.5},
        {"refinements": -1},
        {"refinements": True},
        {"lambda_min": 2.0},
        {"lambda_max": INF},
        {"lambda_min": NAN},
        {"gamma": 0.0},
        {"gamma": NAN},
        {"gamma": "wide"},
        {"normalize": "sides"},
        {"reduce": 5},
        {"reduce": torch.ones(2)},
        {"advantages": torch.ones(9)},
        {"proxies": torch.ones(9)},
    ),
)
def _(proxies, advantages, refinements, gamma, normalize):
    if not proxies:
        return []
    size = largest(itertools.chain(*proxies)) or 1.0
    return references.delta_coefficients(
        [[value / size for value in proxy] for proxy in proxies],
        to_one(advantages)[0],
        0.8,
        1.2,
        refinements=refinements,
        gamma=gamma and gamma / size / size,
        normalize=normalize,
        least=1e-4 / size / size,
    )


# --- batching


@row(
    batching.query_preserved_permutation,
    draw=lambda draw: {"num_groups": draw.number(0, 5), "group_size": draw.number(1, 4)},
    senseless=({"generator": 5}, {"num_groups": 2.5}, {"num_groups": -1}, {"group_size": 0}, {"group_size": "2"}),
)
def _(num_groups, group_size):
    def whole(order):
        groups = [order[first : first + group_size] for first in range(0, len(order), group_size)]
        members = [[group * group_size + i for i in range(group_size)] for group in range(num_groups)]
        return sorted(groups) == members

    return whole


def rewarded(draw: Draw) -> dict[str, Any]:
    rewards = draw.floats(3, 3, 2, size=1.0)
    rewards[draw.integers(0, 2, 3, 3, 2).bool() & draw.signs(1)] = draw.of([0.0, NAN])
    weights = torch.tensor(draw.of([[1.0, 1.0], [1.0, 0.0], [0.5, -1.0]]), dtype=draw.dtype)
    return {"rewards": rewards, "weights": weights, "apart": draw.of([False, True])}


@row(
    batching.without_variance,
    draw=rewarded,
    # In single precision sums of half ones are exact.
    fits=lambda **arguments: arguments["rewards"].dtype.itemsize < 4,
    senseless=({"weights": torch.ones(3)}, {"rewards": torch.ones(3)}),
)
def _(rewards, weights, apart):
    def columns(rollout):
        if apart:
            return [reward for reward, weight in zip(rollout, weights, strict=True) if weight]
        known = [reward * weight for reward, weight in zip(rollout, weights, strict=True) if not math.isnan(reward)]
        return [sum(known) if known else NAN]

    def alike(group):
        by_function = zip(*map(columns, group), strict=True)
        return all(len({value for value in column if not math.isnan(value)}) <= 1 for column in by_function)

    return [alike(group) for group in rewards]


def counted_groups(draw: Draw) -> dict[str, Any]:
    """In any kind of sequence."""
    size, count = draw.number(1, 4), draw.number(1, 5)
    positives = [draw.number(0, size) for _ in range(count)]
    negatives = [draw.number(0, size - more) for more in positives]
    kind = draw.of(
        [list, tuple, np.array, lambda of: np.array(of, np.int32), torch.tensor, lambda of: draw_ints(of, draw)]
    )
    return {
        "positives": kind(positives),
        "negatives": kind(negatives),
        "num_groups": draw.number(1, count),
        "group_size": size,
        "min_fraction": draw.of([0.0, 0.25, 0.3, 0.5, 1]),
    }


def draw_ints(values: list[int], draw: Draw) -> torch.Tensor:
    return torch.tensor(values, dtype=draw.of([torch.uint8, torch.int16, torch.int32]))


@row(
    batching.select_balanced_groups,
    draw=counted_groups,
    senseless=(
        {"num_groups": 9},
        {"num_groups": 0.5},
        {"group_size": True},
        {"group_size": 0},
        {"min_fraction": 1.5},
        {"min_fraction": NAN},
        {"min_fraction": "half"},
        *({"positives": wrong} for wrong in ([0.5], [NAN], ["1"], [None], [[1]], 1, None, torch.ones(2), np.ones(2))),
    ),
)
def _(positives, negatives, num_groups, group_size, min_fraction):
    def least(groups):
        return min(sum(positives[group] for group in groups), sum(negatives[group] for group in groups))

    target = min_fraction * num_groups * group_size - 1e-9
    best = max(map(least, itertools.combinations(range(len(positives)), num_groups)))

    def right(found):
        groups, satisfied = found
        assert groups == sorted({*groups})
        assert len(groups) == num_groups
        return satisfied == (best >= target) and least(groups) >= min(best, target)

    return right


# --- diagnostics


def placed(draw: Draw) -> dict[str, Any]:
    shape = draw.number(0, 3), draw.number(1, 4)
    arguments = {"pushes": draw.floats(*shape), "places": draw.integers(0, 3, *shape)}
    return {**arguments, "counted": draw.mask(*shape)}


@row(
    diagnostics.token_places,
    draw=lambda draw: {"first_wrong": draw.integers(0, 6, draw.number(0, 3)), "length": draw.number(0, 5)},
    senseless=(
        {"first_wrong": torch.tensor([-1])},
        {"first_wrong": torch.tensor([NAN])},
        {"first_wrong": torch.tensor([0.5])},
        {"length": 2.5},
        {"length": -1},
    ),
)
def _(first_wrong, length):
    return [[(t >= first) + (t > first) for t in range(length)] for first in first_wrong]


@row(
    diagnostics.blame_by_place,
    draw=placed,
    hidden={"pushes": lambda counted, **_: counted == 0},
    nan={"pushes": "refused"},
    senseless=(
        {"pushes": torch.ones(1, 1), "places": torch.full((1, 1), 3), "counted": torch.ones(1, 1)},
        {"counted": torch.ones(2)},
    ),
)
def _(pushes, places, counted):
    sums = [0.0] * 3
    for row in zip(pushes, places, counted, strict=True):
        for push, place, counts in zip(*row, strict=True):
            sums[place] += -push if counts and push < 0 else 0.0
    return sums


def contextual(draw: Draw) -> dict[str, Any]:
    shape = draw.number(0, 3), draw.number(1, 4)
    return {"pushes": draw.floats(*shape), "contexts": draw.integers(0, 3, *shape)}


def unshared(contexts, **_):
    return contexts == 0


@row(
    diagnostics.net_pushes,
    draw=contextual,
    hidden={"pushes": unshared},
    nan={"pushes": "refused"},
    senseless=({"contexts": torch.rand(1, 1)}, {"contexts": torch.ones(5, 5).long()}),
    gradient=("pushes",),
)
def _(pushes, contexts):
    members = {}
    for push, context in zip(itertools.chain(*pushes), itertools.chain(*contexts), strict=True):
        members.setdefault(context, []).append(push)
    net = {context: sum(of) / len(of) if context else 0.0 for context, of in members.items()}
    size = {context: largest(of) if context else 0.0 for context, of in members.items()}
    return tuple([[of[context] for context in row] for row in contexts] for of in (net, size))


def of_layer(draw: Draw) -> dict[str, Any]:
    found = scored_group(draw, rollouts=1, length=draw.number(0, 4))
    tokens = {"hidden": found["hidden"][0], "token_ids": found["token_ids"][0], "head": found["head"]}
    return {**tokens, "temperature": draw.of([1.0, 0.7])}


NO_LAYER = (
    {"temperature": 0.0},
    {"temperature": "hot"},
    {"token_ids": torch.tensor([-1])},
    {"token_ids": torch.tensor([99])},
    {"token_ids": torch.rand(9)},
    {"head": torch.ones(4, 5)},
    {"head": LMHead(torch.nn.Linear(5, 4))},
    {"head": torch.ones(4)},
)


def errors_of(hidden, token_ids, head, temperature):
    chances = [probabilities(state, head, temperature) for state in hidden]
    return [
        [((v == token) - chance) / temperature for v, chance in enumerate(row)]
        for token, row in zip(token_ids, chances, strict=True)
    ]


@row(
    diagnostics.prediction_errors,
    draw=of_layer,
    tolerance=100,
    nan={"hidden": "refused"},
    senseless=NO_LAYER,
)
def _(hidden, token_ids, head, temperature):
    errors = errors_of(hidden, token_ids, head, temperature)
    return errors, [[1.0] * len(head) for _ in errors]


@row(
    diagnostics.head_gradient,
    draw=lambda draw: (lambda of: {**of, "weights": draw.floats(len(of["hidden"]), size=1.0)})(of_layer(draw)),
    tolerance=100,
    nan={"hidden": "refused", "weights": "refused"},
    senseless=(*NO_LAYER, {"weights": torch.ones(9)}),
)
def _(hidden, token_ids, weights, head, temperature):
    errors = errors_of(hidden, token_ids, head, temperature)
    size = sum(abs(weight) * largest(state) for weight, state in zip(weights, hidden, strict=True))
    dim = len(head[0])
    tokens = list(zip(weights, errors, hidden, strict=True))
    return (
        [[sum(w * e[v] * h[k] for w, e, h in tokens) for k in range(dim)] for v in range(len(head))],
        [[size] * dim for _ in head],
    )


@row(
    diagnostics.predicted_shifts,
    draw=lambda draw: (lambda of: {**of, "gradient": draw.floats(*of["head"].shape, size=1.0)})(of_layer(draw)),
    tolerance=100,
    nan={"hidden": "refused", "gradient": "refused"},
    senseless=(*NO_LAYER, {"gradient": torch.ones(4, 9)}),
)
def _(hidden, token_ids, gradient, head, temperature):
    errors = errors_of(hidden, token_ids, head, temperature)
    shifts = [
        sum(error * references.dot(change, state) for error, change in zip(row, gradient, strict=True))
        for row, state in zip(errors, hidden, strict=True)
    ]
    return shifts, [10 * largest(state) * largest(itertools.chain(*gradient)) for state in hidden]


def couples(draw: Draw) -> dict[str, Any]:
    size = draw.of([1.0, *([1e15, 1e-15] if draw.dtype is not torch.float16 else [100.0])])
    return {
        "hidden_a": draw.floats(2, 3, size=size, coarse=False),
        "errors_a": draw.floats(2, 4, size=1.0),
        "hidden_b": draw.floats(3, 3, size=size, coarse=False),
        "errors_b": draw.floats(3, 4, size=1.0),
    }


@row(
    diagnostics.coupling_kernel,
    draw=couples,
    nan=dict.fromkeys(["hidden_a", "errors_a", "hidden_b", "errors_b"], "refused"),
    senseless=({"errors_b": torch.ones(1, 4)}, {"hidden_b": torch.ones(3, 1)}, {"hidden_a": torch.ones(3)}),
)
def _(hidden_a, errors_a, hidden_b, errors_b):
    def of(sums):
        return [
            [sums(h, k) * sums(e, f) for k, f in zip(hidden_b, errors_b, strict=True)]
            for h, e in zip(hidden_a, errors_a, strict=True)
        ]

    return of(references.dot), of(lambda first, second: sum(abs(a * b) for a, b in zip(first, second, strict=True)))


@row(
    diagnostics.sign_agreement,
    draw=lambda draw: {"first": draw.floats(4), "second": draw.floats(4), "threshold": draw.of([0.0, 0.3])},
    nan={"first": "refused", "second": "refused"},
    fits=lambda first, threshold, **_: not ((first.double().abs() - threshold).abs() < 0.01 * threshold).any(),
    senseless=({"threshold": -1.0}, {"threshold": NAN}, {"second": torch.ones(3)}),
)
def _(first, second, threshold):
    counted = [
        (a > 0) - (a < 0) == (b > 0) - (b < 0) for a, b in zip(first, second, strict=True) if abs(a) > threshold
    ]
    return sum(counted) / len(counted) if counted else NAN


def updated_group(draw: Draw) -> dict[str, Any]:
    shape = draw.number(0, 2), draw.number(1, 3), draw.number(1, 3)
    return {
        "before": draw.logps(*shape),
        "after": draw.logps(*shape),
        "mask": draw.mask(*shape),
        "positive": draw.mask(*shape[:2]),
    }


def of_wrong(mask, positive, **_):
    return (mask == 0) | (positive == 0).unsqueeze(-1)


@row(
    diagnostics.likelihood_displacement,
    draw=updated_group,
    hidden={"before": of_wrong, "after": of_wrong},
    nan={"before": "refused", "after": "refused"},
    senseless=({"positive": torch.ones(7)}, {"mask": torch.ones(1)}),
    gradient=("before", "after"),
)
def _(before, after, mask, positive):
    prompts = list(zip(before, after, mask, positive, strict=True))

    def of(prompt, displaced=references.displacement):
        before, after, mask, positive = prompt
        before, after = (
            [
                [v if m and p else 0.0 for v, m in zip(row, kept, strict=True)]
                for row, kept, p in zip(values, mask, positive, strict=True)
            ]
            for values in (before, after)
        )
        return displaced(before, after, mask, positive) if any(positive) else NAN

    size = [sum(map(abs, itertools.chain(*before, *after))) for before, after, *_ in prompts]
    return [of(prompt) for prompt in prompts], [100.0 for _ in size]


def unlike(draw: Draw) -> dict[str, Any]:
    positive = torch.tensor([True, False, draw.of([True, False])]).to(draw.of([torch.bool, torch.long]))
    return {**scored_group(draw), "positive": positive}


@row(
    diagnostics.gwhes,
    draw=unlike,
    tolerance=200,
    hidden={"hidden": off},
    nan={"hidden": "refused"},
    senseless=(
        {"positive": torch.ones(3)},
        {"positive": torch.zeros(3)},
        {"positive": torch.tensor([1, 0])},
        {"temperature": 0.0},
        {"mask": torch.ones(3)},
    ),
)
def _(hidden, token_ids, mask, positive, head):
    chances = probabilities(hidden, head)
    states = [state for row, kept in zip(hidden, mask, strict=True) for state, m in zip(row, kept, strict=True) if m]
    return references.gwhes(hidden, chances, token_ids, mask, positive), 8 * sum(
        references.dot(state, state) for state in states
    ) * max(len(states), 1)


@row(
    diagnostics.top_k_overlap,
    draw=lambda draw: (
        lambda n: {
            "displacements": torch.randperm(n, generator=draw.generator).to(draw.dtype) * draw.magnitude(),
            "scores": torch.randperm(n, generator=draw.generator).to(draw.dtype),
            "k": draw.number(1, n),
        }
    )(draw.number(1, 5)),
    fits=lambda displacements, **_: (
        displacements.isfinite().all() and len(displacements.unique()) == len(displacements)
    ),
    nan={"displacements": "refused", "scores": "refused"},
    senseless=({"k": 0}, {"k": 9}, {"k": 1.5}, {"k": True}, {"k": "1"}, {"scores": torch.ones(7)}),
)
def _(displacements, scores, k):
    places = range(len(scores))
    least = sorted(places, key=displacements.__getitem__)[:k]
    highest = sorted(places, key=scores.__getitem__, reverse=True)[:k]
    return len({*least} & {*highest}) / k


@row(
    diagnostics.gradient_asymmetry,
    draw=lambda draw: (lambda of: {**of, "advantages": draw.floats(*of["weights"].shape)})(group_of(draw)),
    nan=PASSED_ON,
    senseless=OTHER_GROUP,
    tolerance=50,
)
def _(weights, advantages):
    def variance(group):
        values, size = to_one([w * a for w, a in zip(*group, strict=True)])
        mean = sum(values) / len(values) if values else NAN
        return sum((value - mean) ** 2 for value in values) / len(values) * size * size if values else NAN

    groups = list(zip(weights, advantages, strict=True))
    return [variance(group) for group in groups], [
        largest(w * a for w, a in zip(*group, strict=True)) * largest(w * a for w, a in zip(*group, strict=True))
        for group in groups
    ]


@row(
    diagnostics.energy_by_frequency,
    draw=lambda draw: (
        lambda n: {
            "energies": draw.floats(n).abs(),
            "token_ids": draw.integers(0, 3, n),
            "num_buckets": draw.number(1, 4),
        }
    )(draw.number(0, 6)),
    nan={"energies": "refused"},
    senseless=(
        {"num_buckets": 0},
        {"num_buckets": 1.5},
        {"energies": torch.tensor([-1.0])},
        {"energies": [1.0], "token_ids": [0.5]},
        {"energies": [1.0], "token_ids": ["a"]},
        {"token_ids": torch.ones(9)},
    ),
)
def _(energies, token_ids, num_buckets):
    nothing = [NAN] * num_buckets
    if not token_ids:
        return (nothing, nothing), (nothing, nothing)
    energy, tokens = references.energy_by_frequency(
        energies if any(energies) else [1.0] * len(energies), token_ids, num_buckets
    )
    ones = [1.0] * num_buckets
    return (energy if any(energies) else nothing, tokens), (ones, ones)


@row(
    diagnostics.output_row_energy,
    draw=lambda draw: {
        "weights": draw.floats(3, size=1.0, coarse=False),
        "logps": draw.logps(3),
        "hidden": draw.floats(3, draw.number(1, 3)),
    },
    nan=dict.fromkeys(["weights", "logps", "hidden"], "refused"),
    outside={"logps": (0.5, INF), "weights": (INF,), "hidden": (INF,)},
    senseless=({"weights": torch.ones(1)}, {"hidden": torch.ones(3)}),
)
def _(weights, logps, hidden):
    def norm(state):
        values, size = to_one(state)
        return size * math.hypot(*values)

    return [abs(w) * -math.expm1(logp) * norm(h) for w, logp, h in zip(weights, logps, hidden, strict=True)]


@row(
    diagnostics.jitter2,
    draw=lambda draw: {"series": draw.floats(draw.number(3, 6))},
    nan={"series": "refused"},
    senseless=({"series": [1.0, 2.0]}, {"series": torch.ones(3, 3)}, {"series": [1.0, None, 2.0]}, {"series": "up"}),
)
def _(series):
    seconds = [c - 2 * b + a for a, b, c in zip(series, series[1:], series[2:], strict=False)]
    return sum(map(abs, seconds)) / len(seconds), 4 * largest(series)


def rollouts_of(draw: Draw) -> dict[str, Any]:
    rows, length = draw.number(0, 4), draw.number(1, 3)
    return {
        "token_ids": draw.integers(0, 2, rows, length),
        "mask": draw.mask(rows, length),
        "group_ids": torch.arange(rows) // 2,
        "advantages": draw.floats(rows),
    }


@row(
    diagnostics.shared_contexts,
    draw=rollouts_of,
    nan={},
    senseless=(
        {"advantages": torch.ones(9)},
        {"token_ids": torch.rand(4, 3)},
        {"group_ids": torch.ones(9)},
        {"group_ids": None},
    ),
)
def _(token_ids, mask, group_ids, advantages):
    def prefix(i, t):
        return (group_ids[i], *token_ids[i][: t + 1])

    tokens = [(i, t) for i, row in enumerate(mask) for t, counts in enumerate(row) if counts]
    pushes = {}
    for i, t in tokens:
        pushes.setdefault(prefix(i, t), []).append(advantages[i])
    shared = {context: sum(of) / sum(map(abs, of)) for context, of in pushes.items() if min(of) < 0 < max(of)}

    def right(found):
        contexts, deserved = found
        numbers = {}
        for i, row in enumerate(mask):
            for t in range(len(row)):
                context = prefix(i, t) if row[t] else None
                if context not in shared:
                    assert contexts[i][t] == deserved[i][t] == 0
                else:
                    assert numbers.setdefault(context, contexts[i][t]) == contexts[i][t] != 0
                    assert deserved[i][t] == pytest.approx(shared[context], abs=1e-5)
        return len({*numbers.values()}) == len(numbers)

    return right


@row(
    diagnostics.shared_prefix_residual,
    draw=lambda draw: (lambda of: {**of, "deserved": draw.floats(*of["pushes"].shape, size=1.0).clamp(-1, 1)})(
        contextual(draw)
    ),
    hidden={"pushes": unshared, "deserved": unshared},
    nan={"pushes": "passed on"},
    senseless=(
        {"contexts": torch.ones(5, 5).long()},
        {"pushes": torch.ones(1, 1), "contexts": torch.ones(1, 1), "deserved": torch.ones(1, 1)},
        {"deserved": torch.ones(1)},
    ),
)
def _(pushes, contexts, deserved):
    tokens = [
        token
        for token in zip(*map(itertools.chain.from_iterable, (pushes, contexts, deserved)), strict=True)
        if token[1]
    ]
    total = 0.0
    for _, context, value in tokens:
        of = [push for push, other, _ in tokens if other == context]
        gross = sum(map(abs, of))
        total += abs(sum(of) / gross - value) if gross else 0.0
    return (total / max(1, len(tokens)), len(tokens)), (2.0, 1.0)


def shifted(draw: Draw) -> dict[str, Any]:
    shape = draw.number(0, 3), draw.number(1, 3)
    return {
        "before": draw.logps(*shape),
        "after": draw.logps(*shape),
        "mask": draw.mask(*shape),
        "advantages": draw.floats(shape[0]),
        "threshold": draw.of([0.0, 0.4]),
    }


@row(
    diagnostics.token_shifts,
    draw=shifted,
    hidden={"before": off, "after": off},
    nan={},
    fits=lambda before, after, threshold, **_: (
        not threshold or not (((after.double() - before.double()).abs() - threshold).abs() < 1e-3).any()
    ),
    senseless=(
        {"threshold": -1.0},
        {"threshold": NAN},
        {"threshold": "0.1"},
        {"advantages": torch.ones(7)},
        {"mask": torch.ones(1)},
    ),
)
def _(before, after, mask, advantages, threshold):
    rows = list(zip(before, after, mask, strict=True))
    shifts = [[b - a if m else 0.0 for a, b, m in zip(*row, strict=True)] for row in rows]

    def ratios(belongs):
        chosen = [
            shift
            for row, kept, advantage in zip(shifts, mask, advantages, strict=True)
            for shift, m in zip(row, kept, strict=True)
            if m and belongs(advantage)
        ]
        parts = (
            [c > threshold for c in chosen],
            [c < -threshold for c in chosen],
            [abs(c) <= threshold for c in chosen],
            chosen,
            [abs(c) for c in chosen],
        )
        return [sum(part) / len(part) if part else NAN for part in parts]

    def right(found):
        for name, belongs in (("positive", lambda a: a > 0), ("negative", lambda a: a < 0), ("all", lambda a: True)):
            of = getattr(found, name)
            values = (of.boosted, of.suppressed, of.stable, of.mean, of.mean_magnitude)
            assert values == pytest.approx(ratios(belongs), nan_ok=True, abs=1e-5)
        return found.shifts.tolist() == [pytest.approx(row, abs=1e-5) for row in shifts]

    return right


@row(
    diagnostics.counterfactual_value,
    draw=lambda draw: {
        "forced": draw.floats(3, size=1.0),
        "free": draw.floats(3, size=1.0),
        "probability": draw.floats(3, size=1.0).abs().clamp(max=0.9),
    },
    nan=dict.fromkeys(["forced", "free", "probability"], "refused"),
    outside={"probability": (1.0, 1.5, -0.5), "forced": (INF,)},
    senseless=(
        {"probability": torch.ones(3)},
        {"probability": -torch.ones(3)},
        {"probability": 1.0},
        {"free": torch.ones(2)},
    ),
)
def _(forced, free, probability):
    return [(q - v) / (1 - p) for q, v, p in zip(forced, free, probability, strict=True)], [40.0] * 3


# --- evaluation


@row(
    evaluation.avg_at_k,
    draw=lambda draw: (lambda n: {"rewards": draw.floats(2, n), "k": draw.of([None, 1, n])})(draw.number(1, 4)),
    nan={},
    senseless=(
        {"k": 0},
        {"k": 9},
        {"k": 1.5},
        {"k": True},
        {"rewards": torch.ones(2, 0), "k": 1},
        {"rewards": "right"},
    ),
)
def _(rewards, k):
    return [sum(row[:k]) / len(row[:k]) for row in rewards], [largest(row) for row in rewards]


@row(
    evaluation.pass_at_k,
    draw=lambda draw: (
        lambda n: {
            "correct": draw.mask(2, n).to(draw.of([torch.bool, torch.long, draw.dtype])),
            "k": draw.number(1, n),
        }
    )(draw.number(1, 4)),
    nan={"correct": "refused"},
    senseless=(
        {"k": 0},
        {"k": 9},
        {"k": 2.5},
        {"k": "1"},
        {"correct": torch.tensor([0.5]), "k": 1},
        {"correct": torch.tensor([2.0]), "k": 1},
    ),
)
def _(correct, k):
    def passes(row):
        subsets = list(itertools.combinations(row, k))
        return sum(any(subset) for subset in subsets) / len(subsets)

    return [passes(row) for row in correct], [1.0, 1.0]


def graded(draw: Draw) -> dict[str, Any]:
    scores = draw.floats(draw.number(0, 3), draw.number(1, 3))
    scores[draw.signs(*scores.shape)] = NAN
    return {"scores": scores, "num_resamples": 50}


@row(
    evaluation.mean_with_interval,
    draw=graded,
    nan={},
    senseless=(
        {"confidence": 0.0},
        {"confidence": 1.5},
        {"confidence": NAN},
        {"seed": "x"},
        {"seed": 0.5},
        {"num_resamples": 0},
        {"num_resamples": 2.5},
        {"scores": torch.ones(3)},
        {"scores": torch.tensor([[INF]])},
        {"scores": torch.tensor([[-INF]])},
    ),
)
def _(scores, num_resamples):
    known = [[value for value in row if not math.isnan(value)] for row in scores]
    means = [sum(row) / len(row) for row in known if row]

    def right(found):
        if not means:
            return all(map(math.isnan, found))
        mean, low, high = found
        slack = 1e-12 * largest(itertools.chain(*known))
        assert mean == pytest.approx(sum(means) / len(means), abs=slack, rel=1e-9)
        return min(means) - slack <= low <= high <= max(means) + slack

    return right


# Public functions without a row.
ELSEWHERE = {
    "balanced_order": "whole numbers, in tests/batching/test_balance.py",
    **dict.fromkeys(["best_precision", "explain"], "of devices and configurations"),
    **dict.fromkeys(
        [
            "answer_problems",
            "continuations",
            "end_tokens",
            "evaluate",
            "sample_rollouts",
            "sampling",
            "score_samples",
            "token_values",
        ],
        "of models",
    ),
    **dict.fromkeys(
        ["as_answers", "load_problems", "math_verify_reward", "prompt_token_ids", "rewards_of", "summarize"],
        "of texts",
    ),
}
