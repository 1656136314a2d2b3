"""What a run is given, checked before anything is generated: rows, reward functions and tokenizer must fit together."""

import inspect
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from trl.data_utils import is_conversational

from ..upstream.trl import get_callable_name


# What TRL passes to every reward function by name, beside the columns of the data set; tests/contract/ looks.
PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Columns that TRL does not pass on, and parameters that are often taken for what it passes instead.
KEPT = {"prompt": "prompts", "completion": "completions", "completion_ids": "completion_ids"}

PROMPTS = (
    "A prompt must be a text or a conversation, [{'role': 'user', 'content': ...}]; leave other rows out, e.g. "
    "dataset.filter(lambda row: bool(row['prompt']))."
)


def columns_of(dataset: Any) -> list[str] | None:
    """
    The columns that the rows of a data set will have, where that is certain without looking at one: to look could take
    a row from a stream, or a random number from a transform.

    Args:
        dataset (`Any`):
            Data set.

    Returns:
        `list[str]`, *optional*: `None` for rows that are made on the fly, streams that do not know theirs, and whatever
        is no data set of the `datasets` library itself.
    """
    if type(dataset) is IterableDataset:
        return dataset.column_names
    if type(dataset) is not Dataset or dataset.format["type"] == "custom":
        return None
    return dataset.column_names if dataset.format["output_all_columns"] else list(dataset.format["columns"])


def first_prompt(dataset: Any) -> Any:
    """The first prompt of a data set, if it can be looked at without consequences; `None` otherwise."""
    if type(dataset) is not Dataset or "prompt" not in (columns_of(dataset) or ()) or not len(dataset):
        return None
    return dataset.with_format(None, columns=["prompt"])[0]["prompt"]


def check_prompt(source: str, columns: Iterable[str]) -> None:
    """
    Refuses rows without a prompt.

    Args:
        source (`str`):
            What the rows are of.
        columns (`Iterable[str]`):
            Their columns.

    Raises:
        `ValueError`: If there is no `prompt`.
    """
    if "prompt" not in columns:
        raise ValueError(
            f"{source} has the columns {list(columns)} but no 'prompt'. Rename or map the column that holds the "
            "prompts, e.g. dataset.rename_column('question', 'prompt')."
        )


def check_prompts(source: str, dataset: Any, column: str = "prompt") -> int | None:
    """
    Refuses prompts that are neither texts nor conversations, where they can be looked at without consequences.

    Args:
        source (`str`):
            What the data set is.
        dataset (`Any`):
            Data set.
        column (`str`, *optional*, defaults to `"prompt"`):
            The column that holds them.

    Returns:
        `int`, *optional*: The first row whose prompt is an empty text, which some tokenizers make tokens of.

    Raises:
        `ValueError`: Names the first row that is wrong.
    """
    if type(dataset) is not Dataset or column not in (columns_of(dataset) or ()):
        return None
    first = None
    for start, batch in zip(count(step=1000), dataset.with_format("arrow", columns=[column]).iter(1000), strict=False):
        for row in _rows_to_look_at(batch[column]):
            prompt = batch[column][row].as_py()
            if prompt == "":
                first = start + row if first is None else first
            elif not isinstance(prompt, str) or not prompt:
                raise _no_prompt(source, start + row, prompt, column)
    return first


def _no_prompt(source: str, row: int, prompt: Any, column: str = "prompt") -> ValueError:
    quoted = repr(prompt)
    return ValueError(f"{source}[{row}][{column!r}] is {quoted[:200]}{'...' * (len(quoted) > 200)}. {PROMPTS}")


def _rows_to_look_at(prompts: Any) -> list[int]:
    """Rows that hold nothing, or the first one if all are numbers."""
    kind = prompts.type
    if pa.types.is_primitive(kind) or pa.types.is_null(kind):
        return [0]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        nothing = pc.equal(pc.binary_length(prompts), 0)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        nothing = pc.equal(pc.list_value_length(prompts), 0)
    else:
        nothing = pc.is_null(prompts)
    return pc.indices_nonzero(nothing.fill_null(True)).to_pylist()


def check_row(source: str, row: Mapping[str, Any], tokenizer: Any) -> None:
    """
    Refuses a row whose prompt is missing, a number or empty, unless the tokenizer makes tokens of an empty text.

    Args:
        source (`str`):
            What the row is of.
        row (`Mapping[str, Any]`):
            The row.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.

    Raises:
        `ValueError`: Quotes the row.
    """
    prompt = row["prompt"]
    nothing = prompt is None or isinstance(prompt, int | float) or (isinstance(prompt, str | list) and not prompt)
    if not nothing or (prompt == "" and makes_tokens(tokenizer)):
        return
    quoted = repr(dict(row))
    raise ValueError(
        f"A row of {source} has the prompt {prompt!r}: {quoted if len(quoted) < 200 else quoted[:200] + '...'}. {PROMPTS}"
    )


def makes_tokens(tokenizer: Any) -> bool:
    """Whether a tokenizer makes tokens of an empty text, such as one that begins it."""
    return bool(tokenizer("")["input_ids"])


def check_rewards(
    functions: Any,
    columns: Iterable[str],
    source: str,
    *,
    passed: Collection[str] = PASSED,
    may_grow: bool = False,
) -> None:
    """
    Refuses reward functions that cannot be called as TRL calls them, by name, with what it passes and with the columns
    of the data set. Functions whose parameters cannot be known are left to the call.

    Args:
        functions (`Callable` or `list`):
            Reward functions; models and their names are passed over.
        columns (`Iterable[str]`):
            Columns of the data set.
        source (`str`):
            What these are the columns of.
        passed (`Collection[str]`, *optional*):
            Names that are passed whatever the columns are.
        may_grow (`bool`, *optional*, defaults to `False`):
            Whether further values may be passed that are not known yet.

    Raises:
        `ValueError`: Names the function, its parameters and the columns.
    """
    columns = list(columns)
    for function in functions if isinstance(functions, list) else [functions]:
        if callable(function) and not isinstance(function, torch.nn.Module):
            _check_reward(function, columns, source, passed, may_grow)


