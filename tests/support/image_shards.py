"""Image shards of a few drawn images."""

import json

import numpy as np
from PIL import Image

from vavae.data.image import encode_image
from vavae.data.shards.manifest import Manifest, ShardInfo, read_manifest
from vavae.data.shards.plan import describe_sources
from vavae.data.shards.tar import write_tar
from vavae.data.shards.write import check_origin
from vavae.randomness import numpy_generator
from vavae.storage import artifact
from vavae.storage.storage import sha256_of

CLASSES = ("a", "b", "c")
SIZE = 8
SIZES = (SIZE, SIZE)


def image(split, index, height=SIZE, width=SIZE):
    """Pixels uint8 [H, W, 3] of the image at an index of a split."""
    return numpy_generator(0, split, index).integers(0, 256, (height, width, 3), dtype=np.uint8)


def find_shards(storage, prefix, config):
    """The manifest of finished shards, if they are there and made as a configuration says; None without any."""
    record = artifact.read(storage, prefix)
    if record is None or not artifact.is_intact(storage, prefix, record):
        return None
    check_origin(storage, prefix, config, describe_sources(config, storage))
    return read_manifest(storage, prefix)


def png(pixels):
    return encode_image(Image.fromarray(pixels), "png").data


def label_of(index):
    return index % len(CLASSES)


def write_image_shards(storage, counts, height=SIZE, width=SIZE, damaged=(), garbage=b"damaged"):
    """Write image shards; `counts` is records per shard by split, `damaged` are (split, index) that hold garbage."""
    splits = {}
    for split, sizes in counts.items():
        first, infos = 0, []
        for number, count in enumerate(sizes):
            name = f"{number:06d}.tar"
            with storage.create(f"{split}/{name}") as local:
                with write_tar(local) as tar:
                    for index in range(first, first + count):
                        data = garbage if (split, index) in damaged else png(image(split, index, height, width))
                        key = json.dumps({"key": f"{split} {index}"}).encode()
                        tar.add(index, {"png": data, "cls": b"%d" % label_of(index), "json": key})
                info = ShardInfo(name=name, count=count, bytes=local.stat().st_size, sha256=sha256_of(local))
            infos.append(info)
            first += count
        splits[split] = tuple(infos)
    return Manifest(splits=splits, classes=CLASSES, image_size=SIZE, sources={})
