"""The order of the prompts, and fresh ones for further rounds of generation."""

import random
from collections.abc import Callable, Iterator, Sized
from itertools import count, islice
from typing import Any

from datasets import IterableDataset
from torch.utils.data import Sampler
from transformers import TrainerCallback


class FreshPrompts(TrainerCallback):
    """
    A second stream over the training data, in an order of its own that is the same on every process. Checkpoints hold
    its position, and a resumed run takes it up from there.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The training data. It is shuffled, a stream with a buffer.
        seed (`int`):
            Seed of the order.
    """

    SAVED_AS = "trl_cancel.FreshPrompts"

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed = dataset, seed
        self._start(0)

    def draw(self, number: int) -> list[dict[str, Any]]:
        """
        The next rows; after the last one, all again in another order.

        Args:
            number (`int`):
                How many.

        Raises:
            `ValueError`: If there is none.
        """
        self.drawn += number
        return list(islice(self._rows, number))

    def _start(self, drawn: int) -> None:
        self.drawn = drawn
        self._rows = islice(self._all_rows(), drawn, None)

    def _all_rows(self) -> Iterator[dict[str, Any]]:
        for epoch in count():
            empty = True
            for row in self._epoch(epoch):
                empty = False
                yield row
            if empty:
                raise ValueError("train_dataset is empty, so there are no prompts to generate from.")

    def _epoch(self, epoch: int) -> Iterator[dict[str, Any]]:
        order = random.Random(f"fresh prompts {self.seed} {epoch}")
        if isinstance(self.dataset, IterableDataset):
            return iter(self.dataset.shuffle(seed=order.randrange(2**32)))
        rows = len(self.dataset)
        return (self.dataset[row] for row in order.sample(range(rows), rows))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start(state.stateful_callbacks.get(self.SAVED_AS, {}).get("attributes", {}).get("drawn", 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.stateful_callbacks[self.SAVED_AS] = {"args": {}, "attributes": {"drawn": self.drawn}}


class PromptSampler(Sampler[int]):
    """
    The order of the prompts of each epoch, as TRL's sampler draws it, for runs that draw fresh ones beside it. Unlike
    TRL's it is a function of the number of the epoch, so that a run that resumes in a later epoch goes on with that
    epoch's order.

    Args:
        of_trl (`Callable`):
            Makes TRL's sampler anew, which draws the same orders each time.
    """

    def __init__(self, of_trl: Callable[[], Any]):
        self.of_trl, self.epoch = of_trl, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch with its number."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        sampler = self.of_trl()
        for _ in range(self.epoch):
            next(iter(sampler), None)  # draws the order of an epoch before
        yield from sampler

    def __len__(self) -> int:
        sampler: Sized = self.of_trl()
        return len(sampler)
