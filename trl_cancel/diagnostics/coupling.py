r"""
Coupling: what a push on one token does to another ([2605.08666](https://huggingface.co/papers/2605.08666), section 2).

To first order, a step of gradient ascent with rate \\( \eta \\) on \\( \sum_k w_k\log\pi(y_k) \\) shifts token
\\( j \\) by \\( \eta\sum_k w_kK(j,k) \\) (Eq. 5). In the output layer alone the kernel factorises (Eq. 7), with the
hidden states \\( h \\) and the prediction errors \\( e = \mathrm{onehot}(y) - \pi \\):

$$ K(j,k) = \langle\nabla_W\log\pi(y_j), \nabla_W\log\pi(y_k)\rangle = \langle h_j,h_k\rangle\langle e_j,e_k\rangle $$

Shapes: N tokens, d hidden size, V vocabulary.
"""

import torch

from ..arguments import finite, floats, known, not_negative, positive, shaped, single, to_one, whole_numbers, within
from ..batch.states import LMHead, fitting_head
from .forward import pieces, vocabulary_size


def prediction_errors(
    hidden: torch.Tensor, token_ids: torch.Tensor, head: LMHead | torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    r"""
    The derivative of each token's log-probability by what the output layer gives: the prediction error
    \\( \mathrm{onehot}(y) - \pi \\), times the scale, soft cap and temperature that stand between the two.

    Args:
        hidden (`torch.Tensor` of shape `(N, d)`):
            Hidden states that predict the tokens.
        token_ids (`torch.Tensor` of shape `(N,)`):
            The tokens.
        head ([`~trl_cancel.batch.states.LMHead`] or `torch.Tensor` of shape `(V, d)`):
            Output layer, or its bare weight.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the policy.

    Returns:
        `torch.Tensor` of shape `(N, V)`: For so few tokens at a time that it fits into memory.

    Raises:
        `ValueError`: If the shapes do not fit, a state is not finite, or the layer has no such token.
    """
    hidden, token_ids, head = _of_layer(hidden, token_ids, head, temperature)
    logits = head.all_logits(hidden)
    probabilities = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).softmax(1)
    errors = -probabilities
    errors[torch.arange(len(errors), device=errors.device), token_ids] += 1
    return errors * head.slope(logits) / temperature


def coupling_kernel(
    hidden_a: torch.Tensor, errors_a: torch.Tensor, hidden_b: torch.Tensor, errors_b: torch.Tensor
) -> torch.Tensor:
    r"""
    The kernel \\( \langle h_a,h_b\rangle\langle e_a,e_b\rangle \\) between all pairs of tokens (Eq. 7; the second
    factor is that of Eq. 8, \\( 1[y=y'] - \pi(y') - \pi'(y) + \langle\pi,\pi'\rangle \\)).

    Args:
        hidden_a (`torch.Tensor` of shape `(N, d)`):
            Hidden states.
        errors_a (`torch.Tensor` of shape `(N, V)`):
            Prediction errors, see [`prediction_errors`].
        hidden_b (`torch.Tensor` of shape `(M, d)`):
            Hidden states of the other tokens.
        errors_b (`torch.Tensor` of shape `(M, V)`):
            Their prediction errors.

    Returns:
        `torch.Tensor` of shape `(N, M)`, in float32 or better.

    Raises:
        `ValueError`: If the shapes do not fit, or something is not finite.
    """
    hidden_a, errors_a, hidden_b, errors_b = single(
        *floats(hidden_a=hidden_a, errors_a=errors_a, hidden_b=hidden_b, errors_b=errors_b)
    )
    shaped(
        hidden_a=(hidden_a, "N d"), errors_a=(errors_a, "N V"), hidden_b=(hidden_b, "M d"), errors_b=(errors_b, "M V")
    )
    finite(hidden_a=hidden_a, errors_a=errors_a, hidden_b=hidden_b, errors_b=errors_b)
    # Errors of tokens that are nearly certain are so small that their products vanish.
    (errors_a, of_a), (errors_b, of_b) = to_one(errors_a, -1), to_one(errors_b, -1)
    return ((of_a * hidden_a) @ (of_b * hidden_b).T) * (errors_a @ errors_b.T)


