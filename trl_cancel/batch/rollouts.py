"""One scored generation batch as the methods see it."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _silent(name: str, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
    pass


class _NotAskedFor:
    """Stands for what only credits find that ask for it, and says so when it is used."""

    def __init__(self, name: str, asks: str = "needs_states"):
        self._name, self._asks = name, asks

    def __getitem__(self, rows: Any) -> Any:
        raise ValueError(
            f"rollouts.{self._name} is there only for credits that ask for it. Set {self._asks} = True in the class of "
            "your credit."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]


@dataclass(frozen=True)
class Rollouts:
    """
    The scored generation batch of one process, in the order in which it was generated: the rollouts of one prompt
    stand in a row. Shapes: B rollouts, G rollouts a prompt, T completion tokens, P prompt tokens, F reward functions.

    Args:
        prompt_ids (`torch.Tensor` of shape `(B, P)`):
            Token ids of the prompts, padded on the left.
        prompt_mask (`torch.Tensor` of shape `(B, P)`):
            1 for the tokens of the prompts, 0 for padding.
        completion_ids (`torch.Tensor` of shape `(B, T)`):
            Token ids of the completions, padded on the right.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 for the tokens that the loss counts: no padding, no tool results, no completion that was masked for
            being truncated.
        advantages (`torch.Tensor` of shape `(B,)`):
            TRL's advantages, after scaling and before any credit.
        group_ids (`torch.Tensor` of shape `(B,)`):
            Which rollouts share a prompt: numbers that are unique over all processes.
        rewards (`torch.Tensor` of shape `(B, F)`):
            The reward functions' values, not weighted; `nan` where a function returned `None`.
        reward_names (`list[str]`):
            Names of the columns of `rewards`.
        examples (`list[dict]` of length B):
            The data set's row behind each rollout: all its columns.
        num_generations (`int`):
            G, the rollouts a prompt.
        old_logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            Log-probabilities under the policy that sampled, at its temperature: where TRL computes them, and always
            for credits that set `needs_states = True`.
        states (`torch.Tensor` of shape `(B, T, d)` or [`~trl_cancel.batch.states.StateStore`], *optional*):
            Last hidden states, the ones that predict each token, for credits that set `needs_states = True`. They may
            be kept in pieces, so take the states of some rollouts at a time: `states[i:j]` has shape `(j - i, T, d)`.
        head ([`~trl_cancel.batch.states.LMHead`], *optional*):
            The output layer that belongs to `states`.
        entropies (`torch.Tensor` of shape `(B, T)`, *optional*):
            Entropies, in nats, of the distributions that the tokens were drawn from, at the temperature of the policy,
            for credits that set `needs_entropies = True`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the policy, by which logits are divided.
        reduce (`Callable`, *optional*):
            Sums a tensor over all processes. Does nothing in a single process.
        log (`Callable`, *optional*):
            `log(name, values, weights)` adds to a metric of this optimizer step, a mean over all processes. All
            processes must log the same names.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    group_ids: torch.Tensor
    rewards: torch.Tensor
    reward_names: list[str]
    examples: list[dict[str, Any]]
    num_generations: int
    old_logps: Any = None
    states: Any = field(default=_NotAskedFor("states"), repr=False)
    head: Any = field(default=_NotAskedFor("head"), repr=False)
    entropies: Any = field(default=_NotAskedFor("entropies", "needs_entropies"), repr=False)
    temperature: float = 1.0
    reduce: Callable[[torch.Tensor], torch.Tensor] = field(default=_identity, repr=False)
    log: Callable[..., None] = field(default=_silent, repr=False)

    @property
    def lengths(self) -> torch.Tensor:
        """Number of tokens of each rollout that the loss counts, of shape `(B,)`."""
        return self.mask.sum(-1)

    def by_group(self, tensor: torch.Tensor) -> torch.Tensor:
        """
        Folds a tensor of one row a rollout into groups: `(B, ...)` becomes `(B/G, G, ...)`.

        Raises:
            `ValueError`: If this process holds parts of groups.
        """
        rows = tensor.size(0)
        if rows % self.num_generations:
            raise ValueError(f"{rows} rollouts do not fold into groups of num_generations={self.num_generations}.")
        return tensor.unflatten(0, (-1, self.num_generations))

    def take(self, index: torch.Tensor, **changes: Any) -> "Rollouts":
        """
        Some of the rollouts.

        Args:
            index (`torch.Tensor` of shape `(N,)`):
                Rollouts to pick, in their new order.
            **changes:
                Fields with new values, one of which must be `states` if these rollouts have any.
        """
        rows = {name: value for name, value in vars(self).items() if name not in ("reward_names", *changes)}
        return replace(self, **take_rows(rows, index), **changes)


