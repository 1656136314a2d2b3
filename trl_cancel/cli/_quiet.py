"""Silence for what libraries say about each other."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """
    Hides the deprecation notes that transformers and TRL address to each other, loading bars, and whatever asks for an
    optional package; everything else is shown.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from transformers.utils import logging

        logging.disable_progress_bar()
        yield
