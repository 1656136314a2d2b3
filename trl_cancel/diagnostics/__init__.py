"""Diagnostics: what an update did to each token."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .blame import blame_by_place, net_pushes, token_places
    from .callbacks import TokenShiftCallback
    from .coupling import coupling_kernel, head_gradient, predicted_shifts, prediction_errors, sign_agreement
    from .displacement import gwhes, likelihood_displacement, top_k_overlap
    from .energy import energy_by_frequency, gradient_asymmetry, jitter2, output_row_energy
    from .probing.probe import UpdateProbe
    from .probing.sampling import sample_rollouts
    from .probing.values import TokenValues, counterfactual_value, token_values
    from .probing.variants import Variant
    from .residual import shared_contexts, shared_prefix_residual
    from .shifts import Ratios, TokenShifts, token_shifts

# Where each public name lives. Loaded on first use: the trainer takes a few functions, the probe takes the trainer's.
_HOME = {
    "blame": ("blame_by_place", "net_pushes", "token_places"),
    "callbacks": ("TokenShiftCallback",),
    "coupling": ("coupling_kernel", "head_gradient", "predicted_shifts", "prediction_errors", "sign_agreement"),
    "displacement": ("gwhes", "likelihood_displacement", "top_k_overlap"),
    "energy": ("energy_by_frequency", "gradient_asymmetry", "jitter2", "output_row_energy"),
    "probing.probe": ("UpdateProbe",),
    "residual": ("shared_contexts", "shared_prefix_residual"),
    "probing.sampling": ("sample_rollouts",),
    "shifts": ("Ratios", "TokenShifts", "token_shifts"),
    "probing.values": ("TokenValues", "counterfactual_value", "token_values"),
    "probing.variants": ("Variant",),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Ratios",
    "TokenShiftCallback",
    "TokenShifts",
    "TokenValues",
    "UpdateProbe",
    "Variant",
    "blame_by_place",
    "counterfactual_value",
    "coupling_kernel",
    "energy_by_frequency",
    "gradient_asymmetry",
    "gwhes",
    "head_gradient",
    "jitter2",
    "likelihood_displacement",
    "net_pushes",
    "output_row_energy",
    "predicted_shifts",
    "prediction_errors",
    "sample_rollouts",
    "shared_contexts",
    "shared_prefix_residual",
    "sign_agreement",
    "token_places",
    "token_shifts",
    "token_values",
    "top_k_overlap",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
