r"""
DelTA, discriminative token credit ([2605.21467](https://huggingface.co/papers/2605.21467)): tokens whose gradient looks
like that of their own side of the batch, and not like that of the other, carry more of the advantage.

Each active token is stood for by a proxy v of its gradient. With the centroids of both sides, weighted by the
advantages, a token's margin is how much nearer it is to its own side than to the other:

$$ \mu_\pm = \frac{\sum |A|v}{\sum |A|}, \qquad m = \|v-\mu_{other}\|^2 - \|v-\mu_{own}\|^2 $$

The margin is affine in v, so a dot product with \\( \mu_+-\mu_- \\) gives it for all tokens.

Shapes: N active tokens of the generation batch, d the size of a proxy.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import finite, floats, is_number, one_of, shaped, single, whole
from ..batch.protocol import Scope
from ..batch.rollouts import Rollouts, generator_of
from ..batch.states import HELD_LOGITS, LMHead
from ..papers import Paper
from .method import ActiveMethod, Config, Method, Named, PaperConfiguration, PaperEvaluation, Row, documented


PAPER = Paper(
    "2605.21467",
    "zhang2026delta",
    "DelTA: Discriminative Token Credit Assignment for Reinforcement Learning from Verifiable Rewards",
    "Kaiyi Zhang and Wei Wu and Yankai Lin",
)
Reduce = Callable[[torch.Tensor], torch.Tensor]
Proxies = Callable[[], Iterable[torch.Tensor]]  # gives the proxies anew at each call, some tokens at a time
PROXIES = ("lm_head_row", "hidden_gradient")
ASSIGNMENTS = ("soft", "hard", "random")
NORMALIZATIONS = ("batch", "side", "none")
LEAST_SPREAD = 1e-4  # the authors' lower bound of γ
CHUNK = 8192  # tokens
TOP_WORDS = 20


def delta_coefficients(
    proxies: torch.Tensor,
    advantages: torch.Tensor,
    refinements: int = 1,
    lambda_min: float = 0.8,
    lambda_max: float = 1.2,
    gamma: float | None = None,
    normalize: bool | str = True,
    reduce: Reduce | None = None,
) -> torch.Tensor:
    r"""
    The credit of each token: \\( \lambda = \lambda_{min} + (\lambda_{max}-\lambda_{min})\,\sigma(m/\gamma) \\), divided
    by a mean. In each refinement the centroids are taken again with the tokens weighted by \\( \sigma(m/\gamma)|A| \\).

    Args:
        proxies (`torch.Tensor` of shape `(N, d)`):
            Proxies of the active tokens of this process.
        advantages (`torch.Tensor` of shape `(N,)`):
            Their advantages. Tokens of advantage 0 belong to no side and get `lambda_min`.
        refinements (`int`, *optional*, defaults to `1`):
            How often the centroids are refined.
        lambda_min (`float`, *optional*, defaults to `0.8`):
            Credit of a token that looks like the other side.
        lambda_max (`float`, *optional*, defaults to `1.2`):
            Credit of a token that looks like its own.
        gamma (`float`, *optional*):
            Scale of the margins; by default, for each side, the standard deviation (of the population) of the margins
            from which the centroids were refined, and at least 1e-4.
        normalize (`bool` or `str`, *optional*, defaults to `True`):
            `"batch"` or `True`: divide by the mean over all tokens, so that it is 1. The means of the two sides then
            differ, so the update is tilted towards one. `"side"`: divide each side by its own mean, so that neither is
            pushed harder. `"none"` or `False`: leave the coefficients as they are.
        reduce (`Callable`, *optional*):
            Sums a tensor over all processes. Centroids, scales and the mean are then those of all.

    Returns:
        `torch.Tensor` of shape `(N,)`: The coefficients. Where one side has no token, there is nothing to tell apart,
        and the tokens of the other get the middle of the range.

    Raises:
        `ValueError`: If the shapes do not fit, a proxy or an advantage is not finite, or a setting makes no sense.
    """
    check_delta(refinements, lambda_min, lambda_max, gamma)
    normalize = normalization(normalize)
    if not (reduce is None or callable(reduce)):
        raise ValueError(f"reduce={reduce!r} must be a function that sums a tensor over all processes, or None.")
    proxies, advantages = floats(proxies=proxies, advantages=advantages)
    shaped(proxies=(proxies, "N d"), advantages=(advantages, "N"))
    finite(proxies=proxies, advantages=advantages)
    reduce = reduce or (lambda tensor: tensor)
    proxies, advantages = single(proxies, advantages)
    (proxies, size), (advantages, _) = _to_one(proxies, reduce), _to_one(advantages, reduce)
    limits = torch.finfo(proxies.dtype)

    def of_margins(scale: float) -> float:  # which are squares of proxies
        return min(max(scale / size / size, limits.tiny), limits.max)

    gamma, least = None if gamma is None else of_margins(gamma), of_margins(LEAST_SPREAD)
    assignment, _ = assign(lambda: proxies.split(CHUNK), advantages, refinements, gamma, reduce, least_spread=least)
    coefficients = lambda_min + (lambda_max - lambda_min) * assignment
    return normalized(coefficients, advantages, normalize, reduce)


def _to_one(values: torch.Tensor, reduce: Reduce) -> tuple[torch.Tensor, float]:
    """
    Values brought to a magnitude of about one, the same for all processes, so that their products neither overflow nor
    vanish; and what to multiply them with to have them back.
    """
    largest = reduce(values.abs().amax() if values.numel() else values.new_zeros(())).item()  # up to their number
    furthest = -math.log2(torch.finfo(values.dtype).tiny)
    scale = 2.0 ** min(max(math.floor(math.log2(largest)), -furthest), furthest) if largest > 0 else 1.0
    return values / scale, scale


def check_delta(
    refinements: Any,
    lambda_min: Any,
    lambda_max: Any,
    gamma: Any,
    proxy: Any = "lm_head_row",
    assignment: Any = "soft",
    top_fraction: Any = None,
    prefix: str = "",
) -> None:
    """
    Refuses settings that [`DelTA`] cannot follow.

    Args:
        refinements, lambda_min, lambda_max, gamma, proxy, assignment, top_fraction:
            As in [`DelTA`].
        prefix (`str`, *optional*, defaults to `""`):
            What stands before their names in a configuration.

    Raises:
        `ValueError`: Names the setting.
    """
    numbers = is_number(lambda_min) and is_number(lambda_max)
    if not (numbers and 0 <= lambda_min <= lambda_max and 0 < lambda_max < float("inf")):
        raise ValueError(
            f"{prefix}lambda_min={lambda_min!r} and {prefix}lambda_max={lambda_max!r} must be numbers with "
            f"0 <= {prefix}lambda_min <= {prefix}lambda_max, e.g. 0.8 and 1.2."
        )
    whole(f"{prefix}refinements", refinements, 0)
    if gamma is not None and not (is_number(gamma) and gamma > 0):
        raise ValueError(f"{prefix}gamma={gamma!r} must be a positive number, or None.")
    one_of(f"{prefix}proxy", proxy, PROXIES)
    one_of(f"{prefix}assignment", assignment, ASSIGNMENTS)
    if top_fraction is not None and not (is_number(top_fraction) and 0 < top_fraction <= 1):
        raise ValueError(f"{prefix}top_fraction={top_fraction!r} must be between 0 and 1, e.g. 0.5, or None.")
    if top_fraction is not None and assignment == "hard":
        raise ValueError(
            f"{prefix}top_fraction={top_fraction} ranks tokens by their assignment, but {prefix}assignment='hard' gives "
            f"only 0 and 1. Set {prefix}assignment='soft', or 'random' for a control."
        )


def assign(
    proxies: Proxies,
    advantages: torch.Tensor,
    refinements: int,
    gamma: float | None,
    reduce: Reduce,
    soften: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid,
    least_spread: float = LEAST_SPREAD,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    How much each token looks like its own side: \\( \alpha = \sigma(m/\gamma) \\), with refined centroids.

    Args:
        proxies (`Callable`):
            Gives the proxies of shape `(n, d)`, n of the N tokens at a time; called \\( 2 \\) (`refinements` + 1) times.
        advantages, refinements, gamma, reduce:
            As in [`delta_coefficients`].
        soften (`Callable`, *optional*, defaults to the sigmoid):
            What turns \\( m/\gamma \\) into \\( \alpha \\).
        least_spread (`float`, *optional*, defaults to `1e-4`):
            Least \\( \gamma \\) where it is a standard deviation.

    Returns:
        `tuple`: \\( \alpha \\) of shape `(N,)`, and the standard deviations of the last margins over the tokens of the
        positive and of the negative side, of shape `(2,)`.
    """
    magnitude = advantages.abs().to(torch.promote_types(advantages.dtype, torch.float32))
    sides = _sides(advantages).to(magnitude.dtype)  # (2, N)

    margins = _margins(proxies, sides, magnitude, reduce)
    spread = _spread(margins, sides, reduce)

    def scaled(scale: torch.Tensor) -> torch.Tensor:
        """Margins over the scale of their side."""
        of_sides = (scale.clamp(min=least_spread) @ sides).where(sides.any(0), 1.0)
        return margins / (of_sides if gamma is None else gamma)

    scale = spread
    for _ in range(refinements):
        refined = _margins(proxies, sides, soften(scaled(scale)) * magnitude, reduce)
        # The scale is that of the margins before the centroids moved.
        scale, margins, spread = spread, refined, _spread(refined, sides, reduce)
    return soften(scaled(scale)).where(advantages != 0, 0.0), spread


