"""Batching: which rollouts go into one optimizer step, as pure functions."""

from .batch.groups import without_variance
from .batch.layout import BatchLayout
from .methods.query_preserved import query_preserved_permutation
from .methods.reward_balance import balanced_order, select_balanced_groups


__all__ = [
    "BatchLayout",
    "balanced_order",
    "query_preserved_permutation",
    "select_balanced_groups",
    "without_variance",
]
