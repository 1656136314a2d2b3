"""What the monitor makes of micro-batches, on hand-made rows."""

import pytest
import torch

from trl_cancel.batch.rollouts import Rollouts
from trl_cancel.pipeline.monitor import UpdateMonitor

from .runs import train


PAD = 9


class OneProcess:
    """An accelerator without others."""

    num_processes, process_index = 1, 0

    def gather(self, tensor):
        return tensor


@pytest.fixture
def monitor():
    return UpdateMonitor(OneProcess(), groups_are_local=True)


def scored(ids, completion_mask, mask=None, prompts=((5,), (5,)), prompt_mask=((1,), (1,))):
    """A batch of one group of two, with advantages 1 and -1."""
    ids, completion_mask = torch.tensor(ids), torch.tensor(completion_mask)
    mask = completion_mask if mask is None else torch.tensor(mask)
    rollouts = Rollouts(
        prompt_ids=torch.tensor(prompts),
        prompt_mask=torch.tensor(prompt_mask),
        completion_ids=ids,
        mask=mask,
        advantages=torch.tensor([1.0, -1.0]),
        group_ids=torch.zeros(2, dtype=torch.long),
        rewards=torch.zeros(2, 1),
        reward_names=["reward"],
        examples=[{}, {}],
        num_generations=2,
    )
    return {"completion_ids": ids, "completion_mask": completion_mask}, rollouts


def shared(monitor, *batch, **prompts):
    return (monitor.mark_shared(*scored(*batch, **prompts), PAD)["shared_contexts"] != 0).tolist()


def test_rollouts_of_other_prompts_share_nothing(monitor):
    """As an environment may give them within a group; how far a prompt is padded makes no difference."""
    completions = [[1, 2], [1, 2]], [[1, 1], [1, 1]]
    padded = {"prompt_mask": [[0, 1, 1], [1, 1, 1]]}
    assert shared(monitor, *completions, prompts=[[7, 5, 6], [5, 6, 6]], **padded) == [[False, False]] * 2
    assert (
        shared(monitor, *completions, prompts=[[PAD, 5, 6], [5, 6, 0]], prompt_mask=[[0, 1, 1], [1, 1, 0]])
        == [[True, True]] * 2
    )


def test_an_end_of_sequence_that_also_pads_is_shared(monitor):
    """Many models pad with the token that ends a completion: the first counts, the padding after it does not."""
    assert shared(monitor, [[1, PAD, PAD], [1, PAD, PAD]], [[1, 1, 0], [1, 1, 0]]) == [[True, True, False]] * 2


def test_a_truncated_completion_is_part_of_its_group(monitor):
    """It is masked out of the update, but good and bad rollouts still share what it holds."""
    assert shared(monitor, [[1, 2], [1, 3]], [[1, 1], [0, 0]]) == [[True, False], [False, False]]


def test_tokens_that_the_loss_leaves_out_are_not_counted(monitor):
    """The second token was written by a tool: part of the context of the third, but nothing that is pushed."""
    found = shared(monitor, [[1, 2, 3], [1, 2, 3]], [[1, 1, 1], [1, 1, 1]], [[1, 0, 1], [1, 0, 1]])
    assert found == [[True, False, True]] * 2


def test_a_step_without_shared_tokens_has_no_residual(monitor):
    """Rather than a 0 that would read as perfect cancellation."""
    logps = torch.zeros(2, 2, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0], requires_grad=True)
    loss = -(advantages.unsqueeze(1) * torch.exp(logps - logps.detach())).sum()
    inputs = {"completion_mask": torch.ones(2, 2), "deserved": torch.zeros(2, 2)}
    inputs["rollout_advantages"] = advantages.detach()
    monitor.watch_loss(loss, logps, advantages, {**inputs, "shared_contexts": torch.zeros(2, 2, dtype=torch.long)})
    assert set(monitor.end_step()) == {"cancel/positive_fraction", "cancel/negative_fraction"}
    monitor.watch_loss(loss, logps, advantages, {**inputs, "shared_contexts": torch.full((2, 2), 7)})
    assert monitor.end_step()["cancel/shared_prefix_residual"] == 0


def test_groups_are_judged_over_the_whole_step(tiny_model):
    """Groups of four over two micro-batches cancel, though in neither micro-batch alone."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 32, "max_completion_length": 20}
    logs = train(tiny_model, **settings, max_steps=2).logs[:-1]
    assert any("cancel/shared_prefix_residual" in entry for entry in logs)
    assert max(entry.get("cancel/shared_prefix_residual", 0) for entry in logs) < 1e-6


def test_groups_of_different_generations_have_different_numbers(tiny_model):
    """Also when a prompt comes again: its rollouts of another generation are another group."""
    seen = []

    class Watch:
        scope = "group"

        def coefficients(self, rollouts):
            seen.append(rollouts.group_ids.tolist())
            return torch.ones_like(rollouts.mask)

    train(tiny_model, per_device_train_batch_size=8, max_steps=3, arguments={"credits": [Watch()]})
    assert seen == [[n] * 4 + [n + 1] * 4 for n in (0, 2, 4)]
