"""The trainer's loss as a function of chosen log-probs: the forward pass is replaced, the rest is the real thing."""

import torch
import trl

from trl_cancel import CancelGRPOTrainer

from .runs import build


class LossHarness:
    """
    Computes a trainer's loss on hand-made log-probs.

    Args:
        monkeypatch ([`~trl_cancel.doctor.check.Patches`]):
            Replaces the forward pass of TRL's trainer for a while; pytest's fixture will do.
        model (`str`):
            Path of any model, which is not called.
        **settings:
            Settings of the trainer; `trainer` and `arguments` as in `build`.
    """

    def __init__(self, monkeypatch, model, **settings):
        self.trainer = build(model, **settings)
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self.forward_passes = 0

        def forward(trainer, *args, **kwargs):
            self.forward_passes += 1
            return self.logps, torch.zeros_like(self.logps), None

        monkeypatch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", forward)

    def __call__(self, logps, old_logps, advantages, mask, **extra):
        """Loss and its gradient by `logps`; `extra` are further entries of the micro-batch."""
        self.logps = logps.detach().clone().requires_grad_()
        inputs = {
            "prompt_ids": torch.zeros(mask.size(0), 1, dtype=torch.long),
            "prompt_mask": torch.ones(mask.size(0), 1, dtype=torch.long),
            "completion_ids": torch.zeros_like(mask),
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": old_logps,
            "num_items_in_batch": mask.sum(),
            "shared_contexts": torch.zeros_like(mask),
            "deserved": torch.zeros_like(logps),
            "rollout_advantages": advantages if advantages.dim() == 1 else advantages[:, 0],
            "group_ids": torch.arange(mask.size(0)) // self.trainer.num_generations,
            **extra,
        }
        before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        loss = self.trainer.compute_loss(self.trainer.model, inputs)
        if isinstance(self.trainer, CancelGRPOTrainer):
            self.trainer._losses.end_step()
        assert inputs.keys() == before.keys(), "the micro-batch is used again and must not change"
        assert all(torch.equal(inputs[name], value) for name, value in before.items() if value is not None)
        (gradient,) = torch.autograd.grad(loss, self.logps)
        return loss.detach(), gradient

    @property
    def metrics(self):
        """The latest value of each metric."""
        return {name: values[-1] for name, values in self.trainer._metrics["train"].items()}