def generator_of(token_ids: torch.Tensor) -> torch.Generator:
    """
    Random numbers of their own: another stream for other tokens and another seed of the run, and none taken from the
    stream that samples and shuffles, so that a run stays comparable with one that does not need them.

    Args:
        token_ids (`torch.Tensor`):
            The tokens at hand.
    """
    return torch.Generator().manual_seed(torch.initial_seed() % 2**32 ^ zlib.crc32(token_ids.cpu().numpy().tobytes()))


def as_many_at_random(selected: torch.Tensor, among: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    A control of a selection: as many places of each row as it selects, drawn at random.

    Args:
        selected (`torch.Tensor` of shape `(N, M)` and type `bool`):
            The selection.
        among (`torch.Tensor` of shape `(N, M)` and type `bool`):
            Places that may be drawn, at least as many.
        generator (`torch.Generator`):
            Source of randomness.

    Returns:
        `torch.Tensor` of shape `(N, M)` and type `bool`.
    """
    order = torch.rand(selected.shape, generator=generator).to(selected.device).masked_fill(~among, 2.0)
    return order.argsort(1).argsort(1) < selected.sum(1, keepdim=True)


# A batch as TRL hands it round: a dictionary of tensors and lists whose first dimension runs over the rollouts, with
# scalars and `None` in between.
Rows = dict[str, Any]


def take_rows(batch: Rows, index: torch.Tensor) -> Rows:
    """
    Picks rollouts out of a batch.

    Args:
        batch (`dict`):
            Batch of B rollouts.
        index (`torch.Tensor` of shape `(N,)`):
            Rollouts to pick, in their new order.

    Returns:
        `dict`: The batch of N rollouts; scalars and `None` are kept as they are.
    """

    def pick(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value[index.to(value.device)]
        if isinstance(value, list):
            return [value[i] for i in index.tolist()]
        return value

    return {name: pick(value) for name, value in batch.items()}


def of_rollouts(batch: Rows) -> torch.Tensor:
    """The advantage of each rollout, of shape `(B,)`: where an override gives one a token, their mean over its tokens."""
    advantages = batch["advantages"]
    if advantages.dim() == 1:
        return advantages
    mask = loss_mask(batch)
    return (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)


def silenced(advantages: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Advantages of shape `(B,)` or `(B, T)` with 0 for some rollouts, `rows` of shape `(B,)` and type `bool`."""
    return advantages.masked_fill(rows if advantages.dim() == 1 else rows.unsqueeze(1), 0)


def loss_mask(rows: Rows) -> torch.Tensor:
    """1 for the tokens that the loss counts, of shape `(B, T)`."""
    mask = rows["completion_mask"]
    return mask * rows["tool_mask"] if "tool_mask" in rows else mask


# Entries of prompts and of prompts and completions together; others with a value for each token are of completions.
OF_PROMPTS = ("prompt_ids", "prompt_mask")
OF_BOTH = ("token_type_ids", "mm_token_type_ids")
OF_IMAGES = ("pixel_values", "pixel_attention_mask")
# What else tells of them.
ABOUT_IMAGES = (*OF_IMAGES, "image_grid_thw", "image_sizes", "image_position_ids", "spatial_shapes")
# What stands on padding where it is not 0; `None` is the padding token.
PADDING: dict[str, int | None] = {
    "prompt_ids": None,
    "completion_ids": None,
    "tool_mask": 1,
    "importance_sampling_ratio": 1,
}


def join_rows(batches: Sequence[Rows], pad_token_id: int) -> Rows:
    """
    Rollouts of several batches as one, padded to one length: prompts on the left, completions on the right.

    Args:
        batches (`Sequence` of `dict`):
            Batches. Entries that tell of images may be missing where there is none.
        pad_token_id (`int`):
            Token that pads.

    Returns:
        `dict`: The batch; scalars are those of the first, and pixels a list of one tensor a rollout.

    Raises:
        `ValueError`: If an entry is missing or of shapes that cannot be put together.
    """
    lengths = [(batch["prompt_ids"].size(1), batch["completion_ids"].size(1)) for batch in batches]
    longest = [max(column) for column in zip(*lengths, strict=True)]

    def joined(name: str) -> Any:
        values = [_entry(name, batch, batches) for batch in batches]
        if name in OF_IMAGES:
            return _of_one_size(values)
        if isinstance(values[0], list):
            return [item for value in values for item in value]
        if not isinstance(values[0], torch.Tensor) or values[0].dim() == 0:
            return values[0]
        if len({value.shape[1:] for value in values}) > 1:
            filler = PADDING.get(name, 0)
            filler = pad_token_id if filler is None else filler
            values = [
                _widened(value, *sides, filler) for value, sides in zip(values, missing(name, values), strict=True)
            ]
        return torch.cat(values)

    def missing(name: str, values: list[torch.Tensor]) -> list[tuple[int, int]]:
        """For each batch, columns to add on the left and on the right."""
        widths = [value.size(1) for value in values]
        left, right = name in OF_PROMPTS + OF_BOTH, name not in OF_PROMPTS
        if widths != [left * prompt + right * completion for prompt, completion in lengths]:
            shapes = [tuple(value.shape) for value in values]
            raise ValueError(f"Rounds of generation have {name} of shapes {shapes}, which cannot be put together.")
        return [(left * (longest[0] - prompt), right * (longest[1] - completion)) for prompt, completion in lengths]

    return {name: joined(name) for name in {name: None for batch in batches for name in batch}}


def _entry(name: str, batch: Rows, batches: Sequence[Rows]) -> Any:
    """An entry of a batch, or what stands for it in one without images."""
    if name in batch:
        return batch[name]
    rows = len(batch["completion_ids"])
    example = next(other[name] for other in batches if name in other)
    if isinstance(example, list):
        return [example[0][:0] if isinstance(example[0], torch.Tensor) else 0] * rows
    if name in OF_BOTH:
        return example.new_zeros(rows, batch["prompt_ids"].size(1) + batch["completion_ids"].size(1))
    hint = " Give all prompts images, or none." if name in ABOUT_IMAGES else ""
    raise ValueError(f"Only some rounds of generation have {name}, so their rollouts cannot be put together.{hint}")


def _of_one_size(values: Sequence[Any]) -> list[torch.Tensor]:
    """
    Pixels of several batches, each a list of one tensor a rollout or a tensor of one row a rollout. Those that a
    processor has padded to the largest images, or to the most of them, of each batch are padded to those of all.
    """
    rollouts = [rows for value in values for rows in (value if isinstance(value, list) else value.split(1))]
    size = [max(lengths) for lengths in zip(*(rows.shape[1:] for rows in rollouts), strict=True)]

    def padded(rows: torch.Tensor) -> torch.Tensor:
        gaps = [most - length for most, length in zip(size, rows.shape[1:], strict=True)]
        widths = [width for gap in reversed(gaps) for width in (0, gap)]
        return torch.nn.functional.pad(rows, widths) if any(gaps) else rows

    return [padded(rows) for rows in rollouts]


def _widened(value: torch.Tensor, left: int, right: int, filler: int) -> torch.Tensor:
    widths = [0, 0] * (value.dim() - 2) + [left, right]
    return torch.nn.functional.pad(value, widths, value=filler)
