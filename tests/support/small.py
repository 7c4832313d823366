"""The smallest data and models that go the whole way, for tests of what joins them."""

import json

import numpy as np
import torch
from PIL import Image

from vavae.data.image import encode_image
from vavae.data.shards.manifest import Manifest, ShardInfo
from vavae.data.shards.tar import write_tar
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig
from vavae.randomness import numpy_generator, torch_generator
from vavae.storage.storage import sha256_of

CLASSES = ("a", "b", "c")
SIZE, GRID = 8, 4
TOKENIZER = TokenizerConfig(latent_dim=4, channels=32, channel_multipliers=(1, 1), res_blocks=1, attention_levels=())
LIGHTNINGDIT = LightningDiTConfig(size=None, depth=1, width=32, heads=2, classes=len(CLASSES))


def image(split, index, height=SIZE, width=SIZE):
    """Pixels uint8 [H, W, 3] of the image at an index of a split."""
    return numpy_generator(0, split, index).integers(0, 256, (height, width, 3), dtype=np.uint8)


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


def randomised(module, scale=0.2):
    """A module in evaluation mode with keyed weights, none of them zero."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=torch_generator(0, name)) * scale)
    return module.eval().requires_grad_(False)


def tokenizer():
    return randomised(VAVAE(TOKENIZER))


def lightningdit():
    return randomised(LightningDiT(LIGHTNINGDIT, TOKENIZER.latent_dim, GRID), scale=0.3)
