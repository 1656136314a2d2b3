"""Weights that are not finite: told by name where sampling or a loss fails for them, and not looked at elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor


class WeightsError(ValueError):
    """The weights of the model hold `nan` or infinite values, so it computes nothing."""


@contextmanager
def weights_looked_at(model: Any) -> Iterator[None]:
    """
    Where sampling fails meanwhile, looks whether the weights of the model are to blame.

    Args:
        model ([`~torch.nn.Module`]):
            The model that samples.

    Raises:
        [`WeightsError`]: If they are.
    """
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" in str(error):  # that of `torch.multinomial`
            check_weights(model, error)
        if "device-side assert" in str(error):  # after which a GPU can be asked nothing
            error.add_note(
                "If a line above speaks of a probability tensor: the weights of the model hold nan or infinite values, or "
                "it overflows in its precision."
            )
        raise


@torch.no_grad()
def check_weights(model: Any, cause: BaseException | None = None) -> None:
    """
    Refuses weights that are not finite. Of a sharded model each process looks at its part.

    Args:
        model ([`~torch.nn.Module`]):
            The model.
        cause (`BaseException`, *optional*):
            What they have led to.

    Raises:
        [`WeightsError`]: Names the first of them.
    """
    for name, weight in model.named_parameters():
        weight = weight.to_local() if isinstance(weight, DTensor) else weight
        # The least and the most, since a mask of all would take memory that may be scarce.
        if not weight.is_floating_point() or not weight.numel():
            continue
        weight = weight.float() if weight.dtype.itemsize == 1 else weight
        if not torch.stack(weight.aminmax()).isfinite().all():
            raise WeightsError(
                f"The weights of {type(model).__name__} are not finite: {name} holds nan or infinite values. Load other "
                "weights; if they became so in training, go on from a checkpoint before, with a smaller learning_rate or "
                "in another precision."
            ) from cause
