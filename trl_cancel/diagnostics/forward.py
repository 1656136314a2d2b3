"""Hidden states and log-probabilities of rollouts by the model that is trained, in bounded memory."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..batch.rollouts import Rollouts
from ..batch.states import HELD_LOGITS, LMHead


def final_states(model: Any, rollouts: Rollouts) -> torch.Tensor:
    """
    The hidden states that predict the tokens of rollouts, without the model's output layer.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal language model.
        rollouts ([`~trl_cancel.batch.rollouts.Rollouts`]):
            So few rollouts that their activations fit into memory.

    Returns:
        `torch.Tensor` of shape `(B, T, d)`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    output = base.base_model(
        input_ids=torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1),
        attention_mask=torch.cat([rollouts.prompt_mask, rollouts.mask], 1),
        use_cache=False,
    )
    return output.last_hidden_state[:, -rollouts.mask.size(1) - 1 : -1]


def log_probs(hidden: torch.Tensor, token_ids: torch.Tensor, head: LMHead, temperature: float = 1.0) -> torch.Tensor:
    """
    Log-probabilities of tokens. Logits are held for a few tokens at a time; gradients compute them again.

    Args:
        hidden (`torch.Tensor` of shape `(N, d)`):
            Hidden states that predict the tokens.
        token_ids (`torch.Tensor` of shape `(N,)`):
            The tokens.
        head ([`~trl_cancel.batch.states.LMHead`]):
            Output layer.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the policy.

    Returns:
        `torch.Tensor` of shape `(N,)`, in float32 or better.
    """

    def some(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = head.all_logits(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return logits.gather(1, targets.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)

    parts = [
        checkpoint(some, hidden[part], token_ids[part], use_reentrant=False)
        if torch.is_grad_enabled()
        else some(hidden[part], token_ids[part])
        for part in pieces(len(hidden), vocabulary_size(head))
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0)


def entropies(hidden: torch.Tensor, head: LMHead, temperature: float = 1.0) -> torch.Tensor:
    """
    Entropies of the distributions of tokens, in nats. Logits are held for a few tokens at a time.

    Args:
        hidden (`torch.Tensor` of shape `(N, d)`):
            Hidden states that predict the tokens.
        head ([`~trl_cancel.batch.states.LMHead`]):
            Output layer.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the policy.

    Returns:
        `torch.Tensor` of shape `(N,)`, in float32 or better.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    parts = [torch.zeros(0, dtype=dtype, device=hidden.device)]
    with torch.no_grad():
        for part in pieces(len(hidden), vocabulary_size(head)):
            log_probs = (head.all_logits(hidden[part]).to(dtype) / temperature).log_softmax(-1)
            parts.append(torch.special.entr(log_probs.exp()).sum(-1))
    return torch.cat(parts)


def vocabulary_size(head: LMHead) -> int:
    """V, the number of logits that an output layer gives."""
    layer: Any = head.layer
    return (
        layer.size(0)
        if isinstance(layer, torch.Tensor)
        else getattr(layer, "out_features", None) or layer.weight.size(0)
    )


def pieces(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` tokens, each so small that `width` numbers for each of its tokens fit into memory."""
    size = max(1, HELD_LOGITS // width)
    return (slice(first, min(first + size, count)) for first in range(0, count, size))
