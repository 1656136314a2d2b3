"""
Token flipping: which tokens an update boosts and which it suppresses, whatever the sign of their rollout's advantage
([2605.08666](https://huggingface.co/papers/2605.08666), Appendix C).
"""

from dataclasses import dataclass

import torch

from ..arguments import floats, marks, not_negative, shaped, single


# The paper's number did not survive in the text at hand; this is a change of a probability by a ten-thousandth of it.
THRESHOLD = 1e-4


@dataclass(frozen=True)
class Ratios:
    """
    How some tokens have shifted.

    Args:
        boosted, suppressed, stable (`float`):
            Fractions of the tokens whose log-probability has risen by more than the threshold, has fallen by more than
            it, and has done neither; `nan` without tokens. A shift that is `nan` is none of these.
        mean, mean_magnitude (`float`):
            Mean of the shifts and of their magnitudes, in nats.
        tokens (`int`):
            Number of tokens.
    """

    boosted: float
    suppressed: float
    stable: float
    mean: float
    mean_magnitude: float
    tokens: int


@dataclass(frozen=True)
class TokenShifts:
    """
    What an update did to each token.

    Args:
        shifts (`torch.Tensor` of shape `(B, T)`):
            Changes of the log-probabilities, in nats, in float32 or better; 0 where the mask is.
        positive, negative, all ([`Ratios`]):
            How the tokens of rollouts with positive advantage, of those with negative advantage and of all have
            shifted.
    """

    shifts: torch.Tensor
    positive: Ratios
    negative: Ratios
    all: Ratios


def token_shifts(
    before: torch.Tensor,
    after: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    threshold: float = THRESHOLD,
) -> TokenShifts:
    r"""
    The shift \\( \Delta_{it} = \log\pi_{\theta'}(y_{it}) - \log\pi_\theta(y_{it}) \\) of each token by one update, and
    the ratios of boosted (\\( \Delta > \epsilon \\)), suppressed (\\( \Delta < -\epsilon \\)) and stable tokens (Eq. 16
    of [2605.08666](https://huggingface.co/papers/2605.08666)).

    Args:
        before (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities before the update, by the model that is trained, not by the one that sampled.
        after (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities after it, computed in the same way.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 for the tokens that count.
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantages of the rollouts; one that is `nan` is neither positive nor negative.
        threshold (`float`, *optional*, defaults to `1e-4`):
            \\( \epsilon \\), in nats.

    Returns:
        [`TokenShifts`]

    Raises:
        `ValueError`: If `threshold` is negative, or the shapes do not fit.
    """
    not_negative("threshold", threshold, "1e-4")
    before, after = single(*floats(before=before, after=after))
    (advantages,), (active,) = floats(advantages=advantages), marks(mask=mask)
    shaped(before=(before, "B T"), after=(after, "B T"), mask=(active, "B T"), advantages=(advantages, "B"))
    shifts = (after - before).masked_fill(~active, 0.0)

    def ratios(rollouts: torch.Tensor) -> Ratios:
        chosen = shifts[active & rollouts.unsqueeze(1)].double()

        def fraction(kind: torch.Tensor) -> float:
            return kind.double().mean().item()

        return Ratios(
            boosted=fraction(chosen > threshold),
            suppressed=fraction(chosen < -threshold),
            stable=fraction(chosen.abs() <= threshold),  # nan is none of these
            mean=chosen.mean().item(),
            mean_magnitude=chosen.abs().mean().item(),
            tokens=len(chosen),
        )

    return TokenShifts(
        shifts,
        positive=ratios(advantages > 0),
        negative=ratios(advantages < 0),
        all=ratios(torch.ones_like(advantages, dtype=torch.bool)),
    )
