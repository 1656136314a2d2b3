"""What a method is: all that the rest of the package asks of one."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch

from ..batch.clipping import Clipping
from ..batch.groups import Add, GroupWeigher, Selector
from ..batch.protocol import Credit
from ..papers import Paper


# A `CancelGRPOConfig`, which is made of the settings of the methods and so cannot be imported here.
Config = Any
T = TypeVar("T")


@dataclass(frozen=True)
class Named:
    """
    A combination of settings with a name, for `--method`.

    Args:
        settings (`dict[str, Any]`):
            Fields of [`~trl_cancel.CancelGRPOConfig`] and their values.
        summary (`str`):
            What it does, in a few words.
        paper (`str`, *optional*):
            arXiv id of its source.
    """

    settings: dict[str, Any]
    summary: str
    paper: str | None = None


@dataclass(frozen=True)
class PaperConfiguration:
    """
    The settings of a paper, of which a configuration and a trainer are made.

    Args:
        name (`str`):
            What their names begin with.
        title (`str`):
            The same, as people write it.
        tag (`str`):
            Tag of the trainer's models.
        paper ([`~trl_cancel.papers.Paper`]):
            The paper.
        settings (`dict[str, Any]`):
            Fields of [`~trl_cancel.CancelGRPOConfig`] and their values.
        does (`str`):
            What is trained with them, in a few words.
        about (`str`):
            Where they are from, for the documentation of the configuration.
        notes (`dict[str, str]`, *optional*):
            A sentence on a setting, for the documentation.
        gives_way (`dict[str, str]`, *optional*):
            Settings that are left to their default where another is not as in the paper.
    """

    name: str
    title: str
    tag: str
    paper: Paper
    settings: dict[str, Any]
    does: str
    about: str
    notes: dict[str, str] = field(default_factory=dict)
    gives_way: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PaperEvaluation:
    """
    How a paper evaluates.

    Args:
        label (`str`):
            Its name among the presets of `trl-cancel eval`.
        paper (`str`):
            arXiv id.
        data (`tuple[str, ...]`):
            Names of data sets.
        settings (`dict[str, Any]`):
            Fields of [`~trl_cancel.evaluation.EvaluationSettings`].
        is_usual (`bool`, *optional*, defaults to `True`):
            Whether the name of a data set alone may stand for these settings.
    """

    label: str
    paper: str
    data: tuple[str, ...]
    settings: dict[str, Any]
    is_usual: bool = True


@dataclass(frozen=True)
class Row:
    """
    A row of the README's table of methods, and what its list of pages says.

    Args:
        page (`str`):
            Page of the documentation.
        title (`str`):
            Its title.
        does (`str`):
            What the method does.
        when (`str`):
            When it changes anything.
        costs (`str`):
            What it costs, as `benchmarks/overhead.py` measures it.
        gave (`str`, *optional*, defaults to `"not compared"`):
            What the comparison found; `{name}` stands for what it found of one of its methods.
        paper (`str`, *optional*):
            arXiv id of its source.
    """

    page: str
    title: str
    does: str
    when: str
    costs: str
    gave: str = "not compared"
    paper: str | None = None


@dataclass(frozen=True)
class ActiveMethod:
    """
    A method that is on, as a model card states it.

    Args:
        name (`str`):
            Its name.
        does (`str`):
            What it does, with the settings that decide it.
        tags (`tuple[str, ...]`):
            Tags of the models trained with it: the names that `--method` knows, where there is one.
        papers (`tuple` of [`~trl_cancel.papers.Paper`]):
            Its sources.
        acts (`bool`):
            Whether it changes anything with these sizes of batches.
    """

    name: str
    does: str
    tags: tuple[str, ...] = ()
    papers: tuple[Paper, ...] = ()
    acts: bool = True


class Method:
    """
    All there is of a method beside its formula. It has no state: what a run has on is read from its configuration,
    which every hook is given.

    A method takes part in the pipeline by the objects that it gives to its stages: a [`~trl_cancel.credit.Credit`], a
    [`~trl_cancel.batch.groups.Selector`] of groups, a [`~trl_cancel.batch.groups.GroupWeigher`], or other bounds of
    the clipping.

    Attributes:
        Settings (`type`):
            Dataclass of its settings, which become fields of the configuration.
        switch (`str`):
            The setting that turns it on.
        off (`Any`):
            Value of that setting with which it is off.
        named (`dict[str, Named]`):
            What `--method` knows of it: the method, its controls and ablations.
        configurations (`tuple[PaperConfiguration, ...]`):
            Settings of its papers.
        evaluations (`tuple[PaperEvaluation, ...]`):
            How they evaluate.
        logs (`tuple[str, ...]`):
            What the names of its metrics begin with.
        row ([`Row`]):
            What the README's table says of it.
        acts_in_generation, acts_in_loss (`bool`):
            Whether it cannot do without the way from the generation to the micro-batches, or without TRL's loss, apart
            from token credit, of which that is known anyway. A subclass that leaves these out is refused.
        sets (`tuple[str, ...]`):
            Settings of TRL's that it sets by itself.
        look_alike (`tuple[str, str]`, *optional*):
            A setting of TRL's that is taken for the switch, and what it is.
        needs_whole_groups (`bool`):
            Whether it has no meaning where groups are torn between optimizer steps.
        says_when_idle (`bool`):
            Whether a run is told that it changes nothing there.
        neutral (`dict[str, Any]`, *optional*):
            Settings with which it is on and computes what TRL computes, where there are some; for the doctor.
        is_neutral_exactly (`bool`):
            Whether that agrees to the last bit, and not only to rounding.
    """

    Settings: ClassVar[type]
    switch: ClassVar[str]
    off: ClassVar[Any] = False
    named: ClassVar[dict[str, Named]] = {}
    configurations: ClassVar[tuple[PaperConfiguration, ...]] = ()
    evaluations: ClassVar[tuple[PaperEvaluation, ...]] = ()
    logs: ClassVar[tuple[str, ...]] = ()
    row: ClassVar[Row]
    acts_in_generation: ClassVar[bool] = False
    acts_in_loss: ClassVar[bool] = False
    sets: ClassVar[tuple[str, ...]] = ()
    look_alike: ClassVar[tuple[str, str] | None] = None
    needs_whole_groups: ClassVar[bool] = False
    says_when_idle: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any] | None] = None
    is_neutral_exactly: ClassVar[bool] = True

    _of: ClassVar[dict[type, "Method"]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Settings" in vars(cls):
            Method._of[cls.Settings] = cls()

    @staticmethod
    def of(settings: type) -> "Method":
        """The method whose settings these are."""
        return Method._of[settings]

    def is_on(self, args: Config) -> bool:
        """Whether the configuration asks for it."""
        return getattr(args, self.switch) != self.off

    def chosen(self, args: Config) -> str:
        """The setting that asks for it, as in a call."""
        return f"{self.switch}={getattr(args, self.switch)!r}"

    def acts(self, args: Config) -> bool:
        """Whether it changes anything, where it is on, with these sizes of batches."""
        return True

    # What it refuses and says. Asked also where it is off.

    def in_force(self, args: Config) -> dict[str, Any]:
        """Settings whose value is left to others, with what they come to; for comparing runs."""
        return {}

    def check(self, args: Config) -> None:
        """
        Refuses settings that make no sense or contradict others.

        Raises:
            `ValueError`: Names the settings and what would work.
        """

    def active(self, args: Config) -> ActiveMethod | None:
        """What a model card says, where it is on; `None` for nothing."""
        raise NotImplementedError

    def explain(self, args: Config) -> Iterator[tuple[str, str]]:
        """Lines of [`~trl_cancel.explain`], each with its topic."""
        yield from ()

    def warns(self, args: Config) -> Iterator[str]:
        """What a run is told when its trainer is made."""
        yield from ()

    def leaks(self, args: Config) -> Iterator[str]:
        """Sentences on what breaks cancellation."""
        yield from ()

    # What it gives to the stages of the pipeline, where it is on.

    def cuts(self, args: Config) -> bool:
        """Whether generation batches must be cut into micro-batches group by group, where TRL's cut would tear them."""
        return False

    def selector(self, args: Config) -> Selector | None:
        """What chooses among the groups of several rounds of generation."""
        return None

    def credit(self, args: Config) -> Credit | None:
        """
        What the advantages of tokens are multiplied with: once a generation batch, or, where it needs hidden states and
        the data are on policy, within the loss of each micro-batch.
        """
        return None

    def clipping(self, args: Config, clipping: Clipping) -> Clipping:
        """The clipping of ratios in place of another."""
        return clipping

    def weigher(self, args: Config) -> GroupWeigher | None:
        """What weighs the rollouts of each group by their ratios, in place of the clipped ratios."""
        return None

    def watch_ratios(
        self, args: Config, ratios: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, add: Add
    ) -> None:
        """
        Metrics of a micro-batch's ratios, `(B, T)` or `(B, 1)`; advantages and mask are of shape `(B, T)`, the former
        also `(B, 1)`.
        """


