"""The tokenizer as a folder that `diffusers.AutoencoderKL.from_pretrained` reads, and such folders as tokenizers."""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from vavae.errors import UserError
from vavae.interop.checkpoint_file import WeightsFile, read_weights
from vavae.interop.released_tokenizer import PublishedTokenizer, batch_norm_statistics, convert_tokenizer
from vavae.latents.statistics import check_statistics
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig
from vavae.storage.storage import Storage

_CLASS = "AutoencoderKL"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
"""Files of a folder of any model of diffusers."""
_OF_PIPELINE = "model_index.json"
DESCRIPTIONS = (CONFIG, _OF_PIPELINE)
"""Files that tell of a folder that it is of diffusers: a model, or a pipeline of several."""
_WEIGHTS_FILE = re.compile(
    r"diffusion_pytorch_model(\.(?P<variant>\w+))?\.(safetensors|bin)"
    r"|diffusion_pytorch_model\.(safetensors|bin)\.index(\.(?P<index_variant>\w+))?\.json"
)
"""Names of files of weights, and of the index of weights in several files, whole or rounded (`fp16`)."""
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
"""Replacements from released names to those of diffusers, applied in this order; reading inverts what they give."""
_FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the layers of attention before diffusers 0.18, and those of today."""
_OF_ATTENTION = re.compile(r"\.(q|k|v|proj_out)\.weight$")
"""Released names of the weights that are convolutions there and linear maps in diffusers."""

ModelT = TypeVar("ModelT", bound=BaseModel)
_log = logging.getLogger(__name__)


class NotInDiffusersError(UserError):
    """Raised for a part of a run that a folder of diffusers has no words or no code for."""


class _Settings(BaseModel):
    """The configuration of an AutoencoderKL; defaults are those of diffusers, where a file lacks a key."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[PositiveInt, ...] = (64,)
    layers_per_block: int = 1
    act_fn: Literal["silu", "swish"] = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: Any = None
    force_upcast: Any = None
    double_z: Literal[True] = True
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def tokenizer(self, url: str) -> TokenizerConfig:
        """The architecture; UserError where it has no like here."""
        lengths = {len(self.down_block_types), len(self.up_block_types), len(self.block_out_channels)}
        down, up = (
            [level for level, kind in enumerate(types) if kind.startswith("Attn")]
            for types in (self.down_block_types, reversed(self.up_block_types))
        )
        if len(lengths) != 1 or 0 in lengths:
            raise UserError(f"{url}: down_block_types, up_block_types and block_out_channels differ in length")
        if down != up:
            raise UserError(f"{url}: attention at levels {down} of the encoder, but {up} of the decoder: not supported")
        if self.in_channels != self.out_channels:
            raise UserError(
                f"{url}: in_channels {self.in_channels}, but out_channels {self.out_channels}: not supported"
            )
        first = self.block_out_channels[0]
        values = {
            "latent_dim": self.latent_channels,
            "image_channels": self.in_channels,
            "channels": first,
            "channel_multipliers": [width / first for width in self.block_out_channels],
            "res_blocks": self.layers_per_block,
            "attention_levels": down,
            "norm_groups": self.norm_num_groups,
            "middle_attention": self.mid_block_add_attention,
            "quant_conv": self.use_quant_conv,
            "post_quant_conv": self.use_post_quant_conv,
        }
        return _validated(TokenizerConfig, values, url)

    def statistics(self, url: str) -> dict[str, Tensor] | None:
        """Mean and deviation per channel that make latents what a diffusion model of diffusers sees; None for none."""
        channels = self.latent_channels
        mean = [self.shift_factor or 0.0] * channels if self.latents_mean is None else self.latents_mean
        std = [1.0] * channels if self.latents_std is None else self.latents_std
        if (len(mean), len(std)) != (channels, channels):
            raise UserError(f"{url}: latents_mean and latents_std are not of latent_channels={channels} numbers")
        if not self.scaling_factor:
            raise UserError(f"{url}: scaling_factor is 0, expected another number")
        tensors = {
            "mean": torch.tensor(mean, dtype=torch.float64),
            "std": torch.tensor(std, dtype=torch.float64) / self.scaling_factor,
        }
        check_statistics(**tensors, place=url)
        return tensors if tensors["mean"].any() or (tensors["std"] != 1).any() else None


