"""The tokenizer as a folder that `diffusers.AutoencoderKL.from_pretrained` reads."""

import re
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vavae.errors import UserError
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig
from vavae.storage.storage import Storage

_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_RENAMES = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.attn\.", r".up_blocks.\1.attentions."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", r".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"\.norm_out\.", r".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
"""Replacements from released names to those of diffusers, applied in this order."""


def save_diffusers_tokenizer(folder: str, autoencoder: VAVAE, image_size: int | tuple[int, int]) -> None:
    """Write a tokenizer as a diffusers folder.

    The factor between latents and those of a diffusion model is 1: the normalization per channel that goes with this
    tokenizer has no place in an AutoencoderKL.

    Args:
        folder: local path or storage URL.
        autoencoder: the tokenizer.
        image_size: side, or height and width, of the images that it was trained on, pixels; for information.

    Raises:
        UserError: diffusers has no such architecture.
    """
    config = autoencoder.config
    settings = _settings(config, image_size)
    storage = Storage(folder)
    tensors = {_name(name, config): _linear(name, tensor) for name, tensor in autoencoder.state_dict().items()}
    with storage.create(_WEIGHTS) as local:
        save_file(tensors, local, metadata={"format": "pt"})
    storage.write_json(_CONFIG, settings)


def _settings(config: TokenizerConfig, image_size: int | tuple[int, int]) -> dict[str, Any]:
    first = config.channel_multipliers[0]
    if first != 1:
        raise UserError(
            f"tokenizer.channel_multipliers starts with {first}: an AutoencoderKL of diffusers enters its first "
            "level with the channels that it leaves it with, so it starts with 1"
        )
    attends = [level in config.attention_levels for level in range(len(config.channel_multipliers))]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": [f"{'Attn' * attention}DownEncoderBlock2D" for attention in attends],
        "up_block_types": [f"{'Attn' * attention}UpDecoderBlock2D" for attention in reversed(attends)],
        "block_out_channels": [config.channels * multiplier for multiplier in config.channel_multipliers],
        "layers_per_block": config.res_blocks,
        "act_fn": "silu",
        "latent_channels": config.latent_dim,
        "norm_num_groups": config.norm_groups,
        "sample_size": image_size,
        "scaling_factor": 1.0,
    }


def _name(released: str, config: TokenizerConfig) -> str:
    """Name of a tensor in diffusers, which numbers the decoder's levels in the order in which they run."""
    last = len(config.channel_multipliers) - 1
    name = re.sub(r"\.up\.(\d+)\.", lambda level: f".up.{last - int(level[1])}.", released)
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _linear(released: str, tensor: Tensor) -> Tensor:
    """A tensor as diffusers stores it: 1x1 convolutions of attention become linear maps."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor[:, :, 0, 0].contiguous() if re.search(r"\.(q|k|v|proj_out)\.weight$", released) else tensor
