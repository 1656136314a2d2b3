r"""
DelTA, discriminative token credit ([2605.21467](https://huggingface.co/papers/2605.21467)): tokens whose gradient looks
like that of their own side of the batch, and not like that of the other, carry more of the advantage.

Each active token is stood for by a proxy v of its gradient. With the centroids of both sides, weighted by the
advantages, a token's margin is how much nearer it is to its own side than to the other:

$$ \mu_\pm = \frac{\sum |A|v}{\sum |A|}, \qquad m = \|v-\mu_{other}\|^2 - \|v-\mu_{own}\|^2 $$

The margin is affine in v, so a dot product with \\( \mu_+-\mu_- \\) gives it for all tokens.

Shapes: N active tokens of the generation batch, d the size of a proxy.
"""

from collections.abc import Callable

import torch


Reduce = Callable[[torch.Tensor], torch.Tensor]


def delta_coefficients(
    proxies: torch.Tensor,
    advantages: torch.Tensor,
    refinements: int = 1,
    lambda_min: float = 0.8,
    lambda_max: float = 1.2,
    gamma: float | None = None,
    normalize: bool = True,
    reduce: Reduce | None = None,
) -> torch.Tensor:
    r"""
    The credit of each token: \\( \lambda = \lambda_{min} + (\lambda_{max}-\lambda_{min})\,\sigma(m/\gamma) \\), divided
    by its mean. In each refinement the centroids are taken again with the tokens weighted by \\( \sigma(m/\gamma)|A| \\).

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
            from which the centroids were refined.
        normalize (`bool`, *optional*, defaults to `True`):
            Divide by the mean over all tokens, so that the mean is 1.
        reduce (`Callable`, *optional*):
            Sums a tensor over all processes. Centroids, scales and the mean are then those of all.

    Returns:
        `torch.Tensor` of shape `(N,)`: The coefficients. Where one side has no token, there is nothing to tell apart,
        and the tokens of the other get the middle of the range.
    """
    reduce = reduce or (lambda tensor: tensor)
    proxies, magnitude = proxies.to(_at_least_float32(proxies)), advantages.abs()
    sides = torch.stack([advantages > 0, advantages < 0]).to(proxies.dtype)  # (2, N)

    margins = _margins(proxies, sides, magnitude, reduce)
    scale = _scale(margins, sides, gamma, reduce)
    for _ in range(refinements):
        refined = _margins(proxies, sides, torch.sigmoid(_over(margins, scale)) * magnitude, reduce)
        # Each scale is that of the margins before the centroids moved.
        scale, margins = _scale(margins, sides, gamma, reduce), refined

    assignment = torch.sigmoid(_over(margins, scale)).where(advantages != 0, 0.0)
    coefficients = lambda_min + (lambda_max - lambda_min) * assignment
    if normalize:
        count, total = reduce(torch.stack([torch.ones_like(coefficients).sum(), coefficients.sum()]))
        coefficients = coefficients * count / total.where(total > 0, 1.0)
    return coefficients


def _margins(proxies: torch.Tensor, sides: torch.Tensor, weights: torch.Tensor, reduce: Reduce) -> torch.Tensor:
    """Squared distance to the other side's centroid minus that to the own side's, of shape `(N,)`."""
    weighted = sides * weights
    # (2, d + 1): the sums of both sides and, in the last column, of their weights
    sums = reduce(torch.cat([weighted @ proxies, weighted.sum(1, keepdim=True)], dim=1))
    total = sums[:, -1:]
    positive, negative = sums[:, :-1] / total.where(total > 0, 1.0)
    margins = 2 * proxies @ (positive - negative) + (negative @ negative - positive @ positive)
    return (margins * (sides[0] - sides[1])).where((total > 0).all(), 0.0)


def _scale(margins: torch.Tensor, sides: torch.Tensor, gamma: float | None, reduce: Reduce) -> torch.Tensor:
    """The scale of each token's margin: `gamma`, or the standard deviation over its side; of shape `(N,)`."""
    if gamma is not None:
        return torch.full_like(margins, gamma)
    count, total = reduce(torch.stack([sides.sum(1), sides @ margins]))
    mean = total / count.clamp(min=1)
    deviations = (margins - mean @ sides) ** 2  # from the mean of the own side; a second pass loses no digits
    variance = reduce(sides @ deviations) / count.clamp(min=1)
    return variance.sqrt() @ sides


def _over(margins: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The quotient; where a side has no spread, its limit."""
    spread = scale > 0
    limit = torch.where(margins == 0, 0.0, torch.inf * margins.sign())
    return torch.where(spread, margins / scale.where(spread, 1.0), limit)


def _at_least_float32(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
