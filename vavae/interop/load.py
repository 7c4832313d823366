"""Models by an address: that of a run, an export, a file or a folder that others have published, or the hub."""

import os
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from vavae.distributed.device import choose_device
from vavae.errors import UserError
from vavae.interop.averages import load_lightningdit_of_checkpoint
from vavae.interop.checkpoint_file import read_weights
from vavae.interop.diffusers_tokenizer import DESCRIPTIONS, is_diffusers_weights, read_diffusers_tokenizer
from vavae.interop.export import DESCRIPTION, load_exported_lightningdit, load_exported_tokenizer
from vavae.interop.hub import fetch_diffusers_folder
from vavae.interop.released_lightningdit import convert_lightningdit
from vavae.interop.released_tokenizer import PublishedTokenizer, convert_tokenizer, read_released_tokenizer
from vavae.latents.manifest import read_latent_manifest
from vavae.models.backbones.config import HUB_PREFIX
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.representation import Autoencoder
from vavae.runs.checkpoints import TRAINED, find_checkpoints
from vavae.runs.files import CONFIG
from vavae.runs.run import Run
from vavae.storage.storage import Storage

Source = str | os.PathLike[str] | Run
"""Run, or address of a model."""

AS_TRAINED = "model"
"""Name of the weights themselves, beside the names of their averages; released files have them under this key."""


def load_tokenizer(source: Source, device: torch.device | str | None = None) -> Autoencoder:
    """Load a tokenizer that is to be used, not trained: `encode` and `decode` take it.

    Args:
        source: a run, or the path or storage URL of its folder, such as `runs/quickstart`; of an export, such as
            `runs/quickstart/tokenizer/export`; of a released checkpoint (`.pt`, `.pth`, `.ckpt`, `.safetensors`); of a
            folder of diffusers with an AutoencoderKL, or one of its files of weights. Or `hf-hub:owner/name`.
        device: where to put it, such as `cuda:1`; None takes a GPU where there is one.

    Returns:
        The module in evaluation mode, float32, without gradients. Its `config.downsample` is the factor between the
        sides of images and latents, `config.image_channels` and `config.latent_dim` are their channels. Latents are its
        own: statistics that come with it, and the scaling factor of a folder of diffusers, are left out.

    Raises:
        UserError: there is nothing at the address, no tokenizer, one that can't be used, or no such device.
    """
    place, found = choose_device(device), _find(source, "tokenizer")
    if isinstance(found, Run):
        found = found.stored("train_vavae").folder
    if isinstance(found, Storage):
        tokenizer, _ = load_exported_tokenizer(found)
    else:
        published = read_published_tokenizer(found)
        settings = {} if published.config is None else published.config.model_dump()
        tokenizer = convert_tokenizer(published.weights, settings)
    return tokenizer.float().eval().requires_grad_(False).to(place)


def load_lightningdit(
    source: Source, weights: str | None = None, device: torch.device | str | None = None
) -> LightningDiT:
    """Load a LightningDiT that is to be used, not trained: a function of noisy latents, times and labels.

    Args:
        source: a run, or the path or storage URL of its folder, such as `runs/quickstart`; of an export, such as
            `runs/quickstart/lightningdit/export`; or of a released checkpoint (`.pt`, `.pth`, `.ckpt`, `.safetensors`).
        weights: None takes those that samples are made with: the export of a run, which is the average of
            `train_lightningdit.ema_decay` where there is one, and of a file `ema` before `model`. Else the name of
            another average of a run (one of `train_lightningdit.averages`, or one that `vavae average` has made), or
            the key of a file; `model` is the weights themselves, of a run those of its last checkpoint.
        device: where to put it, such as `cuda:1`; None takes a GPU where there is one.

    Returns:
        The module in evaluation mode, float32, without gradients. `model(x, t, y)` is the velocity [B, C, H, W] from
        noise (t = 0) to data (t = 1): x are noisy normalized latents, floating-point [B, C, H, W] of `state_shape`; t
        times in [0, 1], floating-point [B]; y labels, int64 [B], of which `null_label` asks for no class. All are on
        the device of the module; a UserError says which is not, or is of another shape or range.

    Raises:
        UserError: there is nothing at the address, no LightningDiT, none with such weights, or no such device.
    """
    place, found = choose_device(device), _find(source, "LightningDiT")
    if isinstance(found, Run) and weights == AS_TRAINED:
        training, latents = found.training_folder("train_lightningdit"), found.folder("precompute_latents")
        model = _load_as_trained(training, latents, found.config.lightningdit)
    elif isinstance(found, Run):
        model, _ = load_exported_lightningdit(found.stored_lightningdit(weights).folder)
    elif isinstance(found, Storage):
        if weights is not None:
            raise UserError(f"weights={weights}: an export holds one set of weights: leave it out, or give the run")
        model, _ = load_exported_lightningdit(found)
    else:
        model = convert_lightningdit(read_weights(found, weights), {})
    model = model.float().eval().requires_grad_(False).to(place)
    model.register_forward_pre_hook(_check_inputs, with_kwargs=True)
    return model


