"""
Last hidden states, caught in forward passes that are made anyway, and the output layer that turns them into logits of a
few tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..arguments import finite, floats, shaped, single, within


GIB = 2**30
CPU_SHARE = 4  # CPU memory is cheaper than that of a GPU
UNIT_VECTORS = 256  # given to a layer at a time, where its weight must be measured
HELD_LOGITS = 2**25  # logits of some tokens, one for each word of a vocabulary, that the credits hold at a time


class StateStore:
    """
    The last hidden states of the rollouts of one generation batch: `store[i:j]` has shape `(j - i, T, d)`, and is 0
    where there is no token. Only states of tokens are kept, in the precision in which they were computed.

    Args:
        gib (`float`, *optional*):
            Memory that the states may take on the device that computes them, in GiB. More, up to four times as much,
            goes to CPU memory; still more is not kept but computed again when it is asked for. No limit by default.
    """

    def __init__(self, gib: float = float("inf")):
        self.gib = gib
        self.decided = gib == float("inf")
        self.keeps, self.offloads = True, False
        self.recompute: Callable[[slice], torch.Tensor] | None = None
        self.logps: torch.Tensor | None = None  # of the pass that has filled it
        self.entropies: torch.Tensor | None = None  # likewise, where they were asked for
        self._states: list[torch.Tensor] = []
        self._masks: list[torch.Tensor] = []

    def reserve(self, size: int) -> None:
        """
        Decides where the states go.

        Args:
            size (`int`):
                Bytes that they can take.
        """
        self.decided = True
        self.offloads = size > self.gib * GIB
        self.keeps = size <= CPU_SHARE * self.gib * GIB

    def add(self, states: torch.Tensor, mask: torch.Tensor) -> None:
        """
        Keeps the states of the next rollouts.

        Args:
            states (`torch.Tensor` of shape `(B, T, d)`):
                States.
            mask (`torch.Tensor` of shape `(B, T)`):
                1 where there is a token.
        """
        mask = mask.bool()
        packed = states[mask.to(states.device)]  # a model's last layer may be on another GPU than its inputs
        packed = packed.cpu() if self.offloads else packed
        self._states += packed.split(mask.sum(1).tolist())
        self._masks += mask

    def filled_by(self, model: Any, mask: torch.Tensor) -> AbstractContextManager[None]:
        """
        Takes the states of the forward passes made meanwhile.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                The model that makes them.
            mask (`torch.Tensor` of shape `(B, T)`):
                1 for the completion tokens of all their rollouts.
        """
        first = len(self)

        def keep(states: torch.Tensor) -> None:
            done = len(self) - first
            self.add(states, mask[done : done + len(states)])

        return last_hidden_states(model, mask.size(1), keep) if self.keeps else nullcontext()

    def forget(self) -> None:
        """Drops all states; they are computed again when asked for."""
        self.keeps, self._states, self._masks = False, [], []

    def take(self, rows: torch.Tensor) -> "StateStore":
        """A store of some of the rollouts."""
        taken = self._like(self)
        if self.keeps:
            # Copies, so that the memory of the others can go.
            taken._states = [self._states[row].clone() for row in rows.tolist()]
            taken._masks = [self._masks[row] for row in rows.tolist()]
        return taken

    @classmethod
    def join(cls, stores: "Sequence[StateStore]", length: int) -> "StateStore":
        """
        The rollouts of several stores.

        Args:
            stores (`Sequence` of [`StateStore`]):
                Stores. Unless all have kept their states, the new one has none.
            length (`int`):
                T, the number of tokens to which all are padded.
        """
        joined = cls._like(stores[0])
        joined.keeps = all(store.keeps for store in stores)
        joined.offloads = any(store.offloads for store in stores)
        for store in stores if joined.keeps else ():
            joined._states += store._states
            joined._masks += [nn.functional.pad(mask, (0, length - len(mask))) for mask in store._masks]
        return joined

    @classmethod
    def _like(cls, store: "StateStore") -> "StateStore":
        empty = cls(store.gib)
        empty.decided, empty.keeps, empty.offloads = True, store.keeps, store.offloads
        return empty

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        if not self.keeps:
            assert self.recompute is not None
            return self.recompute(rows)
        mask = torch.stack(self._masks[rows])
        packed = torch.cat([states.to(mask.device) for states in self._states[rows]])
        states = packed.new_zeros(*mask.shape, packed.size(-1))
        states[mask] = packed
        return states


@contextmanager
def last_hidden_states(model: Any, length: int, keep: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """
    Catches the last hidden states of every forward pass made meanwhile.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal language model, not wrapped for training.
        length (`int`):
            T, the tokens at the end whose predictions are wanted.
        keep (`Callable`):
            Takes the states of one pass, of shape `(B, T, d)`: those that predict the last T tokens.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model

    def catch(module: nn.Module, inputs: Any, output: Any) -> None:
        keep(output.last_hidden_state[:, -length - 1 : -1].detach())

    handle = model.base_model.register_forward_hook(torch.compiler.disable(catch))
    try:
        yield
    finally:
        handle.remove()


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

    def __init__(self, layer: "nn.Module | torch.Tensor | _Rows", scale: float = 1.0, softcap: float | None = None):
        self.layer, self.scale, self.softcap = layer, scale, softcap

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any) -> "LMHead":
        """
        The head of a model. The scale of its logits is measured on a few tokens rather than taken from names, which
        mean different things in different models; whether scale and soft cap are all there is, is checked there too.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                A causal language model.

        Raises:
            `ValueError`: If the logits are not a scaled and capped linear function of the last hidden states, or not
                finite.
        """
        layer = model.get_output_embeddings()
        if layer is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings, so no logits of single tokens.")
        config = getattr(model.config, "text_config", model.config)
        softcap = getattr(config, "final_logit_softcapping", None)
        tokens = torch.arange(8, device=model.device).unsqueeze(0) % config.vocab_size
        with without_dropout(model), _outputs_of(layer) as outputs:
            logits = model(input_ids=tokens).logits.double()
        if not logits.isfinite().all():
            raise ValueError(
                f"The logits of {type(model).__name__} are not finite: its weights hold nan or infinite values, or "
                f"overflow in {str(model.dtype).removeprefix('torch.')}. Load other weights, or in another precision."
            )
        raw = outputs[-1].to(logits.device).double()
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

    @property
    def vocabulary_size(self) -> int:
        """V, the words for which there are logits."""
        if isinstance(self.layer, nn.Module):
            layer = cast(Any, self.layer)
            return int(getattr(layer, "out_features", None) or layer.weight.size(0))
        return len(self.layer) if isinstance(self.layer, torch.Tensor) else int(self.layer.token_ids.max()) + 1

    @property
    def width(self) -> int | None:
        """d, the size of the states that it takes; `None` where the layer does not tell."""
        if isinstance(self.layer, nn.Module):
            return getattr(self.layer, "in_features", None)
        weight = self.layer if isinstance(self.layer, torch.Tensor) else self.layer.weight
        return weight.size(-1)

    @torch.no_grad()
    def restricted_to(self, token_ids: torch.Tensor) -> "LMHead":
        """
        The same head for a few tokens only, with weights of its own. Gathers weights that are sharded over processes,
        so all processes must ask at once.

        Args:
            token_ids (`torch.Tensor`):
                The tokens, of any shape.
        """
        token_ids = token_ids.unique()
        return LMHead(_Rows(token_ids, *self.rows(token_ids)), self.scale, self.softcap)

    def rows(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Rows of the weight and of the bias.

        Args:
            token_ids (`torch.Tensor` of shape `(K,)`):
                The tokens.

        Returns:
            `tuple`: Weight of shape `(K, d)`, and bias of shape `(K,)` or `None`.
        """
        with _gathered(self.layer):
            # The layer may be on another device than the tokens: on the last one of several GPUs.
            weight, bias = _rows(self.layer, token_ids.to(_device_of(self.layer)))
        return weight.to(token_ids.device), None if bias is None else bias.to(token_ids.device)

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
        weight, bias = self.rows(token_ids)
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        bias = None if bias is None else bias.to(dtype)
        return self._finish(nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias))

    def all_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        Logits of the whole vocabulary, through which gradients flow to the layer.

        Args:
            hidden (`torch.Tensor` of shape `(N, d)`):
                Last hidden states: of so few tokens at a time that the logits fit into memory.

        Returns:
            `torch.Tensor` of shape `(N, V)`.
        """
        if isinstance(self.layer, nn.Module):
            floating = next((weight for weight in self.layer.parameters() if weight.is_floating_point()), hidden)
            return self._finish(self.layer(hidden.to(floating.dtype)))
        weight, bias = (
            (self.layer, None) if isinstance(self.layer, torch.Tensor) else (self.layer.weight, self.layer.bias)
        )
        return self._finish(nn.functional.linear(hidden.to(weight.dtype), weight, bias))

    @torch.no_grad()
    def moved(self, step: torch.Tensor) -> "LMHead":
        """
        The same head with another weight, of its own.

        Args:
            step (`torch.Tensor` of shape `(V, d)`):
                What is added to the weight.
        """
        token_ids = torch.arange(len(step), device=step.device)
        weight, bias = self.rows(token_ids)
        return LMHead(_Rows(token_ids, weight + step.to(weight.dtype), bias), self.scale, self.softcap)

    def slope(self, logits: torch.Tensor) -> torch.Tensor:
        """Derivative of the logits by what the layer gives: the scale, and what the soft cap leaves of it."""
        cap = 1.0 if self.softcap is None else 1 - (logits / self.softcap) ** 2
        return self.scale * cap * torch.ones_like(logits)

    def _finish(self, raw: torch.Tensor) -> torch.Tensor:
        scaled = raw * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def fitting_head(head: LMHead | torch.Tensor, hidden: torch.Tensor, token_ids: torch.Tensor) -> LMHead:
    """
    An output layer for some states and tokens.

    Args:
        head ([`LMHead`] or `torch.Tensor` of shape `(V, d)`):
            The layer, or its bare weight.
        hidden (`torch.Tensor` of shape `(..., d)`):
            Hidden states.
        token_ids (`torch.Tensor`):
            Tokens.

    Raises:
        `ValueError`: If the layer takes states of another size, or has no such token; or if a bare weight is none, or
            not finite.
    """
    if not isinstance(head, LMHead):
        (weight,) = single(*floats(head=head))
        shaped(hidden=(hidden, "... d"), head=(weight, "V d"))
        finite(head=weight)
        head = LMHead(weight)
    elif head.width not in (None, hidden.size(-1)):
        raise ValueError(f"head takes states of size {head.width}, but hidden has the shape {tuple(hidden.shape)}.")
    within(head.vocabulary_size, token_ids=token_ids)
    return head


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """
    Evaluation mode for a while, but for linear layers, which train; after it, each module is in the mode in which it
    was.

    Args:
        model (`nn.Module`):
            The model.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:  # not `eval()`, in which some adapters merge their weights
            # Linear layers have no dropout, and 4-bit ones on a CPU pack their weights for good unless they train.
            module.training = isinstance(module, nn.Linear)
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _outputs_of(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects what a layer gives."""
    outputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@dataclass
class _Rows:
    """Some rows of a layer, those of sorted tokens."""

    token_ids: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def _device_of(layer: "nn.Module | torch.Tensor | _Rows") -> torch.device:
    if isinstance(layer, nn.Module):
        return next(chain(layer.parameters(), layer.buffers())).device
    return layer.weight.device if isinstance(layer, _Rows) else layer.device


def _rows(layer: Any, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of the weight and of the bias of a layer."""
    if isinstance(layer, torch.Tensor):
        return layer[token_ids], None
    if isinstance(layer, _Rows):
        index = torch.searchsorted(layer.token_ids, token_ids)
        return layer.weight[index], None if layer.bias is None else layer.bias[index]
    if hasattr(layer, "modules_to_save"):  # PEFT's copy of a whole layer
        trained = not layer.disable_adapters
        return _rows(layer.modules_to_save[layer.active_adapter] if trained else layer.original_module, token_ids)
    if hasattr(layer, "lora_A"):
        return _lora_rows(layer, token_ids)
    if not _is_linear(layer):
        return _measured_rows(layer, token_ids)
    return _whole(layer.weight)[token_ids], None if layer.bias is None else _whole(layer.bias)[token_ids]


def _is_linear(layer: nn.Module) -> bool:
    """A plain linear layer; FSDP2 makes a class of the same name of it, quantized ones have a class of their own."""
    return isinstance(layer, nn.Linear) and layer.weight.is_floating_point() and type(layer).__module__[:5] == "torch"


def _lora_rows(layer: Any, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged:
        return _rows(layer.base_layer, token_ids)
    if any(layer.use_dora.get(name) or layer.lora_bias.get(name) for name in adapters):
        return _measured_rows(layer, token_ids)
    weight, bias = _rows(layer.base_layer, token_ids)
    for name in adapters:
        update = _whole(layer.lora_B[name].weight)[token_ids] @ _whole(layer.lora_A[name].weight)
        weight = weight + layer.scaling[name] * update.to(weight.dtype)
    return weight, bias


def _measured_rows(layer: Any, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, where a layer keeps its weight to itself (quantized, or changed by more than a sum): unit vectors."""
    floating = next((weight for weight in layer.parameters() if weight.is_floating_point()), torch.empty(0))
    units = torch.eye(layer.in_features, dtype=floating.dtype, device=token_ids.device)
    with torch.no_grad(), without_dropout(layer):
        bias = layer(torch.zeros_like(units[:1]))[0, token_ids]
        columns = [layer(some)[:, token_ids] - bias for some in units.split(UNIT_VECTORS)]
    return torch.cat(columns).T, bias


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight that FSDP2 may have sharded."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _gathered(layer: Any) -> Any:
    """Holds together the weights of a layer that DeepSpeed ZeRO-3 has sharded."""
    weights = list(layer.parameters()) if isinstance(layer, nn.Module) else []
    if not any(hasattr(weight, "ds_id") for weight in weights):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights)
