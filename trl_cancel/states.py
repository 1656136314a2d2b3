"""The output layer of a language model, for logits of a few tokens only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class LMHead:
    """
    The output layer of a language model: logits of chosen tokens, without those of the whole vocabulary.

    Weights are read when logits are asked for, so a head stays right while its model is trained.

    Args:
        layer (`torch.nn.Module` or `torch.Tensor` of shape `(V, d)`):
            The layer, or its bare weight.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor on what the layer gives, before the soft cap.
        softcap (`float`, *optional*):
            Bound c of the logits z, which become c tanh(z/c).
    """

    def __init__(self, layer: nn.Module | torch.Tensor, scale: float = 1.0, softcap: float | None = None):
        self.layer, self.scale, self.softcap = layer, scale, softcap

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any) -> "LMHead":
        """
        The head of a model. What the model does to its logits (a scale, a soft cap) is measured on a few tokens rather
        than taken from names, which mean different things in different models.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                A causal language model.

        Raises:
            `ValueError`: If the logits are not a scaled and capped linear function of the last hidden states.
        """
        layer = model.get_output_embeddings()
        if layer is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings, so no logits of single tokens.")
        config = getattr(model.config, "text_config", model.config)
        softcap = getattr(config, "final_logit_softcapping", None)
        tokens = torch.arange(8, device=model.device).unsqueeze(0) % config.vocab_size
        training = model.training
        model.eval()
        try:
            with _outputs_of(layer) as outputs:
                logits = model(input_ids=tokens).logits.double()
        finally:
            model.train(training)
        raw = outputs[-1].double()
        if softcap is None:
            uncapped, measured = logits, raw
        else:
            clear = logits.abs() < 0.9 * softcap  # nearer to the cap, rounding has eaten what was there
            uncapped, measured = softcap * torch.atanh(logits[clear] / softcap), raw[clear]
        scale = ((uncapped * measured).sum() / (measured * measured).sum()).item()
        head = cls(layer, scale, softcap)
        tolerance = 10 * torch.finfo(outputs[-1].dtype).eps * logits.abs().max()
        if not (head._finish(raw) - logits).abs().max() <= tolerance:
            raise ValueError(
                f"The logits of {type(model).__name__} are not a scaled and capped linear function of its last hidden "
                "states, so logits of single tokens cannot be computed."
            )
        return head

    def logits(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """
        Logits of chosen tokens.

        Args:
            hidden (`torch.Tensor` of shape `(..., d)`):
                Last hidden states.
            token_ids (`torch.Tensor` of shape `(K,)`):
                The tokens.

        Returns:
            `torch.Tensor` of shape `(..., K)`.
        """
        rows = _rows(self.layer, token_ids)
        if rows is None:  # quantized, or an adapter that is not a sum of matrices: the layer knows how
            return self._finish(self.layer(hidden)[..., token_ids])  # type: ignore[operator]
        weight, bias = rows
        bias = None if bias is None else bias.to(hidden.dtype)
        return self._finish(nn.functional.linear(hidden, weight.to(hidden.dtype), bias))

    def _finish(self, raw: torch.Tensor) -> torch.Tensor:
        scaled = raw * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


@contextmanager
def _outputs_of(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects what a layer gives."""
    outputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _rows(layer: Any, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Rows of the weight and of the bias of a layer, or `None` where they are not to be had."""
    if isinstance(layer, torch.Tensor):
        return layer[token_ids], None
    if hasattr(layer, "modules_to_save"):  # PEFT's copy of a whole layer
        trained = not layer.disable_adapters
        return _rows(layer.modules_to_save[layer.active_adapter] if trained else layer.original_module, token_ids)
    if hasattr(layer, "lora_A"):
        return _lora_rows(layer, token_ids)
    if type(layer) is not nn.Linear:
        return None
    return layer.weight[token_ids], None if layer.bias is None else layer.bias[token_ids]


def _lora_rows(layer: Any, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    rows = _rows(layer.base_layer, token_ids)
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if rows is None or any(layer.use_dora.get(name) or layer.lora_bias.get(name) for name in adapters):
        return None
    weight, bias = rows
    if layer.disable_adapters or layer.merged:
        return rows
    for name in adapters:
        update = layer.lora_B[name].weight[token_ids] @ layer.lora_A[name].weight
        weight = weight + layer.scaling[name] * update.to(weight.dtype)
    return weight, bias
