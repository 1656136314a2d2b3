"""Diagnostics: what an update did to each token, as pure functions."""

from .residual import shared_contexts, shared_prefix_residual
from .shifts import Ratios, TokenShifts, token_shifts


__all__ = ["Ratios", "TokenShifts", "shared_contexts", "shared_prefix_residual", "token_shifts"]
