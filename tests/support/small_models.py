"""The smallest models that go the whole way, for tests of what joins them."""

import torch
from support.image_shards import CLASSES

from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig
from vavae.randomness import torch_generator

GRID = 4
"""Side of the latents of `image_shards`."""
TOKENIZER = TokenizerConfig(latent_dim=4, channels=32, channel_multipliers=(1, 1), res_blocks=1, attention_levels=())
LIGHTNINGDIT = LightningDiTConfig(size=None, depth=1, width=32, heads=2, classes=len(CLASSES))


def randomized(module, scale=0.2):
    """A module in evaluation mode with keyed weights, none of them zero."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=torch_generator(0, name)) * scale)
    return module.eval().requires_grad_(False)


def tokenizer():
    return randomized(VAVAE(TOKENIZER))


def lightningdit(config=LIGHTNINGDIT):
    return randomized(LightningDiT(config, TOKENIZER.latent_dim, GRID), scale=0.3)
