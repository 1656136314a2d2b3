"""One update, taken for a look: applied, measured, and undone to the last bit."""

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.optim import SGD, Optimizer

from ...arguments import positive, whole
from ...batch.rollouts import Rollouts
from ...batch.states import LMHead, StateStore, without_dropout
from ..coupling import head_gradient, predicted_shifts
from ..forward import entropies, final_states, log_probs
from .variants import Variant


class UpdateProbe:
    r"""
    A model, rollouts and an optimizer: applies variants of one update to the same rollouts from the same weights, and
    measures every token before and after with the model itself, without dropout.

    Weights, gradients, the optimizer's state, the mode of the model and random numbers are restored exactly, also
    after an error. Only parameters that require gradients are touched, so a model with LoRA is probed in its adapter.

    Shapes: B rollouts in groups of G, T completion tokens, N active tokens, d hidden size, V vocabulary.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal language model. In float32, since small updates are lost in the rounding of bfloat16.
        rollouts ([`~trl_cancel.batch.rollouts.Rollouts`]):
            Whole groups, e.g. from [`~trl_cancel.diagnostics.sample_rollouts`]. Without `old_logps`, those of the model
            as it is now are taken: the update is on policy.
        optimizer (`torch.optim.Optimizer`, *optional*):
            Optimizer over the model's parameters. Plain SGD by default: Adam's first step is the sign of the gradient,
            whatever the tokens' shares in it.
        learning_rate (`float`, *optional*, defaults to `0.1`):
            Learning rate of the default optimizer.
        batch_size (`int`, *optional*, defaults to `8`):
            Rollouts a forward pass.

    Raises:
        `ValueError`: If a number is not positive, if no parameter requires gradients or some that do are of half precision, if an adapter adds
            tokens to the prompt, or if the model's logits are not a linear function of its hidden states.
    """

    def __init__(
        self,
        model: Any,
        rollouts: Rollouts,
        optimizer: Optimizer | None = None,
        *,
        learning_rate: float = 0.1,
        batch_size: int = 8,
    ):
        positive("learning_rate", learning_rate, "0.1")
        self.model, self.batch_size = model, whole("batch_size", batch_size, 1)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("No parameter of the model requires gradients, so there is no update to probe.")
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                f"{model.active_peft_config.peft_type.value} adapters add tokens to the prompt, which the probe does "
                "not make; it works with LoRA and its kin, and with all parameters trained."
            )
        half = {str(parameter.dtype) for parameter in self.parameters if parameter.dtype.itemsize < 4}
        if half:
            raise ValueError(
                f"The model's trained parameters are {', '.join(sorted(half))}, whose rounding swallows small updates. "
                "Load it with dtype='float32', or call model.float()."
            )
        self.optimizer = optimizer or SGD(self.parameters, lr=learning_rate)
        self.learning_rate = self.optimizer.param_groups[0]["lr"]
        self.head = LMHead.of(model)
        states = StateStore()
        self.before = self._pass(rollouts, states)
        old_logps = self.before if rollouts.old_logps is None else rollouts.old_logps
        self.rollouts = replace(rollouts, states=states, head=self.head, old_logps=old_logps)
        self._credited: dict[str, torch.Tensor] = {}

    @property
    def active(self) -> torch.Tensor:
        """The tokens that count, of shape `(B, T)` and type `bool`."""
        return self.rollouts.mask.bool()

    @cached_property
    def hidden(self) -> torch.Tensor:
        """Hidden states that predict the active tokens, before any update, of shape `(N, d)`."""
        return self.rollouts.states[:][self.active]

    @property
    def token_ids(self) -> torch.Tensor:
        """The active tokens, of shape `(N,)`."""
        return self.rollouts.completion_ids[self.active]

    # Updates

    def weights(
        self, variant: Variant | str, logps: torch.Tensor | None = None, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        The weights that a variant gives the tokens.

        Args:
            variant ([`Variant`] or `str`):
                The variant, or its name.
            logps (`torch.Tensor` of shape `(B, T)`, *optional*):
                Log-probabilities now; those before the update by default.
            rows (`torch.Tensor` of shape `(K,)`, *optional*):
                Rollouts that `logps` belongs to; all by default.

        Returns:
            `torch.Tensor` of shape `(B, T)`, or `(K, T)`.
        """
        variant = Variant(variant) if isinstance(variant, str) else variant
        advantages = self.credited_advantages(variant)
        if rows is None:
            return variant.weights(self.rollouts, self.before if logps is None else logps, advantages)
        logps = self.before[rows] if logps is None else logps
        return variant.weights(self._take(rows), logps, advantages[rows])

    def credited_advantages(self, variant: Variant) -> torch.Tensor:
        """Advantages with a variant's token credit, settled by the states before any update."""
        key = repr((variant.name, sorted(variant.settings.items(), key=str)))
        if key not in self._credited:
            rollouts = self.rollouts
            if variant.needs_entropies:
                rollouts = replace(rollouts, entropies=self._entropies())
            self._credited[key] = variant.credited(rollouts).advantages
        return self._credited[key]

    def _entropies(self) -> torch.Tensor:
        """Entropies of the distributions of the tokens, of shape `(B, T)`."""
        values = entropies(self.hidden, self.head, self.rollouts.temperature)
        return values.new_zeros(self.active.shape).masked_scatter(self.active, values)

    def gradient(self, weights: torch.Tensor, rows: torch.Tensor | None = None) -> list[torch.Tensor]:
        r"""
        The gradient of the loss \\( -\sum_{it} w_{it}\log\pi(y_{it}) / \sum_{it} m_{it} \\).

        Args:
            weights (`torch.Tensor` of shape `(B, T)`):
                \\( w \\); rollouts without weight cost no pass.
            rows (`torch.Tensor`, *optional*):
                Rollouts that make up the batch; all by default.

        Returns:
            `list[torch.Tensor]`: One for each of `parameters`.
        """
        rows = torch.arange(len(weights)) if rows is None else rows.cpu()
        count = self.rollouts.mask[rows].sum()
        weighed = rows[(weights[rows] != 0).any(1).cpu()]
        kept = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        try:
            with without_dropout(self.model), torch.enable_grad():
                for part in weighed.split(self.batch_size) if len(weighed) else ():
                    some = self._take(part)
                    active = some.mask.bool()
                    hidden = final_states(self.model, some)[active]
                    logps = log_probs(hidden, some.completion_ids[active], self.head, some.temperature)
                    (-(weights[part.to(weights.device)][active] * logps).sum() / count).backward()
            return [
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                for parameter in self.parameters
            ]
        finally:
            for parameter, gradient in zip(self.parameters, kept, strict=True):
                parameter.grad = gradient

    def step(self, gradient: Sequence[torch.Tensor]) -> None:
        """
        One step of the optimizer, which stays: use it within [`UpdateProbe.restored`].

        Args:
            gradient (`Sequence[torch.Tensor]`):
                One for each of `parameters`.
        """
        for parameter, value in zip(self.parameters, gradient, strict=True):
            parameter.grad = value
        self.optimizer.step()

    @contextmanager
    def updated(self, weights: torch.Tensor, rows: torch.Tensor | None = None) -> Iterator[None]:
        """
        The model after one update, until the context ends.

        Args:
            weights (`torch.Tensor` of shape `(B, T)`):
                Weights of the tokens.
            rows (`torch.Tensor`, *optional*):
                Rollouts that make up the batch; all by default.
        """
        with self.restored():
            self.step(self.gradient(weights, rows))
            yield

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Undoes at its end whatever happens to weights, gradients, the optimizer, modes and random numbers."""
        optimized = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moving = dict.fromkeys([*self.parameters, *optimized])
        values = [(tensor, tensor.detach().clone()) for tensor in [*moving, *self.model.buffers()]]
        gradients = [(parameter, parameter.grad) for parameter in dict.fromkeys([*moving, *self.model.parameters()])]
        for parameter, _ in gradients:  # nothing is to follow an old one, or to add to it
            parameter.grad = None
        state = {
            parameter: {name: _copy(value) for name, value in entries.items()}
            for parameter, entries in self.optimizer.state.items()
        }
        groups = [
            {name: (value, _copy(value)) for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        modes = [(module, module.training) for module in self.model.modules()]
        python, numpy = random.getstate(), np.random.get_state()
        devices = sorted({parameter.device.index for parameter in self.parameters if parameter.device.type == "cuda"})
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            self.optimizer.state.clear()
            self.optimizer.state.update(state)
            for group, saved in zip(self.optimizer.param_groups, groups, strict=True):
                for name in group.keys() - saved.keys() - {"params"}:
                    del group[name]
                group.update({name: _put_back(*entry) for name, entry in saved.items()})
            for module, training in modes:
                module.training = training

    # Measurements

    def log_probs(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """
        Log-probabilities of the tokens by the model as it is now.

        Args:
            rows (`torch.Tensor`, *optional*):
                Rollouts; all by default.

        Returns:
            `torch.Tensor` of shape `(len(rows), T)`: 0 where the mask is.
        """
        return self._pass(self.rollouts if rows is None else self._take(rows))

    def shifts(self, variant: Variant | str) -> torch.Tensor:
        """The shift of each token by one update, of shape `(B, T)`; 0 where the mask is."""
        with self.updated(self.weights(variant)):
            return self.log_probs() - self.before

    def head_step(self, weights: torch.Tensor) -> torch.Tensor:
        """
        The change of the output layer's weight, of shape `(V, d)`, by one step of plain gradient descent in it alone.

        Args:
            weights (`torch.Tensor` of shape `(B, T)`):
                Weights of the tokens.
        """
        chosen = weights[self.active] / self.active.sum()
        gradient = head_gradient(self.hidden, self.token_ids, chosen, self.head, self.rollouts.temperature)
        return self.learning_rate * gradient

    def head_shifts(self, step: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """
        The shift of active tokens by a change of the output layer's weight, all hidden states held.

        Args:
            step (`torch.Tensor` of shape `(V, d)`):
                The change, see [`UpdateProbe.head_step`].
            places (`torch.Tensor` of shape `(K,)`, *optional*):
                Which of the active tokens; all by default.

        Returns:
            `torch.Tensor` of shape `(N,)` or `(K,)`.
        """
        hidden, token_ids = self.hidden, self.token_ids
        hidden, token_ids = (hidden, token_ids) if places is None else (hidden[places], token_ids[places])
        moved = self.head.moved(step)
        with torch.no_grad():
            after, before = (
                log_probs(hidden, token_ids, head, self.rollouts.temperature) for head in (moved, self.head)
            )
        return after - before

    def predicted_shifts(self, weights: torch.Tensor) -> torch.Tensor:
        """
        The shift of each active token that the kernel of the output layer predicts (Eq. 9 of
        [2605.08666](https://huggingface.co/papers/2605.08666)), of shape `(N,)`.

        Args:
            weights (`torch.Tensor` of shape `(B, T)`):
                Weights of the tokens.
        """
        step = self.head_step(weights)
        return predicted_shifts(self.hidden, self.token_ids, step, self.head, self.rollouts.temperature)

    def _take(self, rows: torch.Tensor) -> Rollouts:
        return self.rollouts.take(rows, states=None)

    @torch.no_grad()
    def _pass(self, rollouts: Rollouts, states: StateStore | None = None) -> torch.Tensor:
        parts = []
        with without_dropout(self.model):
            for rows in torch.arange(len(rollouts.mask)).split(self.batch_size):
                some = rollouts.take(rows, states=None)
                active = some.mask.bool()
                hidden = final_states(self.model, some)
                if states is not None:
                    states.add(hidden, some.mask)
                logps = log_probs(hidden[active], some.completion_ids[active], self.head, some.temperature)
                parts.append(torch.zeros_like(some.mask, dtype=logps.dtype).masked_scatter(active, logps))
        return torch.cat(parts)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _put_back(value: Any, before: Any) -> Any:
    """The value as it was; a tensor stays the same object, which others may hold too."""
    return value.copy_(before) if isinstance(value, torch.Tensor) else before
