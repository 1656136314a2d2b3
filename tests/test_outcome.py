"""Runs in which nothing could be learned say so at their end, and name the metric and the page."""

import os
import re
import signal
from pathlib import Path

import pytest

from .runs import assert_same_weights, build, load, weights_of


ROOT = Path(__file__).parents[1]


def equal_reward(completion_ids, **kwargs):
    return [1.0 for _ in completion_ids]


def differing(completion_ids, **kwargs):
    return [float(number % 2) for number, _ in enumerate(completion_ids)]


EQUAL = r"Nothing could be learned: all rewards of a group are equal \(frac_reward_zero_std is 1 in every log; see "
MASKED = r"Nothing could be learned: all completions are cut off and masked \(completions/clipped_ratio is 1 in every"
STILL = r"Nothing could be learned: no step changes a weight \({} is 0 in every log"
CUT_OFF = r"All completions are cut off \(completions/clipped_ratio is 1 in every log"


@pytest.mark.parametrize(
    ("reward", "settings", "said"),
    [
        (equal_reward, {"max_completion_length": 6}, EQUAL),
        (equal_reward, {"max_completion_length": 6, "logging_strategy": "no"}, EQUAL),
        (differing, {"max_completion_length": 1, "mask_truncated_completions": True}, MASKED),
        (differing, {"max_completion_length": 6, "learning_rate": 0.0}, STILL.format("learning_rate")),
        (differing, {"max_completion_length": 1, "max_steps": 1}, CUT_OFF),
        (differing, {"max_completion_length": 16}, None),
    ],
    ids=["equal", "equal, no logs", "masked", "no rate", "cut off", "well"],
)
def test_what_a_run_could_not_learn_is_said(tiny_model, tmp_path, caplog, reward, settings, said):
    trainer = build(tiny_model, **settings, output_dir=str(tmp_path), arguments={"reward_funcs": reward})
    trainer.train()
    remarks = [text for text in caplog.messages if "docs/troubleshooting.md" in text]
    assert bool(remarks) == (said is not None)
    if said is None:
        return
    assert len(remarks) == 1
    assert re.search(said, remarks[0])
    if "Nothing" in said:
        assert_same_weights(weights_of(trainer.model), weights_of(load(tiny_model)))
    page, entry = re.search(r"(docs/\S+\.md)#([\w-]+)", remarks[0]).groups()
    titles = re.findall(r"^### (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert entry in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_a_run_that_is_stopped_is_not_judged(tiny_model, tmp_path, caplog):
    def stopped(completion_ids, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return equal_reward(completion_ids)

    with pytest.raises(SystemExit):
        build(tiny_model, output_dir=str(tmp_path), arguments={"reward_funcs": stopped}).train()
    assert "could be learned" not in caplog.text
