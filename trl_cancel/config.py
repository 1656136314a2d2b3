"""The configuration of the trainer: TRL's, the settings of every method, and the few that belong to a run."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from inspect import cleandoc
from typing import Any, ClassVar, TypeVar

from trl import GRPOConfig

from .arguments import is_number, one_of, whole
from .batch.clipping import LOSS_TYPES
from .batch.layout import BatchLayout
from .methods import CONFIGURATIONS, METHODS, MethodSettings
from .methods.method import documented
from .pipeline.token_credits import TokenCredits
from .running.removed import KnowsRemoved
from .running.secrets import KeepsSecrets, without_secrets
from .upstream import trl as _upstream  # noqa: F401  (refuses an untested TRL before anything else happens)
from .value_rules import check_number, check_values, types_of


# TRL refuses others too, some of them after the first generation.
CHOICES_OF_TRL = {
    "loss_type": LOSS_TYPES,
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_importance_sampling_mode": ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate"),
}


@documented
@dataclass
class CancelGRPOConfig(KnowsRemoved, KeepsSecrets, MethodSettings, GRPOConfig):
    r"""
    Configuration class for the [`CancelGRPOTrainer`].

    This class includes only the parameters that are specific to this package. For a full list of training arguments,
    please refer to the [`~trl.GRPOConfig`] documentation; all defaults are TRL's.

    Parameters:
        > Parameters that control the rounds of generation

        max_generation_rounds (`int`, *optional*, defaults to `4`):
            Rounds of generation after which the best groups there are are taken, where some are to be chosen.

        > Parameters that control memory

        state_cache_gib (`float`, *optional*, defaults to `2.0`):
            Memory for the hidden states of a generation batch on the device, in GiB. More, up to four times as much,
            goes to CPU memory; still more is computed again when it is needed.

        > Parameters that control the logging

        cancellation_metrics (`bool`, *optional*, defaults to `True`):
            Log how much of the push on shared tokens is left (`cancel/shared_prefix_residual`) and how rollouts divide
            by sign. Changes nothing in training.
        token_shift_steps (`int`, *optional*, defaults to `0`):
            Every so many optimizer steps, log which tokens the step boosts and which it suppresses (`shift/*`), which
            takes two forward passes over its rollouts; 0 for never. Changes nothing in training. Source: Appendix C of
            [2605.08666](https://huggingface.co/papers/2605.08666).

        > Parameters that control the saving

        save_on_signal (`bool`, *optional*, defaults to `True`):
            On SIGTERM or SIGINT, finish the optimizer step, save a checkpoint (unless `save_strategy="no"`) and end the
            training; a second signal acts at once. Signals that something else handles already are left to it.

    Raises:
        `ValueError`: If settings contradict each other; the message names them and what would work.
    """

    max_generation_rounds: int = 4
    state_cache_gib: float = 2.0
    cancellation_metrics: bool = True
    token_shift_steps: int = 0
    save_on_signal: bool = True

    # Settings of a paper that are left to their default where another is not the paper's: with both values.
    _gives_way: ClassVar[dict[str, tuple[Any, str, Any]]] = {}

    def __post_init__(self):
        for name, (value, other, of_paper) in self._gives_way.items():
            if getattr(self, name) == value and getattr(self, other) != of_paper:
                setattr(self, name, None)
        self._check_numbers()  # before TRL compares them and divides by them
        try:
            super().__post_init__()
        except ValueError:
            if "distributed_state" in self.__dict__:  # otherwise it came before sizes are known
                self._check_whole_groups()  # the same refusal, by the names of what was set
            raise
        self.check()

    @classmethod
    def adopt(cls, args: GRPOConfig) -> "CancelGRPOConfig":
        """
        This configuration with the settings of a plain [`~trl.GRPOConfig`] and this class's defaults for what that
        lacks.

        Args:
            args ([`~trl.GRPOConfig`]):
                A configuration; returned as it is if it is this package's already.

        Raises:
            `TypeError`: If `args` is something else, or this class is that of a paper's settings.
            `ValueError`: If the settings do not fit this class's defaults.
        """
        if isinstance(args, cls):
            args.check()
            return args
        if cls is not CancelGRPOConfig:
            raise TypeError(
                f"args is a {type(args).__name__}; pass a {cls.__name__}, which holds the paper's settings."
            )
        if not isinstance(args, GRPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; pass a {cls.__name__} or a trl.GRPOConfig.")
        # TRL's own `__post_init__` has run on `args` and cannot run twice, so its results are taken over.
        adopted = object.__new__(cls)
        adopted.__dict__.update(copy.copy(args.__dict__))
        for setting in fields(cls):
            if setting.name not in adopted.__dict__:
                setattr(adopted, setting.name, setting.default)  # this package's fields have plain defaults
        adopted.check()
        return adopted

    def to_dict(self) -> dict[str, Any]:
        """As TRL's, which trackers are given; without other secrets either, such as in `model_init_kwargs` or addresses."""
        return without_secrets(super().to_dict())

    @property
    def layout(self) -> BatchLayout:
        """The sizes that decide which rollouts meet in one optimizer step."""
        return BatchLayout.of(self)

    @contextmanager
    def set_aside(self, **settings: Any) -> Iterator[None]:
        """
        Other settings for a while. What is pickled meanwhile, `training_args.bin`, has the user's.

        Args:
            **settings:
                The other settings.
        """
        outer = self.__dict__.get("_set_aside", {})
        before = {name: getattr(self, name) for name in settings}
        self.__dict__.update(settings, _set_aside={**before, **outer})
        try:
            yield
        finally:
            self.__dict__.update(before, _set_aside=outer)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        users = state.pop("_set_aside", {})
        return {**state, **users}

    def check(self) -> None:
        """
        Refuses settings that contradict each other, and takes the end of the line off a token that was read from a
        file. Done when the configuration is made, and again by the trainer, since fields can be assigned in between.

        Raises:
            `ValueError`: Names the settings and what would work.
        """
        if isinstance(self.hub_token, str):
            self.hub_token = self.hub_token.strip()
        self._check_numbers()
        self._check_choices()
        self._check_rounds()
        for method in METHODS:
            method.check(self)
        TokenCredits(self)  # which refuses losses that token credits do not fit
        self._check_states()
        self._check_logging()
        self._check_own_numbers()

    def _check_numbers(self) -> None:
        for method in METHODS:
            name, what = method.look_alike or ("", "")
            if name and isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value}: {name} is {what}. Did you mean {method.switch}={value}?")
        check_values(self)
        self._check_sizes()

    def _check_own_numbers(self) -> None:
        """Settings of a method that is off have not been looked at, and must be numbers all the same."""
        for name, types in types_of(CancelGRPOConfig).items():
            if name in _OWN_FIELDS and types & {int, float}:
                check_number(name, getattr(self, name), types)

    def _check_sizes(self) -> None:
        for name in BatchLayout.__dataclass_fields__.keys() & self.__dataclass_fields__.keys():
            value, least = getattr(self, name), 2 if name == "num_generations" else 1
            if value is not None or name != "steps_per_generation":  # which TRL fills in
                whole(name, value, least)

    def _check_whole_groups(self) -> None:
        if self.steps_per_generation is None:
            return
        layout = self.layout
        total = layout.generation_batch_per_process * layout.num_processes
        if total % layout.num_generations:
            processes = f" x {layout.num_processes} processes" if layout.num_processes > 1 else ""
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} x steps_per_generation="
                f"{self.steps_per_generation}{processes} = {total} rollouts a generation, which is not a multiple of "
                f"num_generations={self.num_generations}. Set one of {', '.join(layout.sizes_that_fit())}."
            )

    def _check_choices(self) -> None:
        for setting in fields(self):
            choices, value = setting.metadata.get("choices"), getattr(self, setting.name)
            if setting.name in _OWN_FIELDS and choices:
                one_of(setting.name, value, choices)
            if setting.name in _OWN_FIELDS and isinstance(setting.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{setting.name}={value!r} must be True or False.")
        for name, known in CHOICES_OF_TRL.items():
            one_of(name, getattr(self, name), known)

    def _check_rounds(self) -> None:
        rounds = self.max_generation_rounds
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise ValueError(f"max_generation_rounds={rounds!r} must be a whole number of at least 1.")

    def _check_states(self) -> None:
        if not (is_number(self.state_cache_gib) and self.state_cache_gib >= 0):
            raise ValueError(f"state_cache_gib={self.state_cache_gib!r} must be a number of GiB, e.g. 2.0.")

    def _check_logging(self) -> None:
        steps = self.token_shift_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(
                f"token_shift_steps={steps!r} must be a whole number of at least 0, e.g. 10, or 0 for never."
            )


_OWN_FIELDS = {setting.name for setting in fields(CancelGRPOConfig)} - {setting.name for setting in fields(GRPOConfig)}


def _document() -> None:
    """Puts the parameters of the methods into the docstring of the configuration."""
    sections = [cleandoc(method.Settings.__doc__ or "") for method in METHODS]
    indented = "\n\n".join(sections).replace("\n", "\n        ").replace("        \n", "\n")
    start = "Parameters:\n"
    CancelGRPOConfig.__doc__ = str(CancelGRPOConfig.__doc__).replace(start, f"{start}        {indented}\n\n", 1)


_document()
C = TypeVar("C", bound=CancelGRPOConfig)


def of_paper(name: str) -> Callable[[type[C]], type[C]]:
    """
    Makes a subclass of [`CancelGRPOConfig`] the configuration of a paper.

    Args:
        name (`str`):
            Which; one of `CONFIGURATIONS`.
    """
    paper = CONFIGURATIONS[name]

    def made(cls: type[C]) -> type[C]:
        lines = []
        for setting, value in paper.settings.items():
            old = CancelGRPOConfig.__dataclass_fields__[setting]
            default: Any = {"default_factory": value.copy} if isinstance(value, dict) else {"default": value}
            setattr(cls, setting, field(**default, metadata=old.metadata))
            cls.__annotations__[setting] = old.type
            kind = getattr(old.type, "__name__", str(old.type))
            see = "[`CancelGRPOConfig`]" if setting in _OWN_FIELDS else "[`~trl.GRPOConfig`]"
            note = paper.notes.get(setting, f"See {see}.")
            lines.append(f"    {setting} (`{kind}`, *optional*, defaults to `{value!r}`):\n        {note}")
        cls.__doc__ = (
            f"[`CancelGRPOConfig`] with the settings of {paper.paper.title} ([{paper.paper.id}]({paper.paper.url})).\n\n"
            f"{paper.about}\n\nParameters:\n"
            + "\n".join(lines)
            + "\n\nRaises:\n    `ValueError`: As [`CancelGRPOConfig`]."
        )
        cls._gives_way = {
            setting: (paper.settings[setting], other, paper.settings.get(other))
            for setting, other in paper.gives_way.items()
        }
        return dataclass(cls)

    return made