def check_groups_are_local(what: str, args: Config) -> None:
    """
    Refuses sizes with which groups straddle processes.

    Args:
        what (`str`):
            What needs whole groups on one process, as the beginning of a sentence.
        args ([`~trl_cancel.CancelGRPOConfig`]):
            The configuration.

    Raises:
        `ValueError`: Names the sizes.
    """
    layout = args.layout
    if not layout.groups_are_local:
        raise ValueError(
            f"{what}, but groups of num_generations={args.num_generations} straddle processes that generate "
            f"{layout.generation_batch_per_process} rollouts each (per_device_train_batch_size x steps_per_generation). "
            "Make that a multiple of num_generations."
        )


def said(args: Config, name: str) -> str:
    """
    A setting of TRL's as in a call, with a word on it where nobody has chosen it.

    Args:
        args ([`~trl_cancel.CancelGRPOConfig`]):
            The configuration.
        name (`str`):
            Name of the setting.
    """
    value = getattr(args, name)
    known = [each for cls in type(args).__mro__ if name in (each := getattr(cls, "__dataclass_fields__", {}))]
    default = known[-1][name].default
    return f"{name}={value!r}" + (" (TRL's default)" if value == default else "")


def whole_groups(args: Config) -> str:
    """What to set so that groups stay whole in each optimizer step, where they are torn."""
    layout = args.layout
    if layout.groups_are_local and layout.groups_fit_steps:
        steps = f"steps_per_generation={args.gradient_accumulation_steps} (= gradient_accumulation_steps)"
        return f"Set query_preserved=True, or {steps}."
    return f"Set one of {', '.join(layout.sizes_that_fit())}."


