"""Metrics over the micro-batches of an optimizer step and over processes, with one exchange a step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.logging import get_logger


logger = get_logger(__name__)


class Guard:
    """
    Metrics never end a run: where they cannot be taken they are left out from then on, with one warning.

    Args:
        what (`str`):
            The metrics, as the beginning of a sentence.
        source (`str`):
            What they are read off.
    """

    def __init__(self, what: str, source: str):
        self.what, self.source, self.is_off = what, source, False

    def leave_out(self, why: str, also: str = "") -> None:
        """Turns them off, with the reason, and what else is left out."""
        if not self.is_off:
            logger.warning(f"{self.what} {f'and {also} are' if also else 'is'} left out: {why}.")
        self.is_off = True

    def cannot_read(self, why: str) -> None:
        """Turns them off, with what is wrong with their source."""
        self.leave_out(f"{self.source} cannot be read ({why})")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Stands around what takes them."""
        try:
            yield
        except Exception as error:  # whatever a subclass has made of the batches
            self.cannot_read(f"{type(error).__name__}: {error}")


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

    def void(self, prefix: str) -> None:
        """Lets the metrics whose names begin so have no value in this step."""
        for name, sums in self._sums.items():
            if name.startswith(prefix):
                self._sums[name] = [torch.zeros_like(sums[0])]

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
