"""Presets, on stand-ins with the columns of the real data sets."""

import pytest
from datasets import Dataset

from trl_cancel.evaluation import PRESETS, DataSource, load_problems, math_verify_reward, presets
from trl_cancel.evaluation.presets import INSTRUCTION, SOURCES


# The columns as code that loads the real ones describes them, with what their right answers look like.
STAND_INS = {
    "HuggingFaceH4/aime_2024": {"problem": "P", "solution": "Long. \\boxed{33}", "answer": "033", "year": "2024"},
    "math-ai/aime25": {"problem": "P", "answer": "70", "id": "0"},
    "MathArena/aime_2026": {"problem_idx": 1, "answer": 277, "problem": "P"},
    "math-ai/amc23": {"id": 0, "answer": "27.0", "question": "P", "url": "u"},
    "HuggingFaceH4/MATH-500": {
        "problem": "P",
        "solution": "Long.",
        "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
        "subject": "Precalculus",
        "level": 2,
        "unique_id": "u",
    },
    "math-ai/minervamath": {"question": "P", "answer": "4.5e33"},
    "math-ai/olympiadbench": {"id": 1, "question": "P", "final_answer": ["$2$", "$5$"], "subfield": "Algebra"},
    "MathArena/hmmt_feb_2025": {"problem_idx": 1, "answer": "103", "problem": "P", "problem_type": ["Number Theory"]},
    "MathArena/hmmt_nov_2025": {"problem_idx": 1, "answer": "\\frac{1}{576}", "problem": "P"},
    "MathArena/hmmt_feb_2026": {"problem_idx": 1, "answer": "\\sqrt{2}", "problem": "P"},
    "MathArena/brumo_2025": {"problem_idx": 1, "answer": "181", "problem": "P"},
}
RIGHT = {
    "HuggingFaceH4/aime_2024": "33",
    "math-ai/aime25": "70",
    "MathArena/aime_2026": "277",
    "math-ai/amc23": "27",
    "HuggingFaceH4/MATH-500": "(3, \\pi/2)",
    "math-ai/minervamath": "4.5e33",
    "math-ai/olympiadbench": "2, 5",
    "MathArena/hmmt_feb_2025": "103",
    "MathArena/hmmt_nov_2025": "1/576",
    "MathArena/hmmt_feb_2026": "\\sqrt{2}",
    "MathArena/brumo_2025": "181",
}


@pytest.fixture
def hub(monkeypatch):
    """A Hub with the stand-ins, two rows each."""
    asked = []

    def load(path, name=None, split=None):
        asked.append((path, name, split))
        if path not in STAND_INS:
            raise FileNotFoundError(f"{path} is not here")
        return Dataset.from_list([{**STAND_INS[path]}, {**STAND_INS[path]}])

    monkeypatch.setattr(presets, "load_dataset", load)
    return asked


@pytest.mark.parametrize("name", SOURCES)
def test_data_sets_become_prompts_and_solutions(name, hub):
    source = SOURCES[name]
    problems = load_problems(source, instruction=INSTRUCTION)
    assert hub == [(source.path, None, source.split)]
    assert problems["prompt"][:] == [[{"role": "user", "content": f"P\n\n{INSTRUCTION}"}]] * 2
    right, wrong = (f"So \\boxed{{{answer}}}." for answer in (RIGHT[source.path], "12345"))
    assert math_verify_reward([right, wrong], problems["solution"]) == [1.0, 0.0]


def test_every_preset_is_one_of_a_paper():
    assert set(STAND_INS) == {source.path for source in SOURCES.values()}
    assert {preset.source for preset in PRESETS.values()} == set(SOURCES.values())
    assert set(SOURCES) <= set(PRESETS)
    assert {preset.paper for preset in PRESETS.values()} == {"2605.08666", "2605.21467", "2604.13088", "2505.18830"}
    for name, preset in PRESETS.items():
        assert preset.source == SOURCES[name if name in SOURCES else name.rpartition("-")[0]]
    assert PRESETS["aime24"] == PRESETS["aime24-cancellation"]
    assert PRESETS["aime24"].settings.num_samples == 32
    assert PRESETS["aime26"].settings.num_samples == 16
    assert PRESETS["math500-nthr"].settings.tries == []


def test_texts_for_models_without_a_chat_template(hub):
    problems = load_problems(SOURCES["aime24"], 1, "Box it.", conversational=False)
    assert problems["prompt"][:] == ["P\n\nBox it.\n"]
    assert problems["year"][:] == ["2024"]


def test_prompts_as_they_are(monkeypatch):
    conversation = [{"role": "user", "content": "1+1"}]
    rows = Dataset.from_dict({"prompt": [conversation], "solution": ["2"], "level": [3]})
    monkeypatch.setattr(presets, "load_dataset", lambda *_, **__: rows)
    problems = load_problems(DataSource("any", "test", "prompt", "solution"), instruction="Box it.")
    assert problems[0] == {"level": 3, "prompt": conversation, "solution": "2"}


def test_rewards_that_need_no_solution(monkeypatch):
    """A column of that name is kept, where there is one."""
    for columns in ({"prompt": ["1+1"]}, {"prompt": ["1+1"], "solution": ["2"]}):
        monkeypatch.setattr(presets, "load_dataset", lambda *_, rows=columns, **__: Dataset.from_dict(rows))
        problems = load_problems(DataSource("any", "test", "prompt", solution=None))
        assert problems.to_dict() == columns


def test_what_cannot_be_loaded_is_named(hub, monkeypatch):
    with pytest.raises(ValueError, match=r"data set no/where, split 'test': cannot load it \(no/where is not here\)"):
        load_problems(DataSource("no/where", "test"))
    with pytest.raises(ValueError, match=r"math-ai/aime25.* has the columns problem, answer, id but no 'question'"):
        load_problems(DataSource("math-ai/aime25", "test", problem="question"))
    monkeypatch.setattr(presets, "load_dataset", lambda *_, **__: Dataset.from_dict({"problem": [], "answer": []}))
    with pytest.raises(ValueError, match="has no problems"):
        load_problems(SOURCES["aime25"])


@pytest.mark.parametrize(
    ("paper", "names"),
    [
        ("2605.08666", ("aime24", "aime25", "amc23", "math500", "minerva", "olympiad")),
        ("2605.21467", ("aime26", "hmmt25-feb", "hmmt25-nov", "hmmt26-feb", "brumo25")),
    ],
)
def test_short_names_stand_for_the_papers_that_the_page_names(paper, names):
    assert {PRESETS[name].paper for name in names} == {paper}
