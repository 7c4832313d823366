"""Folders put into repositories of the Hugging Face hub."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from vavae.errors import UserError
from vavae.runs.run import PUBLISHED
from vavae.storage.retry import is_transient

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
_ELSEWHERE = "--out FOLDER writes what would be uploaded"
_REPLACED = (
    *(f"{folder}/*" for folder in (*PUBLISHED.values(), "scheduler", "latents")),
    *("*.py", "*.png", "model_index.json", "metrics.json"),
)
"""Files of an earlier push that go where the new one has none of their name."""


def check_repository(name: str) -> None:
    """Raise a UserError unless a text has the form of the name of a repository, `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}: name the repository as owner/name") from error
    if name.count("/") != 1:
        raise UserError(f"{name}: no owner: name the repository as owner/name")


def check_upload() -> None:
    """Raise a UserError where no upload can succeed: without a token, or where HF_HUB_OFFLINE forbids the network."""
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"HF_HUB_OFFLINE is set, which forbids to ask the hub: unset it; {_ELSEWHERE}")
    if get_token() is None:
        raise UserError(f"no token of the hub: {_LOG_IN}; {_ELSEWHERE}")


def upload(folder: Path, name: str, private: bool, revision: str | None, message: str) -> str:
    """Put the files of a folder into a repository, which is made where there is none; in place of an earlier push.

    Args:
        folder: the folder.
        name: of the repository, `owner/name`.
        private: make the repository a private one.
        revision: branch, which is made where there is none; None for the main one.
        message: of the commit.

    Returns:
        Address of the page of the repository, or of the branch.

    Raises:
        UserError: the hub refuses it or can't be reached, or the upload broke off; or the repository is there and
            public where it is to be private.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(library_name="vavae")
    with _one_line(name, api.endpoint):
        page = str(api.create_repo(name, private=private or None, exist_ok=True))
        if private and not api.model_info(name).private:
            raise UserError(f"{name}: it is there and public, so --private can't be: make it private, or name another")
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
            page = f"{page}/tree/{revision}"
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns=[*_REPLACED],
        )
    return page


@contextmanager
def _one_line(name: str, endpoint: str) -> Iterator[None]:
    """Raise what the hub refuses, and what breaks on the way to it, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled as error:
        raise UserError(f"{name}: HF_HUB_OFFLINE forbids to ask the hub: unset it; {_ELSEWHERE}") from error
    except ValueError as error:
        raise UserError(f"{name}: the hub does not take the card ({_reason(error)}): correct --license") from error
    except Exception as error:
        if not isinstance(error, (OSError, RuntimeError)) and not is_transient(error):
            raise
        raise UserError(f"{name}: {_explain(error, name, endpoint)}") from error


def _explain(error: Exception, name: str, endpoint: str) -> str:
    owner = name.partition("/")[0]
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    reason = _reason(error)
    match status:
        case 401:
            return f"{endpoint} does not accept the token ({reason}): {_LOG_IN}"
        case 403:
            return f"the account of this token may not write to {owner} ({reason}): name your own, or {_LOG_IN}"
        case 404:
            return f"{endpoint} has no such place ({reason}): correct the name or the revision"
        case None if is_transient(error) and "Connect" in type(error).__name__:
            return f"no way to {endpoint} ({reason}): try again where there is a connection; {_ELSEWHERE}"
    return f"the upload broke off ({reason}); nothing is lost: run the same command again"


def _reason(error: Exception) -> str:
    """The message of the hub where there is one, else that of the error or, of a wrapped one, of its cause."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    message = getattr(cause, "server_message", None) or str(cause) or type(cause).__name__
    return " ".join(message.split()).rstrip(".")
