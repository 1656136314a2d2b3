"""Batching: which rollouts go into one optimizer step, as pure functions."""

from .balance import balanced_order, select_balanced_groups, without_variance
from .layout import BatchLayout
from .mini_batches import query_preserved_permutation


__all__ = [
    "BatchLayout",
    "balanced_order",
    "query_preserved_permutation",
    "select_balanced_groups",
    "without_variance",
]
