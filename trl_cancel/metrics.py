"""Averages over the micro-batches of an optimizer step and over processes, with one reduction a step."""

from collections.abc import Callable

import torch


class StepMeans:
    """
    Collects sums and counts during an optimizer step and turns them into means at its end.

    Nothing is copied off the device and nothing is communicated until [`StepMeans.flush`].
    """

    def __init__(self):
        self._sums: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """
        Adds values to a mean.

        Args:
            name (`str`):
                Name of the metric. All processes must add the same names during a step.
            values (`torch.Tensor`):
                Values of any shape.
            weights (`torch.Tensor`, *optional*):
                Weights of the values, of a shape that `values` broadcasts to; 1 each if not given.
        """
        weights = torch.ones_like(values) if weights is None else weights
        total = torch.stack([(values * weights).sum(), weights.expand_as(values * weights).sum()]).detach().float()
        self._sums.setdefault(name, []).append(total)

    def flush(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """
        The means over everything added since the last call, on all processes; names without weight are left out.

        Args:
            reduce (`Callable`):
                Sums a tensor over processes.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = reduce(torch.stack([torch.stack(self._sums[name]).sum(0) for name in names]))
        self._sums.clear()
        return {name: total / weight for name, (total, weight) in zip(names, totals.tolist(), strict=True) if weight}
