"""The Inception network with random weights: what of it can be tested without a download."""

from pathlib import Path

import torch

import vavae.torchvision_compat  # noqa: F401  (before torch-fidelity)
from vavae.models.backbones.config import InceptionConfig
from vavae.storage.storage import sha256_of

# isort: split
from torch_fidelity import feature_extractor_inceptionv3 as fidelity


class _Unloaded(fidelity.FeatureExtractorInceptionV3):
    """As it is before its weights are loaded."""

    def load_state_dict(self, state_dict, strict=True, assign=False):
        pass


def random_inception(folder: Path, seed: int = 0) -> InceptionConfig:
    """Write weights that keep the size of what they see, and their checksum."""
    empty = folder / "empty.pth"
    torch.save({}, empty)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = _Unloaded("inception", ["2048"], str(empty))
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
    file = folder / "inception.pth"
    torch.save(network.state_dict(), file)
    return InceptionConfig(weights=str(file), sha256=sha256_of(file))