def documented(cls: type[T]) -> type[T]:
    """
    Gives the fields of a dataclass of settings their help and choices, which are its docstring's.

    Args:
        cls (`type`):
            Dataclass whose docstring describes each field in TRL's form. A list whose items begin with a value in
            quotes holds the choices.

    Returns:
        `type`: The class.
    """
    texts = described(cls.__doc__ or "")
    for name, setting in vars(cls)["__dataclass_fields__"].items():
        if name in texts:
            setting.metadata = MappingProxyType({**_metadata(texts[name]), **setting.metadata})
    return cls


def described(docstring: str) -> dict[str, str]:
    """
    What a docstring in TRL's form says of each parameter.

    Args:
        docstring (`str`):
            Docstring.

    Returns:
        `dict[str, str]`: The texts by name, without the line of name and type.
    """
    pattern = r"^(?P<indent> *)(?P<name>\w+) \(`.+\):\n(?P<text>(?:(?P=indent) {4}.*\n|\s*\n)+)"
    found = re.finditer(pattern, f"{inspect.cleandoc(docstring)}\n", re.MULTILINE)
    return {match["name"]: inspect.cleandoc(match["text"]) for match in found}


def _metadata(text: str) -> dict[str, Any]:
    plain = re.sub(r"\[([^]]+)]\([^)]*\)", r"\1", text)
    items = re.findall(r'^- `"(\w+)"`', plain, re.MULTILINE)
    paragraphs, *choices = re.split(r"\n+- ", plain)
    choices = [re.sub(r'^`"(\w+)"`', r"`\1`", choice).rstrip(".") for choice in choices]
    words = " ".join(" ".join([paragraphs, "; ".join(choices)]).split())
    return {"help": words if words.endswith(".") else f"{words}.", **({"choices": items} if items else {})}
