"""The Inception network of published Fréchet distances: architecture and preprocessing of torch-fidelity.

It is the network of 2015-12-05 that the public evaluations use, translated from TensorFlow with its way of resizing.
"""

import importlib.util
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vavae.torchvision_compat  # noqa: F401  (before torch-fidelity)
from vavae.errors import UserError
from vavae.models.backbones.config import InceptionConfig
from vavae.models.backbones.load import freeze
from vavae.models.backbones.weights import answers
from vavae.storage.storage import Storage, sha256_of

POOLED_DIM = 2_048
_LOGITS, _SPATIAL_CHANNELS = "logits_unbiased", 7


class InceptionFeatures(NamedTuple):
    """Features of a batch of images, float32."""

    pooled: Tensor
    """Features [B, 2048] of FID, KID, precision and recall."""
    spatial: Tensor
    """Features [B, 17 · 17 · 7] of sFID: first seven channels of a convolution, TensorFlow's order."""
    logits: Tensor
    """Logits [B, 1008] of the Inception score; without the bias, as its public evaluations have them."""


class Inception(nn.Module):
    """The Inception network on uint8 images of any size; resized to 299 pixels bilinearly, as TensorFlow 1 did."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self._spatial: Tensor | None = None
        # `mixed_6/conv:0` in the graph of the public evaluation.
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        freeze(self)

    def forward(self, images: Tensor) -> InceptionFeatures:
        """Features of images [B, 3, H, W] in uint8."""
        pooled, logits = self.network(images)
        assert self._spatial is not None, "the forward pass goes through Mixed_6d"
        spatial, self._spatial = self._spatial, None
        return InceptionFeatures(pooled, spatial, logits)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # [B, 7, 17, 17] → [B, 2023]


def load_inception(config: InceptionConfig) -> Inception:
    """Load the network with its weights, frozen.

    Raises:
        UserError: torch-fidelity is not installed, or the weights cannot be had or are not those.
    """
    _check_installed()
    file = _weights_file(config)
    if not sha256_of(file).startswith(config.sha256):
        raise UserError(
            f"the Inception weights at {config.weights} have the SHA-256 {sha256_of(file)}, not {config.sha256}: fetch "
            "them again, or set evaluate.metrics.inception.sha256 to compare by another network"
        )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        torch.load(file, map_location="cpu", weights_only=True)  # the next line would run what a pickle says
        return Inception(FeatureExtractorInceptionV3("inception", [str(POOLED_DIM), _LOGITS], str(file)))
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{config.weights} holds no weights of Inception as torch-fidelity has them ({type(error).__name__}): "
            f"fetch {InceptionConfig().weights}"
        ) from error


def check_inception(config: InceptionConfig) -> None:
    """Find out within seconds whether the network can be had; call it before workers start.

    Raises:
        UserError: it cannot; the message says what to fetch.
    """
    _check_installed()
    if not config.is_url:
        _weights_file(config)
    elif not _downloaded(config).is_file() and not answers(config.weights):
        raise _unreachable(config)


def _weights_file(config: InceptionConfig) -> Path:
    """Return the weights as a local file, downloaded where they are not here yet."""
    if not config.is_url:
        storage = Storage(config.weights)
        if not storage.is_file():
            raise UserError(f"no weights of Inception at {config.weights}: put {InceptionConfig().weights} there")
        return storage.local_file()
    file = _downloaded(config)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(config.weights, str(file), hash_prefix=config.sha256, progress=False)
        except (OSError, RuntimeError) as error:  # no connection, a status of refusal, or another checksum
            raise _unreachable(config) from error
    return file


def _downloaded(config: InceptionConfig) -> Path:
    """Path of the download in torch's own folder, which torch-fidelity uses too."""
    return Path(torch.hub.get_dir(), "checkpoints", config.weights.rpartition("/")[2])


def _check_installed() -> None:
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UserError("the extractor inception needs torch-fidelity: pip install -e '.[fidelity]'")


def _unreachable(config: InceptionConfig) -> UserError:
    return UserError(
        f"the weights of Inception are neither at {_downloaded(config)} nor reachable: download {config.weights} where "
        "there is a connection, put it where every worker can read it, and set evaluate.metrics.inception.weights to "
        "its path or storage URL"
    )
