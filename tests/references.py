"""Slow, independent versions of every formula: loops over Python floats, written from the papers."""

import itertools
import math


def ratio(logps, old_logps, mask, level):
    """Ratios of one rollout as a list, the same for all its tokens at sequence level (Eq. 44 of 2604.13088)."""
    logs = [(new - old) for new, old in zip(logps, old_logps, strict=True)]
    if level == "token":
        return [math.exp(log) for log in logs]
    length = sum(mask)
    mean = sum(log for log, counts in zip(logs, mask, strict=True) if counts) / length if length else 0.0
    return [math.exp(mean)] * len(logs)


def normalisation(mask, loss_type, max_length):
    """What each token's loss is multiplied with in the loss of a micro-batch that is a whole optimizer step."""
    rows, total = len(mask), sum(map(sum, mask))
    by_loss = {
        "grpo": lambda row: 1 / (rows * max(sum(row), 1)),
        "bnpo": lambda row: 1 / total,
        "dr_grpo": lambda row: 1 / (rows * max_length),
        "dapo": lambda row: 1 / total,
        "luspo": lambda row: 1 / rows,
    }
    return [[by_loss[loss_type](row) * counts for counts in row] for row in mask]


def clipped_loss(
    logps, old_logps, advantages, mask, *, bounds, level, loss_type, max_length, credit=None, score=False
):
    """
    Value and gradient by the log-probs of -sum alpha A f(r), for a weight f given by `bounds(A) -> (low, high)`.

    With `score` the clipped ratio is a constant weight of the score (Eq. 81), otherwise it is differentiated (Eq. 80).
    With `credit`, a coefficient a token, the gradient of each token carries its own coefficient at either level.
    """
    alpha = normalisation(mask, loss_type, max_length)
    value, gradient = 0.0, [[0.0] * len(row) for row in logps]
    for i, advantage in enumerate(advantages):
        low, high = bounds(advantage)
        ratios = ratio(logps[i], old_logps[i], mask[i], level)
        for t, r in enumerate(ratios):
            coefficient = 1.0 if credit is None else credit[i][t]
            clipped = min(max(r, low), high)
            slope = clipped if score else (r if low <= r <= high else 0.0)
            value -= alpha[i][t] * coefficient * advantage * clipped
            if level == "token" or credit is not None:
                gradient[i][t] -= alpha[i][t] * coefficient * advantage * slope
            else:  # the ratio's gradient is spread over all tokens of the rollout
                for s in range(len(ratios)):
                    gradient[i][s] -= alpha[i][t] * advantage * slope * mask[i][s] / sum(mask[i])
    return value, gradient


def symmetric_bounds(epsilon):
    """Eq. 79 of 2604.13088: one range for both signs."""
    return lambda advantage: (0.0, 1 + epsilon)


def stock_bounds(epsilon_low, epsilon_high):
    """Eq. 78: a positive advantage is cut above, a negative one below."""
    return lambda advantage: (0.0, 1 + epsilon_high) if advantage >= 0 else (1 - epsilon_low, math.inf)


def shared_prefix_residual(token_ids, present, groups, advantages, pushes, in_update):
    """Mean over tokens of |net / gross of the pushes - net / gross of the advantages|, one context at a time."""
    members, pushed = {}, {}
    for i, row in enumerate(token_ids):
        for t in range(len(row)):
            if present[i][t]:
                context = (groups[i], tuple(row[: t + 1]))
                members.setdefault(context, []).append(advantages[i])
                if in_update[i][t]:
                    pushed.setdefault(context, []).append(pushes[i][t])
    total, count = 0.0, 0
    for context, values in members.items():
        if not (any(value > 0 for value in values) and any(value < 0 for value in values)):
            continue
        applied = pushed.get(context, [])
        count += len(applied)
        gross = sum(map(abs, applied))
        if gross > 0:
            deserved = sum(values) / sum(map(abs, values))
            total += len(applied) * abs(sum(applied) / gross - deserved)
    return (total / count if count else 0.0), count


def surrogate_slope(ratio, advantage, epsilon_low, epsilon_high, delta=None):
    """The slope by the log-ratio of min(min(r, delta) A, clip(r) A) over A: r on the branch that is taken, 0 where flat."""
    inner = ratio if delta is None else min(ratio, delta)
    outer = min(max(ratio, 1 - epsilon_low), 1 + epsilon_high)
    smaller, larger = sorted((inner, outer))
    taken = smaller if advantage >= 0 else larger
    return ratio if taken == ratio else 0.0


def post_clip_weight(ratio, advantage, epsilon_low, epsilon_high, delta=None):
    """Eq. 46 and 47 of 2604.13088, for one rollout, with TRL's two-sided clipping."""
    bounded = ratio if delta is None else min(ratio, delta)
    clipped = min(max(ratio, 1 - epsilon_low), 1 + epsilon_high)
    return min(bounded, clipped) if advantage >= 0 else max(bounded, clipped)


