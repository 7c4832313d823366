"""Folders of models on the Hugging Face hub, fetched into its cache."""

import re

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from vavae.errors import UserError
from vavae.models.backbones.config import HUB_PREFIX

_ADDRESS = re.compile(HUB_PREFIX + r"(?P<repository>[\w.-]+/[\w.-]+)(/(?P<folder>[\w./-]+))?(@(?P<revision>[\w./-]+))?")


def fetch_diffusers_folder(address: str) -> str:
    """Fetch the configuration and the safetensors files of a diffusers model, unless the cache has them.

    Args:
        address: `hf-hub:owner/name`, with the model's folder in a repository of several and a revision where there are
            any: `hf-hub:owner/name/vae@main`.

    Returns:
        Path of the local folder.

    Raises:
        UserError: the address has another form, or there is no way to these files.
    """
    parts = _ADDRESS.fullmatch(address)
    if parts is None:
        raise UserError(f"{address}: write {HUB_PREFIX}owner/name, or {HUB_PREFIX}owner/name/folder@revision")
    folder = f"{parts['folder']}/" if parts["folder"] else ""
    patterns = [folder + name for name in ("config.json", "*.safetensors", "*.safetensors.index*.json")]
    try:
        root = huggingface_hub.snapshot_download(
            parts["repository"], revision=parts["revision"], allow_patterns=patterns
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"{address} is neither in the cache {huggingface_hub.constants.HF_HUB_CACHE} nor reachable: download its "
            f"{folder}config.json and {folder}diffusion_pytorch_model.safetensors where there is a connection, and "
            "import the folder that they are in"
        ) from error
    return f"{root}/{folder}"
