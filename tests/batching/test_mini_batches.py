"""Query-preserved mini-batching: the permutation, and what reaches each optimizer step of a run."""

import pytest
import torch
import trl
from hypothesis import given
from hypothesis import strategies as st

from tests.runs import build
from trl_cancel import CancelGRPOTrainer
from trl_cancel.batching import query_preserved_permutation
from trl_cancel.doctor.batches import micro_batches
from trl_cancel.playground.data import load_prompts


@given(num_groups=st.integers(1, 20), group_size=st.integers(1, 9), seed=st.integers(0, 1000))
def test_permutation_moves_whole_groups(num_groups, group_size, seed):
    generator = torch.Generator().manual_seed(seed)
    order = query_preserved_permutation(num_groups, group_size, generator)
    assert sorted(order.tolist()) == list(range(num_groups * group_size))
    for group in order.view(num_groups, group_size).tolist():
        assert group == list(range(group[0], group[0] + group_size))
        assert group[0] % group_size == 0


def test_every_order_of_groups_is_as_likely():
    generator = torch.Generator().manual_seed(0)
    orders = [tuple(query_preserved_permutation(3, 2, generator)[::2].tolist()) for _ in range(6000)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert min(counts) > 850, "1000 expected of each, standard deviation 29"


def test_seed_decides():
    def permute(seed):
        return query_preserved_permutation(8, 4, torch.Generator().manual_seed(seed)).tolist()

    assert permute(1) == permute(1) != permute(2)


def groups_by_step(model, trainer, accumulation, **settings):
    """For each optimizer step, how many rollouts of each group it holds; groups are numbered over the run."""
    steps_per_generation = 4 * accumulation
    seen = micro_batches(
        model,
        trainer,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=steps_per_generation,
        max_steps=8,
        **settings,
    )
    steps = []
    for first in range(0, len(seen), accumulation):
        tags = torch.cat([batch["tag"] for batch in seen[first : first + accumulation]])
        assert all(
            (batch["tag_rows"] == batch["tag"].unsqueeze(1)).all() for batch in seen[first : first + accumulation]
        )
        steps.append(torch.bincount(tags // 4, minlength=4 * accumulation).tolist())
    assert len(steps) == 8
    return steps


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("iterations", [1, 2])
def test_whole_groups_in_every_optimizer_step(tiny_model, accumulation, iterations):
    """With steps_per_generation four times the accumulation, TRL tears groups and this package does not."""
    ours = groups_by_step(tiny_model, CancelGRPOTrainer, accumulation, num_iterations=iterations)
    theirs = groups_by_step(tiny_model, trl.GRPOTrainer, accumulation, num_iterations=iterations)
    assert all(set(step) <= {0, 4} for step in ours)
    assert not any(set(step) <= {0, 4} for step in theirs)
    for steps in (ours, theirs):  # either way every rollout is used once an iteration
        for first in range(0, 8, 4):
            assert [sum(counts) for counts in zip(*steps[first : first + 4], strict=True)] == [4] * 4 * accumulation
    assert ours[:4] != ours[4:] or iterations == 2, "groups are shuffled"


def test_whole_groups_in_micro_batches_where_they_fit(tiny_model):
    seen = micro_batches(
        tiny_model,
        CancelGRPOTrainer,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        max_steps=4,
    )
    for batch in seen:
        assert torch.bincount(batch["tag"] // 4, minlength=8).unique().tolist() == [0, 4]


def test_groups_spread_over_the_micro_batches_of_a_step(tiny_model):
    """Micro-batches smaller than a group: the group is whole in the optimizer step."""
    seen = micro_batches(
        tiny_model,
        CancelGRPOTrainer,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        steps_per_generation=8,
        max_steps=4,
    )
    for first in range(0, 8, 2):
        tags = torch.cat([batch["tag"] for batch in seen[first : first + 2]])
        assert torch.bincount(tags // 4, minlength=4).tolist().count(4) == 1


def test_misaligned_steps_keep_groups_whole(tiny_model):
    """Three micro-batches a generation, two an optimizer step: boundaries wander through the generation batches."""
    seen = micro_batches(
        tiny_model,
        CancelGRPOTrainer,
        gradient_accumulation_steps=2,
        steps_per_generation=3,
        max_steps=6,
    )
    assert len(seen) == 12
    for batch in seen:
        assert torch.bincount(batch["tag"] // 4, minlength=3).tolist().count(4) == 1


def test_evaluation_and_training_alternate(tiny_model):
    """Evaluation in the middle of a generation batch leaves its micro-batches alone."""
    trainer = build(
        tiny_model,
        steps_per_generation=4,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        arguments={"eval_dataset": load_prompts("tune", 4)},
    )
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4
