"""What is installed, in a form to paste into a report."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from ..version import __version__
from .precision import best_precision


PACKAGES = ("trl", "transformers", "peft", "accelerate", "datasets", "torch", "huggingface_hub", "math-verify")
ENGINES = ("vllm", "bitsandbytes", "deepspeed", "triton", "liger-kernel", "flash-attn", "kernels", "unsloth")


def report() -> Iterator[tuple[str, str]]:
    """Lines of a report, each with its topic."""
    yield "trl-cancel", __version__
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        yield package, _version(package) or "not installed"
    yield "Device", _device()
    yield "Precision", best_precision().reason
    found = [f"{engine} {_version(engine)}" for engine in ENGINES if _version(engine)]
    yield "Engines", ", ".join(found) or "none"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}"
    if torch.backends.mps.is_available():
        return "MPS"
    return f"CPU, {torch.get_num_threads()} threads"
