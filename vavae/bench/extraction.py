"""Benchmark of extracting latents, against its decoder of images and its encoder, each alone."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vavae.bench.computation import Computation, build_side, dense_peak
from vavae.bench.data.shards import SPLIT, make_images, write_images
from vavae.data.image import prepare_image
from vavae.data.pixels import to_float
from vavae.latents.encoding import place_tokenizer
from vavae.latents.extract import Extraction
from vavae.latents.shards import MappedLatents
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.runs.config import RunConfig
from vavae.storage.storage import Storage
from vavae.training.flops.flops import encoding_flops
from vavae.training.initialize import initialized

EXTRACTION, ENCODER, DECODER = "extraction", "encoder alone", "decoder alone"
_TOLERANCE = 2e-3
"""Tolerance of latents, relative to 1: two units in the last place of float16."""


@contextmanager
def extraction_benchmark(config: RunConfig, device: torch.device, images: int) -> Iterator[Computation]:
    """Benchmark of one shard of JPEG files on a local disk, from files to latents in a file.

    The encoder alone takes decoded images from the host's memory and gives latents back to it; the decoder alone
    makes the images of the files, cropped to their size.

    Args:
        config: configuration of a run.
        device: where to encode.
        images: in the shard; a multiple of `latents.batch_size`.
    """
    assert images % config.latents.batch_size == 0, "whole batches, so that all sides do equal work"
    with tempfile.TemporaryDirectory(prefix="vavae-") as name:
        folder, files = Path(name), make_images(images)
        shards = Storage(str(folder / "images"))
        manifest = write_images(shards, files).model_copy(update={"image_size": config.shards.image_size})
        model = initialized(config.seed, "tokenizer", lambda: VAVAE(config.tokenizer)).eval()
        place_tokenizer(model, config, device)
        decode = partial(_decode, files, config.shards.height_and_width)
        decoded = decode()
        encode = partial(_encode, model, decoded, config, device)

        def extract() -> np.ndarray:
            with tempfile.TemporaryDirectory(dir=folder) as target:
                latents = Storage(target)
                extraction = Extraction(shards, manifest, latents, "", config.latents)
                (task,) = extraction.tasks()
                extraction.encode(task, model, device, lambda _: None)
                record = extraction.record(task)
                assert record is not None, "the shard has just been encoded"
                (shard,) = manifest.splits[SPLIT]
                views = 2 * (1 + config.latents.flip)
                shape = (views, *config.latent_shape)
                return np.array(MappedLatents(latents.local_file(f"{SPLIT}/{shard.name}"), images, shape).arrays)

        np.testing.assert_allclose(extract().astype(np.float32), encode().astype(np.float32), _TOLERANCE, _TOLERANCE)

        def flops() -> float:
            return images * (1 + config.latents.flip) * encoding_flops(config)

        sides = {
            EXTRACTION: build_side(lambda: extract, flops, device),
            ENCODER: build_side(lambda: encode, flops, device),
            DECODER: build_side(lambda: decode, lambda: 0.0, device),
        }
        height, width = config.shards.height_and_width
        name = f"extraction, {images} images of {height} x {width}{', mirrored too' if config.latents.flip else ''}"
        pairs = [(EXTRACTION, ENCODER), (EXTRACTION, DECODER)]
        peak = dense_peak(device, config.latents.precision, config.workers.rounds_to_tf32)
        yield Computation(name, images, sides, pairs, device, peak)


def _decode(files: list[bytes], size: tuple[int, int]) -> Tensor:
    """Images uint8 [N, 3, H, W] of files."""
    return torch.from_numpy(np.stack([prepare_image(data, size) for data in files])).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def _encode(model: VAVAE, images: Tensor, config: RunConfig, device: torch.device) -> np.ndarray:
    """Latents float16 [N, 2 · (1 + flip), C, h, w] of images uint8 [N, 3, H, W]."""
    arrays = []
    for batch in images.split(config.latents.batch_size):
        pixels = batch.to(device)
        parts = []
        for view in [pixels, pixels.flip(-1)] if config.latents.flip else [pixels]:
            posterior = model.encode(to_float(view))
            parts += [posterior.mean, posterior.std]
        arrays.append(torch.stack(parts, dim=1).half().cpu().numpy())
    return np.concatenate(arrays)
