r"""
Likelihood displacement: how little an update raises the likelihood of right answers, and a score that tells for which
prompts ([2505.18830](https://huggingface.co/papers/2505.18830), sections 3 and 4).

Shapes: G rollouts of one prompt, T completion tokens, N tokens, d hidden size, V vocabulary.
"""

from typing import Any

import torch

from ..arguments import floats, known, marks, shaped, single, whole


def likelihood_displacement(
    before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor, positive: torch.Tensor
) -> torch.Tensor:
    r"""
    The mean change of the log-likelihood of a prompt's right responses (Eq. 2),
    \\( \Delta(x) = \frac{1}{N_+}\sum_{i\in+}[\log\pi_{\theta'}(y_i|x) - \log\pi_\theta(y_i|x)] \\).

    Args:
        before (`torch.Tensor` of shape `(..., G, T)`):
            Log-probabilities of the tokens before the update.
        after (`torch.Tensor` of shape `(..., G, T)`):
            Log-probabilities after it.
        mask (`torch.Tensor` of shape `(..., G, T)`):
            1 for the tokens that count.
        positive (`torch.Tensor` of shape `(..., G)` and type `bool`):
            The right responses.

    Returns:
        `torch.Tensor` of shape `(...)`: In nats, in float32 or better; `nan` where no response is right.

    Raises:
        `ValueError`: If the shapes differ, or the change of a token of a right response that counts is not a number.
    """
    before, after = single(*floats(before=before, after=after))
    active, positive = marks(mask=mask, positive=positive)
    shaped(
        before=(before, "... G T"), after=(after, "... G T"), mask=(active, "... G T"), positive=(positive, "... G")
    )
    changes = (after - before).where(active & positive.unsqueeze(-1), 0.0)
    known(**{"after - before": changes})
    return changes.sum((-1, -2)) / positive.sum(-1)


def gwhes(
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    mask: torch.Tensor,
    positive: torch.Tensor,
    head: Any,
    temperature: float = 1.0,
) -> torch.Tensor:
    r"""
    Group weighted hidden embedding score of a prompt (Eq. 5): the larger, the less an update raises the likelihood of
    its right responses. Their mean of

    $$ p^-\sum_k\sum_{j\in-}\sum_{k'}\langle e_{ik},e_{jk'}\rangle\langle h_{ik},h_{jk'}\rangle
    - p^+\sum_k\sum_{i'\in+}\sum_{k''}\langle e_{ik},e_{i'k''}\rangle\langle h_{ik},h_{i'k''}\rangle $$

    with the advantages' magnitudes \\( p^+ = (1-p)/\sqrt{p(1-p)} \\) and \\( p^- = p/\sqrt{p(1-p)} \\) (Eq. 4). It
    takes one matrix \\( M = \sum eh^\top \\) for either sign rather than all pairs of tokens.

    Args:
        hidden (`torch.Tensor` of shape `(G, T, d)`):
            Hidden states that predict the tokens.
        token_ids (`torch.Tensor` of shape `(G, T)`):
            The tokens.
        mask (`torch.Tensor` of shape `(G, T)`):
            1 for the tokens that count.
        positive (`torch.Tensor` of shape `(G,)` and type `bool`):
            The right responses.
        head ([`~trl_cancel.batch.states.LMHead`] or `torch.Tensor` of shape `(V, d)`):
            Output layer, or its bare weight.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the policy.

    Returns:
        `torch.Tensor`: A scalar.

    Raises:
        `ValueError`: If all responses are right, or none; if the shapes do not fit; or if a state that counts is not
            finite.
    """
    from .coupling import head_gradient

    (hidden,) = floats(hidden=hidden)
    active, positive = marks(mask=mask, positive=positive)
    token_ids = torch.as_tensor(token_ids)
    shaped(hidden=(hidden, "G T d"), token_ids=(token_ids, "G T"), mask=(active, "G T"), positive=(positive, "G"))
    if positive.all() or not positive.any():
        raise ValueError("gwhes needs right and wrong responses to the prompt; positive holds only one kind.")

    def matrix(rollouts: torch.Tensor) -> torch.Tensor:
        chosen = active & rollouts.unsqueeze(1)
        states = hidden[chosen]
        return head_gradient(states, token_ids[chosen], torch.ones_like(states[:, 0]), head, temperature)

    right, wrong, p = matrix(positive), matrix(~positive), positive.double().mean()
    spread = (p * (1 - p)).sqrt()
    score = p / spread * (right * wrong).sum() - (1 - p) / spread * (right * right).sum()
    return score / positive.sum()


def top_k_overlap(displacements: torch.Tensor, scores: torch.Tensor, k: int) -> float:
    r"""
    How well a score finds the prompts with the least displacement: \\( |Q_L\cap Q_S|/k \\) with the k prompts of least
    displacement and the k of highest score (section 4.2). Drawing prompts at random gives k/n on average.

    Args:
        displacements (`torch.Tensor` of shape `(n,)`):
            [`likelihood_displacement`] of each prompt.
        scores (`torch.Tensor` of shape `(n,)`):
            [`gwhes`] of each prompt.
        k (`int`):
            Number of prompts to find.

    Raises:
        `ValueError`: If there are fewer than k prompts, not equally many numbers of both kinds, or a `nan` among them.
    """
    displacements, scores = floats(displacements=displacements, scores=scores)
    shaped(displacements=(displacements, "n"), scores=(scores, "n"))
    known(displacements=displacements, scores=scores)
    k = whole("k", k, 1, len(scores), "the number of prompts, ")
    least, highest = displacements.argsort()[:k], scores.argsort(descending=True)[:k]
    return len(set(least.tolist()) & set(highest.tolist())) / k
