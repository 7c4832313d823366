"""Encoding of images as latents are stored, for their extraction and for trainings that encode by themselves."""

import torch
from torch import Tensor

from vavae.distributed.compilation import compile_each, compiles_blocks
from vavae.distributed.config import Precision
from vavae.models.tokenizer.representation import Autoencoder
from vavae.runs.config import RunConfig


def place_tokenizer(tokenizer: Autoencoder, config: RunConfig, device: torch.device) -> Autoencoder:
    """Move a tokenizer to the device where it is to encode, its blocks compiled if the configuration says so."""
    if compiles_blocks(config.latents.compile_blocks, config.workers, device):
        compile_each(tokenizer.residual_blocks())
    return tokenizer.to(device)


def encode_moments(model: Autoencoder, images: Tensor, precision: Precision) -> Tensor:
    """Encode images as latents are stored: float16 [B, moments, C, h, w], mean and deviation or the latent alone.

    Args:
        model: the tokenizer, on the device of the images.
        images: [B, c, H, W] in [-1, 1].
        precision: of the encoder's layers.
    """
    with torch.inference_mode():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            posterior = model.encode(images)
        return torch.stack([each for each in (posterior.mean, posterior.std) if each is not None], dim=1).half()
