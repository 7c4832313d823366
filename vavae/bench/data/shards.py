"""Shards that the benchmarks read: smooth noise with grain, 25 KB a file, as photographs take; latents of noise."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vavae.data.image import encode_image
from vavae.data.shards.manifest import Manifest, ShardInfo
from vavae.data.shards.tar import write_tar
from vavae.latents.manifest import LatentManifest
from vavae.latents.shards import write_latents
from vavae.randomness import numpy_generator
from vavae.storage.storage import Storage, sha256_of

BATCH = 32
SPLIT = "train"
_SIDE, _LATENT, _QUALITY = 256, (32, 16, 16), 90
_CLASSES = tuple(str(label) for label in range(10))


def make_images(count: int) -> list[bytes]:
    """Make JPEG files of 256 x 256 pixels."""
    random = numpy_generator(0, "bench")
    files = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (_SIDE // 16, _SIDE // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), np.int64)
        grainy = (smooth + random.integers(-5, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        files.append(encode_image(Image.fromarray(grainy), "jpeg", _QUALITY).data)
    return files


def write_images(storage: Storage, files: Sequence[bytes], shards: int = 1) -> Manifest:
    """Put image shards into a store, all of one length."""
    infos = []
    for number, indices in enumerate(np.array_split(np.arange(len(files)), shards)):
        name = f"{number:06d}.tar"
        with storage.create(f"{SPLIT}/{name}") as local:
            with write_tar(local) as tar:
                for index in indices.tolist():
                    tar.add(index, {"jpg": files[index], "cls": b"%d" % (index % len(_CLASSES))})
            infos.append(_describe(local, name, len(indices)))
    return Manifest(splits={SPLIT: tuple(infos)}, classes=_CLASSES, image_size=_SIDE, sources={})


def make_latents(count: int) -> np.ndarray:
    """Make means and standard deviations of posteriors, float16 [N, 2, C, H, W]."""
    return numpy_generator(0, "bench").standard_normal((count, 2, *_LATENT), np.float32).astype(np.float16)


def write_latent_shard(storage: Storage, arrays: np.ndarray) -> LatentManifest:
    """Put one shard of latents into a store."""
    name = "000000.tar"
    with storage.create(f"{SPLIT}/{name}") as local:
        write_latents(local, arrays, labels_of(len(arrays)), 0)
        info = _describe(local, name, len(arrays))
    return LatentManifest(tokenizer="", shape=_LATENT, flip=False, classes=_CLASSES, splits={SPLIT: (info,)})


def labels_of(count: int) -> list[int]:
    """Class of each of so many samples."""
    return [index % len(_CLASSES) for index in range(count)]


def _describe(local: Path, name: str, count: int) -> ShardInfo:
    return ShardInfo(name=name, count=count, bytes=local.stat().st_size, sha256=sha256_of(local))
