"""
The playground: a tiny model, its tokenizer and an endless supply of problems, embedded in the package.

Everything runs on it offline and in seconds. `CHECKPOINT` is a path for `from_pretrained`; [`data`](data.py) makes the
data sets and [`reward`](reward.py) scores the answers.
"""

from pathlib import Path


CHECKPOINT = Path(__file__).parent / "checkpoint"
# The name that stands for it wherever a model or a data set is asked for.
NAME = "playground"

__all__ = ["CHECKPOINT", "NAME"]
