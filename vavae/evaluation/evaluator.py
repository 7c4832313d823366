"""The measures of a run, part by part: any number of actors may do the parts, in any order, with the same bits."""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vavae.config import digest, identity, written_path
from vavae.data.shard_reader import LabeledImages, gather, read_images, read_span
from vavae.data.shards.manifest import read_manifest
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.evaluation.config import HELD_OUT, RECONSTRUCTION_PROTOCOLS, TRAIN
from vavae.evaluation.generation import Reference, sample_batches
from vavae.evaluation.latent_space import LatentSpace, measure_latent_space
from vavae.evaluation.parts import Part, PartFiles, SetName, Tensors, concatenate, pack, spans, unpack
from vavae.evaluation.reconstruction import Reconstruction, Reconstructor, reconstruct, reconstruction_of
from vavae.interop.export import ALIGNMENT, load_alignment, load_tokenizer
from vavae.losses.perceptual import LPIPS
from vavae.metrics.config import LatentSpaceConfig
from vavae.metrics.features import FeatureExtractor, describe, load_extractor
from vavae.metrics.reference import ReferenceFile, read_reference, reference_images
from vavae.metrics.summary import Summaries, Summarizer, join, summarize
from vavae.models.tokenizer.teacher import VisionFoundationTeacher
from vavae.runs.run import Run
from vavae.sampling.sample_shards import read_samples
from vavae.storage.storage import Storage, sha256_of

KEPT = 10_000
"""Real images whose features are kept for precision, recall and the kernel distance: ADM's files have so many."""

ADM_IMAGENET = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)

REFERENCES: tuple[SetName, ...] = ("held_out", "train", "file")
"""The sets that generated images are compared with."""

_SPLITS = {"held_out": HELD_OUT, "train": TRAIN}
_OURS = "measuring"
"""Folder of what was seen of this run's models; what was seen of real images is in `references`."""