def orthogonal_projection(weights, advantages):
    """Eq. 18."""
    square = sum(a * a for a in advantages)
    inner = sum(a * s for a, s in zip(advantages, weights, strict=True))
    return [s - (inner / square * a if square else 0) for a, s in zip(advantages, weights, strict=True)]


def positive_orthogonal_projection(weights, advantages):
    """Eq. 51 by trying every set of rollouts that may be zero: the nearest of the feasible points on the faces."""
    best = None
    for zero in itertools.product([False, True], repeat=len(weights)):
        a = [0 if z else value for z, value in zip(zero, advantages, strict=True)]
        s = [0 if z else value for z, value in zip(zero, weights, strict=True)]
        point = orthogonal_projection(s, a)
        if min(point) >= 0 and abs(sum(x * y for x, y in zip(point, advantages, strict=True))) < 1e-9:
            distance = sum((x - y) ** 2 for x, y in zip(point, weights, strict=True))
            if best is None or distance < best[0]:
                best = distance, point
    return best[1]


def truncate_and_rebalance(weights, advantages, floor):
    """Eq. 52 to 55, with the sign of beta that makes it positive."""
    raised = [max(value, floor) for value in weights]
    pairs = list(zip(advantages, raised, strict=True))
    positive = sum(a * s for a, s in pairs if a > 0)
    negative = sum(-a * s for a, s in pairs if a < 0)
    alpha = min(1.0, negative / positive) if positive else 1.0
    beta = min(1.0, positive / negative) if negative else 1.0
    return [s * alpha if a > 0 else s * beta if a < 0 else s for a, s in pairs]


def consistent(transformation, weights, advantages):
    """Weights of the rollouts of a group that take part, made consistent."""
    if not weights or transformation == "identity":
        return weights
    if transformation == "orth":
        return orthogonal_projection(weights, advantages)
    if transformation == "positive_orth":
        return positive_orthogonal_projection(weights, advantages)
    if transformation == "rebalance":
        return truncate_and_rebalance(weights, advantages, 1e-6)
    equal = [min(weights)] * len(weights)
    # Equal weights cancel only where the advantages sum to zero, which they do not when a member is missing.
    return equal if abs(sum(advantages)) < 1e-9 else truncate_and_rebalance(equal, advantages, 0.0)


def nthr_scores(hidden, probabilities, token_ids, mask, positive):
    """Eq. 7 of 2505.18830 by pairs of tokens, with errors over the tokens that occur, and the threshold of Eq. 9."""
    tokens = [(i, t) for i, row in enumerate(mask) for t, counts in enumerate(row) if counts]
    occurring = sorted({token_ids[i][t] for i, t in tokens})

    def error(i, t):
        return [(v == token_ids[i][t]) - probabilities[i][t][v] for v in occurring]

    scores = [[0.0] * len(row) for row in mask]
    for i, t in tokens:
        for j, k in tokens:
            if positive[j]:
                scores[i][t] += dot(error(j, k), error(i, t)) * dot(hidden[j][k], hidden[i][t])
    means = [sum(scores[i]) / sum(mask[i]) for i in range(len(mask)) if positive[i] and sum(mask[i])]
    return scores, min(means, default=math.inf)


def dot(first, second):
    """Inner product."""
    return sum(a * b for a, b in zip(first, second, strict=True))


def delta_coefficients(proxies, advantages, lambda_min, lambda_max, *, refinements, gamma, normalize, least=1e-4):
    """Section 4 of 2605.21467, with squared distances."""
    sides = [(a > 0) - (a < 0) for a in advantages]

    def centroid(side, weights):
        chosen = [(w * abs(a), v) for w, a, s, v in zip(weights, advantages, sides, proxies, strict=True) if s == side]
        total = sum(weight for weight, _ in chosen) or 1.0
        return [sum(weight * v[k] for weight, v in chosen) / total for k in range(len(proxies[0]))]

    def margins(weights):
        centroids = {side: centroid(side, weights) for side in (1, -1)}
        if not {1, -1} <= set(sides):
            return [0.0] * len(proxies)  # nothing to tell apart
        return [
            math.dist(v, centroids[-s]) ** 2 - math.dist(v, centroids[s]) ** 2 if s else 0.0
            for s, v in zip(sides, proxies, strict=True)
        ]

    def scales(values):
        found = {0: 1.0}
        for side in (1, -1):
            own = [value for value, s in zip(values, sides, strict=True) if s == side]
            mean = sum(own) / max(1, len(own))
            spread = math.sqrt(sum((value - mean) ** 2 for value in own) / max(1, len(own)))
            found[side] = max(spread, least) if gamma is None else gamma
        return found

    def assignment(value, scale):
        if scale == 0:  # the limit
            return (1 + (value > 0) - (value < 0)) / 2
        return 1 / (1 + math.exp(min(-value / scale, 700)))

    def assignments(values, scale):
        return [assignment(value, scale[s]) for value, s in zip(values, sides, strict=True)]

    found = margins([1.0] * len(proxies))
    scale = scales(found)
    for _ in range(refinements):
        weights = assignments(found, scale)
        scale = scales(found)
        found = margins(weights)
    alpha = [value if s else 0.0 for value, s in zip(assignments(found, scale), sides, strict=True)]
    coefficients = [lambda_min + (lambda_max - lambda_min) * value for value in alpha]
    if normalize in (False, "none"):
        return coefficients
    means = {}
    for side in (1, 0, -1):
        own = [value for value, s in zip(coefficients, sides, strict=True) if s == side or normalize != "side"]
        means[side] = sum(own) / len(own) if own and (side or normalize != "side") else 1.0
    return [value / means[s] for value, s in zip(coefficients, sides, strict=True)]


