"""
Query-preserved mini-batching (section 4 of 2605.08666): all rollouts of a prompt go into the same optimizer step.

Shuffling single rollouts scatters a group over several optimizer steps. In each of them the advantages of the part
that is there no longer sum to zero, and the rest arrives after the weights have moved, so what the group shares cannot
cancel (Eq. 14).
"""

import torch

from ..arguments import whole


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
