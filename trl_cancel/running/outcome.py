"""Whether a finished training can have taught anything."""

from typing import Any


PAGE = "docs/troubleshooting.md"
EQUAL_REWARDS = "#all-rewards-of-a-group-are-equal"
CUT_OFF = "#completions-are-cut-off"
NO_UPDATE = "#loss-is-0"


def remark_on(logs: list[dict[str, Any]], args: Any) -> str | None:
    """
    Says so if nothing could be learned in any step of a run, or no completion came to its end; `None` otherwise.

    Args:
        logs (`list[dict]`):
            What the trainer has logged, `trainer.state.log_history`.
        args ([`~trl_cancel.CancelGRPOConfig`]):
            The settings of the run.
    """
    cut_off = _always(logs, "completions/clipped_ratio", 1.0)
    why = []
    if _always(logs, "frac_reward_zero_std", 1.0):
        why.append(f"all rewards of a group are equal {_seen('frac_reward_zero_std', 1, EQUAL_REWARDS)}")
    if cut_off and args.mask_truncated_completions:
        why.append(f"all completions are cut off and masked {_seen('completions/clipped_ratio', 1, CUT_OFF)}")
    elif cut_off and why:
        why.append(f"all completions are cut off {_seen('completions/clipped_ratio', 1, CUT_OFF)}")
    for metric in ("grad_norm", "learning_rate"):
        if not why and _always(logs, metric, 0.0):
            why.append(f"no step changes a weight {_seen(metric, 0, NO_UPDATE)}")
    if why:
        return f"Nothing could be learned: {', and '.join(why)}."
    if cut_off:
        seen = _seen("completions/clipped_ratio", 1, CUT_OFF)
        return f"All completions are cut off {seen}: the end of an answer was never seen, nor rewarded."
    return None


def _always(logs: list[dict[str, Any]], metric: str, value: float) -> bool:
    values = [log[metric] for log in logs if log.get(metric) is not None]
    return bool(values) and all(abs(each - value) < 1e-9 for each in values)


def _seen(metric: str, value: int, entry: str) -> str:
    return f"({metric} is {value} in every log; see {PAGE}{entry})"