def _check_reward(function: Any, columns: list[str], source: str, passed: Collection[str], may_grow: bool) -> None:
    name = get_callable_name(function)
    for twice in ("prompts", "completions"):
        if twice in columns:
            raise ValueError(
                f"{source} has a column {twice!r}, which is what TRL calls the {twice} that it passes to reward "
                "functions. Rename the column."
            )
    parameters = _parameters(function)
    if parameters is None:
        return
    given = {*passed, *(column for column in columns if column not in KEPT)}
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if by_place:
        raise ValueError(
            f"The reward function {name!r} takes {_listed(by_place)} by position only, but TRL passes everything by "
            "name. Take the / out of its parameters."
        )
    needed = [p.name for p in named.values() if p.default is p.empty and p.name not in given]
    if needed and not may_grow:
        meant = "".join(f" TRL passes {KEPT[n]!r}, all at once." for n in needed if n in KEPT)
        raise ValueError(
            f"The reward function {name!r} needs {_listed(needed)}, but {source} has the columns {', '.join(columns)}."
            f"{meant} Rename a column or the parameter, or give the parameter a default."
        )
    unknown = [n for n in [*passed, *columns] if n in given and n not in named]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"The reward function {name!r} does not take {_listed(dict.fromkeys(unknown))}, which TRL passes by name "
            "to every reward function. Add **kwargs to its parameters."
        )


def _parameters(function: Any) -> list[inspect.Parameter] | None:
    """
    The parameters with which a function is really called: those of a decorator's own function, not of the decorated
    one, which may be called otherwise. `None` where they are not known, or only claimed (`__signature__`).
    """
    called = function
    while isinstance(called, partial):
        called = called.func
    if hasattr(called, "__signature__") or hasattr(type(called).__call__, "__signature__"):
        return None
    try:
        return list(inspect.signature(function, follow_wrapped=False).parameters.values())
    except (TypeError, ValueError):  # of a built-in function, say
        return None


def _listed(names: Iterable[str]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} and {last}" if others else last


def check_problems(source: str, problems: Any, reward: Any, tokenizer: Any) -> None:
    """
    Refuses problems of an evaluation that cannot be answered or scored.

    Args:
        source (`str`):
            What they are called.
        problems ([`~datasets.Dataset`] or `list[dict]`):
            The problems. Rows that a data set makes on the fly are not looked at.
        reward (`Callable`):
            Reward function.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.

    Raises:
        `ValueError`: If a row has no prompt, or one of another kind than the first, if the reward function cannot be
            called, or the chat template is missing.
    """
    columns = list(problems[0]) if isinstance(problems, list) else columns_of(problems)
    if columns is None:
        return
    check_prompt(source, columns)
    check_rewards(reward, columns, source)
    if isinstance(problems, list):
        prompts = [row.get("prompt") for row in problems]
    elif type(problems) is Dataset:
        prompts = problems.with_format(None, columns=["prompt"])["prompt"][:]
    else:
        return
    _check_kinds(source, prompts)
    if "" in prompts and not makes_tokens(tokenizer):
        row = prompts.index("")
        raise ValueError(f"{source}[{row}]['prompt'] is '', of which the tokenizer makes no tokens. {PROMPTS}")
    if not isinstance(prompts[0], str):
        check_chat_template(source, tokenizer)


def _check_kinds(source: str, prompts: list[Any]) -> None:
    """Refuses what is neither a text nor a conversation, and both at once: prompts of an evaluation go together."""
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not (prompt and is_conversational({"prompt": prompt})):
            raise _no_prompt(source, row, prompt)
        if isinstance(prompt, str) != isinstance(prompts[0], str):
            kind, first = ("text", "conversation") if isinstance(prompt, str) else ("conversation", "text")
            raise ValueError(
                f"{source}[{row}]['prompt'] is a {kind}, but that of {source}[0] is a {first}. Make all of them one kind."
            )


def check_chat_template(source: str, processing_class: Any, whose: str = "the tokenizer") -> None:
    """
    Refuses a tokenizer that cannot write conversations.

    Args:
        source (`str`):
            What holds the conversations.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            The tokenizer, or the processor that has it.
        whose (`str`, *optional*):
            What it is called.

    Raises:
        `ValueError`: If it has no chat template and needs one.
    """
    if getattr(processing_class, "chat_template", None) is not None:
        return
    try:  # some write conversations without a template, Mistral's own for one
        processing_class.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except Exception as error:
        raise ValueError(
            f"{source} holds conversations, but {whose} has no chat template. Set its chat_template, take a model that "
            "was tuned on conversations, or make the prompts texts."
        ) from error


def check_tokens(tokenizer: Any, *, ends_answers: bool) -> None:
    """
    Refuses a tokenizer that cannot pad, or end an answer; TRL lets it pad with the token that ends one.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer, as TRL has completed it.
        ends_answers (`bool`):
            Whether its own token is needed to end an answer, as it is where transformers generates.

    Raises:
        `ValueError`: If it lacks the token.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "The tokenizer has neither a pad_token nor an eos_token, so rollouts can be neither ended nor padded. Set "
            "tokenizer.eos_token to the token that ends an answer, and pass the tokenizer as processing_class."
        )
    if ends_answers and tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no eos_token, so TRL cannot tell where a rollout ends. Set tokenizer.eos_token to the "
            "token that ends an answer, and pass the tokenizer as processing_class."
        )
