"""Silence for what libraries say about each other."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


LIBRARIES = "transformers|trl|torch|accelerate|peft|datasets|importlib|<frozen"


@contextmanager
def quiet() -> Iterator[None]:
    """
    Hides the deprecation notes that these libraries address to each other, loading bars, and whatever asks for an
    optional package; everything else is shown.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=LIBRARIES)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # misses kernels that it can do without
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        yield
