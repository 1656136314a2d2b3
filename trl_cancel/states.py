"""Last hidden states, and the output layer that turns them into logits of a few tokens."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LMHead:
    """
    The output layer of a language model, for logits of chosen tokens only.

    Args:
        weight (`torch.Tensor` of shape `(V, d)`):
            Output embeddings.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Their bias.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor on the logits, before the soft cap.
        softcap (`float`, *optional*):
            Bound c of the logits z, which become c tanh(z/c).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """
        Logits of the tokens `token_ids` of shape `(V*,)`, given hidden states of shape `(..., d)`.

        Returns:
            `torch.Tensor` of shape `(..., V*)`.
        """
        bias = None if self.bias is None else self.bias[token_ids]
        logits = torch.nn.functional.linear(hidden, self.weight[token_ids].to(hidden.dtype), bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
