"""Weights in the checkpoints of a training, averages and their own, read without the training."""

from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256

import torch
from torch import Tensor

from vavae.distributed.shard_files import (
    DamagedFileError,
    ReadRange,
    ShardFile,
    fetch_tensor_shards,
    fill_tensor_shards,
    map_file,
)
from vavae.distributed.sharded_tensors import as_full_shard
from vavae.errors import UserError
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.runs.checkpoints import CHECKPOINTS, EMA, checkpoint_name
from vavae.storage.artifact import FileInfo, read
from vavae.storage.storage import Storage


def open_stored_shards(checkpoints: Storage, path: str, info: FileInfo, header: FileInfo | None) -> ShardFile:
    """Open a file of a checkpoint where it is.

    Args:
        checkpoints: folder of the checkpoints.
        path: of the file.
        info: its size and checksum.
        header: those of its header; None in checkpoints that were written without. Those are read as a whole.

    Raises:
        UserError: it is damaged.
    """
    if header is None:
        return ShardFile.open(checkpoints.local_file(path, info.sha256))
    read: ReadRange = partial(checkpoints.read_range, path)
    whole: Callable[[], ReadRange] | None = None
    if checkpoints.is_local:
        read = map_file(checkpoints.local_file(path))
    elif info.bytes <= checkpoints.options.cache_bytes:
        # Of what a rank needs for the most part, other ranks of its machine need the same: it goes through the cache.
        whole = partial(_map_cached, checkpoints, path, info)
    found = read(0, header.bytes)
    if sha256(found).hexdigest() != header.sha256:
        raise DamagedFileError(f"{checkpoints.url(path)}: the SHA-256 of its header is another")
    return ShardFile(checkpoints.url(path), found, read, whole)


def _map_cached(checkpoints: Storage, path: str, info: FileInfo) -> ReadRange:
    return map_file(checkpoints.local_file(path, info.sha256))


def load_weights(
    training: Storage,
    images_seen: int,
    tensors: Mapping[str, Tensor],
    weights: str = EMA,
    folder: str = CHECKPOINTS,
    prefix: str = "",
) -> None:
    """Fill full contiguous tensors with a set of weights in a checkpoint, or in a snapshot.

    Args:
        training: folder of the training.
        images_seen: at the checkpoint.
        tensors: tensors by their names in the step's module, all of those that begin with the prefix.
        weights: the set: the average that is exported, another `average_set`, or `TRAINED`.
        folder: `CHECKPOINTS` or `SNAPSHOTS`.
        prefix: of the names.

    Raises:
        UserError: a file is damaged, or gone.
    """
    checkpoints, name = training.child(folder), checkpoint_name(images_seen)
    record = read(checkpoints, name)
    if record is None:
        raise UserError(f"{checkpoints.url(name)}: this checkpoint is gone")
    headers = record.details.get("headers", {})
    assert isinstance(headers, dict), "details.headers maps paths to sizes and checksums"
    paths = sorted(path for path in record.files if path.split("/")[1] == weights)
    files = (
        open_stored_shards(
            checkpoints,
            f"{name}/{path}",
            record.files[path],
            FileInfo.model_validate(headers[path]) if path in headers else None,
        )
        for path in paths
    )
    parts = {name: as_full_shard(tensor) for name, tensor in tensors.items()}
    fill_tensor_shards(parts, fetch_tensor_shards(parts, files, prefix))


def load_lightningdit_of_checkpoint(
    training: Storage,
    images_seen: int,
    config: LightningDiTConfig,
    latent_dim: int,
    grid: tuple[int, int],
    weights: str = EMA,
) -> LightningDiT:
    """Load the LightningDiT of a checkpoint with a set of its weights, in evaluation mode on the CPU.

    Args:
        training: folder of the training.
        images_seen: at the checkpoint.
        config: the model's configuration, with the number of its classes.
        latent_dim: channels of the latents.
        grid: their height and width.
        weights: as for `load_weights`.

    Raises:
        UserError: a file is damaged, or gone.
    """
    with torch.device("meta"):
        model = LightningDiT(config, latent_dim, grid)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    tensors = {f"model.{name}": each for name, each in model.state_dict().items()}
    # What else is trained is not exported.
    load_weights(training, images_seen, tensors, weights, prefix="model.")
    return model
