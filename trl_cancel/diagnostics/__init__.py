"""Diagnostics: what an update did to each token, as pure functions."""

from .residual import shared_contexts, shared_prefix_residual


__all__ = ["shared_contexts", "shared_prefix_residual"]
