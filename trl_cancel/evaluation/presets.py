"""Problems with their settings in the papers, and how data sets become prompts and solutions."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset

from ..arguments import whole
from ..methods import METHODS
from ..running import sources
from ..running.inputs import PROMPTS, check_prompts
from .settings import EvaluationSettings


INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class DataSource:
    """
    Where problems and their solutions come from.

    Args:
        path (`str`):
            Hub id, or local file or folder for [`~datasets.load_dataset`]. A file is the split that is asked for.
        split (`str`):
            Split.
        problem (`str`, *optional*, defaults to `"problem"`):
            Column of the problems: texts, or conversations.
        solution (`str`, *optional*, defaults to `"answer"`):
            Column of the right answers; `None` where the reward function needs none.
        config (`str`, *optional*):
            Configuration of the data set.
    """

    path: str
    split: str
    problem: str = "problem"
    solution: str | None = "answer"
    config: str | None = None


@dataclass(frozen=True)
class Preset:
    """
    A data set with the settings of a paper.

    Args:
        source ([`DataSource`]):
            The data.
        paper (`str`):
            arXiv id of the paper.
        settings ([`EvaluationSettings`]):
            How the paper answers.
    """

    source: DataSource
    paper: str
    settings: EvaluationSettings


# The Hub ids that public evaluation code uses; docs/evaluation.md says which were seen where.
SOURCES = {
    "aime24": DataSource("HuggingFaceH4/aime_2024", "train"),
    "aime25": DataSource("math-ai/aime25", "test"),
    "aime26": DataSource("MathArena/aime_2026", "train"),
    "amc23": DataSource("math-ai/amc23", "test", problem="question"),
    "math500": DataSource("HuggingFaceH4/MATH-500", "test"),
    "minerva": DataSource("math-ai/minervamath", "test", problem="question"),
    "olympiad": DataSource("math-ai/olympiadbench", "test", problem="question", solution="final_answer"),
    "hmmt25-feb": DataSource("MathArena/hmmt_feb_2025", "train"),
    "hmmt25-nov": DataSource("MathArena/hmmt_nov_2025", "train"),
    "hmmt26-feb": DataSource("MathArena/hmmt_feb_2026", "train"),
    "brumo25": DataSource("MathArena/brumo_2025", "train"),
}


def _presets() -> dict[str, Preset]:
    presets: dict[str, Preset] = {}
    for evaluation in (evaluation for method in METHODS for evaluation in method.evaluations):
        for name in evaluation.data:
            preset = Preset(SOURCES[name], evaluation.paper, EvaluationSettings(**evaluation.settings))
            if evaluation.is_usual:
                presets.setdefault(name, preset)
            presets[f"{name}-{evaluation.label}"] = preset
    return presets


# By name of the data set, and of the data set and the paper.
PRESETS = _presets()


def load_problems(
    source: DataSource,
    num_problems: int | None = None,
    instruction: str | None = None,
    conversational: bool = True,
) -> Dataset:
    """
    Problems of a data set as prompts.

    Args:
        source ([`DataSource`]):
            Where they come from.
        num_problems (`int`, *optional*):
            How many, the first ones; all if not given.
        instruction (`str`, *optional*):
            What is said after each problem that is a text. Without it problems are prompts as they are.
        conversational (`bool`, *optional*, defaults to `True`):
            Whether a problem with its instruction becomes a user's message, or a text for a model without chat
            template.

    Returns:
        [`~datasets.Dataset`]: Columns `prompt` and, if the source names one for it, `solution`; further columns are
        kept.

    Raises:
        `ValueError`: If the data set cannot be loaded or lacks a column, or `num_problems` is not positive.
    """
    if num_problems is not None:
        whole("num_problems", num_problems, 1)
    try:
        saved: Any = sources.load_files(source.path, source.split)
        path, files = sources.load_arguments(source.path, source.split)
        dataset: Any = (
            saved[source.split] if saved else load_dataset(path, name=source.config, split=source.split, **files)
        )
    except Exception as error:  # the library raises a dozen types for names, files and connections
        said = sources.in_short(error, source.path)
        raise ValueError(f"data set {source.path}, split {source.split!r}: cannot load it ({said}).") from error
    if num_problems is not None:
        dataset = dataset.select(range(min(num_problems, len(dataset))))
    if not len(dataset):
        raise ValueError(f"data set {source.path}, split {source.split!r}: it has no problems.")
    columns = dataset.column_names
    for column in (source.problem, source.solution):
        if column is not None and column not in columns:
            raise ValueError(
                f"data set {source.path}, split {source.split!r}: it has the columns {', '.join(columns)} but no "
                f"{column!r}."
            )

    if instruction is not None:  # which would hide that there is nothing before it
        empty = check_prompts(f"data set {source.path}", dataset, source.problem)
        if empty is not None:
            raise ValueError(f"data set {source.path}[{empty}][{source.problem!r}] is ''. {PROMPTS}")

    def prompt(problem: Any) -> Any:
        if not isinstance(problem, str):
            return problem
        question = f"{problem}\n\n{instruction}"
        return [{"role": "user", "content": question}] if conversational else f"{question}\n"

    # Columns as they are, with their types: values of several types do not tell theirs.
    def renamed(column: str, name: str) -> Dataset:
        alone = dataset.select_columns([column])
        return alone if column == name else alone.rename_column(column, name)

    if instruction is None:
        parts = [renamed(source.problem, "prompt")]
    else:
        parts = [Dataset.from_dict({"prompt": [prompt(problem) for problem in dataset[source.problem]]})]
    if source.solution is not None:
        parts.append(renamed(source.solution, "solution"))
    if others := [name for name in columns if all(name not in part.column_names for part in parts)]:
        parts.append(dataset.select_columns(others))
    return concatenate_datasets(parts, axis=1)
