"""The evaluator of a run: its images are evaluated in parts, by any number of actors, in any order, with equal bits."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vavae.config import digest, identity, written_path
from vavae.data.ahead import threads_of
from vavae.data.pixels import to_rgb
from vavae.data.shard_reader import LabeledImages, gather, read_images, read_span
from vavae.data.shards.manifest import read_manifest
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.evaluation.config import HELD_OUT, RECONSTRUCTION_PROTOCOLS, TRAIN, EvaluateConfig
from vavae.evaluation.generation import Divisor, LabeledFeatures, Reference, sample_batches
from vavae.evaluation.latent_probes import ProbedBatch, ProbedImages, ProbeResults, is_probed, probe_results
from vavae.evaluation.latent_space import LatentSpace, evaluate_latent_space
from vavae.evaluation.parts import Part, PartFiles, SetName, Tensors, concatenate, pack, spans, unpack
from vavae.evaluation.reconstruction import Reconstruction, Reconstructor, reconstruct
from vavae.finite import require_finite_images
from vavae.interop.export import ALIGNMENT, load_alignment, load_exported_tokenizer
from vavae.losses.perceptual import LPIPS
from vavae.metrics.config import ExtractorName
from vavae.metrics.features import FeatureExtractor, Summaries, Summarizer, describe, join, load_extractor, summarize
from vavae.metrics.frechet import frechet_distance
from vavae.metrics.latent_space import FEWEST_TOKENS
from vavae.metrics.reference import ReferenceFile, read_reference, reference_images
from vavae.models.tokenizer.teacher import VisionFoundationTeacher
from vavae.runs.evaluation_inputs import EvaluationInputs
from vavae.runs.run import StoredArtifact
from vavae.sampling.sample_shards import read_samples
from vavae.storage.storage import Storage, sha256_of

CLASSIFIER_IMAGES = 4_000
"""Training images that a classifier is fitted to, and held-out ones that it is tried on, at most."""

KEPT_FEATURES = 10_000
"""Real images whose features are kept for precision, recall and the kernel distance: ADM's files have so many."""

ADM_IMAGENET = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)

REFERENCES: tuple[SetName, ...] = ("held_out", "train", "file")
"""The sets that generated images are compared with."""

_IMAGE_WORDS: dict[SetName, str] = {
    "held_out": "held-out image",
    "train": "training image",
    "file": "reference image",
    "real": "real image",
    "probe": "training image",
    "reconstructions": "reconstruction of held-out image",
    "samples": "sample",
}
_OF_MODELS, _OF_REAL_IMAGES = "measuring", "references"
"""Folders of parts, in that of the run: those of its reconstructions, samples and latents, and those of real images."""