def load_diffusers_tokenizer(folder: str | os.PathLike[str]) -> VAVAE:
    """Read an AutoencoderKL of diffusers into the class that trains; see :func:`read_diffusers_tokenizer`.

    Returns:
        The model in training mode, its tensors bitwise those of the files.
    """
    tokenizer = read_diffusers_tokenizer(folder)
    assert tokenizer.config is not None, "a folder of diffusers describes the architecture"
    return convert_tokenizer(tokenizer.weights, tokenizer.config.model_dump())


def read_diffusers_tokenizer(path: str | os.PathLike[str]) -> PublishedTokenizer:
    """Read an AutoencoderKL of diffusers: architecture, tensors by released name, and statistics of its latents.

    Files of full precision are preferred to a variant such as `fp16`, and safetensors to pickles, which are read
    without running code from them. `sample_size` and `force_upcast` say nothing about the weights.

    Args:
        path: folder, as a local path or storage URL; or one of its files of weights, where there are several.

    Raises:
        UserError: another class of model, an architecture that there is not here, or missing or damaged files.
    """
    folder, _, name = os.fspath(path).rstrip("/").rpartition("/")
    given = name if is_diffusers_weights(name) else None
    storage = Storage(os.fspath(path) if given is None else folder or ".")
    url = storage.url(CONFIG)
    settings = _read_settings(storage)
    config = settings.tokenizer(url)
    weights = released_names(read_tensors(storage, given), config)
    batch_norm = weights.part("bn.")
    if batch_norm.tensors:
        statistics = batch_norm_statistics(batch_norm, config.latent_dim)
        return PublishedTokenizer(weights.without("bn."), config, statistics, ", ".join(batch_norm.tensors))
    keys = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    source = ", ".join(key for key in keys if getattr(settings, key) is not None)
    return PublishedTokenizer(weights, config, settings.statistics(url), source)


def is_diffusers_weights(name: str) -> bool:
    """Return whether a file of this name holds weights of a model of diffusers, beside its `config.json`."""
    return _WEIGHTS_FILE.fullmatch(name) is not None


