"""
The cancellation residual: how much of the push on shared tokens is left that the advantages do not justify.

Take one context of a group, a prefix of token ids together with the token that follows, and the rollouts that contain
it, good and bad ones. What they deserve to do to this token together, and what the update really does, are

    deserved = sum of A / sum of |A|        applied = sum of cA / sum of |cA|

with the coefficients c that multiply the advantage in the gradient. The residual |applied - deserved| is 0 if and only
if good and bad rollouts are weighted alike, whatever the weight. Where the whole group shares the prefix the
advantages sum to zero, and the residual is |sum of cA| / sum of |cA|.
"""

import torch

from ..arguments import floats, marks, shaped, single, whole_numbers


def prefix_ids(token_ids: torch.Tensor, mask: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """
    Numbers the contexts: two tokens get the same number if and only if they belong to the same group and all tokens up
    to and including them are the same. (A 64-bit hash of the prefix: two of a million contexts collide with
    probability 3e-8.)

    Args:
        token_ids (`torch.Tensor` of shape `(B, T)`):
            Token ids of the completions.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 for tokens, 0 for padding.
        group_ids (`torch.Tensor` of shape `(B,)`):
            Which rollouts share a prompt.

    Returns:
        `torch.Tensor` of shape `(B, T)` and type `int64`: The numbers, 0 for padding.
    """
    position = torch.arange(1, token_ids.size(1) + 1, device=token_ids.device)
    # A sum of hashes of (position, token) identifies a prefix, and a running sum is all prefixes at once.
    prefix = _scramble(_scramble(token_ids.long() + 1) + position).cumsum(1)
    return _scramble(prefix + _scramble(group_ids.long() + 1).unsqueeze(1)) * mask.long()


def same_prompt(group_ids: torch.Tensor, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor:
    """
    Numbers the prompts: two rollouts get the same number if and only if they belong to the same group and their prompts
    hold the same tokens. An environment may give the rollouts of a group prompts of their own. (A hash, as above.)

    Args:
        group_ids (`torch.Tensor` of shape `(B,)`):
            Which rollouts belong to the same group.
        prompt_ids (`torch.Tensor` of shape `(B, P)`):
            Token ids of the prompts.
        prompt_mask (`torch.Tensor` of shape `(B, P)`):
            1 for tokens, 0 for padding, however much there is of it.

    Returns:
        `torch.Tensor` of shape `(B,)` and type `int64`: The numbers.
    """
    position = prompt_mask.long().cumsum(1)
    prompt = (_scramble(_scramble(prompt_ids.long() + 1) + position) * prompt_mask.long()).sum(1)
    return _scramble(prompt + _scramble(group_ids.long() + 1))


def _scramble(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64, in wrapping 64-bit arithmetic."""
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)


def net_and_gross(values: torch.Tensor, index: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What the values of each context come to.

    Args:
        values (`torch.Tensor` of shape `(N,)`):
            Values of tokens.
        index (`torch.Tensor` of shape `(N,)`):
            Their contexts, from 0 to C - 1.
        count (`int`):
            Number of contexts C.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(C,)`: The sum of the values, and that of their magnitudes.
    """
    net, gross = (values.new_zeros(count).index_add_(0, index, part) for part in (values, values.abs()))
    return net, gross


def shared_contexts(
    token_ids: torch.Tensor, mask: torch.Tensor, group_ids: torch.Tensor, advantages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The contexts that good and bad rollouts of a group share, and what these deserve.

    Args:
        token_ids (`torch.Tensor` of shape `(B, T)`):
            Token ids of the completions of whole groups.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 for tokens, 0 for padding.
        group_ids (`torch.Tensor` of shape `(B,)`):
            Which rollouts share a prompt; where those of a group may differ in it, the numbers of [`same_prompt`].
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantages of the rollouts.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(B, T)`: The contexts, 0 for a token that is not shared by rollouts of
        both signs; and the deserved net push over gross push, between -1 and 1, in float32 or better; `nan` where an
        advantage is not finite.

    Raises:
        `ValueError`: If the shapes do not fit, or `token_ids` or `group_ids` are not whole numbers.
    """
    token_ids, group_ids = whole_numbers(token_ids=token_ids, group_ids=group_ids)
    (present,) = marks(mask=mask)
    (advantages,) = single(*floats(advantages=advantages))
    shaped(
        token_ids=(token_ids, "B T"), mask=(present, "B T"), group_ids=(group_ids, "B"), advantages=(advantages, "B")
    )
    contexts = prefix_ids(token_ids, present, group_ids)
    values = advantages.unsqueeze(1).expand_as(contexts)
    names, index = contexts.unique(return_inverse=True)
    net, gross = net_and_gross(values.flatten(), index.flatten(), len(names))
    # Signs are looked up: of sums that were added up in different orders none is exactly the other. What is nan may be
    # of either sign.
    up, down = (values.new_zeros(len(names), dtype=torch.bool) for _ in range(2))
    up[index[~(values <= 0)]] = True
    down[index[~(values >= 0)]] = True
    shared = (up & down)[index] & (contexts != 0)
    return contexts * shared, (net / gross)[index].where(shared, 0.0)


def shared_prefix_residual(
    pushes: torch.Tensor, contexts: torch.Tensor, deserved: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The cancellation residual of one update: over the tokens that good and bad rollouts of a group share, the mean of

    $$ \Big| \frac{\sum_i c_i A_i}{\sum_i |c_i A_i|} - \frac{\sum_i A_i}{\sum_i |A_i|} \Big| $$

    where i runs over the rollouts that contain the token behind the same prefix. It is 0 if they all carry the same
    coefficient, and at most 2. A rollout that is missing from the update counts with c = 0. Not from a paper: the
    condition is that of Eq. 2 of [2604.13088](https://huggingface.co/papers/2604.13088), extended to prefixes that
    only a part of the group shares.

    Args:
        pushes (`torch.Tensor` of shape `(N,)` or `(B, T)`):
            What the update does to each token: the coefficient of its \\( \nabla\log\pi \\), advantage included.
        contexts (`torch.Tensor` of the same shape):
            The tokens' contexts from [`shared_contexts`], 0 for tokens to leave out.
        deserved (`torch.Tensor` of the same shape):
            What the contexts deserve, from [`shared_contexts`].

    Returns:
        `tuple` of two scalar `torch.Tensor`: The residual, 0 if no token is shared, and `nan` if a push on a shared
        one is not finite; and the number of tokens it is the mean of.

    Raises:
        `ValueError`: If the shapes differ, or the contexts are not whole numbers.
    """
    pushes, deserved = single(*floats(pushes=pushes, deserved=deserved))
    (contexts,) = whole_numbers(contexts=contexts)
    shaped(pushes=(pushes, "..."), contexts=(contexts, "..."), deserved=(deserved, "..."))
    shared = contexts != 0
    names, index = contexts[shared].unique(return_inverse=True)
    net, gross = net_and_gross(pushes[shared], index, len(names))
    # Where nothing pushes, nothing is left.
    residual = torch.where(gross[index] == 0, 0.0, (net / gross)[index] - deserved[shared]).abs()
    return residual.sum() / shared.sum().clamp(min=1), shared.sum()
