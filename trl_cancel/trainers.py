"""The trainers: of the package, and with the settings of each paper."""

from collections.abc import Callable
from typing import TypeVar

from .configs import DelTAConfig, DFPOConfig, GRPOFixConfig, NTHRConfig
from .methods import CONFIGURATIONS
from .trainer import CancelGRPOTrainer


T = TypeVar("T", bound=CancelGRPOTrainer)


def of_paper(name: str) -> Callable[[type[T]], type[T]]:
    """
    Makes a subclass of [`CancelGRPOTrainer`] the trainer of a paper.

    Args:
        name (`str`):
            Which; one of `CONFIGURATIONS`.
    """
    paper = CONFIGURATIONS[name]

    def made(cls: type[T]) -> type[T]:
        cls._tag_names = [*CancelGRPOTrainer._tag_names, paper.tag]
        cls._name = f"{paper.title} (trl-cancel)"
        cls._paper = paper.paper.for_trl
        cls.__doc__ = (
            f"[`CancelGRPOTrainer`] with [`{cls._config_class.__name__}`]: {paper.does}, {paper.paper.title} "
            f"([{paper.paper.id}]({paper.paper.url}))."
        )
        return cls

    return made


@of_paper("DFPO")
class DFPOTrainer(CancelGRPOTrainer):
    _config_class = DFPOConfig


@of_paper("GRPOFix")
class GRPOFixTrainer(CancelGRPOTrainer):
    _config_class = GRPOFixConfig


@of_paper("NTHR")
class NTHRTrainer(CancelGRPOTrainer):
    _config_class = NTHRConfig


@of_paper("DelTA")
class DelTATrainer(CancelGRPOTrainer):
    _config_class = DelTAConfig


__all__ = ["CancelGRPOTrainer", "DFPOTrainer", "DelTATrainer", "GRPOFixTrainer", "NTHRTrainer"]