def normalization(normalize: bool | str) -> str:
    """
    The name of a normalisation.

    Args:
        normalize (`bool` or `str`):
            One of the names; or `True` for `"batch"` and `False` for `"none"`, also spelled as text.

    Raises:
        `ValueError`: If it is none of these.
    """
    name = {"true": "batch", "false": "none"}.get(str(normalize).lower(), normalize)
    if name not in NORMALIZATIONS:
        raise ValueError(f"normalize={normalize!r} is not one of {', '.join(map(repr, NORMALIZATIONS))}.")
    return str(name)


def normalized(coefficients: torch.Tensor, advantages: torch.Tensor, by: str, reduce: Reduce) -> torch.Tensor:
    r"""
    Coefficients over their mean over the tokens of all processes, \\( \bar\lambda = \lambda N / Z \\).

    Args:
        coefficients (`torch.Tensor` of shape `(N,)`):
            Coefficients.
        advantages (`torch.Tensor` of shape `(N,)`):
            Advantages of their tokens.
        by (`str`):
            `"batch"`: the mean over all tokens; `"side"`: over those of the same sign of the advantage, and tokens of
            advantage 0 are left as they are; `"none"`.
        reduce (`Callable`):
            Sums a tensor over all processes.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    if by == "none":
        return coefficients
    sides = _sides(advantages).to(coefficients.dtype) if by == "side" else torch.ones_like(coefficients).unsqueeze(0)
    count, total = reduce(torch.stack([sides.sum(1), sides @ coefficients]))  # (1,) or (2,)
    factor = torch.where(total > 0, count / total.where(total > 0, 1.0), 1.0)
    return coefficients * (factor @ sides).where(sides.any(0), 1.0)


def _sides(advantages: torch.Tensor) -> torch.Tensor:
    """Which tokens are of the positive side, and which of the negative one, of shape `(2, N)`."""
    return torch.stack([advantages > 0, advantages < 0])


def _margins(proxies: Proxies, sides: torch.Tensor, weights: torch.Tensor, reduce: Reduce) -> torch.Tensor:
    """Squared distance to the other side's centroid minus that to the own side's, of shape `(N,)`."""
    weighted = sides * weights
    sums: Any = 0
    for chunk, part in _by_chunk(proxies, weighted):
        # (2, d + 1): the sums of both sides and, in the last column, of their weights
        sums = sums + torch.cat([part @ chunk, part.sum(1, keepdim=True)], dim=1)
    sums = reduce(sums)
    total = sums[:, -1:]
    positive, negative = sums[:, :-1] / total.where(total > 0, 1.0)
    # From the middle between the centroids: both may lie far from 0, and close together.
    apart, middle = positive - negative, (positive + negative) / 2
    rounding = 8 * torch.finfo(apart.dtype).eps * middle.norm()
    apart = torch.where(apart.norm() > rounding, apart, 0.0)
    margins = torch.cat([2 * (chunk - middle) @ apart for chunk, _ in _by_chunk(proxies, weighted)])
    return (margins * (sides[0] - sides[1])).where((total > 0).all(), 0.0)


def _by_chunk(proxies: Proxies, columns: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of some tokens' proxies and their columns."""
    first = 0
    for chunk in proxies():
        last = first + len(chunk)
        yield chunk.to(columns.dtype), columns[:, first:last]
        first = last


