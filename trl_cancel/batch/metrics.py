"""Metrics over the micro-batches of an optimizer step and over processes, with one exchange a step."""

from collections.abc import Callable

import torch


class StepMetrics:
    """
    Collects means and extremes during an optimizer step.

    Nothing is copied off the device and nothing is communicated until [`StepMetrics.flush`].
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._largest: dict[str, list[torch.Tensor]] = {}

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

    def add_range(self, lowest: str, highest: str, values: torch.Tensor) -> None:
        """
        Adds values to a minimum and a maximum.

        Args:
            lowest (`str`):
                Name of the minimum. All processes must add the same names during a step.
            highest (`str`):
                Name of the maximum.
            values (`torch.Tensor`):
                Values of any shape; may be empty.
        """
        values = values.detach().float().flatten()
        nothing = values.new_full((1,), -torch.inf)
        self._largest.setdefault(highest, []).append(torch.cat([values, nothing]).amax())
        self._largest.setdefault(f"-{lowest}", []).append(torch.cat([-values, nothing]).amax())

    def flush(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """
        The metrics of everything added since the last call, on all processes; names without a value are left out.

        Args:
            gather (`Callable`):
                Joins the tensors of all processes along the first dimension.
        """
        means, extremes = sorted(self._sums), sorted(self._largest)
        if not means and not extremes:
            return {}
        rows = [torch.stack(self._sums[name]).sum(0) for name in means]
        rows += [torch.stack(self._largest[name]).amax().repeat(2) for name in extremes]
        gathered = gather(torch.stack(rows).unsqueeze(0))  # (processes, names, 2)
        totals, largest = gathered[:, : len(means)].sum(0).tolist(), gathered[:, len(means) :, 0].amax(0).tolist()
        self._sums.clear()
        self._largest.clear()
        metrics = {name: total / weight for name, (total, weight) in zip(means, totals, strict=True) if weight}
        for name, value in zip(extremes, largest, strict=True):
            if value > -torch.inf:
                metrics[name.removeprefix("-")] = -value if name.startswith("-") else value
        return metrics
