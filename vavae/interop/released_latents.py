"""Latents in the layout of the public extraction, converted from and to latent shards.

A folder of `latents_rank{rr}_shard{sss}.safetensors`, each with one posterior sample per image (`latents`, float32
[N, C, h, w]), one of its mirror image (`latents_flip`) and `labels` (int64 [N]); and `latents_stats.pt`, mean and
standard deviation per channel (float32 [1, C, 1, 1]). Other floating types, such as bfloat16, are read as well, and
labels in other integers.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vavae.data.config import ShardsConfig
from vavae.data.shards.manifest import ShardInfo, shard_file
from vavae.errors import UserError
from vavae.interop.checkpoint_file import WeightsFile, read_weights
from vavae.latents.manifest import MANIFEST, LatentManifest, read_latent_manifest, require_stored
from vavae.latents.shards import MappedLatents, write_latents
from vavae.latents.statistics import STATISTICS, LatentStatistics, check_statistics, read_statistics
from vavae.randomness import torch_generator
from vavae.storage.storage import Storage, sha256_of

_KIND = "file of released latents"
_SHARD = re.compile(r"latents_rank\d+_shard\d+\.safetensors")
_RELEASED_STATISTICS = "latents_stats.pt"
_VIEWS = ("latents", "latents_flip")


def export_released_latents(latents: Storage, split: str, target: Storage, seed: int) -> None:
    """Write latents and their statistics in the public layout, a file per shard.

    The noise of each sample is keyed by seed, view and index of the image, so equal calls write equal files.

    Args:
        latents: a folder of latent shards, with mirror images.
        split: `train` or `validation`.
        target: folder to write.
        seed: seed of the posterior samples.

    Raises:
        UserError: the latents are without mirror images, which the public data set draws from.
    """
    manifest = require_stored(latents, read_latent_manifest(latents))
    if manifest.kind != "kl" or manifest.statistics != "channel":
        raise UserError(
            f"{latents.url()}: latents of kind {manifest.kind} with statistics per {manifest.statistics}, and the "
            "public layout has samples of posteriors with statistics per channel"
        )
    if not manifest.flip:
        raise UserError(f"{latents.url()}: no mirror images, which the public layout has; set latents.flip=true")
    first = 0
    for number, info in enumerate(manifest.splits[split]):
        shard = MappedLatents(shard_file(latents, split, info), info.count, manifest.record_shape)
        tensors = {name: _samples(shard.arrays, 2 * view, first, seed) for view, name in enumerate(_VIEWS)}
        tensors["labels"] = torch.from_numpy(shard.labels)
        metadata = {"total_size": str(info.count), "dtype": "torch.float32", "device": "cpu"}
        with target.create(f"latents_rank00_shard{number:03d}.safetensors") as local:
            save_file(tensors, local, metadata)
        first += info.count
    statistics = dict(zip(("mean", "std"), read_statistics(latents), strict=True))
    with target.create(_RELEASED_STATISTICS) as local:
        torch.save({name: values.float()[None, :, None, None] for name, values in statistics.items()}, local)


def check_released_latents(
    source: Storage, shape: tuple[int, int, int], classes: int, images: int
) -> dict[str, Tensor]:
    """Read latents of the public layout, and check every value of them before anything is written.

    Args:
        source: a folder in the public layout.
        shape: C, h, w that the latents must have.
        classes: number of classes.
        images: images that are checked at a time, at most.

    Returns:
        `mean` and `std` of a channel, float64 [C]: those of the file where there is one, else of all samples.

    Raises:
        UserError: no such files, damaged ones, or tensors of other names, shapes or values than expected.
    """
    given, computed = _given_statistics(source, shape[0]), LatentStatistics(shape[0])
    for batch in _batches(source, shape, classes, images):
        for view in range(len(_VIEWS)):
            computed.update(batch.views[:, view], np.zeros_like(batch.views[:, view]))
    if not computed.count:
        raise UserError(f"{source.url()}: the files hold no image; fetch them again")
    if given is not None:
        return given
    statistics = {"mean": torch.from_numpy(computed.mean), "std": torch.from_numpy(computed.std)}
    check_statistics(**statistics, place=source.url())
    return statistics


def import_released_latents(
    source: Storage,
    target: Storage,
    split: str,
    shape: tuple[int, int, int],
    tokenizer: str,
    classes: Sequence[str],
    shard_images: int = ShardsConfig.model_fields["shard_images"].default,
    statistics: dict[str, Tensor] | None = None,
) -> LatentManifest:
    """Write latents of the public layout as latent shards, with their statistics.

    A sample becomes a mean with deviation 0. Shards hold float16, so a value is rounded by at most 2⁻¹¹ of itself (2⁻²⁵
    below 2⁻¹⁴); the statistics stay exact: those of the file where there is one, else of all samples before rounding.

    Args:
        source: a folder in the public layout.
        target: folder to write.
        split: `train` or `validation`.
        shape: C, h, w that the latents must have.
        tokenizer: digest of the tokenizer that made the latents.
        classes: names of the classes; a label is an index into them.
        shard_images: most images in a shard.
        statistics: result of `check_released_latents`; None checks first.

    Raises:
        UserError: no such files, damaged ones, or tensors of other names, shapes or values than expected.
    """
    if statistics is None:
        statistics = check_released_latents(source, shape, len(classes), shard_images)
    shards: list[ShardInfo] = []
    images = 0
    for batch in _batches(source, shape, len(classes), shard_images):
        # [N, 2 · views, C, h, w]: mean and deviation of each view
        arrays = np.zeros((len(batch.labels), 2 * len(_VIEWS), *shape), np.float16)
        arrays[:, ::2] = batch.views
        name = f"{len(shards):06d}.tar"
        with target.create(f"{split}/{name}") as local:
            write_latents(local, arrays, batch.labels.tolist(), images)
            info = ShardInfo(name=name, count=len(arrays), bytes=local.stat().st_size, sha256=sha256_of(local))
        shards.append(info)
        images += info.count
    manifest = LatentManifest(
        tokenizer=tokenizer, shape=shape, flip=True, classes=tuple(classes), splits={split: tuple(shards)}
    )
    with target.create(STATISTICS) as local:
        save_file(statistics, local)
    target.write_json(MANIFEST, manifest.to_json())
    return manifest


class _Batch(NamedTuple):
    views: np.ndarray
    """Latents of images and of their mirror images, float32 [N, 2, C, h, w]."""
    labels: np.ndarray
    """Class indices, int64 [N]."""


def _batches(source: Storage, shape: tuple[int, int, int], classes: int, size: int) -> Iterator[_Batch]:
    """The latents of all files, in the order of their names, at most `size` at a time and never across files."""
    names = [name for name in source.list() if _SHARD.fullmatch(name)]
    if not names:
        raise UserError(f"{source.url()}: no latents_rank00_shard000.safetensors or the like there")
    for name in names:
        file = read_weights(source.url(name))
        count = file.shape(_KIND, "latents", 4)[0]
        views = [file.expect(_KIND, view, (count, *shape)) for view in _VIEWS]
        labels = file.expect(_KIND, "labels", (count,))
        _check_types(file)
        for start in range(0, count, size):
            part = slice(start, start + size)
            batch = _Batch(
                torch.stack([view[part].float() for view in views], dim=1).numpy(), labels[part].long().numpy()
            )
            _check_values(file.url, batch, classes)
            yield batch


def _check_values(url: str, batch: _Batch, classes: int) -> None:
    if batch.labels.min() < 0 or batch.labels.max() >= classes:
        raise UserError(f"{url}: labels {batch.labels.min()} to {batch.labels.max()}, expected 0 to {classes - 1}")
    if not np.abs(batch.views).max() <= np.finfo(np.float16).max:
        raise UserError(f"{url}: latents as large as {np.abs(batch.views).max():g}, which float16 cannot hold")


def _check_types(file: WeightsFile) -> None:
    for name in (*_VIEWS, "labels"):
        dtype, wanted = file.tensors[name].dtype, "integers" if name == "labels" else "floating-point numbers"
        if dtype.is_floating_point == (name == "labels") or dtype.is_complex or dtype == torch.bool:
            raise UserError(f"{file.url}: {name} holds {dtype}, expected {wanted}")


def _given_statistics(source: Storage, channels: int) -> dict[str, Tensor] | None:
    """Mean and standard deviation in the file of statistics, float64 [C]; None where there is no such file."""
    if not source.is_file(_RELEASED_STATISTICS):
        return None
    file = read_weights(source.url(_RELEASED_STATISTICS))
    shape = (1, channels, 1, 1)
    statistics = {name: file.expect(_KIND, name, shape).double().flatten() for name in ("mean", "std")}
    check_statistics(**statistics, place=file.url)
    return statistics


def _samples(arrays: np.ndarray, part: int, first: int, seed: int) -> Tensor:
    """Draw one posterior sample per image of a view: float32 [N, C, h, w].

    Args:
        arrays: a shard, float16 [N, 2 · (1 + flip), C, h, w].
        part: index of the view's mean in the second dimension.
        first: index of the first image.
        seed: seed of the samples.
    """
    noise = [
        torch.randn(arrays.shape[2:], generator=torch_generator(seed, "released latents", part, index))
        for index in range(first, first + len(arrays))
    ]
    mean, std = (torch.from_numpy(arrays[:, index].astype(np.float32)) for index in (part, part + 1))
    return torch.addcmul(mean, std, torch.stack(noise))