def log_softmax(logits):
    """Of a list."""
    largest = max(logits)
    normaliser = largest + math.log(sum(math.exp(logit - largest) for logit in logits))
    return [logit - normaliser for logit in logits]


def coupling(hidden_a, probabilities_a, token_a, hidden_b, probabilities_b, token_b):
    """Eq. 7 and 8 of 2605.08666 for two tokens, with the second factor written out."""
    overlap = dot(probabilities_a, probabilities_b)
    errors = (token_a == token_b) - probabilities_a[token_b] - probabilities_b[token_a] + overlap
    return dot(hidden_a, hidden_b) * errors


def gwhes(hidden, probabilities, token_ids, mask, positive):
    """Eq. 5 of 2505.18830 by pairs of tokens, mean over the right responses."""
    rate = sum(positive) / len(positive)
    spread = math.sqrt(rate * (1 - rate))
    total = 0.0
    for i, row in enumerate(mask):
        for j, other in enumerate(mask):
            if positive[i]:
                weight = -(1 - rate) / spread if positive[j] else rate / spread
                for k, m in itertools.product(range(len(row)), range(len(other))):
                    if row[k] and other[m]:
                        total += weight * coupling(
                            hidden[i][k], probabilities[i][k], token_ids[i][k],
                            hidden[j][m], probabilities[j][m], token_ids[j][m],
                        )  # fmt: skip
    return total / sum(positive)


def displacement(before, after, mask, positive):
    """Eq. 2 of 2505.18830."""
    changes = [
        sum((new - old) * counts for old, new, counts in zip(*row, strict=True))
        for row in zip(before, after, mask, strict=True)
    ]
    right = [change for change, is_right in zip(changes, positive, strict=True) if is_right]
    return sum(right) / len(right)


def energy_by_frequency(energies, token_ids, num_buckets):
    """Eq. 24 of 2604.13088: frequent tokens first, cut where the middle of a token's run falls."""
    ids = sorted(set(token_ids))
    ids.sort(key=lambda token: -token_ids.count(token))
    shares, sizes, ahead = [0.0] * num_buckets, [0] * num_buckets, 0
    for token in ids:
        places = [place for place, other in enumerate(token_ids) if other == token]
        bucket = min(int((ahead + len(places) / 2) / len(token_ids) * num_buckets), num_buckets - 1)
        shares[bucket] += sum(energies[place] for place in places)
        sizes[bucket] += len(places)
        ahead += len(places)
    return [share / sum(energies) for share in shares], [size / len(token_ids) for size in sizes]


def conflict_tokens(token_ids, mask, advantages):
    """GTPO's conflict tokens of one group: unbroken runs at both ends (section 2 of 2508.03772)."""
    rollouts = [
        [token for token, counts in zip(*row, strict=True) if counts] for row in zip(token_ids, mask, strict=True)
    ]

    def shared(i, place, backwards):
        def token(j):
            tokens = rollouts[j][::-1] if backwards else rollouts[j]
            return tokens[place] if place < len(tokens) else None

        others = [j for j in range(len(rollouts)) if advantages[j] * advantages[i] < 0]
        return any(token(j) == token(i) for j in others)

    found = []
    for i, row in enumerate(mask):
        run = set()
        for backwards in (False, True):
            for place in range(len(rollouts[i])):
                if not shared(i, place, backwards):
                    break
                run.add(len(rollouts[i]) - 1 - place if backwards else place)
        counted = [t for t, counts in enumerate(row) if counts]
        found.append([t in {counted[place] for place in run} for t in range(len(row))])
    return found
