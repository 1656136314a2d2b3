"""
What this package takes from TRL that is private, with one small adapter for each difference between its versions.

What is used of each name, and why, stands in `names.py`. All of it is looked for when this module is imported, and what
it does is tried by `trl-cancel doctor`, whose checks are the contract tests.
"""

import inspect
import warnings
from contextlib import AbstractContextManager
from typing import Any

import trl

from . import versions
from .checks import differences, names_in_both
from .names import ATTRIBUTES, FUNCTIONS, METHODS, WAY_OF_ROWS


def differs(difference: str) -> ImportError:
    """The error of a TRL that differs from what this package builds on."""
    return ImportError(
        f"trl {trl.__version__} differs from what trl-cancel builds on: {difference}. {versions.how_to_mend(trl.__version__)}"
    )


try:
    from trl import GRPOTrainer
    from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
    from trl.trainer.utils import (
        get_callable_name,
        get_config_model_id,
        is_async_callable,
        split_pixel_values_by_grid,
        split_tensor_dict,
        unsplit_pixel_values_by_grid,
    )
except ImportError as error:
    raise differs(f"a name is gone ({error})") from error


def check_installation(trainer: type = GRPOTrainer) -> None:
    """
    Refuses a TRL that differs from what is built on; run once, when this module is imported.

    Args:
        trainer (`type`, *optional*, defaults to [`~trl.GRPOTrainer`]):
            Class to check.

    Raises:
        `ImportError`: If a private name is missing, or is used otherwise, or TRL's trainer has been replaced.
    """
    if trainer.__module__.partition(".")[0] != trl.__name__:
        raise ImportError(
            f"trl.GRPOTrainer is {trainer.__module__}.{trainer.__name__}: another package, as Unsloth does, has put it in "
            "the place of TRL's, whose loss and batches the methods build on. Import GRPOTrainer of trl_cancel before that package; its "
            "trainers are then built on TRL's own."
        )
    found = list(differences(trainer, {name: globals()[name] for name in FUNCTIONS}))
    if found:
        raise differs("; ".join(found))
    versions.warn_if_newer(trl.__version__)


def check_names(own: type) -> None:
    """
    Refuses a TRL whose trainer has names that this package has given to something else; run once, for its trainer.

    Args:
        own (`type`):
            The trainer of this package.

    Raises:
        `ImportError`: Names them.
    """
    taken = names_in_both(own, GRPOTrainer)
    if taken:
        raise differs(f"its trainer has {', '.join(taken)} too, which trl-cancel uses for something else")


def warn_if_replaced() -> None:
    """Warns where another package has put a trainer of its own in the place of TRL's, after this one was imported."""
    current: Any = trl.GRPOTrainer
    if current is not GRPOTrainer:
        warnings.warn(
            f"trl.GRPOTrainer is {current.__module__}.{current.__name__} by now: another package, as Unsloth does, has put "
            "it in the place of TRL's. The trainers of trl_cancel are built on TRL's own, without its changes to the "
            "trainer; what it has changed in models is not known to work with them.",
            stacklevel=3,
        )


def unwrapped_for_generation(model: Any, accelerator: Any, args: Any) -> AbstractContextManager[Any]:
    """
    The model in a state in which it can generate, or be asked for its weights, also where DeepSpeed ZeRO-3 shards it.

    Args:
        model (`Any`):
            The wrapped model.
        accelerator ([`~accelerate.Accelerator`]):
            The processes, which must all enter.
        args ([`~trl.GRPOConfig`]):
            The configuration.
    """
    settings: dict[str, Any] = {"gather_deepspeed3_params": getattr(args, "ds3_gather_for_generation", True)}
    # TRL 1.16 turns checkpointing off and on again with these; before, they were lost. Can go with TRL 1.15.
    if "gradient_checkpointing_kwargs" in inspect.signature(unwrap_model_for_generation).parameters:
        settings["gradient_checkpointing_kwargs"] = args.gradient_checkpointing_kwargs
    return unwrap_model_for_generation(model, accelerator, **settings)


check_installation()

__all__ = [
    "ATTRIBUTES",
    "METHODS",
    "WAY_OF_ROWS",
    "check_installation",
    "check_names",
    "disable_gradient_checkpointing",
    "get_callable_name",
    "get_config_model_id",
    "is_async_callable",
    "split_pixel_values_by_grid",
    "split_tensor_dict",
    "unsplit_pixel_values_by_grid",
    "unwrapped_for_generation",
    "warn_if_replaced",
]
