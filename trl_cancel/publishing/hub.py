"""Pushing to the Hub: early checks, errors that say what to do next, and a second try from what is on disk."""

import errno
import logging
import shlex
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from ..running.secrets import quotable, without_tokens
from ..texts import plain
from ..version import __version__
from .model_card import FILE, rename_in_card


logger = logging.getLogger(__name__)


# Files of a model, its tokenizer and its results. Nothing in a folder below, and nothing pickled: checkpoints, states of
# optimizers, arguments, logs of trackers.
SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".md")
MODEL_FILES = ("config.json", "adapter_config.json")
COMMIT_MESSAGE = "Upload model"


class PushError(RuntimeError):
    """
    What the Hub refused, or could not be asked for.

    Args:
        message (`str`):
            One line that says what failed and what to do.
        refused (`bool`):
            Whether trying again without changing anything cannot help: a token, a name or a permission.
    """

    def __init__(self, message: str, refused: bool):
        super().__init__(message)
        self.refused = refused


def check_token(token: str | None) -> None:
    """
    Asks the Hub who a token belongs to.

    Args:
        token (`str`, *optional*):
            The token; the one that is logged in with if not given.

    Raises:
        `PushError`: If the token is refused, or the Hub cannot be reached.
    """
    try:
        _api(token).whoami()
    except Exception as error:
        raise no_access(error) from quotable(error)


def check_write(repo_id: str, token: str | None) -> None:
    """
    Asks the Hub whether a token may write to a repository that exists.

    Args:
        repo_id (`str`):
            The repository.
        token (`str`, *optional*):
            The token; the one that is logged in with if not given.

    Raises:
        `PushError`: If it may not.
    """
    try:
        _api(token).auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if _status(error) in (401, 403):  # not all servers know the question
            raise no_access(error, repo_id) from quotable(error)
    except Exception as error:
        raise no_access(error, repo_id) from quotable(error)


def no_access(error: Exception, repo_id: str | None = None) -> PushError:
    """The error for a run that is to be pushed but cannot be, before it has started."""
    what = "the Hub" if repo_id is None else repo_id
    return PushError(f"push_to_hub: no access to {plain(what)}: {plain(reason(error))}.", is_refusal(error))


def push_failed(
    error: Exception,
    folder: str,
    repo_id: str,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str = COMMIT_MESSAGE,
) -> PushError:
    """The error for a push that failed after the model was saved, with the command that makes up for it."""
    words = ["trl-cancel", "push", folder, "--hub_model_id", repo_id]
    words += ["--hub_revision", revision] if revision else []
    words += ["--hub_private_repo"] if private else []
    words += ["--commit_message", commit_message] if commit_message != COMMIT_MESSAGE else []
    command = shlex.join(words)
    saved = plain(f"It is saved in {folder}; push it with: {command}")
    return PushError(
        f"The model could not be pushed to {plain(repo_id)}: {plain(reason(error))}. {saved}",
        is_refusal(error),
    )


def comes_from_hub(error: Exception) -> bool:
    """Whether an error was raised within a call of the Hub's client."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("huggingface_hub" in Path(frame.filename).parts for frame in frames)


def is_refusal(error: BaseException) -> bool:
    """Whether trying again without changing anything cannot help."""
    if any(
        isinstance(part, (OfflineModeIsEnabled, LocalTokenNotFoundError, HFValidationError)) for part in _chain(error)
    ):
        return True
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 429)


def reason(error: BaseException) -> str:
    """Why a request to the Hub failed, in one line and without the full stop."""
    for part in _chain(error):
        if isinstance(part, OfflineModeIsEnabled):
            return "offline mode is on (HF_HUB_OFFLINE=1)"
        if isinstance(part, LocalTokenNotFoundError):
            return "there is no token; run `hf auth login`, set HF_TOKEN or pass hub_token"
    status = _status(error)
    if status == 401:
        return "the token was refused (401); run `hf auth login`, set HF_TOKEN or pass hub_token"
    if status == 403:
        return "the token may not write there (403); use one with write permission for this user or organization"
    if status == 429:
        return "too many requests (429); try again later"
    if status is not None and status >= 500:
        return f"the Hub answered {status}; try again later"
    innermost = list(_chain(error))[-1]
    if isinstance(innermost, (ConnectionRefusedError, socket.gaierror)):
        return f"{constants.ENDPOINT} cannot be reached ({innermost.strerror}); check the network, or HF_ENDPOINT"
    lines = [line for line in str(innermost).strip().splitlines() if line]
    return without_tokens((lines[0] if lines else type(innermost).__name__).rstrip("."))


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = COMMIT_MESSAGE,
) -> str:
    """
    Pushes what a run has left in its output folder: the model, its tokenizer, its card and its results. What the
    repository has already is not uploaded again.

    Args:
        folder (`Path`):
            Output folder of a run.
        repo_id (`str`):
            Repository; made if there is none.
        token (`str`, *optional*):
            Token; the one that is logged in with if not given.
        private (`bool`, *optional*):
            Whether a repository that is made is private.
        revision (`str`, *optional*):
            Branch; `main` if not given.
        commit_message (`str`, *optional*):
            Message of the commit.

    Returns:
        `str`: Address of the repository.

    Raises:
        `PushError`: If the Hub refuses or cannot be reached.
    """
    api = _api(token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        check_write(repo.repo_id, token)
        if (folder / FILE).is_file():
            try:
                rename_in_card(folder / FILE, repo.repo_id)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                logger.warning(
                    f"{folder / FILE} cannot be written ({error.strerror}): the card's code loads the old name."
                )
        if revision is not None:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            allow_patterns=list(files_to_push(folder)),
            commit_message=commit_message,
            revision=revision,
        )
    except PushError:
        raise
    except Exception as error:
        failed = push_failed(error, str(folder), repo_id, revision, private, commit_message)
        raise failed from quotable(error)
    return str(repo)


def files_to_push(folder: Path) -> Iterator[str]:
    """Names of the files in a folder that make up a model and its results."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in SUFFIXES and not path.name.startswith((".", "_")):
            yield path.name


def license_of(repo_id: str, token: str | None = None) -> str | None:
    """The license that a model's card states, `None` where it cannot be found out."""
    try:
        data: Any = _api(token).model_info(repo_id, timeout=10).card_data
    except Exception:  # it is a nicety
        return None
    return data.license if data else None


def _api(token: str | None) -> HfApi:
    token = token.strip() if token else token  # as read from a file
    return HfApi(token=token, library_name="trl-cancel", library_version=__version__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _status(error: BaseException) -> int | None:
    statuses = [part.response.status_code for part in _chain(error) if isinstance(part, HfHubHTTPError)]
    return statuses[-1] if statuses else None
