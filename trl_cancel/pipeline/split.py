"""A generation batch cut into micro-batches, group by group."""

from typing import Any

import torch

from ..batch.rollouts import Rows, generator_of, take_rows
from ..upstream.trl import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid
from .rounds import Chosen


def cut(batch: Rows, rows: torch.Tensor, count: int) -> list[Rows]:
    """
    Some rollouts of a batch, cut into parts of one size.

    Args:
        batch (`dict`):
            The batch.
        rows (`torch.Tensor` of shape `(N,)`):
            The rollouts, in the order in which they fill the parts.
        count (`int`):
            Number of parts.
    """
    parts: list[Any] = split_tensor_dict(take_rows(split_pixel_values_by_grid(batch), rows), count)
    return [unsplit_pixel_values_by_grid(part) for part in parts]


def order_of_groups(num_groups: int, generator: torch.Generator | None) -> torch.Tensor:
    """The groups in random order."""
    return torch.randperm(num_groups, generator=generator)


def whole_group_batches(batch: Rows, args: Any, chosen: Chosen | None = None) -> list[Rows]:
    """
    The micro-batches of a generation batch whose groups stand in a row.

    Args:
        batch (`dict`):
            The batch.
        args ([`~trl_cancel.CancelGRPOConfig`]):
            The configuration.
        chosen ([`~trl_cancel.pipeline.rounds.Chosen`], *optional*):
            What is known of its groups, where they were chosen: the methods that chose may arrange them.
    """
    layout = args.layout
    num_groups = layout.generation_batch_per_process // layout.num_generations
    # Where TRL's order would do too, later rollouts are to be sampled as if it had been kept.
    generator = None if layout.is_split else generator_of(batch["completion_ids"])
    order = order_of_groups(num_groups, generator)
    if chosen is not None:
        for selector in args.selectors:
            order = selector.arranged(order, chosen.groups, chosen.choice)
    rows = (order.unsqueeze(1) * layout.num_generations + torch.arange(layout.num_generations)).flatten()
    return cut(batch, rows, layout.steps_per_generation)
