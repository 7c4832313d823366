"""Models by an address: that of a run, an export, a file or a folder that others have published, or the hub."""

import os
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

import torch
from torch import Tensor

from vavae.config import is_hub_address
from vavae.distributed.device import choose_device
from vavae.errors import UserError
from vavae.interop.averages import load_lightningdit_of_checkpoint
from vavae.interop.checkpoint_file import WeightsFile, read_weights
from vavae.interop.diffusers_tokenizer import DESCRIPTIONS, is_diffusers_weights, read_diffusers_tokenizer
from vavae.interop.export import (
    ALIGNMENT,
    DESCRIPTION,
    load_alignment,
    load_exported_lightningdit,
    load_exported_tokenizer,
)
from vavae.interop.released_lightningdit import convert_lightningdit
from vavae.interop.released_tokenizer import (
    PublishedTokenizer,
    convert_tokenizer,
    read_released_tokenizer,
    released_tensors,
)
from vavae.latents.manifest import read_latent_manifest
from vavae.latents.statistics import STATISTICS, read_statistics
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.representation import Autoencoder
from vavae.runs.checkpoints import TRAINED, find_checkpoints
from vavae.runs.files import CONFIG
from vavae.runs.run import PUBLISHED, Run, is_published
from vavae.storage.hub import fetch_from_hub
from vavae.storage.storage import Storage

Source = str | os.PathLike[str] | Run
"""Run, or address of a model."""

Kind = Literal["tokenizer", "LightningDiT"]

_OTHER: Mapping[Kind, str] = {"tokenizer": PUBLISHED["train_lightningdit"], "LightningDiT": PUBLISHED["train_vavae"]}
"""Folder of the model that is not wanted, by the one that is."""

AS_TRAINED = "model"
"""Name of the weights themselves, beside the names of their averages; released files have them under this key."""


def load_tokenizer(source: Source, device: torch.device | str | None = None) -> Autoencoder:
    """Load a tokenizer that is to be used, not trained: `encode` and `decode` take it.

    Args:
        source: a run, or the path or storage URL of its folder, such as `runs/quickstart`; of an export, such as
            `runs/quickstart/tokenizer/export`; of a released checkpoint (`.pt`, `.pth`, `.ckpt`, `.safetensors`); of a
            folder of diffusers with an AutoencoderKL, or one of its files of weights. Or
            `hf-hub:owner/name[/path][@revision]` of any of them: `vavae push` puts a run there.
        device: where to put it, such as `cuda:1`; None takes a GPU where there is one.

    Returns:
        The module in evaluation mode, float32, without gradients. Its `config.downsample` is the factor between the
        sides of images and latents, `config.image_channels` and `config.latent_dim` are their channels. Latents are its
        own: statistics that come with it, and the scaling factor of a folder of diffusers, are left out.

    Raises:
        UserError: there is nothing at the address, no tokenizer, one that can't be used, or no such device.
    """
    place, found = choose_device(device), find_model(source, "tokenizer")
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
            Or `hf-hub:owner/name[/path][@revision]` of any of them: `vavae push` puts a run there.
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
    place, found = choose_device(device), find_model(source, "LightningDiT")
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
        address: path or storage URL of a released file, of a folder of diffusers or one of its files of weights, of an
            export or of a run; or `hf-hub:owner/name[/path][@revision]` of one.

    Raises:
        UserError: there is none, or one that can't be used; see :mod:`vavae.interop.released_tokenizer` and
            :mod:`vavae.interop.diffusers_tokenizer`.
    """
    if is_hub_address(address) or any(map(Storage(address).is_file, (CONFIG, DESCRIPTION))):
        found = find_model(address, "tokenizer")
        if isinstance(found, Run):
            export = found.stored("train_vavae").folder
            measured = found.artifact("precompute_latents") is not None
            return _published_export(export, found.folder("precompute_latents") if measured else export)
        if isinstance(found, Storage):
            return _published_export(found, found)
        address = found
    storage = Storage(address)
    if is_diffusers_weights(PurePosixPath(address).name) or (storage.exists() and not storage.is_file()):
        return read_diffusers_tokenizer(address)
    return read_released_tokenizer(address)


def _published_export(export: Storage, latents: Storage) -> PublishedTokenizer:
    """The tokenizer of an export as others would publish it, with statistics per channel where a folder has them."""
    autoencoder, description = load_exported_tokenizer(export, encodes=False)
    alignment = load_alignment(export) if export.is_file(ALIGNMENT) else None
    statistics = None
    if latents.is_file(STATISTICS):
        mean, std = read_statistics(latents)
        statistics = {"mean": mean, "std": std} if mean.ndim == 1 else None
    weights = WeightsFile(export.url(), released_tensors(autoencoder, alignment))
    return PublishedTokenizer(weights, description.tokenizer, statistics, STATISTICS)


def fetch_model(address: str, kind: Kind) -> str:
    """Fetch what an address of the hub means, without the other model of a run; other addresses stay as they are."""
    if not is_hub_address(address):
        return address
    return fetch_from_hub(address, without=[f"{_OTHER[kind]}/*.safetensors"])


def find_model(source: Source, kind: Kind) -> Run | Storage | str:
    """Find out what an address means: a run, the folder of an export, or else what others have published.

    Args:
        source: run, or address of a model; what the hub has is fetched, without the other model of a run.
        kind: the model that is wanted.

    Returns:
        The run; folder of an export; or the path or storage URL of a released file, or of a folder of diffusers.

    Raises:
        UserError: there is nothing, or nothing of the kind.
    """
    if isinstance(source, Run):
        return source
    given = os.fspath(source)
    address = fetch_model(given, kind)
    storage = Storage(address)
    if is_published(storage) if is_hub_address(given) else storage.is_file(CONFIG):
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
