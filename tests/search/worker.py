"""Searches in this process, or in all processes of a launch: `python -m tests.search.worker SEED FIRST END FOLDER SHRINK`."""

import gc
import logging
import os
import pickle
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from .runs import PROCESSES
from .search import TRAINS, Outcome, check, smallest
from .settings import draw
from .standins import MODELS, model_folder


def quiet_and_quick() -> None:
    """One thread, no messages, and a garbage collection that looks at a run's own objects alone."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    gc.collect()
    gc.freeze()


def search(
    seed: Any, indices: Iterator[int] | range, shrink: int = 0
) -> Iterator[tuple[int, Outcome, dict[str, tuple[dict[str, Any], str]]]]:
    """
    Draws and checks configurations.

    Args:
        seed (`Any`):
            Seed of the search.
        indices (`Iterator[int]` or `range`):
            Numbers of the configurations.
        shrink (`int`, *optional*, defaults to `0`):
            How many failures of each promise are brought to their smallest settings.

    Returns:
        `Iterator[tuple]`: Number, outcome, and for each broken promise the smallest settings and what was found there.
    """
    shrunk: Counter[str] = Counter()
    for index in indices:
        outcome, least = check(draw((seed, index), PROCESSES)), {}
        for promise in outcome.broken:
            if shrunk[promise] < shrink:
                least[promise] = smallest(outcome.settings, promise)
                shrunk[promise] += 1
        yield index, outcome, least


def main() -> None:
    seed, first, end, folder, shrink = (
        sys.argv[1],
        int(sys.argv[2]),
        int(sys.argv[3]),
        Path(sys.argv[4]),
        int(sys.argv[5]),
    )
    quiet_and_quick()
    for model in MODELS:
        model_folder(model)  # before there are processes, of which only the first would save it
    rank = int(os.environ.get("RANK", 0))
    for index, outcome, least in search(seed, range(first, end), shrink):
        if rank == 0:
            unfinished = folder / f"{index}.unfinished"
            unfinished.write_bytes(pickle.dumps((outcome, least)))
            unfinished.rename(folder / f"{index}.pickle")
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo's may abort the process while the interpreter is being taken down


if __name__ == "__main__":
    main()


__all__ = ["TRAINS", "main", "quiet_and_quick", "search"]