def _spread(margins: torch.Tensor, sides: torch.Tensor, reduce: Reduce) -> torch.Tensor:
    """Standard deviation of the margins over the tokens of each side, of shape `(2,)`."""
    count, total = reduce(torch.stack([sides.sum(1), sides @ margins]))
    mean = total / count.clamp(min=1)
    deviations = (margins - mean @ sides) ** 2  # from the mean of the own side; a second pass loses no digits
    return (reduce(sides @ deviations) / count.clamp(min=1)).sqrt()


def output_row(hidden: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    r"""
    \\( (1-\pi(y))\,h \\), the gradient of \\( \log\pi(y) \\) by the token's own row of the output layer.

    Args:
        hidden (`torch.Tensor` of shape `(N, d)`):
            Last hidden states, the ones that predict each token.
        logps (`torch.Tensor` of shape `(N,)`):
            Log-probabilities of the tokens.

    Returns:
        `torch.Tensor` of shape `(N, d)`.
    """
    return -torch.expm1(logps).unsqueeze(1) * hidden


def hidden_gradient(
    hidden: torch.Tensor,
    logps: torch.Tensor,
    token_ids: torch.Tensor,
    vocabulary: torch.Tensor,
    head: LMHead,
    temperature: float = 1.0,
    top_words: int = TOP_WORDS,
) -> torch.Tensor:
    r"""
    \\( W_y - \sum_k \pi_k W_k \\), the gradient of \\( \log\pi(y) \\) by the hidden state, up to the temperature,
    the scale and the soft cap of the logits; the sum runs over the likeliest words of a small vocabulary.

    Args:
        hidden (`torch.Tensor` of shape `(N, d)`):
            Last hidden states, the ones that predict each token.
        logps (`torch.Tensor` of shape `(N,)`):
            Log-probabilities of the tokens, at `temperature`.
        token_ids (`torch.Tensor` of shape `(N,)`):
            The tokens.
        vocabulary (`torch.Tensor` of shape `(V*,)`):
            Sorted tokens to which the sum is restricted, among them all of `token_ids`.
        head ([`~trl_cancel.batch.states.LMHead`]):
            Output layer.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the policy.
        top_words (`int`, *optional*, defaults to `20`):
            Words that are summed over, for each token the likeliest.

    Returns:
        `torch.Tensor` of shape `(N, d)`.
    """
    weight, _ = head.rows(vocabulary)
    logits = head.logits(hidden, vocabulary).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
    own = torch.searchsorted(vocabulary, token_ids).unsqueeze(1)
    log_normaliser = logits.gather(1, own) - logps.to(logits.dtype).unsqueeze(1)
    probabilities = torch.exp(logits - log_normaliser)
    likeliest = probabilities.topk(min(top_words, len(vocabulary)), dim=1).indices
    errors = torch.zeros_like(logits).scatter(1, likeliest, -probabilities.gather(1, likeliest))
    return errors.scatter_add(1, own, torch.ones_like(log_normaliser)) @ weight.to(logits.dtype)


class DelTA:
    """
    Discriminative token credit as a credit, over the generation batch of all processes.

    Args:
        refinements, lambda_min, lambda_max, gamma, normalize:
            As in [`delta_coefficients`].
        proxy (`str`, *optional*, defaults to `"lm_head_row"`):
            `"lm_head_row"` ([`output_row`]) or `"hidden_gradient"` ([`hidden_gradient`], over the tokens that occur in
            the generation batch of all processes).
        assignment (`str`, *optional*, defaults to `"soft"`):
            `"soft"`; `"hard"`: 1 for a positive margin, else 0; `"random"`: the soft assignments, dealt out at random
            among the tokens of the same side and process, so that each side keeps its values and its mean.
        top_fraction (`float`, *optional*):
            Instead of weighing tokens, keep this fraction of those that have an advantage, those with the highest
            assignments.

    Raises:
        `ValueError`: If a setting is none of these.
    """

    scope: Scope = "batch"
    needs_states = True
    reads_states = "2 (delta_refinements + 1) forward passes"

    def __init__(
        self,
        refinements: int = 1,
        lambda_min: float = 0.8,
        lambda_max: float = 1.2,
        gamma: float | None = None,
        normalize: bool | str = True,
        proxy: str = "lm_head_row",
        assignment: str = "soft",
        top_fraction: float | None = None,
    ):
        check_delta(refinements, lambda_min, lambda_max, gamma, proxy, assignment, top_fraction)
        self.refinements, self.gamma, self.normalize = refinements, gamma, normalization(normalize)
        self.lambda_min, self.lambda_max = lambda_min, lambda_max
        self.proxy, self.assignment, self.top_fraction = proxy, assignment, top_fraction

    def coefficients(self, rollouts: Rollouts) -> torch.Tensor:
        """Coefficients of shape `(B, T)`."""
        active = rollouts.mask.bool()
        advantages = rollouts.advantages.unsqueeze(1).expand_as(active)[active]
        soften = _step if self.assignment == "hard" else torch.sigmoid
        assignment, spread = assign(
            self._proxies(rollouts, active), advantages, self.refinements, self.gamma, rollouts.reduce, soften
        )
        if self.assignment == "random":
            assignment = _dealt_out(assignment, advantages.sign(), generator_of(rollouts.completion_ids))
        if self.top_fraction is None:
            values = self.lambda_min + (self.lambda_max - self.lambda_min) * assignment
        else:
            pushed = advantages != 0
            least = _quantile(assignment[pushed], self.top_fraction, rollouts.reduce)
            values = (pushed & (assignment >= least)).to(assignment)
        self._log(rollouts, values, spread)
        values = normalized(values, advantages, self.normalize, rollouts.reduce)
        for side, tokens in zip(("positive", "negative"), _sides(advantages), strict=True):
            rollouts.log(f"delta/lambda_mean_{side}", values, tokens.to(values.dtype))
        return torch.ones_like(rollouts.mask, dtype=values.dtype).masked_scatter(active, values)

    def _proxies(self, rollouts: Rollouts, active: torch.Tensor) -> Proxies:
        # As many pieces on all processes, which must make the same passes where states are computed again and the model
        # is sharded: by the mean of their lengths.
        length, processes = rollouts.reduce(active.new_tensor([active.size(1), 1], dtype=torch.long)).tolist()
        rows = max(1, CHUNK * processes // max(1, length))
        pieces = [slice(first, first + rows) for first in range(0, len(active), rows)]

        def hidden_and_logps(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            hidden, logps = rollouts.states[rows][active[rows]], rollouts.old_logps[rows][active[rows]]
            return hidden.to(torch.promote_types(hidden.dtype, torch.float32)), logps

        if self.proxy == "lm_head_row":
            return lambda: (output_row(*hidden_and_logps(rows)) for rows in pieces)

        ids = rollouts.completion_ids
        occurs = torch.zeros(rollouts.head.vocabulary_size, device=ids.device)
        occurs[ids[active]] = 1  # of all processes, so that the update does not depend on their number
        vocabulary = rollouts.reduce(occurs).nonzero().squeeze(1)
        head = rollouts.head.restricted_to(vocabulary)
        size = max(1, HELD_LOGITS // max(1, len(vocabulary)))  # tokens

        def gradients(rows: slice) -> torch.Tensor:
            hidden, logps = hidden_and_logps(rows)
            parts = zip(hidden.split(size), logps.split(size), ids[rows][active[rows]].split(size), strict=True)
            return torch.cat(
                [hidden_gradient(h, logp, y, vocabulary, head, rollouts.temperature) for h, logp, y in parts]
            )

        if not getattr(rollouts.states, "keeps", True):
            return lambda: map(gradients, pieces)
        # Kept where the states are: they take much longer to compute than to hold.
        offloads = getattr(rollouts.states, "offloads", False)
        kept = [gradients(rows).to("cpu" if offloads else active.device) for rows in pieces]
        return lambda: (piece.to(active.device) for piece in kept)

    @staticmethod
    def _log(rollouts: Rollouts, values: torch.Tensor, spread: torch.Tensor) -> None:
        count, total = rollouts.reduce(torch.stack([torch.ones_like(values).sum(), values.sum()]))
        mean = total / count.clamp(min=1)
        squares = rollouts.reduce(((values - mean) ** 2).sum())
        rollouts.log("delta/lambda_mean", mean)
        rollouts.log("delta/lambda_std", (squares / count.clamp(min=1)).sqrt())
        rollouts.log("delta/margin_std_pos", spread[0])
        rollouts.log("delta/margin_std_neg", spread[1])


def _step(margins: torch.Tensor) -> torch.Tensor:
    return (margins > 0).to(margins.dtype)


def _dealt_out(values: torch.Tensor, sides: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The values of each side in random order."""
    dealt = values.clone()
    for side in (-1, 1):
        places = (sides == side).nonzero().squeeze(1)
        dealt[places] = values[places[torch.randperm(len(places), generator=generator).to(places.device)]]
    return dealt


def _quantile(values: torch.Tensor, fraction: float, reduce: Reduce) -> torch.Tensor:
    """The highest value that at least this fraction of all processes' values in [0, 1] reach, by bisection."""
    count = reduce(torch.ones_like(values).sum())
    low, high = values.new_zeros(()), values.new_ones(())
    for _ in range(32):
        middle = (low + high) / 2
        enough = reduce((values >= middle).sum()) >= fraction * count
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


@documented
@dataclass
class Settings:
    """
    delta_credit (`bool`, *optional*, defaults to `False`):
        Let tokens that tell good rollouts from bad ones carry more of the advantage (DelTA). Source:
        [2605.21467](https://huggingface.co/papers/2605.21467).
    delta_lambda_min (`float`, *optional*, defaults to `0.8`):
        DelTA's credit of a token that looks like the other side.
    delta_lambda_max (`float`, *optional*, defaults to `1.2`):
        DelTA's credit of a token that looks like its own side.
    delta_refinements (`int`, *optional*, defaults to `1`):
        How often DelTA's centroids of both sides are taken again with the tokens weighted.
    delta_gamma (`float`, *optional*):
        Scale of DelTA's margins. By default, the standard deviation of each side's.
    delta_proxy (`str`, *optional*, defaults to `"lm_head_row"`):
        What stands for a token's gradient in DelTA. One of:

        - `"lm_head_row"`: (1 - π)h, one minus its probability times the hidden state.
        - `"hidden_gradient"`: the gradient by the hidden state.
    delta_assignment (`str`, *optional*, defaults to `"soft"`):
        How DelTA assigns tokens to sides. One of:

        - `"soft"`: by the sigmoid of their margin.
        - `"hard"`: one side or the other.
        - `"random"`: the soft ones dealt out at random, a control.
    delta_normalize (`str`, *optional*, defaults to `"batch"`):
        What DelTA's credits are divided by: `batch`, their mean over the generation batch, as the authors have it,
        which pushes one side harder than the other; `side`, the mean of their own side, which does not; or
        `none`. `True` and `False` mean `batch` and `none`.
    delta_top_fraction (`float`, *optional*):
        Instead of weighing tokens, keep this fraction of them, those with DelTA's highest credit.
    """

    delta_credit: bool = False
    delta_lambda_min: float = 0.8
    delta_lambda_max: float = 1.2
    delta_refinements: int = 1
    delta_gamma: float | None = None
    delta_proxy: str = "lm_head_row"
    delta_assignment: str = "soft"
    delta_normalize: str = "batch"
    delta_top_fraction: float | None = None


class DiscriminativeCredit(Method):
    """Gives tokens credit by how well they tell the two sides of the batch apart."""

    Settings = Settings
    switch = "delta_credit"
    neutral = {"delta_credit": True, "delta_lambda_min": 1.0, "delta_lambda_max": 1.0}
    row = Row(
        "docs/delta.md",
        "DelTA",
        "tokens that tell good rollouts from bad ones carry more of the advantage (DelTA)",
        "always",
        "off policy 0.3% to 3.1%, on policy 21% to 27%: a pass of its own",
        "{DelTA}",
        PAPER.id,
    )
    named = {
        "delta": Named({"delta_credit": True}, "more credit to tokens that tell good from bad", PAPER.id),
        "delta-random": Named(
            {"delta_credit": True, "delta_assignment": "random"},
            "control: the same credits, dealt out at random",
            PAPER.id,
        ),
    }
    configurations = (
        PaperConfiguration(
            "DelTA",
            "DelTA",
            "delta",
            PAPER,
            {
                "delta_credit": True,
                "epsilon_high": 0.28,
                "num_generations": 16,
                "per_device_train_batch_size": 16,
                "learning_rate": 1e-6,
            },
            "tokens that tell good rollouts from bad ones carry more of the advantage (DelTA)",
            "DelTA, without the sizes of its batches.",
            {
                "epsilon_high": "Upper end of the clipping range.",
                "num_generations": "Rollouts a prompt.",
                "per_device_train_batch_size": "Rollouts a micro-batch.",
            },
        ),
    )
    evaluations = (
        PaperEvaluation(
            "delta",
            PAPER.id,
            ("aime24", "aime25", "aime26", "hmmt25-feb", "hmmt25-nov", "hmmt26-feb", "brumo25"),
            {"num_samples": 16, "greedy": False, "max_completion_length": 30000},
        ),
    )
    logs = ("delta/",)
    look_alike = ("delta", "TRL's name for a bound on the ratio, a number")

    def check(self, args: Config) -> None:
        try:
            args.delta_normalize = normalization(args.delta_normalize)
        except ValueError as error:
            raise ValueError(f"delta_{error}") from None
        if not args.delta_credit:
            return
        check_delta(
            args.delta_refinements,
            args.delta_lambda_min,
            args.delta_lambda_max,
            args.delta_gamma,
            args.delta_proxy,
            args.delta_assignment,
            args.delta_top_fraction,
            "delta_",
        )

    def active(self, args: Config) -> ActiveMethod:
        does = "tokens that tell good rollouts from bad ones carry more of the advantage"
        control = ", as a control dealt out at random" if args.delta_assignment == "random" else ""
        return ActiveMethod("DelTA", does + control, ("delta", "delta-random") if control else ("delta",), (PAPER,))

    def explain(self, args: Config) -> Iterator[tuple[str, str]]:
        if args.delta_credit:
            yield "Credit", f"DelTA: {self._shares(args)}."

    def _shares(self, args: Config) -> str:
        if args.delta_top_fraction is not None:
            return f"only the {args.delta_top_fraction:.0%} of tokens that tell good rollouts from bad ones best count"
        how = {
            "soft": "by how well it tells good rollouts from bad ones",
            "hard": "the higher if it looks like its own side, the lower if it looks like the other",
            "random": "as DelTA would, but dealt out at random",
        }[args.delta_assignment]
        mean = {"batch": ", over their mean", "side": ", over the mean of its side", "none": ""}[args.delta_normalize]
        return f"each token carries {args.delta_lambda_min:g} to {args.delta_lambda_max:g} of it{mean}, {how}"

    def leaks(self, args: Config) -> Iterator[str]:
        if args.delta_credit:
            yield "delta_credit=True weighs a token by its side, so what both sides share keeps a little of the push."

    def credit(self, args: Config) -> DelTA:
        return DelTA(
            refinements=args.delta_refinements,
            lambda_min=args.delta_lambda_min,
            lambda_max=args.delta_lambda_max,
            gamma=args.delta_gamma,
            normalize=args.delta_normalize,
            proxy=args.delta_proxy,
            assignment=args.delta_assignment,
            top_fraction=args.delta_top_fraction,
        )