def read_published_tokenizer(address: str) -> PublishedTokenizer:
    """Read a tokenizer that others have published.

    Args:
        address: path or storage URL of a released file, or of a folder of diffusers or one of its files of weights; or
            `hf-hub:owner/name` of one.

    Raises:
        UserError: there is none, or one that can't be used; see :mod:`vavae.interop.released_tokenizer` and
            :mod:`vavae.interop.diffusers_tokenizer`.
    """
    if address.startswith(HUB_PREFIX):
        return read_diffusers_tokenizer(fetch_diffusers_folder(address))
    storage = Storage(address)
    if is_diffusers_weights(PurePosixPath(address).name) or (storage.exists() and not storage.is_file()):
        return read_diffusers_tokenizer(address)
    return read_released_tokenizer(address)


def _find(source: Source, kind: str) -> Run | Storage | str:
    """The run or the folder of the export that a source means, or else the address of what others have published."""
    if isinstance(source, Run):
        return source
    address = os.fspath(source)
    if address.startswith(HUB_PREFIX):
        return address
    storage = Storage(address)
    if storage.is_file(CONFIG):
        return Run.at(address)
    if storage.is_file(DESCRIPTION):
        return storage
    if storage.is_file() or (kind == "tokenizer" and any(map(storage.is_file, DESCRIPTIONS))):
        return address
    there = f"no {CONFIG} and no {DESCRIPTION} there" if storage.exists() else "no such file or folder"
    raise UserError(f"{storage.url()}: {there}: give a run, an export, or a released file of a {kind}")


def _load_as_trained(training: Storage, latents: Storage, config: LightningDiTConfig) -> LightningDiT:
    """Load the last checkpoint of a training on some latents, with the weights as they are trained."""
    checkpoints = find_checkpoints(training)
    if not checkpoints:
        raise UserError(f"weights={AS_TRAINED}: no checkpoint in {training.url()}: leave weights out")
    manifest = read_latent_manifest(latents)
    latent_dim, height, width = manifest.shape
    model = config.with_classes(len(manifest.classes))
    return load_lightningdit_of_checkpoint(training, checkpoints[-1], model, latent_dim, (height, width), TRAINED)


def _check_inputs(model: LightningDiT, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Raise the UserError of arguments of `forward` that torch would refuse somewhere inside, or not at all."""
    arguments = {**dict(zip("xty", positional, strict=False)), **named}
    if arguments.keys() != {"x", "t", "y"}:
        return  # which Python refuses in a line of its own
    device, classes = model.x_embedder.proj.weight.device, model.null_label
    shape = ", ".join(map(str, model.state_shape))
    batch = len(arguments["x"]) if isinstance(arguments["x"], Tensor) and arguments["x"].ndim else 0
    expected = {
        "x": (f"floating-point [B, {shape}]", (batch, *model.state_shape), True),
        "t": (f"floating-point [{batch}], one for each of x", (batch,), True),
        "y": (f"int64 [{batch}], one for each of x", (batch,), False),
    }
    for name, (words, size, floats) in expected.items():
        value = arguments[name]
        if not isinstance(value, Tensor):
            raise UserError(f"{name}: a {type(value).__name__}, expected a tensor {words}")
        if value.shape != size or value.is_floating_point() != floats or (not floats and value.dtype != torch.int64):
            raise UserError(f"{name}: {value.dtype} {[*value.shape]}, expected {words}")
        if value.device != device:
            raise UserError(f"{name}: on {value.device}, but the LightningDiT is on {device}: move it there")
    labels = arguments["y"]
    if batch and not 0 <= labels.min() <= labels.max() <= classes:
        raise UserError(f"y: labels from {labels.min()} to {labels.max()}, expected 0 to {classes}, which is no class")
