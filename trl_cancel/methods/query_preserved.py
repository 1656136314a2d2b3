"""
Query-preserved mini-batching (section 4 of 2605.08666): all rollouts of a prompt go into the same optimizer step.

Shuffling single rollouts scatters a group over several optimizer steps. In each of them the advantages of the part
that is there no longer sum to zero, and the rest arrives after the weights have moved, so what the group shares cannot
cancel (Eq. 14).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..arguments import whole
from ..papers import CANCELLATION
from .method import ActiveMethod, Config, Method, Named, PaperEvaluation, Row, documented, whole_groups


def query_preserved_permutation(
    num_groups: int, group_size: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    A random order of rollouts in which groups stay together: the groups are permuted, not the rollouts.

    Cut into equal parts that are multiples of `group_size`, every part holds only whole groups.

    Args:
        num_groups (`int`):
            Number of groups.
        group_size (`int`):
            Number of rollouts of each.
        generator (`torch.Generator`, *optional*):
            Source of randomness; PyTorch's default one if not given.

    Returns:
        `torch.Tensor` of shape `(num_groups * group_size,)`: Indices of the rollouts in their new order.

    Raises:
        `ValueError`: If a number is not whole, or negative, or `generator` is none.

    Example:

    ```python
    >>> query_preserved_permutation(3, 2, torch.Generator().manual_seed(0))
    tensor([4, 5, 0, 1, 2, 3])
    ```
    """
    whole("num_groups", num_groups, 0)
    whole("group_size", group_size, 1)
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise ValueError(f"generator={generator!r} must be a torch.Generator, or None.")
    groups = torch.randperm(num_groups, generator=generator)
    return (groups.unsqueeze(1) * group_size + torch.arange(group_size)).flatten()


AUTO = "auto"
SPELT = {"true": True, "false": False, AUTO: AUTO}


@documented
@dataclass
class Settings:
    """
    > Parameters that control which rollouts meet in one optimizer step

    query_preserved (`str`, *optional*, defaults to `"auto"`):
        Put all rollouts of a prompt into the same optimizer step, instead of shuffling single rollouts. Acts where
        a generation batch is spread over several optimizer steps (`steps_per_generation` greater than
        `gradient_accumulation_steps`); otherwise batches are TRL's. With sizes that cannot keep groups whole, `"auto"`
        leaves batches to TRL, with a warning, and `True` is refused; `False` always leaves them to TRL. Source: section
        4 of [2605.08666](https://huggingface.co/papers/2605.08666).
    """

    # Text, for the command line, where it may also stand alone; `True` and `False` are kept as such.
    query_preserved: str = field(default=AUTO, metadata={"nargs": "?", "const": "true"})


_SAMPLED = {"greedy": False, "temperature": 0.6, "top_p": 0.95, "max_completion_length": 8192}


class QueryPreserved(Method):
    """Cuts generation batches group by group."""

    Settings = Settings
    switch = "query_preserved"
    neutral = {"query_preserved": True, "gradient_accumulation_steps": 4, "num_iterations": 2}
    row = Row(
        "docs/query_preserved.md",
        "query-preserved mini-batching",
        "all rollouts of a prompt share an optimizer step",
        "several optimizer steps a generation (`steps_per_generation` > `gradient_accumulation_steps`)",
        "nothing",
        "{query-preserved}",
        CANCELLATION.id,
    )
    named = {
        "grpo": Named({"query_preserved": False}, "TRL's GRPO, unchanged"),
        "query-preserved": Named(
            {"query_preserved": True}, "rollouts of a prompt share an optimizer step", CANCELLATION.id
        ),
    }
    evaluations = (
        PaperEvaluation(
            "cancellation", CANCELLATION.id, ("aime24", "aime25", "amc23"), {**_SAMPLED, "num_samples": 32}
        ),
        PaperEvaluation(
            "cancellation", CANCELLATION.id, ("math500", "minerva", "olympiad"), {**_SAMPLED, "num_samples": 1}
        ),
    )

    def is_on(self, args: Config) -> bool:
        return _fits(args) if args.query_preserved == AUTO else bool(args.query_preserved)

    def acts(self, args: Config) -> bool:
        return args.layout.is_split  # elsewhere batches are TRL's

    def in_force(self, args: Config) -> dict[str, Any]:
        return {self.switch: self.is_on(args) or not self.acts(args)}

    def check(self, args: Config) -> None:
        spelt = SPELT.get(str(args.query_preserved).lower())
        if spelt is None:
            raise ValueError(f"query_preserved={args.query_preserved!r} is not one of True, False, {AUTO!r}.")
        args.query_preserved = spelt
        if spelt is True and not _fits(args):
            is_needed = any(method.needs_whole_groups for method in args.methods)
            ways_out = [*args.layout.sizes_that_fit(), *([] if is_needed else ["query_preserved=False"])]
            raise ValueError(
                f"query_preserved=True cannot keep groups whole: {_why_torn(args)}. Set one of {', '.join(ways_out)}."
            )

    def warns(self, args: Config) -> Iterator[str]:
        if args.query_preserved == AUTO and not _fits(args):
            yield (
                f"Groups are torn between optimizer steps, as by TRL: {_why_torn(args)}. {whole_groups(args)} "
                "query_preserved=False has TRL's batches without this warning."
            )

    def active(self, args: Config) -> ActiveMethod | None:
        if not self.acts(args):  # on by default, and nothing that somebody has asked for
            return None
        does = "all rollouts of a prompt are in the same optimizer step"
        return ActiveMethod("Query-preserved mini-batching", does, ("query-preserved",), (CANCELLATION,))

    def explain(self, args: Config) -> Iterator[tuple[str, str]]:
        yield "Groups", self._groups(args)

    def _groups(self, args: Config) -> str:
        layout = args.layout
        if not layout.is_split:
            return (
                "Whole in every optimizer step, which holds all of each of its generation batches; batches are TRL's "
                "own."
            )
        if not self.is_on(args):
            why = "" if _fits(args) else f" Here {_why_torn(args)}."
            then = " Then query_preserved=True keeps them whole." if not (args.query_preserved or _fits(args)) else ""
            return (
                f"Torn: TRL shuffles single rollouts and spreads them over several optimizer steps.{why} "
                f"{whole_groups(args)}{then}"
            )
        also = "and every micro-batch" if layout.groups_fit_micro_batches else "but spread over its micro-batches"
        return f"Whole in every optimizer step {also}: {self.chosen(args)} shuffles prompts, not single rollouts."

    def leaks(self, args: Config) -> Iterator[str]:
        if args.tears_groups:
            yield f"Groups are torn between optimizer steps ({self.chosen(args)})."

    def cuts(self, args: Config) -> bool:
        return args.layout.is_split


def _fits(args: Config) -> bool:
    """Whether groups can stay whole with these sizes."""
    layout = args.layout
    return not layout.is_split or (layout.groups_are_local and layout.groups_fit_steps)


def _why_torn(args: Config) -> str:
    layout = args.layout
    if layout.groups_are_local:
        return (
            f"per_device_train_batch_size={args.per_device_train_batch_size} with gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps} and steps_per_generation={args.steps_per_generation} keeps "
            f"{layout.rollouts_together} rollouts of a process together in an optimizer step, which is not a "
            f"multiple of num_generations={args.num_generations}"
        )
    return (
        f"per_device_train_batch_size={args.per_device_train_batch_size} x steps_per_generation="
        f"{args.steps_per_generation} rollouts a process is not a multiple of num_generations="
        f"{args.num_generations}, so groups straddle the {layout.num_processes} processes"
    )