@torch.no_grad()
def head_gradient(
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    weights: torch.Tensor,
    head: LMHead | torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    r"""
    The gradient of \\( \sum_k w_k\log\pi(y_k) \\) by the weight of the output layer,
    \\( \sum_k w_ke_kh_k^\top \\) (Eq. 6).

    Args:
        hidden (`torch.Tensor` of shape `(N, d)`):
            Hidden states that predict the tokens.
        token_ids (`torch.Tensor` of shape `(N,)`):
            The tokens.
        weights (`torch.Tensor` of shape `(N,)`):
            \\( w \\).
        head ([`~trl_cancel.batch.states.LMHead`] or `torch.Tensor` of shape `(V, d)`):
            Output layer, or its bare weight.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the policy.

    Returns:
        `torch.Tensor` of shape `(V, d)`, in float32 or better.

    Raises:
        `ValueError`: If the shapes do not fit, a state or weight is not finite, or the layer has no such token.
    """
    hidden, token_ids, head = _of_layer(hidden, token_ids, head, temperature)
    (weights,) = floats(weights=weights)
    shaped(hidden=(hidden, "N d"), weights=(weights, "N"))
    finite(weights=weights)
    vocabulary = vocabulary_size(head)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    gradient = hidden.new_zeros(vocabulary, hidden.size(1), dtype=dtype)
    for part in pieces(len(hidden), vocabulary):
        errors = prediction_errors(hidden[part], token_ids[part], head, temperature)
        gradient += (weights[part].unsqueeze(1) * errors).T.to(dtype) @ hidden[part].to(dtype)
    return gradient


@torch.no_grad()
def predicted_shifts(
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    gradient: torch.Tensor,
    head: LMHead | torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    r"""
    The first-order shift of each token by a step along a gradient of the output layer's weight (Eq. 9),
    \\( \Delta_j = e_j^\top Gh_j \\): with \\( G = \eta\sum_k w_ke_kh_k^\top \\) this is
    \\( \eta\sum_k w_kK(j,k) \\), without a sum over pairs.

    Args:
        hidden (`torch.Tensor` of shape `(N, d)`):
            Hidden states that predict the tokens.
        token_ids (`torch.Tensor` of shape `(N,)`):
            The tokens.
        gradient (`torch.Tensor` of shape `(V, d)`):
            Change of the weight: learning rate times [`head_gradient`].
        head ([`~trl_cancel.batch.states.LMHead`] or `torch.Tensor` of shape `(V, d)`):
            Output layer, or its bare weight.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the policy.

    Returns:
        `torch.Tensor` of shape `(N,)`, in float32 or better.

    Raises:
        `ValueError`: If the shapes do not fit, a state or change is not finite, or the layer has no such token.
    """
    hidden, token_ids, head = _of_layer(hidden, token_ids, head, temperature)
    (gradient,) = floats(gradient=gradient)
    shaped(hidden=(hidden, "N d"), gradient=(gradient, "V d"))
    finite(gradient=gradient)
    states, gradient = single(hidden, gradient)
    shifts = [
        (
            (prediction_errors(hidden[part], token_ids[part], head, temperature).to(gradient) @ gradient)
            * states[part]
        ).sum(1)
        for part in pieces(len(hidden), len(gradient))
    ]
    return torch.cat(shifts) if shifts else states.new_zeros(0)


def _of_layer(
    hidden: torch.Tensor, token_ids: torch.Tensor, head: LMHead | torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, LMHead]:
    """States, tokens and output layer that fit together."""
    (hidden,), (token_ids,) = floats(hidden=hidden), whole_numbers(token_ids=token_ids)
    shaped(hidden=(hidden, "N d"), token_ids=(token_ids, "N"))
    finite(hidden=hidden)
    positive("temperature", temperature, "1.0")
    head = fitting_head(head, hidden, token_ids)
    within(vocabulary_size(head), token_ids=token_ids)  # fewer where it is restricted to some of its words
    return hidden, token_ids, head


def sign_agreement(first: torch.Tensor, second: torch.Tensor, threshold: float = 0.0) -> float:
    """
    Fraction of tokens that two updates, or an update and its prediction, shift in the same direction, among those that
    the first shifts by more than a threshold; `nan` if there is none.

    Args:
        first (`torch.Tensor` of shape `(N,)`):
            Shifts.
        second (`torch.Tensor` of shape `(N,)`):
            Shifts of the same tokens.
        threshold (`float`, *optional*, defaults to `0.0`):
            Least magnitude of a shift that is counted.

    Raises:
        `ValueError`: If the shapes differ, a shift is not a number, or the threshold is negative.
    """
    first, second = floats(first=first, second=second)
    shaped(first=(first, "N"), second=(second, "N"))
    known(first=first, second=second)
    not_negative("threshold", threshold, "1e-4")
    counted = first.abs() > threshold
    return (first[counted].sign() == second[counted].sign()).double().mean().item()