class Evaluator:
    """Evaluates the images of a run, in parts on its storage.

    Args:
        inputs: with samples where they are to be evaluated.

    Raises:
        UserError: the held-out images are not those of the protocol, the reference file does not fit, or there are
            too few classes or images for what is to be measured.
    """

    def __init__(self, inputs: EvaluationInputs) -> None:
        self.inputs, self._config = inputs, inputs.config.evaluate
        self._threads = threads_of(inputs.config.workers.cpus)
        self._manifest = read_manifest(inputs.shards)
        if inputs.samples is not None:
            check_data(self._config, len(self._manifest.classes), self._manifest.count(TRAIN))
        held_out = self._manifest.count(HELD_OUT)
        wanted = RECONSTRUCTION_PROTOCOLS.get(self._config.reconstruction_protocol, held_out)
        if held_out != wanted:
            raise UserError(
                f"evaluate.reconstruction_protocol={self._config.reconstruction_protocol} means {wanted:,} held-out "
                f"images, {inputs.shards.url()} has {held_out:,}: set it to custom"
            )
        self._counts: dict[SetName, int] = {"held_out": min(self._config.images, held_out)}
        if self._config.reference == TRAIN:
            self._counts["train"] = self._manifest.count(TRAIN)
        if self._file is not None and self._file.images:
            self._counts["file"] = self._file.images
        if self._config.measured_divisors:
            there = self._manifest.count(self._splits["real"])
            self._counts["real"] = min(inputs.config.sample.images, there)
        if not isinstance(self._config.class_agreement, bool):
            self._counts["probe"] = min(CLASSIFIER_IMAGES, self._manifest.count(TRAIN))
        self._counts |= {"reconstructions": self._counts["held_out"], "samples": inputs.config.sample.images}

    def missing(self, sets: Collection[SetName] | None = None) -> list[Part]:
        """The parts that are still to be evaluated, of some of the sets or of all."""
        names = [name for name in self._counts if sets is None or name in sets]
        return [Part(name, span) for name in names for span in self._files(name).missing()]

    def evaluate(self, part: Part, advance: Callable[[int], None]) -> None:
        """Evaluate one part.

        Args:
            part: some images of a set.
            advance: called with the number of images done since its last call.
        """
        found = (
            self._reconstruct(part.span, advance)
            if part.set_name == "reconstructions"
            else self._summarize(part, advance)
        )
        self._files(part.set_name).write(part.span, found)

    def reconstruction(self) -> Reconstruction:
        """The metrics of the tokenizer, once all parts are there."""
        whole = self._files("reconstructions").join(_join_reconstructions)
        metrics = {name: tensor for name, tensor in whole.items() if "/" not in name and not is_probed(name)}
        pairs = (metrics.pop("originals"), metrics.pop("reconstructions"))
        return Reconstruction.of(metrics, self._held_out, unpack(whole), pairs)

    def latent_probes(self) -> ProbeResults | None:
        """Probes of the tokenizer, once all parts are there; None where they are not asked for, or of no image."""
        config = self._config.latent_probes
        if config is None:
            return None
        found = ProbedBatch.from_tensors(self._files("reconstructions").join(_join_reconstructions))
        return None if found is None else probe_results(found, config, self.classes)

    def latent_space(self, mapped: Callable[[int, int], None] = lambda done, total: None) -> LatentSpace | None:
        """Uniformity of the latents, computed once for equal latents; None where it is not asked for.

        Args:
            mapped: called with the number of maps that are done, of all.
        """
        latents, config, seed = self.inputs.latents, self._config.latent_space, self.inputs.config.seed
        if latents is None or config is None:
            return None
        maps = self._maps(latents).join(lambda _: evaluate_latent_space(latents.folder, config, seed, mapped).tensors())
        return LatentSpace.from_tensors(maps)

    def generated(self) -> Summaries:
        """Features of the samples, once all parts are there."""
        return join(map(unpack, self._files("samples").read()))

    def summarize(self, images: Iterable[Tensor], count: int) -> Summaries:
        """Features of generated images that are not on storage.

        Args:
            images: batches uint8 [B, 3, H, W].
            count: number of images.
        """
        return summarize(map(to_rgb, images), self.extractors, count, self.device, image=_IMAGE_WORDS["samples"])

    def references(self) -> dict[str, Reference]:
        """References that generated images are compared with, by the name of the extractor."""
        name: SetName = "train" if self._config.reference == TRAIN else "held_out"
        words = {"held_out": "held-out images", "train": "training images"}[name]
        summaries = self._held_out if name == "held_out" else self._joined(name)
        found = {extractor: Reference.of(summary, words) for extractor, summary in summaries.items()}
        if self._file is not None:
            images = self._joined("file") if "file" in self._counts else {}
            file = str(self._config.reference_file).rpartition("/")[2]
            if self._file.pooled is None:
                words = f"images of {file}, their moments computed here"
                return {extractor: Reference.of(summary, words) for extractor, summary in images.items()}
            extractor = self._config.metrics.extractor
            found[extractor] = Reference.of_file(self._file, images.get(extractor), file)
        return found

    def divisors(self, references: Mapping[str, Reference]) -> dict[ExtractorName, Divisor]:
        """Fréchet distances of real images, which those of generated ones are divided by; empty where not asked for.

        Args:
            references: what generated images are compared with, by the name of the extractor.
        """
        ratio = self._config.frechet_ratio
        if ratio is None:
            return {}
        words = "published" if ratio.divisors == "published" else "given"
        found = {
            name: Divisor(ratio.given[name], words) for name in self._config.metrics.extractors if name in ratio.given
        }
        if self._config.measured_divisors:
            real = self._joined("real")
            words = {TRAIN: "training images", HELD_OUT: "held-out images"}[self._splits["real"]]
            for name in self._config.measured_divisors:
                moments = real[name].pooled
                distance = frechet_distance(moments, references[name].pooled)
                found[name] = Divisor(distance, f"that of {moments.count:,} {words}")
        return found

    def labeled_features(
        self, name: ExtractorName, labels: Tensor
    ) -> tuple[LabeledFeatures, LabeledFeatures, LabeledFeatures]:
        """Features of the samples, and of the first training and held-out images, with their classes.

        Args:
            name: the extractor.
            labels: classes of the samples, int64 [N].
        """
        train, held_out = (self._labeled_features(each, name) for each in ("probe", "held_out"))
        return LabeledFeatures(self.generated()[name].kept, labels), train, held_out

    def _labeled_features(self, set_name: Literal["probe", "held_out"], name: ExtractorName) -> LabeledFeatures:
        span = range(min(CLASSIFIER_IMAGES, self._counts[set_name]))
        batches = read_span(
            self.inputs.shards, self._manifest, self._splits[set_name], span, self._config.batch_size, self._threads
        )
        labels = torch.cat([batch.labels for batch in batches])
        return LabeledFeatures(self._joined(set_name)[name].kept[: len(labels)], labels)

    def first_images(self, split: str, limit: int) -> LabeledImages:
        """The first images of a split, at most `limit`, in color."""
        size = self._config.batch_size
        return _in_color(gather(read_images(self.inputs.shards, self._manifest, split, limit, size, self._threads)))

    def samples(self) -> LabeledImages:
        """All samples of the run, in color."""
        form = self._manifest.pixel_format
        return _in_color(gather(read_samples(self._samples.folder, self._sample_files, self._threads, form)))

    def clean(self) -> None:
        """Delete the parts of these samples; those of the tokenizer and of real images stay for other samples."""
        kept = {self._files("reconstructions").whole}
        if self.inputs.latents is not None:
            kept.add(self._maps(self.inputs.latents).whole)
        for path in self.inputs.storage.list(_OF_MODELS):
            if path not in kept:
                self.inputs.storage.delete(path)

    @property
    def classes(self) -> int:
        """Number of classes of the images."""
        return len(self._manifest.classes)

    @property
    def _splits(self) -> dict[SetName, str]:
        """Splits of the shards that sets of real images are of."""
        other = HELD_OUT if self._config.reference == TRAIN else TRAIN
        return {"held_out": HELD_OUT, "train": TRAIN, "real": other, "probe": TRAIN}

    @cached_property
    def device(self) -> torch.device:
        """The device of this process."""
        return World.current(self.inputs.config.workers.use_gpu).device

    @cached_property
    def extractors(self) -> dict[str, FeatureExtractor]:
        """Feature extractors by name, the main one first."""
        metrics = self._config.metrics
        return {name: load_extractor(name, metrics).to(self.device) for name in metrics.extractors}

    @cached_property
    def _held_out(self) -> Summaries:
        return self._joined("held_out")

    def _joined(self, name: SetName) -> Summaries:
        found = unpack(self._files(name).join(lambda parts: pack(join(map(unpack, parts)))))
        count = min(summary.pooled.count for summary in found.values())
        if count < 2 and name != "file":  # which is checked as it is read
            raise UserError(
                f"{self.inputs.shards.url()}: {count} readable {_IMAGE_WORDS[name]}s to measure against, and a Fréchet "
                "distance takes two or more: make the shards again, with more images or validation_fraction"
            )
        return found

    def _summarize(self, part: Part, advance: Callable[[int], None]) -> Tensors:
        """Features of the images of a part."""
        keep = KEPT_FEATURES - part.span.start if part.set_name != "samples" else len(part.span)
        image, first = _IMAGE_WORDS[part.set_name], part.span.start
        return pack(summarize(self._batches(part), self.extractors, keep, self.device, advance, image, first))

    def _batches(self, part: Part) -> Iterator[Tensor]:
        """The images of a part in color, in batches uint8 [B, 3, H, W]."""
        size, threads = self._config.metrics.batch_size, self._threads
        if part.set_name == "samples":
            shard_images = self.inputs.config.sample.shard_images
            found = (self._samples.folder, self._sample_files, shard_images, part.span, size, threads)
            yield from map(to_rgb, sample_batches(*found, self._manifest.pixel_format))
        elif part.set_name == "file":
            yield from reference_images(self._reference_path, part.span, size)
        else:
            split = self._splits[part.set_name]
            for batch in read_span(self.inputs.shards, self._manifest, split, part.span, size, threads):
                yield to_rgb(batch.images)

    def _reconstruct(self, span: range, advance: Callable[[int], None]) -> Tensors:
        """Metrics of every image of a part, features of its reconstructions, and some pairs for the picture."""
        size = self._config.batch_size
        batches = read_span(self.inputs.shards, self._manifest, HELD_OUT, span, size, self._threads)
        word = _IMAGE_WORDS["reconstructions"]
        summarizer = Summarizer(self.extractors, 0, self.device, word, span.start)
        parts, finite, shown = [], [], max(0, self._config.pictures - span.start)
        probes, seed = self._config.latent_probes, self.inputs.config.seed
        probed = None if probes is None else ProbedImages(probes, self.classes)
        for batch in reconstruct(batches, self._reconstructor, seed, span.start, self.device, probed):
            summarizer.update(to_rgb(batch.reconstructions))
            pictures = {"originals": batch.originals[:shown], "reconstructions": batch.reconstructions[:shown]}
            probed_tensors = {} if batch.probed is None else batch.probed.tensors()
            parts.append(batch.metrics | pictures | probed_tensors)
            finite.append(batch.finite)
            shown -= len(pictures["originals"])
            advance(len(batch.originals))
        if finite:
            place = self.inputs.tokenizer.folder.url()
            what = f"it is not finite, as {place} encodes and decodes the image; train that tokenizer again"
            require_finite_images(torch.cat(finite), word, span.start, what)
        return pack(summarizer.summaries()) | concatenate(iter(parts))

    @cached_property
    def _reconstructor(self) -> Reconstructor:
        export, perceptual = self.inputs.tokenizer, self.inputs.config.losses.perceptual
        tokenizer, description = load_exported_tokenizer(export.folder)
        aligned = ALIGNMENT in export.files  # an imported tokenizer may never have been
        return Reconstructor(
            tokenizer,
            load_alignment(export.folder) if aligned else None,
            VisionFoundationTeacher(description.teacher) if aligned else None,
            LPIPS.load(perceptual) if self._config.lpips else None,
        ).to(self.device)

    @cached_property
    def _file(self) -> ReferenceFile | None:
        """The reference file; checked in every process that evaluates."""
        place = self._config.reference_file
        if place is None:
            return None
        description = describe(self._config.metrics.extractor, self._config.metrics)
        return read_reference(self._reference_path, place, description, self._manifest.height_and_width)

    @cached_property
    def _reference_path(self) -> Path:
        assert self._config.reference_file is not None, "the reference is a split of the shards"
        return find_reference(self.inputs.storage, self._config.reference_file).local_file()

    @property
    def _samples(self) -> StoredArtifact:
        assert self.inputs.samples is not None, "samples are evaluated before there are any"
        return self.inputs.samples

    @cached_property
    def _sample_files(self) -> list[str]:
        return sorted(name for name in self._samples.files if name.endswith(".tar"))

    def _files(self, name: SetName) -> PartFiles:
        folder = _OF_MODELS if name in ("reconstructions", "samples") else _OF_REAL_IMAGES
        return PartFiles(self.inputs.storage, f"{folder}/{name}-{self._origins[name]}", spans(name, self._counts[name]))

    def _maps(self, latents: StoredArtifact) -> PartFiles:
        """The file of the maps of latents."""
        asked = identity(self._config.latent_space)
        origin = digest({"latents": latents.digest, "seed": self.inputs.config.seed, "asked": asked})
        return PartFiles(self.inputs.storage, f"{_OF_MODELS}/latents-{origin[:16]}", [])

    @cached_property
    def _origins(self) -> dict[SetName, str]:
        """Digests of all that the parts of a set are a function of."""
        inputs, config = self.inputs, self._config
        shards = {"shards": self._manifest.digest, "image_size": self._manifest.image_size}
        facts: dict[SetName, dict[str, Any]] = {
            "held_out": {**shards, "images": self._counts["held_out"]},
            "train": shards,
            "reconstructions": {
                **shards,
                "tokenizer": inputs.tokenizer.digest,
                "seed": inputs.config.seed,
                "images": self._counts["reconstructions"],
                "lpips": [config.lpips, inputs.config.losses.perceptual.weights],
                "pictures": config.pictures,
                **({} if config.latent_probes is None else {"latent_probes": identity(config.latent_probes)}),
            },
        }
        if inputs.samples is not None:
            facts["samples"] = {"samples": inputs.samples.digest}
        if "real" in self._counts:
            facts["real"] = {**shards, "split": self._splits["real"], "images": self._counts["real"]}
        if "probe" in self._counts:
            facts["probe"] = {**shards, "split": self._splits["probe"], "images": self._counts["probe"]}
        if "file" in self._counts:
            facts["file"] = {"file": sha256_of(self._reference_path)}
        extractors = config.metrics.fingerprint()
        return {name: digest({"extractors": extractors, **fact})[:16] for name, fact in facts.items()}


