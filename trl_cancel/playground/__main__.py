"""
Writes the playground to a folder, for scripts that name a model and a data set by their paths:

    python -m trl_cancel.playground playground

makes `playground/model`, for `from_pretrained`, and `playground/data`, for `load_dataset`, with the columns of TRL's
math data sets (`prompt`, `solution`) and those of GSM8K (`question`, `answer`).
"""

import argparse
import shutil
from pathlib import Path

from ..texts import plain
from . import CHECKPOINT


def write_playground(folder: Path, num_train: int = 1024, num_test: int = 128) -> None:
    """
    Writes the model and the data.

    Args:
        folder (`Path`):
            Folder to write to; made if it is missing.
        num_train (`int`, *optional*, defaults to `1024`):
            Problems of the split `train`.
        num_test (`int`, *optional*, defaults to `128`):
            Problems of the split `test`.
    """
    from .data import load_prompts

    shutil.copytree(CHECKPOINT, folder / "model", dirs_exist_ok=True)
    for split, count in (("train", num_train), ("test", num_test)):
        problems = load_prompts(split, count)
        problems.map(_as_gsm8k, remove_columns="response").to_json(folder / "data" / f"{split}.jsonl")


def _as_gsm8k(row: dict) -> dict[str, str]:
    *work, _ = row["response"].splitlines()
    answer = row["solution"].removeprefix("\\boxed{").removesuffix("}")
    return {"question": row["prompt"][0]["content"], "answer": "\n".join([*work, f"#### {answer}"])}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trl_cancel.playground",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder to write to")
    folder = parser.parse_args().folder
    write_playground(folder)
    print(plain(f"Wrote {folder / 'model'} and {folder / 'data'}."))


if __name__ == "__main__":
    main()
