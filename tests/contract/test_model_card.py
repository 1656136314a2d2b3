"""What the model card takes from the card that TRL writes."""

import re
from pathlib import Path

import trl

from tests.runs import build
from trl_cancel.publishing.model_card import _last_block, _sections, _versions


def test_parts_of_trls_card(tiny_model, tmp_path):
    trainer = build(tiny_model, output_dir=str(tmp_path))
    trl.GRPOTrainer.create_model_card(trainer, model_name="model")
    sections = _sections((Path(tmp_path) / "README.md").read_text())
    assert {"Quick start", "Training procedure", "Framework versions", "Citations"} <= sections.keys()
    assert _versions(sections["Framework versions"], trainer)["TRL"] == trl.__version__
    assert "vonwerra2020trl" in _last_block(sections["Citations"])


def test_links_to_trackers_are_lines_with_a_badge():
    template = (Path(trl.__file__).parent / "templates" / "lm_model_card.md").read_text()
    assert len(re.findall(r"^\{% if \w+_url %\}\[<img ", template, re.MULTILINE)) == 3
