"""`trl-cancel push`: pushes what a run has left on disk, for instance after an upload that failed."""

import argparse
from pathlib import Path

from ..texts import plain
from . import Failure, OneLineErrors, UsageError
from ._quiet import quiet


class PushParser(OneLineErrors, argparse.ArgumentParser):
    """The options of a push."""


def run(arguments: list[str]) -> int:
    parser = PushParser(prog="trl-cancel push", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", help="output folder of a training run")
    parser.add_argument("--hub_model_id", required=True, help="repository, as USER/NAME; made if there is none")
    parser.add_argument("--hub_private_repo", action="store_true", help="make the repository private")
    parser.add_argument("--hub_revision", help="branch (default: main)")
    parser.add_argument("--hub_token", help="token with write permission (default: HF_TOKEN or `hf auth login`)")
    parser.add_argument("--commit_message", default="Upload model", help="default: %(default)s")
    options = parser.parse_args(arguments)
    with quiet():
        return _push(options)


def _push(options: argparse.Namespace) -> int:
    from ..publishing.hub import MODEL_FILES, PushError, push_folder
    from ..running.damage import why_unusable

    folder = Path(options.folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder.")
    if not any((folder / name).is_file() for name in MODEL_FILES):
        raise UsageError(f"{folder}: the folder holds no model (no {' or '.join(MODEL_FILES)}).")
    reason = why_unusable(folder)
    if reason is not None:
        raise UsageError(f"{folder}: {reason}. Nothing was pushed; save the model again, or push a whole checkpoint.")
    try:
        address = push_folder(
            folder,
            options.hub_model_id,
            token=options.hub_token,
            private=options.hub_private_repo or None,
            revision=options.hub_revision,
            commit_message=options.commit_message,
        )
    except PushError as error:
        raise (UsageError if error.refused else Failure)(str(error)) from error
    print(plain(f"Pushed {folder} to {address}."))
    return 0