class Evaluator:
    """What a run's images are seen as, in parts on its storage.

    Args:
        run: with a tokenizer, and samples where they are to be measured.

    Raises:
        UserError: the held-out images are not those of the protocol, or the reference file does not fit.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._config = run, run.config.evaluate
        self._shards = run.storage.child(run.prefix("prepare_shards"))
        self._manifest = read_manifest(self._shards)
        held_out = self._manifest.count(HELD_OUT)
        wanted = RECONSTRUCTION_PROTOCOLS.get(self._config.reconstruction_protocol, held_out)
        if held_out != wanted:
            raise UserError(
                f"evaluate.reconstruction_protocol={self._config.reconstruction_protocol} means {wanted:,} held-out "
                f"images, {self._shards.url()} has {held_out:,}: set it to custom"
            )
        self._counts: dict[SetName, int] = {"held_out": min(self._config.images, held_out)}
        if self._config.reference == TRAIN:
            self._counts["train"] = self._manifest.count(TRAIN)
        if self._file is not None and self._file.images:
            self._counts["file"] = self._file.images
        self._counts |= {"reconstructions": self._counts["held_out"], "samples": run.config.sample.images}

    def missing(self, of: Collection[SetName] | None = None) -> list[Part]:
        """The parts that are still to be measured, of some of the sets or of all."""
        names = [name for name in self._counts if of is None or name in of]
        return [Part(name, span) for name in names for span in self._files(name).missing()]

    def measure(self, part: Part, advance: Callable[[int], None]) -> None:
        """Do one part; `advance` is told the images done since its last call."""
        measured = (
            self._reconstructed(part.span, advance) if part.of == "reconstructions" else self._seen(part, advance)
        )
        self._files(part.of).write(part.span, measured)

    def reconstruction(self) -> Reconstruction:
        """The measures of the tokenizer, once all parts are there."""
        whole = self._files("reconstructions").join(_whole)
        measures = {name: tensor for name, tensor in whole.items() if "/" not in name}
        pairs = (measures.pop("originals"), measures.pop("reconstructions"))
        return reconstruction_of(measures, self._held_out, unpack(whole), pairs)

    def latent_space(self) -> LatentSpace | None:
        """How evenly latents fill their space, found out once for the same latents; None where nobody asks."""
        config = self._config.latent_space
        if config is None:
            return None
        latents = self._run.storage.child(self._run.prefix("precompute_latents"))
        seed = self._run.config.seed
        maps = self._maps(config).join(lambda _: measure_latent_space(latents, config, seed).tensors())
        return LatentSpace.from_tensors(maps)

    def generated(self) -> Summaries:
        """The generated images, once all parts are there."""
        return join(map(unpack, self._files("samples").read()))

    def summaries(self, images: Iterable[Tensor], count: int) -> Summaries:
        """So many generated images that lie nowhere, given in batches [B, 3, H, W] in uint8."""
        return summarize(images, self.extractors, count, self.device)

    def references(self) -> dict[str, Reference]:
        """What generated images are compared with, by the name of the extractor."""
        name: SetName = "train" if self._config.reference == TRAIN else "held_out"
        words = {"held_out": "held-out images", "train": "training images"}[name]
        seen = self._held_out if name == "held_out" else self._joined(name)
        found = {extractor: Reference.of(summary, words) for extractor, summary in seen.items()}
        if self._file is not None:
            extractor = self._config.metrics.extractor
            images = self._joined("file")[extractor] if "file" in self._counts else None
            found[extractor] = Reference.of_file(
                self._file, images, str(self._config.reference_file).rpartition("/")[2]
            )
        return found

    def some(self, split: str, limit: int) -> LabeledImages:
        """The first images of a split."""
        return gather(read_images(self._shards, self._manifest, split, limit, self._config.batch_size))

    def samples(self) -> LabeledImages:
        """All generated images."""
        return gather(read_samples(self._samples, self._sample_files))

    def clean(self) -> None:
        """Drop what was seen of these samples; what was seen of the tokenizer stays, as references do, for others."""
        kept = {self._files("reconstructions").whole}
        if self._config.latent_space is not None:
            kept.add(self._maps(self._config.latent_space).whole)
        for path in self._run.storage.list(_OURS):
            if path not in kept:
                self._run.storage.delete(path)

    @cached_property
    def device(self) -> torch.device:
        """Where this process measures."""
        return World.current(self._run.config.workers.use_gpu).device

    @cached_property
    def extractors(self) -> dict[str, FeatureExtractor]:
        """By name, the main one first."""
        metrics = self._config.metrics
        return {name: load_extractor(name, metrics).to(self.device) for name in metrics.extractors}

    @cached_property
    def _held_out(self) -> Summaries:
        return self._joined("held_out")

    def _joined(self, name: SetName) -> Summaries:
        found = unpack(self._files(name).join(lambda parts: pack(join(map(unpack, parts)))))
        if not all(summary.pooled.count for summary in found.values()):
            raise UserError(f"{self._shards.url()}: no readable image to measure against; make the shards again")
        return found

    def _seen(self, part: Part, advance: Callable[[int], None]) -> Tensors:
        """What the extractors see of a part."""
        keep = KEPT - part.span.start if part.of != "samples" else len(part.span)
        return pack(summarize(self._batches(part), self.extractors, keep, self.device, advance))

    def _batches(self, part: Part) -> Iterator[Tensor]:
        size = self._config.metrics.batch_size
        if part.of == "samples":
            shard_images = self._run.config.sample.shard_images
            yield from sample_batches(self._samples, self._sample_files, shard_images, part.span, size)
        elif part.of == "file":
            yield from reference_images(self._reference_path, part.span, size)
        else:
            split = _SPLITS[part.of]
            for batch in read_span(self._shards, self._manifest, split, part.span, size):
                yield batch.images

    def _reconstructed(self, span: range, advance: Callable[[int], None]) -> Tensors:
        """Measures of every image of a part, what the extractors see of the reconstructions, and some to be shown."""
        batches = read_span(self._shards, self._manifest, HELD_OUT, span, self._config.batch_size)
        summarizer = Summarizer(self.extractors, 0, self.device)
        measures, shown = [], max(0, self._config.pictures - span.start)
        for batch in reconstruct(batches, self._reconstructor, self._run.config.seed, span.start, self.device):
            summarizer.update(batch.reconstructions)
            pictures = {"originals": batch.originals[:shown], "reconstructions": batch.reconstructions[:shown]}
            measures.append(batch.measures | pictures)
            shown -= len(pictures["originals"])
            advance(len(batch.originals))
        return pack(summarizer.summaries()) | concatenate(iter(measures))

    @cached_property
    def _reconstructor(self) -> Reconstructor:
        export = self._run.storage.child(self._run.prefix("train_vavae"))
        tokenizer, description = load_tokenizer(export)
        aligned = ALIGNMENT in self._run.require("train_vavae").files  # an imported tokenizer may never have been
        return Reconstructor(
            tokenizer,
            load_alignment(export) if aligned else None,
            VisionFoundationTeacher(description.teacher) if aligned else None,
            LPIPS.load(self._run.config.losses.perceptual) if self._config.lpips else None,
        ).to(self.device)

    @cached_property
    def _file(self) -> ReferenceFile | None:
        """The reference file, looked at in every process that measures."""
        place = self._config.reference_file
        if place is None:
            return None
        seen = describe(self._config.metrics.extractor, self._config.metrics)
        return read_reference(self._reference_path, place, seen, self._manifest.image_size)

    @cached_property
    def _reference_path(self) -> Path:
        assert self._config.reference_file is not None, "the reference is a split of the shards"
        return find_reference(self._run.storage, self._config.reference_file).local_file()

    @cached_property
    def _samples(self) -> Storage:
        return self._run.storage.child(self._run.prefix("sample"))

    @cached_property
    def _sample_files(self) -> list[str]:
        return sorted(name for name in self._run.require("sample").files if name.endswith(".tar"))

    def _files(self, name: SetName) -> PartFiles:
        folder = f"{_OURS if name in ('reconstructions', 'samples') else 'references'}/{name}-{self._origins[name]}"
        return PartFiles(self._run.storage, folder, spans(name, self._counts[name]))

    def _maps(self, config: LatentSpaceConfig) -> PartFiles:
        """The file of the maps of the latents."""
        latents, seed = self._run.require("precompute_latents").digest, self._run.config.seed
        origin = digest({"latents": latents, "seed": seed, "asked": identity(config)})
        return PartFiles(self._run.storage, f"{_OURS}/latents-{origin[:16]}", [])

    @cached_property
    def _origins(self) -> dict[SetName, str]:
        """Digests of all that the parts of a set are a function of."""
        run, config = self._run, self._config
        shards = {"shards": self._manifest.digest, "image_size": self._manifest.image_size}
        facts: dict[SetName, dict[str, Any]] = {
            "held_out": {**shards, "images": self._counts["held_out"]},
            "train": shards,
            "reconstructions": {
                **shards,
                "tokenizer": run.require("train_vavae").digest,
                "seed": run.config.seed,
                "images": self._counts["reconstructions"],
                "lpips": [config.lpips, run.config.losses.perceptual.weights],
                "pictures": config.pictures,
            },
        }
        if (samples := run.artifact("sample")) is not None:
            facts["samples"] = {"samples": samples.digest}
        if "file" in self._counts:
            facts["file"] = {"file": sha256_of(self._reference_path)}
        extractors = config.metrics.fingerprint()
        return {name: digest({"extractors": extractors, **fact})[:16] for name, fact in facts.items()}


def _whole(parts: Iterable[Tensors]) -> Tensors:
    """What was measured of all reconstructions, from its parts."""
    every = list(parts)
    of_images = ({name: tensor for name, tensor in part.items() if "/" not in name} for part in every)
    return pack(join(map(unpack, every))) | concatenate(of_images)


def find_reference(storage: Storage, place: str) -> Storage:
    """A reference file.

    Args:
        storage: of the run, whose options reach the file where it is in a store.
        place: a path or URL.

    Raises:
        UserError: there is none.
    """
    file = storage.at(place)
    if not file.is_file():
        raise UserError(
            f"evaluate.reference={written_path(place)}: no file there; ADM's for ImageNet at 256 px is {ADM_IMAGENET}"
        )
    return file
