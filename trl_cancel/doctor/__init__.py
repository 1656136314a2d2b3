"""
Whether TRL still does what this package builds on: its assumptions, each tried on tiny models, offline.

The checks are the contract tests; `trl-cancel doctor` makes them where somebody has installed the package.
"""

from . import batches, card, losses, off
from .check import Check


CHECKS: list[Check] = [*off.CHECKS, *batches.CHECKS, *losses.CHECKS, *card.CHECKS]

__all__ = ["CHECKS", "Check"]
