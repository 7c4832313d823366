"""Repositories of the Hugging Face hub as local folders, by way of its cache."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from vavae.config import HubAddress
from vavae.errors import UserError

_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Ends of the names of files of weights."""
_READ = ("*.json", "*.yaml", "*.safetensors")
"""Files of a folder that are read here; what holds pickles is fetched where its path is given alone."""


def fetch_from_hub(address: str, without: Sequence[str] = ()) -> str:
    """Fetch a folder, or a file with the configuration beside it, unless the cache of the hub has them.

    Args:
        address: `hf-hub:owner/name[/path][@revision]`; a path that ends as files of weights do is one.
        without: patterns of paths in the repository that are left out.

    Returns:
        Path of the local folder or file. It lies below a folder by the name of the commit.

    Raises:
        UserError: the address has another form, there is nothing at it, or there is no way to it.
    """
    # It takes a second to import.
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        repository, path, revision = HubAddress.parse(address)
    except ValueError as error:
        raise UserError(str(error)) from None
    folder = f"{path}/" if path else ""
    patterns = [folder + name for name in _READ]
    if path.endswith(_WEIGHTS):
        beside = PurePosixPath(path).parent / "config.json"
        patterns = [path, str(beside)]
    try:
        root = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=[*without]
        )
    except RevisionNotFoundError as error:
        raise UserError(f"{address}: no such revision in this repository: name a branch, a tag or a commit") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{address}: no such repository, or none that this account may read: correct the name, or log in with "
            "`hf auth login`"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"{address} is neither in the cache {HF_HUB_CACHE} nor reachable: fetch it where "
            f"there is a connection, with `hf download {repository}`, and give the folder that it is in"
        ) from error
    local = Path(root, path)
    if not local.exists():
        raise UserError(f"{address}: no {path or 'weights or configuration'} in this repository: correct the path")
    return str(local)


def commit_of(local: str, address: str) -> str:
    """The address of the same place at the commit that was fetched.

    Args:
        local: path that `fetch_from_hub` gave for the address.
        address: the address.
    """
    place = HubAddress.parse(address)
    parts = Path(local).parts
    commit = parts[len(parts) - len(PurePosixPath(place.path).parts) - 1]
    return str(place._replace(revision=commit))
