"""File systems by URL, and those of their errors that a user can mend."""

from typing import Any, NamedTuple

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from vavae.config import is_hub_address
from vavae.config.credentials import REFUSAL, has_credentials
from vavae.errors import UserError
from vavae.storage.config import StorageOptions
from vavae.storage.hub import fetch_from_hub
from vavae.storage.retry import error_class_names

_S3 = ("s3", "s3a")
_DENIED = {
    "builtins.PermissionError",
    "botocore.exceptions.NoCredentialsError",
    "botocore.exceptions.PartialCredentialsError",
    "botocore.exceptions.CredentialRetrievalError",
    "botocore.exceptions.ProfileNotFound",
    "botocore.exceptions.TokenRetrievalError",
    "google.auth.exceptions.GoogleAuthError",
}
_UNTRUSTED = {"botocore.exceptions.SSLError", "ssl.SSLCertVerificationError"}


class Place(NamedTuple):
    """A file system and the name that it has for the root."""

    filesystem: Any
    base: str


def open_place(root: str, options: StorageOptions) -> Place:
    """The file system of a folder or URL; UserError where there is none, or where the URL carries credentials.

    What a place on the hub holds is fetched whole, into a folder of the hub's cache.
    """
    if is_hub_address(root):
        return Place(LocalFileSystem(), fetch_from_hub(root))
    protocol = root.partition("://")[0]
    try:
        if has_credentials(root):
            raise ValueError(REFUSAL)
        # Other processes write too: a listing kept in this one would miss their files.
        if protocol in _S3 and "::" not in root:
            from vavae.storage.s3 import RetryingS3  # slow, and of no use to local runs

            s3 = RetryingS3(options, use_listings_cache=False)
            return Place(s3, s3._strip_protocol(root))
        return Place(*url_to_fs(root, use_listings_cache=False))
    except ImportError as error:
        raise UserError(f"storage {root!r}: {error}; pip install the package that {protocol}:// needs") from error
    except ValueError as error:
        raise UserError(f"storage {_shown(root)!r}: {error}; give a folder or a URL that fsspec knows") from error


def explained(error: Exception, url: str, endpoint: str | None = None) -> Exception | None:
    """The error to raise in place of one that a file system raised over a file; None where that one says enough.

    Args:
        error: what it raised.
        url: of the file.
        endpoint: address of the server that was asked, where there is one.
    """
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(url)
    names = error_class_names(error)
    if names & _DENIED:
        by = "" if endpoint is None else f" by {endpoint}"
        return UserError(
            f"{url}: access denied ({type(error).__name__}){by}: check the rights of the keys in the environment, "
            "storage.profile or the machine's role, or set storage.anonymous for a public bucket; another server than "
            "this is named by AWS_ENDPOINT_URL or storage.endpoint"
        )
    if names & _UNTRUSTED:
        return UserError(f"{url}: the server's certificate is not trusted: set storage.ca_bundle to its authority's")
    return None


def _shown(root: str) -> str:
    """A root as it may be printed: without the credentials that it may hold."""
    if not has_credentials(root):
        return root
    scheme, separator, _ = root.partition("://")
    return f"{scheme}://..." if separator else "..."
