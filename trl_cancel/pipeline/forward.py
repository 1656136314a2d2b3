"""Forward passes over rollouts, beside those that TRL makes, and what is caught of all of them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate.logging import get_logger

from ..batch.rollouts import ABOUT_IMAGES, Rows
from ..batch.states import CPU_SHARE, GIB, LMHead, StateStore
from ..upstream.hooks import around
from ..upstream.trl import disable_gradient_checkpointing, unwrapped_for_generation
from .split import cut
from .token_credits import TokenCredits


logger = get_logger(__name__)
FORWARD = "_get_per_token_logps_and_entropies"
Forward = Callable[..., Any]


class Passes:
    """
    Passes of the policy.

    Args:
        trainer ([`~trl_cancel.CancelGRPOTrainer`]):
            The trainer.
        loss (`Callable`):
            TRL's loss, `loss(model, inputs)`, whose forward pass is made.
        credits ([`~trl_cancel.pipeline.token_credits.TokenCredits`]):
            The token credits, for which states and entropies are caught.
    """

    def __init__(self, trainer: Any, loss: Callable[[Any, Rows], Any], credits: TokenCredits):
        self.trainer, self.args, self.loss, self.credits = trainer, trainer.args, loss, credits
        self._head: LMHead | None = None

    @property
    def head(self) -> LMHead:
        """The output layer. All processes must ask for it the first time, in case the model is sharded."""
        if self._head is None:
            # As for generation: DeepSpeed ZeRO-3 prepares for the next pass to be like this one unless it is told.
            with unwrapped_for_generation(self.trainer.model_wrapped, self.trainer.accelerator, self.args) as model:
                self._head = LMHead.of(model)
        return self._head

    def logps(self, inputs: Rows, states: StateStore | None = None) -> torch.Tensor:
        """
        Log-probs now, by a pass without gradients and with the arguments that TRL's loss would give it.

        Args:
            inputs (`dict`):
                A micro-batch.
            states ([`~trl_cancel.batch.states.StateStore`], *optional*):
                Takes the hidden states.

        Returns:
            `torch.Tensor` of shape `(B, T)`.
        """
        return self._made(inputs, states, entropies=False)[0]

    def _made(
        self, inputs: Rows, states: StateStore | None, entropies: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs, and entropies where they are asked for."""

        def only(
            forward: Forward, model: Any, input_ids: Any, mask: Any, length: int, *args: Any, **kwargs: Any
        ) -> Any:
            kwargs = {**without_empty_images(kwargs), "compute_entropy": entropies}
            with self.caught(states, mask[:, -length:]):
                raise _ForwardDone(forward(model, input_ids, mask, length, *args, **kwargs)[:2])

        model, checkpointing = cast(Any, (self.trainer.model, self.args.gradient_checkpointing_kwargs))
        # Its dropout is not to change what is sampled and trained later.
        device = self.trainer.accelerator.device
        devices = [device] if device.type == "cuda" else []
        try:
            with (
                torch.random.fork_rng(devices),
                torch.no_grad(),
                disable_gradient_checkpointing(model, checkpointing),
                around(self.trainer, FORWARD, only),
            ):
                self.loss(model, inputs)
        except _ForwardDone as done:
            return done.found
        raise AssertionError("TRL's loss has made no forward pass")

    def over(
        self, batch: Rows, rows: torch.Tensor, states: StateStore | None, entropies: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Log-probs of some rollouts, and entropies where they are asked for, in pieces no larger than a micro-batch; a
        store takes the hidden states.
        """
        count = -(-len(rows) // self.args.layout.per_device_train_batch_size)
        while len(rows) % count:  # pieces are of one size
            count += 1
        made = [self._made(part, states, entropies) for part in cut(batch, rows, count)]
        logps, of_parts = zip(*made, strict=True)
        return torch.cat(logps), torch.cat(of_parts) if entropies else None

    def caught(self, states: StateStore | None, mask: torch.Tensor) -> AbstractContextManager[None]:
        """Lets a store, if there is one, take the hidden states of the passes made meanwhile."""
        if states is None:
            return nullcontext()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if not states.decided:
            width = model.config.get_text_config().hidden_size * model.dtype.itemsize
            rollouts = self.args.layout.generation_batch_per_process
            rollouts *= self.args.max_generation_rounds if self.args.selectors else 1  # all may be held at once
            size = torch.tensor(rollouts * mask.size(1) * width, device=mask.device)
            # All processes decide alike: where the model is sharded, they must make the same passes.
            states.reserve(int(self.trainer.accelerator.gather(size).max()))
            if not states.keeps:
                logger.warning_once(
                    f"The hidden states of a generation batch may take {size.item() / GIB:.2f} GiB, more than "
                    f"{CPU_SHARE} x state_cache_gib={self.args.state_cache_gib}, so they are computed again each time "
                    f"they are needed: {self._again()}."
                )
        return states.filled_by(model, mask)

    def _again(self) -> str:
        """How often states that are not kept are computed again."""
        each = [
            (type(credit).__name__, getattr(credit, "reads_states", "further forward passes"))
            for credit in self.credits.of_states
        ]
        return ", ".join(f"{passes} for {name}" for name, passes in each)

    @contextmanager
    def first_caught(self, store: StateStore) -> Iterator[None]:
        """Lets a store take what credits need of the first forward pass made meanwhile, and its log-probs."""

        def watched(
            forward: Forward, model: Any, input_ids: Any, mask: Any, length: int, *args: Any, **kwargs: Any
        ) -> Any:
            if store.logps is not None:
                return forward(model, input_ids, mask, length, *args, **kwargs)
            kwargs |= {"compute_entropy": True} if self.credits.need_entropies else {}
            with self.caught(store if self.credits.of_states else None, mask[:, -length:]):
                result = forward(model, input_ids, mask, length, *args, **kwargs)
            store.logps, store.entropies = result[:2]
            return result

        with around(self.trainer, FORWARD, watched):
            yield


def without_empty_images(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a pass; models want no images rather than 0, where no prompt has one."""
    pixels = arguments.get("pixel_values")
    if pixels is None or len(pixels):
        return arguments
    return {name: value for name, value in arguments.items() if name not in ABOUT_IMAGES}


class _ForwardDone(Exception):
    """Carries log-probs and entropies out of a loss of which nothing else is wanted."""

    def __init__(self, found: tuple[torch.Tensor, torch.Tensor | None]):
        self.found = found
