"""What every test needs: one thread a process, no network, and warnings that count."""

import os
import signal


# Set before PyTorch is imported: several threads on shared cores mostly wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import hypothesis
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from trl_cancel.playground.tokenizer import build_tokenizer
from trl_cancel.playground.warm_start import build_model

from .runs import TINY


torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that was started in the background ignores it
# The suite tries the same examples each time; a search tries others, and many.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps its state in class attributes; one test's settings must not reach the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a model of a few thousand random parameters, whose answers are noise."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, **TINY, initializer_range=0.4)  # peaked enough that rollouts share prefixes
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
