"""What this package's model card takes from the one that TRL writes."""

import re
from pathlib import Path

import trl

from ..publishing.model_card import _last_block, _sections, _versions
from .check import Checks, holds
from .runs import build


CHECKS = Checks()
SECTIONS = {"Quick start", "Training procedure", "Framework versions", "Citations"}


@CHECKS.assume("TRL's model card has the parts that this package's takes over")
def parts(model: str) -> None:
    trainer = build(model)
    trl.GRPOTrainer.create_model_card(trainer, model_name="model")
    found = _sections(Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8"))
    holds(found.keys() >= SECTIONS, f"it lacks {', '.join(sorted(SECTIONS - found.keys()))}")
    versions = _versions(found["Framework versions"], trainer)
    holds(versions.get("TRL") == trl.__version__, f"its versions are {versions}")
    holds("vonwerra2020trl" in _last_block(found["Citations"]), "its last citation is not TRL's")


@CHECKS.assume("links to trackers stand in lines of their own, with a badge")
def badges(model: str) -> None:
    template = (Path(trl.__file__).parent / "templates" / "lm_model_card.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\{% if \w+_url %\}\[<img ", template, re.MULTILINE)
    holds(len(lines) == 3, f"{len(lines)} such lines, not 3")
