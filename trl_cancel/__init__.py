"""
trl-cancel: TRL's `GRPOTrainer` with the cancellation that GRPO relies on repaired, sharpened and shown.

In GRPO every token of a rollout carries the rollout's advantage. Tokens that good and bad rollouts of one prompt share
get opposite pushes that should cancel, leaving credit for what made the difference.
"""

from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .logs import log_plainly
from .upstream.versions import check_trl_version
from .version import __version__ as __version__


if TYPE_CHECKING:
    from .batch.protocol import Credit
    from .batch.rollouts import Rollouts
    from .configs import CancelGRPOConfig, DelTAConfig, DFPOConfig, GRPOFixConfig, NTHRConfig
    from .configs import CancelGRPOConfig as GRPOConfig
    from .diagnostics.callbacks import TokenShiftCallback
    from .explanation import explain
    from .running.precision import Precision, best_precision
    from .trainers import CancelGRPOTrainer, DelTATrainer, DFPOTrainer, GRPOFixTrainer, NTHRTrainer
    from .trainers import CancelGRPOTrainer as GRPOTrainer

# Where each public name lives. Loaded on first use: the command line and the pure functions do not wait for TRL.
_HOME = {
    "CancelGRPOConfig": ("config", "CancelGRPOConfig"),
    "CancelGRPOTrainer": ("trainer", "CancelGRPOTrainer"),
    "Credit": ("batch.protocol", "Credit"),
    "DelTAConfig": ("configs", "DelTAConfig"),
    "DelTATrainer": ("trainers", "DelTATrainer"),
    "DFPOConfig": ("configs", "DFPOConfig"),
    "DFPOTrainer": ("trainers", "DFPOTrainer"),
    "GRPOConfig": ("config", "CancelGRPOConfig"),
    "GRPOFixConfig": ("configs", "GRPOFixConfig"),
    "GRPOFixTrainer": ("trainers", "GRPOFixTrainer"),
    "GRPOTrainer": ("trainer", "CancelGRPOTrainer"),
    "NTHRConfig": ("configs", "NTHRConfig"),
    "NTHRTrainer": ("trainers", "NTHRTrainer"),
    "Precision": ("running.precision", "Precision"),
    "Rollouts": ("batch.rollouts", "Rollouts"),
    "TokenShiftCallback": ("diagnostics.callbacks", "TokenShiftCallback"),
    "best_precision": ("running.precision", "best_precision"),
    "explain": ("explanation", "explain"),
}

__all__ = [
    "CancelGRPOConfig",
    "CancelGRPOTrainer",
    "Credit",
    "DFPOConfig",
    "DFPOTrainer",
    "DelTAConfig",
    "DelTATrainer",
    "GRPOConfig",
    "GRPOFixConfig",
    "GRPOFixTrainer",
    "GRPOTrainer",
    "NTHRConfig",
    "NTHRTrainer",
    "Precision",
    "Rollouts",
    "TokenShiftCallback",
    "best_precision",
    "explain",
]


check_trl_version(metadata.version("trl"))  # before anything of it is imported
log_plainly(__name__, Path(__file__).parent)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(import_module(f".{module}", __name__), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
