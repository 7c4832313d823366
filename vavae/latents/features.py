"""Features of a frozen network beside the latents: one shard of latents, one of features of the same images.

Shapes: B batch, h x w = N positions, F channels of the features.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from vavae.config import digest
from vavae.data.ahead import in_turn, map_ahead, threads_of
from vavae.data.pixels import to_float
from vavae.data.shard_reader import ReadableImage, ReadableImages, batched, open_records
from vavae.data.shards.manifest import Manifest, ShardInfo, ShardList
from vavae.data.shards.tar import write_tar
from vavae.data.shards.verify import ShardFaults, verify_files
from vavae.distributed.compilation import compile_each, compiles_blocks
from vavae.distributed.config import WorkersConfig
from vavae.errors import UserError
from vavae.latents.config import FeaturesConfig, LatentsConfig
from vavae.latents.manifest import FEATURES, FeatureManifest, LatentManifest
from vavae.latents.shards import feature_members, map_features
from vavae.models.backbones.color import as_color
from vavae.models.tokenizer.teacher import VisionFoundationTeacher, teacher_geometry
from vavae.runs.extraction_inputs import ExtractionInputs
from vavae.storage.artifact import FileInfo
from vavae.storage.storage import Storage, sha256_of

SPLIT = "train"
"""The split whose images have features: nothing reads those of others."""
_MANIFEST = f"{FEATURES}/manifest.json"


class FeatureShardRecord(BaseModel):
    """Commit record of one shard of features."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    origin: str
    """Digest of everything that the features are a function of: image shard, network and settings."""
    shard: ShardInfo