def save_diffusers_tokenizer(
    folder: str,
    autoencoder: VAVAE,
    image_size: int | tuple[int, int],
    statistics: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a tokenizer as a diffusers folder.

    Statistics of its latents become `latents_mean` and `latents_std`, or a `scaling_factor` where that says all.

    Args:
        folder: local path or storage URL.
        autoencoder: the tokenizer.
        image_size: side, or height and width, of the images that it was trained on, pixels; for information.
        statistics: `mean` and `std` per channel [C] that lead to the latents of a diffusion model; None: they are its.

    Raises:
        UserError: diffusers has no such architecture.
    """
    config = autoencoder.config
    settings = _settings(config, image_size)
    if statistics is not None:
        settings |= _statistics_settings(statistics["mean"], statistics["std"])
    storage = Storage(folder)
    tensors = {_name(name, config): _linear(name, tensor) for name, tensor in autoencoder.state_dict().items()}
    with storage.create(WEIGHTS) as local:
        save_file(tensors, local, metadata={"format": "pt"})
    storage.write_json(CONFIG, settings)


def _settings(config: TokenizerConfig, image_size: int | tuple[int, int]) -> dict[str, Any]:
    first = config.channel_multipliers[0]
    if first != 1:
        raise NotInDiffusersError(
            f"tokenizer.channel_multipliers starts with {first}: an AutoencoderKL of diffusers enters its first "
            "level with the channels that it leaves it with, so it starts with 1"
        )
    attends = [level in config.attention_levels for level in range(len(config.channel_multipliers))]
    parts = {
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.post_quant_conv,
        "mid_block_add_attention": config.middle_attention,
    }
    return {
        "_class_name": _CLASS,
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": [f"{'Attn' * attention}DownEncoderBlock2D" for attention in attends],
        "up_block_types": [f"{'Attn' * attention}UpDecoderBlock2D" for attention in reversed(attends)],
        "block_out_channels": config.widths,
        "layers_per_block": config.res_blocks,
        "act_fn": "silu",
        "latent_channels": config.latent_dim,
        "norm_num_groups": config.norm_groups,
        "sample_size": image_size,
        "scaling_factor": 1.0,
        **{name: False for name, there in parts.items() if not there},
    }


def _statistics_settings(mean: Tensor, std: Tensor) -> dict[str, Any]:
    """Settings of an AutoencoderKL for statistics [C], whose inverse `_Settings.statistics` is."""
    if not mean.any() and (std == std[0]).all():
        return {"scaling_factor": 1 / std[0].item()}
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}


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
    return tensor[:, :, 0, 0].contiguous() if _OF_ATTENTION.search(released) else tensor


def _validated(model: type[ModelT], values: Any, url: str) -> ModelT:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        reason = error.errors()[0]
        place = ".".join(map(str, reason["loc"])) + ": " if reason["loc"] else ""
        raise UserError(f"{url}: {place}{reason['msg'].removeprefix('Value error, ')}; not supported") from error


def _read_settings(folder: Storage) -> _Settings:
    """The configuration in a folder; UserError where it is of another class."""
    url = folder.url(CONFIG)
    try:
        stored = folder.read_json(CONFIG)
    except FileNotFoundError:
        of_pipeline = folder.is_file(_OF_PIPELINE)
        where = f"take {folder.url('vae')}" if of_pipeline else "give the folder of an AutoencoderKL of diffusers"
        raise UserError(f"{url}: no such file; {where}") from None
    kind = stored.get("_class_name") if isinstance(stored, dict) else None
    if kind != _CLASS:
        raise UserError(f"{url}: a model of the class {kind}; of diffusers only an {_CLASS} can be a tokenizer here")
    settings = _validated(_Settings, stored, url)
    unknown = [name for name in settings.model_extra or {} if not name.startswith("_")]
    if unknown:
        _log.warning("%s: no effect of %s, which an %s does not have", url, ", ".join(unknown), _CLASS)
    return settings


def read_tensors(folder: Storage, given: str | None = None) -> WeightsFile:
    """Read the tensors of a folder of any model of diffusers, by their names there.

    Args:
        folder: the folder.
        given: name of the file of weights, or of the index of several; None takes the best that is there.

    Raises:
        UserError: there are none, or they are damaged, or rounded in several ways.
    """
    name = given or _best_weights(folder)
    url = folder.url(name)
    if not name.endswith(".json"):
        return read_weights(url)
    try:
        index = folder.read_json(name)["weight_map"]
    except (FileNotFoundError, KeyError, TypeError) as error:
        raise UserError(f"{url}: no index of files of weights; fetch it again") from error
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        tensors |= read_weights(folder.url(file)).tensors
    missing = [tensor for tensor in index if tensor not in tensors]
    if missing:
        raise UserError(f"{url}: no tensor {missing[0]} in {index[missing[0]]}; fetch the files again")
    return WeightsFile(url, tensors)


def _best_weights(folder: Storage) -> str:
    matches = [match for match in map(_WEIGHTS_FILE.fullmatch, folder.list()) if match]
    found = [(match["variant"] or match["index_variant"] or "", match[0]) for match in matches]
    if not found:
        raise UserError(f"{folder.url()}: no {WEIGHTS} there, nor other weights of diffusers")
    variants = sorted({variant for variant, _ in found})
    if variants[0] and len(variants) > 1:
        names = ", ".join(name for _, name in found)
        raise UserError(f"{folder.url()}: weights rounded in several ways, {names}; give the path of one of them")
    # A whole file before one in parts, and one that can't run code before a pickle.
    return min((".bin" in name, name.endswith(".json"), name) for variant, name in found if variant == variants[0])[-1]


def released_names(weights: WeightsFile, config: TokenizerConfig) -> WeightsFile:
    """Rename the tensors of an AutoencoderKL as they are released; those that are none of the architecture keep theirs.

    Args:
        weights: its tensors by their names in diffusers.
        config: the architecture.
    """
    with torch.device("meta"):  # for the names alone
        own_names = {_name(own, config): own for own in VAVAE(config).state_dict()}
    tensors: dict[str, Tensor] = {}
    stored = {own: theirs for theirs, own in own_names.items()}
    for name, tensor in weights.tensors.items():
        theirs = re.sub(
            r"(attentions\.\d+)\.(\w+)\.", lambda layer: f"{layer[1]}.{_FORMER_NAMES.get(layer[2], layer[2])}.", name
        )
        own = own_names.get(theirs, theirs)
        if own in tensors:
            raise UserError(f"{weights.url}: {name} and {stored[own]} are the same tensor; take another file")
        tensors[own], stored[own] = _convolution(own, tensor), name
    return WeightsFile(weights.url, tensors, stored)


def _convolution(released: str, tensor: Tensor) -> Tensor:
    """The inverse of `_linear`; convolutions stay what they are."""
    return tensor[:, :, None, None] if _OF_ATTENTION.search(released) and tensor.ndim == 2 else tensor
