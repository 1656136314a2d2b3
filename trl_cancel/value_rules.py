"""
What the values of TRL's and transformers' settings must be: of which sort, by the types of the fields, and in which
range, by a table. What stock TRL trains on sensibly is let through, such as `top_k=-1` (vLLM's name for all) and
`max_grad_norm=inf` (no clipping).
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from trl import GRPOConfig

from .arguments import is_number, is_whole
from .running.rewards import LARGEST


@dataclass(frozen=True)
class Range:
    """
    Numbers that a setting may have.

    Args:
        wanted (`str`):
            What they are, in words; `{number}` stands for "number" or "whole number".
        holds (`Callable`):
            Whether a number is one of them.
        or_none (`bool`, *optional*, defaults to `False`):
            Whether the setting may be `None`, which leaves it to the model, though the type of its field does not say so.
    """

    wanted: str
    holds: Callable[[float], bool]
    or_none: bool = False


def _at_least(least: int, example: str, or_none: bool = False) -> Range:
    return Range(f"a {{number}} of at least {least}, e.g. {example}", lambda value: least <= value < math.inf, or_none)


def _up_to_one(example: str, or_none: bool = False) -> Range:
    return Range(f"a {{number}} between 0 and 1, e.g. {example}", lambda value: 0 <= value <= 1, or_none)


def _positive(example: str, or_none: bool = False) -> Range:
    return Range(f"a positive {{number}}, e.g. {example}", lambda value: 0 < value < math.inf, or_none)


def _bound(example: str) -> Range:
    """Infinite, it is none."""
    return Range(f"a positive {{number}}, e.g. {example}", lambda value: value > 0)


FINITE = Range("a finite {number}", math.isfinite)
ANY = Range("a {number}", lambda value: not math.isnan(value))
_MOVING_MEAN = Range("a {number} of at least 0 and below 1, e.g. 0.9", lambda value: 0 <= value < 1)

# Of transformers' fields those that bear on a run; of TRL's, which must all be finite numbers, those for which more
# is certain, or less.
RANGES = {
    "num_train_epochs": FINITE,
    "max_steps": Range("a {number}, e.g. 1000, or -1 to go by num_train_epochs", math.isfinite),
    **dict.fromkeys(["logging_steps", "eval_steps", "save_steps"], FINITE),
    "warmup_steps": _at_least(0, "100, or 0.03 for a share of all steps"),
    "weight_decay": _at_least(0, "0.1"),
    **dict.fromkeys(["adam_beta1", "adam_beta2"], _MOVING_MEAN),
    "adam_epsilon": _at_least(0, "1e-8"),
    "max_grad_norm": ANY,  # one that is infinite or not positive is no bound
    "neftune_noise_alpha": _at_least(0, "5.0"),
    "eval_delay": Range("a {number}", lambda value: not math.isnan(value), or_none=True),
    **dict.fromkeys(["save_total_limit", "eval_accumulation_steps"], ANY),
    "seed": Range("a {number} between 0 and 4294967295, e.g. 42", lambda value: 0 <= value < 2**32),
    "per_device_eval_batch_size": _at_least(1, "8"),
    "learning_rate": _at_least(0, "1e-6"),
    "num_generations_eval": _at_least(0, "4, or 0 for num_generations"),
    "max_completion_length": _at_least(1, "512"),
    "generation_batch_size": _at_least(1, "32"),
    "pad_to_multiple_of": _at_least(1, "8"),
    "max_tool_calling_iterations": _at_least(0, "4"),
    "temperature": Range("positive, e.g. 1.0", lambda value: 0 < value < math.inf),
    "top_p": _up_to_one("1.0", or_none=True),
    "top_k": _at_least(-1, "50, or 0 for all", or_none=True),  # -1 is vLLM's name for all
    "min_p": _up_to_one("0.05"),
    "repetition_penalty": _positive("1.0", or_none=True),
    "beta": _at_least(0, "0.001"),
    **dict.fromkeys(["epsilon", "epsilon_high"], _bound("0.2")),
    "delta": _bound("4.0"),
    "off_policy_mask_threshold": ANY,
    **dict.fromkeys(["vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"], _bound("3.0")),
    "vllm_importance_sampling_clip_min": ANY,
    **dict.fromkeys(["sapo_temperature_neg", "sapo_temperature_pos"], _positive("1.0")),
    "ref_model_mixup_alpha": _up_to_one("0.6"),
    "ref_model_sync_steps": _at_least(1, "512"),
    "top_entropy_quantile": _up_to_one("1.0"),
    **dict.fromkeys(["entropy_coef_min", "entropy_coef_max"], ANY),
}
_FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # which may be named instead of given


@cache
def types_of(settings: type) -> dict[str, frozenset[Any]]:
    """
    The types that the fields of a dataclass may have, from its annotations: parsers write over those of the fields.

    Args:
        settings (`type`):
            The dataclass.
    """
    hints = get_type_hints(settings)
    return {
        setting.name: frozenset(get_args(hints[setting.name]) or (hints[setting.name],))
        for setting in fields(settings)
    }


def check_values(settings: Any) -> None:
    """
    Refuses values of TRL's and transformers' settings that are of the wrong sort or out of range.

    Args:
        settings ([`~trl.GRPOConfig`]):
            Settings, also before `__post_init__` has made dictionaries of those that were given as JSON.

    Raises:
        `ValueError`: Names the setting, its value and what would work.
    """
    for name, types in types_of(GRPOConfig).items():
        value = getattr(settings, name)
        origins = {get_origin(kind) or kind for kind in types}
        if is_number(value) and math.isnan(value):
            raise ValueError(f"{name}={value!r} must be a number.")
        if value is None and NoneType in types:
            continue
        if name == "reward_weights":
            _check_weights(name, value)
        elif name == "pad_to_multiple_of":
            _check_padding(name, value)
        elif dict in origins:
            _check_dictionary(name, value)
        elif types & {int, float} and (name in RANGES or name in GRPOConfig.__annotations__):
            check_number(name, value, types, RANGES.get(name, FINITE))
        elif bool in types and str not in types and isinstance(value, str):
            raise ValueError(f"{name}={value!r} must be True or False.")


def check_number(name: str, value: Any, types: Collection[Any], allowed: Range = ANY) -> None:
    """
    Refuses what is not a number of the sort of a field, or out of range.

    Args:
        name (`str`):
            Name of the setting.
        value (`Any`):
            Its value.
        types (`Collection`):
            Types of the field.
        allowed ([`Range`], *optional*):
            The range.

    Raises:
        `ValueError`: Names the setting, its value and what would work.
    """
    may_be_none = NoneType in types or allowed.or_none
    if value is None and may_be_none:
        return
    is_one, number = (is_number, "number") if float in types else (is_whole, "whole number")
    if not (is_one(value) and allowed.holds(value)):
        wanted = allowed.wanted.format(number=number) + (", or None" if may_be_none else "")
        raise ValueError(f"{name}={value!r} must be {wanted}.")


def _check_weights(name: str, value: Any) -> None:
    weights = value.tolist() if hasattr(value, "tolist") else value
    is_list = isinstance(weights, Iterable) and not isinstance(weights, (str, bytes, Mapping))
    for weight in weights if is_list else [value]:
        # TRL keeps them in single precision.
        if not (is_list and (is_number(weight) or isinstance(weight, bool)) and abs(weight) <= LARGEST):
            raise ValueError(
                f"{name}={value!r} must hold one finite number for each reward function, e.g. [1.0, 0.5], or be None."
            )


def _check_padding(name: str, value: Any) -> None:
    """TRL takes it as text too, as the command line gives it."""
    if isinstance(value, str) and value.lower() in ("auto", "none", "null"):
        return
    given = int(value) if isinstance(value, str) and value.isdecimal() else value
    try:
        check_number(name, given, types_of(GRPOConfig)[name], RANGES[name])
    except ValueError:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1, 'auto' or None.") from None


def _check_dictionary(name: str, value: Any) -> None:
    is_text = isinstance(value, str)
    if isinstance(value, Mapping) or (name in _FILES and not (is_text and value.startswith("{"))):
        return  # transformers has a say on what is in a file
    if is_text and value.startswith("{"):
        try:
            json.loads(value)
            return
        except ValueError as error:
            raise ValueError(
                f"{name} must be a dictionary; as JSON it cannot be read: {error}."
            ) from None  # it may hold secrets
    raise ValueError(f"{name}={value!r} must be a dictionary, e.g. {{'key': 1}}, or None.")