def token_grid(config: FeaturesConfig, grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the features of latents on a grid (h, w)."""
    return grid[0] // config.patch_size, grid[1] // config.patch_size


def feature_shape(config: FeaturesConfig, grid: tuple[int, int]) -> tuple[int, int]:
    """N, or one more with a class token, and F of the features of one image whose latent lies on a grid (h, w)."""
    height, width = token_grid(config, grid)
    return config.class_token + height * width, teacher_geometry(config.teacher).feature_dim


def read_features_of(latents: Storage, config: LatentsConfig, grid: tuple[int, int]) -> FeatureManifest:
    """Read the manifest of the features that a model is to be aligned with.

    Args:
        latents: folder of the latents.
        config: section that says whose features they must be.
        grid: height and width of a latent.

    Raises:
        UserError: there are none, or others.
    """
    assert config.features is not None, "no features are configured"
    manifest = _read_feature_manifest(latents)
    if (manifest.config, manifest.shape) != (digest(config.features), feature_shape(config.features, grid)):
        raise UserError(f"{latents.url(_MANIFEST)}: other features than latents.features says; run precompute_latents")
    return manifest


def _read_feature_manifest(latents: Storage) -> FeatureManifest:
    try:
        return FeatureManifest.model_validate_json(latents.read_bytes(_MANIFEST))
    except (FileNotFoundError, ValidationError) as error:
        raise UserError(
            f"{latents.url(_MANIFEST)}: no manifest of features there; run precompute_latents (imported latents have "
            "none: set objective.representation and lightningdit.class_token to null)"
        ) from error


def verify_features(latents: Storage, manifest: LatentManifest) -> Iterator[ShardFaults]:
    """Check every shard of the features beside latents, where there are any, and yield its faults.

    A shard may be gone, have another size, checksum, count or shape than their manifest says, or features of another
    number of images than the latents' shard at its place.

    Args:
        latents: folder of the latents.
        manifest: theirs.

    Raises:
        UserError: the manifest of the features can't be read.
    """
    if not latents.is_file(_MANIFEST):
        return
    features = _read_feature_manifest(latents)
    counts = {shard.name: shard.count for shard in manifest.splits[SPLIT]}

    def check(path: Path, info: ShardInfo, faults: ShardFaults) -> None:
        map_features(path, info.count, features.record_shape)
        if info.count != counts.get(info.name):
            raise UserError(
                f"{path}: features of {info.count} images, but latents of {counts.get(info.name, 0)}; "
                "run precompute_latents"
            )

    yield from verify_files(latents, f"{FEATURES}/{SPLIT}", features.shards, check)


class FeatureExtraction:
    """The features of the training images of one set of shards.

    Args:
        images: folder of the image shards.
        manifest: manifest of the image shards.
        latents: folder of the latents.
        config: network, batch size, flips and precision.
        grid: height and width of a latent.
        workers: say with `config` whether blocks are compiled.
        threads: threads that decode images; their number changes nothing.
    """

    def __init__(
        self,
        images: Storage,
        manifest: Manifest,
        latents: Storage,
        config: LatentsConfig,
        grid: tuple[int, int],
        workers: WorkersConfig,
        threads: int = 1,
    ) -> None:
        assert config.features is not None, "no features are configured"
        self._images, self._manifest, self._latents = images, manifest, latents
        self._config, self._features, self._grid = config, config.features, grid
        self._workers, self._threads = workers, threads
        self._turn = Lock()
        self._teacher: VisionFoundationTeacher | None = None

    @classmethod
    def of(cls, inputs: ExtractionInputs) -> "FeatureExtraction | None":
        """The features of a run; None where it stores none."""
        latents, workers = inputs.config.latents, inputs.config.workers
        if latents.features is None or latents.online:
            return None
        threads = threads_of(latents.cpus or workers.cpus)
        place = inputs.output.folder
        return cls(inputs.images, inputs.manifest, place, latents, inputs.config.grid, workers, threads)

    @property
    def images(self) -> int:
        """Number of images that have features."""
        return self._manifest.count(SPLIT)

    def record(self, source: ShardInfo, first_index: int) -> FeatureShardRecord | None:
        """The record of a shard; None where it is not done, or was made from something else."""
        try:
            record = FeatureShardRecord.model_validate_json(self._latents.read_bytes(_record_path(source)))
            size = self._latents.size(_path(source))
        except (FileNotFoundError, ValidationError):
            return None
        return record if size == record.shard.bytes and record.origin == self._origin(source, first_index) else None

    def _origin(self, source: ShardInfo, first_index: int) -> str:
        config = self._config
        return digest(
            {
                "source": source.sha256,
                "image_size": self._manifest.image_size,
                "first_index": first_index,
                "features": self._features,
                "grid": self._grid,
                "flip": config.flip,
                "batch_size": config.batch_size,
                "precision": config.precision,
            }
        )

    def encode(self, source: ShardInfo, first_index: int, device: torch.device, advance: Callable[[int], None]) -> None:
        """Compute the features of one shard of training images, unless it is done.

        While a batch is computed the next one is decoded and the one before it written. Called in two threads, they
        take turns at the network, which is loaded when it is first needed.

        Args:
            source: the image shard.
            first_index: index within the split of its first record.
            device: where to compute.
            advance: called with the number of images done since its last call.
        """
        if self.record(source, first_index) is not None:
            advance(source.count)
            return
        self._latents.delete(_record_path(source))
        records = open_records(self._images, SPLIT, source)
        images = ReadableImages(records, self._manifest, self._config.batch_size, self._threads)
        with self._latents.create(_path(source)) as local:
            with (
                write_tar(local) as tar,
                closing(in_turn(self._turn, self._compute(batched(images, self._config.batch_size), device))) as found,
            ):

                def write(features: np.ndarray) -> int:
                    for each in features:
                        tar.add(first_index + tar.count, feature_members(each))
                    return len(features)

                with closing(map_ahead(write, found, ahead=1)) as written:
                    for count in written:
                        advance(count)
            info = ShardInfo(name=source.name, count=tar.count, bytes=local.stat().st_size, sha256=sha256_of(local))
        advance(len(images.skipped))
        record = FeatureShardRecord(origin=self._origin(source, first_index), shard=info)
        self._latents.write_json(_record_path(source), record.model_dump(mode="json"))

    def _compute(self, batches: Iterable[list[ReadableImage]], device: torch.device) -> Iterator[np.ndarray]:
        """Yield bits of the features of batches, int16 [B, 1 + flip, N, F]."""
        teacher = self._load(device)
        for batch in batches:
            pixels = torch.from_numpy(np.stack([image.pixels for image in batch])).permute(0, 3, 1, 2)
            features = self._of_views(teacher, to_float(pixels.to(device)))
            finite = features.isfinite().flatten(1).all(1)
            if not finite.all():
                raise UserError(
                    f"{batch[int(finite.int().argmin())].key}: its features are not finite; set latents.precision=fp32"
                )
            yield features.cpu().view(torch.int16).numpy()

    def _load(self, device: torch.device) -> VisionFoundationTeacher:
        if self._teacher is None:
            self._teacher = load_feature_teacher(self._config, self._workers, device)
        return self._teacher

    def _of_views(self, teacher: VisionFoundationTeacher, images: Tensor) -> Tensor:
        """Features bfloat16 [B, 1 + flip, N, F] of images [B, C, H, W] in [-1, 1], and of their mirror images.

        A short batch is padded to the full size.
        """
        count = len(images)
        images = torch.cat([images, images[-1:].expand(self._config.batch_size - count, -1, -1, -1)])
        resized = resize_for(teacher, images, token_grid(self._features, self._grid))
        views = [resized, resized.flip(-1)] if self._config.flip else [resized]
        return torch.stack([compute_features(teacher, view, self._config, self._grid)[:count] for view in views], dim=1)

    def finish(self) -> dict[str, FileInfo]:
        """Write the manifest once all shards are done; returns size and checksum of every file by its path."""
        shards: list[ShardInfo] = []
        first = 0
        for source in self._manifest.splits[SPLIT]:
            record = self.record(source, first)
            assert record is not None, f"{self._latents.url(_path(source))} is not what its record says"
            shards.append(record.shard)
            first += source.count
        manifest = FeatureManifest(
            config=digest(self._features),
            shape=feature_shape(self._features, self._grid),
            flip=self._config.flip,
            shards=ShardList.of(shards),
        )
        self._latents.write_json(_MANIFEST, manifest.model_dump(mode="json"))
        text = self._latents.read_bytes(_MANIFEST)
        files = {_path(shard): FileInfo(bytes=shard.bytes, sha256=shard.sha256) for shard in shards}
        return {**files, _MANIFEST: FileInfo(bytes=len(text), sha256=hashlib.sha256(text).hexdigest())}


def load_feature_teacher(
    config: LatentsConfig, workers: WorkersConfig, device: torch.device
) -> VisionFoundationTeacher:
    """Load the network of `latents.features` onto a device, its blocks compiled if the configuration says so."""
    assert config.features is not None, "no features are configured"
    teacher = VisionFoundationTeacher(config.features.teacher).to(device)
    if compiles_blocks(config.compile_blocks, workers, device):
        compile_each(teacher.blocks)
    return teacher


def resize_for(teacher: VisionFoundationTeacher, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images [B, 3, H', W'] of the size that a network takes for a grid, resized bicubically, as REPA's code does.

    Args:
        teacher: the network.
        images: [B, C, H, W] in [-1, 1].
        grid: height and width of its features.
    """
    size, images = teacher.geometry.image_size(grid), as_color(images)
    return images if images.shape[2:] == size else F.interpolate(images, size, mode="bicubic", align_corners=False)


def compute_features(
    teacher: VisionFoundationTeacher, images: Tensor, config: LatentsConfig, grid: tuple[int, int]
) -> Tensor:
    """Features of images as they are stored, bfloat16 [B, N, F].

    Args:
        teacher: the network of `config.features`, on the device of the images.
        images: of its size, see `resize_for`.
        config: features and precision.
        grid: height and width of a latent.
    """
    assert config.features is not None, "no features are configured"
    with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return teacher.tokens(images, token_grid(config.features, grid), config.features.class_token).bfloat16()


def _path(shard: ShardInfo) -> str:
    return f"{FEATURES}/{SPLIT}/{shard.name}"


def _record_path(shard: ShardInfo) -> str:
    return f"{FEATURES}/{SPLIT}/{shard.name.removesuffix('.tar')}.json"
