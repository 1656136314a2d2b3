"""What TRL's loss reads, when it reads it, and what it makes of advantages of shape `(B, T)`."""

from contextlib import suppress
from itertools import product
from typing import Any

import torch
from trl import GRPOTrainer

from ..batch.clipping import LOSS_TYPES
from .check import Checks, Patches, holds
from .loss import LossHarness


CHECKS = Checks()
FORWARD = "_get_per_token_logps_and_entropies"
WRITTEN = ("advantages", "old_per_token_logps", "sampling_per_token_logps", "level")
RATIO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs now and before, of shape `(4, 6)`, advantages, and a mask."""
    random = torch.Generator().manual_seed(0)
    logps = -torch.rand(4, 6, dtype=torch.float64, generator=random)
    mask = (torch.arange(6) < torch.tensor([6, 3, 5, 1]).unsqueeze(1)).long()
    drift = torch.randn(4, 6, dtype=torch.float64, generator=random)
    return logps, logps + 0.3 * drift, torch.randn(4, dtype=torch.float64, generator=random), mask


def _harness(patches: Patches, model: str, **settings: Any) -> LossHarness:
    return LossHarness(patches, model, trainer=GRPOTrainer, **settings)


@CHECKS.assume("the loss reads after its forward pass what is written during it", over=product(LOSS_TYPES, WRITTEN))
def read_after_the_forward_pass(model: str, what: tuple[str, str]) -> None:
    loss_type, entry = what
    logps, old_logps, advantages, mask = _batch()
    changed = {
        "advantages": 2 * advantages,
        "old_per_token_logps": old_logps - 0.1,
        "sampling_per_token_logps": logps + 1,
    }
    settings: dict[str, Any] = {"loss_type": loss_type, "off_policy_mask_threshold": 0.05}
    settings |= {"epsilon_high": 5.0} if loss_type == "cispo" else {}  # its bound is on the ratio, not on ratio - 1
    with Patches() as patches:
        unchanged = _harness(patches, model, **settings)(logps, old_logps, advantages, mask)
    with Patches() as patches:
        loss_of = _harness(patches, model, **settings)
        entries = {"advantages": advantages, "old_per_token_logps": old_logps}
        if entry == "level":
            loss_of.trainer.importance_sampling_level = "sequence"
        else:
            entries[entry] = changed[entry]
        expected = loss_of(logps, entries.pop("old_per_token_logps"), entries.pop("advantages"), mask, **entries)
    with Patches() as patches:
        loss_of = _harness(patches, model, **settings)
        forward, compute = getattr(GRPOTrainer, FORWARD), loss_of.trainer.compute_loss
        inputs: dict[str, Any] = {}

        def writing_forward(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if entry == "level":
                trainer.importance_sampling_level = "sequence"
            else:
                inputs[entry] = changed[entry]
            return forward(trainer, *args, **kwargs)

        def compute_on_a_copy(model: Any, given: dict[str, Any]) -> Any:
            inputs.update(given)
            return compute(model, inputs)

        patches.setattr(GRPOTrainer, FORWARD, writing_forward)
        loss_of.trainer.compute_loss = compute_on_a_copy
        found = loss_of(logps, old_logps, advantages, mask)
    same = torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    holds(same, f"{entry} was read before, or is not read any more")
    # vespo has ratios of its own.
    acts = (loss_type, entry) == ("vespo", "level") or not torch.equal(found[1], unchanged[1])
    holds(acts, f"{entry} changes nothing")


@CHECKS.assume(
    "at token level a coefficient on the advantage is one on the token's gradient, exactly", over=LOSS_TYPES
)
def token_advantages(model: str, loss_type: str) -> None:
    logps, old_logps, advantages, mask = _batch()
    coefficients = torch.tensor([0.0, 0.25, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)  # powers of two do not round
    with Patches() as patches:
        loss_of = _harness(patches, model, loss_type=loss_type)
        value, plain = loss_of(logps, old_logps, advantages, mask)
        _, scaled = loss_of(logps, old_logps, advantages.unsqueeze(1) * coefficients, mask)
        same, _ = loss_of(logps, old_logps, advantages.unsqueeze(1).expand_as(logps), mask)
    holds(torch.equal(scaled, plain * coefficients), "the gradient is another")
    holds(torch.allclose(same, value, rtol=1e-12, atol=0), "advantages (B, T) give another loss than (B,)")


@CHECKS.assume("at sequence level the loss averages advantages a token over the rollout")
def sequence_advantages(model: str) -> None:
    logps, _, advantages, mask = _batch()
    first_token_only = torch.zeros_like(logps)
    first_token_only[:, 0] = 1
    with Patches() as patches:
        loss_of = _harness(patches, model, importance_sampling_level="sequence", loss_type="grpo")
        _, gradient = loss_of(logps, logps, advantages.unsqueeze(1) * first_token_only, mask)
    holds(gradient[0].all(), "tokens without an advantage get no gradient")


@CHECKS.assume(
    "old log-probs that equal the new ones hold the ratio at 1: the gradient is the score's, times the advantage",
    over=product(RATIO_LOSSES, ("token", "sequence")),
)
def frozen_ratio(model: str, what: tuple[str, str]) -> None:
    loss_type, level = what
    logps, _, advantages, mask = _batch()
    with Patches() as patches:
        loss_of = _harness(patches, model, loss_type=loss_type, importance_sampling_level=level)
        _, missing = loss_of(logps, None, advantages, mask)
        _, equal = loss_of(logps, logps, advantages, mask)
    holds(torch.equal(missing, equal), "without old log-probs the gradient is another")
    holds((equal.sign() == -(advantages.unsqueeze(1) * mask).sign()).all(), "the signs are others")


@CHECKS.assume("the off-policy mask prefers the log-probs of the sampling engine")
def off_policy_mask_of_sampling(model: str) -> None:
    logps, _, advantages, mask = _batch()
    with Patches() as patches:
        loss_of = _harness(patches, model, off_policy_mask_threshold=0.05)
        _, kept = loss_of(logps, logps, -advantages.abs(), mask)
        _, dropped = loss_of(logps, logps, -advantages.abs(), mask, sampling_per_token_logps=logps + 1)
    holds(kept.any() and not dropped.any(), "it keeps what has drifted, or drops what has not")


@CHECKS.assume("the off-policy mask drops negative rollouts that have drifted")
def off_policy_mask(model: str) -> None:
    kept = GRPOTrainer.get_off_policy_mask(
        torch.tensor([[-1.0], [-1.0], [1.0], [-1.0]]),
        torch.tensor([[0.0, 0.0], [-1.0, -1.0], [-1.0, -1.0], [0.0, -1.0]]),
        torch.zeros(4, 2),
        torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0]]),
        0.5,
    )
    holds(kept.flatten().tolist() == [1, 0, 1, 1], f"it keeps {kept.flatten().tolist()} of (1, 0, 1, 1)")


@CHECKS.assume("the loss asks for its forward pass first, with compute_entropy by name, and logs nothing before")
def forward_pass_first(model: str) -> None:
    class Stop(Exception):
        pass

    asked: list[Any] = []

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("compute_entropy"))
        raise Stop

    with Patches() as patches:
        loss_of = _harness(patches, model)
        patches.setattr(GRPOTrainer, FORWARD, stop)
        before = {name: list(values) for name, values in loss_of.trainer._metrics["train"].items()}
        with suppress(Stop):
            loss_of(*_batch())
        after = loss_of.trainer._metrics["train"]
    holds(asked == [True], f"compute_entropy is {asked}")
    holds(before == after, "something is logged before it")


@CHECKS.assume("a sequence-level correction for the sampling engine, (B, 1), multiplies the loss")
def sequence_correction(model: str) -> None:
    logps, old_logps, advantages, mask = _batch()
    ratio = torch.linspace(0.5, 2, logps.size(0), dtype=torch.float64).unsqueeze(1)
    with Patches() as patches:
        loss_of = _harness(patches, model, importance_sampling_level="sequence", loss_type="grpo")
        _, without = loss_of(logps, old_logps, advantages, mask)
        loss_of.trainer.use_vllm = loss_of.trainer.vllm_importance_sampling_correction = True
        ones, corrected = (
            loss_of(logps, old_logps, advantages, mask, importance_sampling_ratio=each)[1]
            for each in (torch.ones_like(ratio), ratio)
        )
    holds(torch.equal(ones, without), "ones change something")
    holds(torch.allclose(corrected, ratio * without, rtol=1e-12, atol=0), "it does not multiply")


@CHECKS.assume("epsilon_low and epsilon_high are read from the trainer, delta from its arguments")
def clipping_bounds(model: str) -> None:
    logps, _, advantages, mask = _batch()
    cuts = (
        (-0.5, 1, {"epsilon_high": 1.0}),  # a positive advantage is cut above 1 + epsilon_high
        (0.5, -1, {"epsilon_low": 1.0}),  # a negative one below 1 - epsilon_low
    )
    for shift, sign, looser in cuts:
        with Patches() as patches:
            loss_of = _harness(patches, model)
            cut = loss_of(logps, logps + shift, sign * advantages.abs(), mask)[1]
            vars(loss_of.trainer).update(looser)
            kept = loss_of(logps, logps + shift, sign * advantages.abs(), mask)[1]
        holds(kept.any() and not cut.any(), f"{', '.join(looser)} does not bound")
    with Patches() as patches:
        loss_of = _harness(patches, model)
        kept = loss_of(logps, logps - 0.5, -advantages.abs(), mask)[1]
        loss_of.trainer.args.delta = 1.2
        cut = loss_of(logps, logps - 0.5, -advantages.abs(), mask)[1]
    holds(kept.any() and not cut.any(), "delta does not bound")
