"""
The playground: tiny models, their tokenizers and an endless supply of problems, embedded in the package.

Everything runs on it offline and in seconds. `CHECKPOINT` is a path for `from_pretrained`; [`data`](data.py) makes the
data sets and [`reward`](reward.py) scores the answers. `CHECKPOINTS` holds the models of all tasks, by name.
"""

from pathlib import Path


CHECKPOINT = Path(__file__).parent / "checkpoint"
# The names that stand for them wherever a model or a data set is asked for.
NAME, VARIED = "playground", "playground-varied"
RICH = "playground-rich"  # a task without an embedded model, for a GPU
CHECKPOINTS = {NAME: CHECKPOINT, VARIED: CHECKPOINT.with_name("varied_checkpoint")}

__all__ = ["CHECKPOINT", "CHECKPOINTS", "NAME", "RICH", "VARIED"]