def _in_color(images: LabeledImages) -> LabeledImages:
    return images._replace(images=to_rgb(images.images))


def check_data(config: EvaluateConfig, classes: int, images: int) -> None:
    """Check that images can be measured as a configuration asks.

    Args:
        config: of the evaluation.
        classes: number of their classes.
        images: number of training images.

    Raises:
        UserError: there are too few classes or images.
    """
    if config.class_agreement and classes < 2:
        raise UserError(
            f"evaluate.class_agreement takes two classes or more, the images have {classes or 'none'}: set it to false"
        )
    if config.latent_space is not None and images < FEWEST_TOKENS:
        raise UserError(
            f"evaluate.latent_space takes {FEWEST_TOKENS} training images, there are {images}: set it to null"
        )


def _join_reconstructions(parts: Iterable[Tensors]) -> Tensors:
    """Metrics and features of all reconstructions."""
    every = list(parts)
    of_images = ({name: tensor for name, tensor in part.items() if "/" not in name} for part in every)
    return pack(join(map(unpack, every))) | concatenate(of_images)


def find_reference(storage: Storage, place: str) -> Storage:
    """Find a reference file.

    Args:
        storage: folder of the run, whose options reach the file where it is in a store.
        place: path or URL of the file.

    Raises:
        UserError: there is none.
    """
    file = storage.at(place)
    if not file.is_file():
        raise UserError(
            f"evaluate.reference={written_path(place)}: no file there; ADM's for ImageNet at 256 px is {ADM_IMAGENET}"
        )
    return file
