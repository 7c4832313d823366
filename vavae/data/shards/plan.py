"""The plan of a set of image shards: which image goes where, decided from names alone, before any image is read."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from vavae.config import digest, identity
from vavae.data.config import NO_LABELS, ShardsConfig
from vavae.data.exclusions import Exclusion
from vavae.data.record import LABEL
from vavae.data.shards.manifest import Manifest, read_manifest
from vavae.data.sources.listing import Fingerprint, Listing, Record, Source
from vavae.data.sources.opening import INDEXED, open_source
from vavae.errors import UserError
from vavae.randomness import numpy_generator
from vavae.storage.storage import Storage

TRAIN, VALIDATION = "train", "validation"


class PlannedShard(NamedTuple):
    """One shard to write, complete for a worker that knows nothing of the others."""

    name: str
    """Path of the shard without its suffix, `<split>/NNNNNN`."""
    source: str
    records: tuple[Record, ...]
    first_index: int
    """Index within the split of the first record; the index of a record is its key in the shard."""
    config: ShardsConfig
    plan: str
    """Digest of the plan that it belongs to."""
    has_labels: bool = True
    """True where its images have classes."""


@dataclass(frozen=True)
class ShardPlan:
    """The shards of all splits, in order, and what they are made from."""

    config: ShardsConfig
    classes: tuple[str, ...]
    sources: dict[str, Fingerprint]
    """Fingerprints of the sources by split; without a validation source both splits come from `train`."""
    shards: tuple[PlannedShard, ...]
    excluded: tuple[Exclusion, ...] = ()
    """Files and images of the sources that are left out, by the reason."""

    @property
    def images(self) -> int:
        """Images in all shards that are to be written."""
        return sum(len(shard.records) for shard in self.shards)

    @property
    def train_images(self) -> int:
        """Images of the train split, those of shards that are there already included."""
        written = sum(len(shard.records) for shard in self.shards if shard.name.startswith(f"{TRAIN}/"))
        return written or cast(int, self.sources[TRAIN]["images"])


def plan_shards(config: ShardsConfig, storage: Storage) -> ShardPlan:
    """List the sources, divide train from validation, shuffle each split by key and cut it into shards.

    Args:
        config: sources and form.
        storage: whose options and cache are used for sources that lie in a store.

    Raises:
        UserError: a source is missing, empty or not arranged in classes; the validation source has a class of its
            own; a split comes out empty.
    """
    index = read_index(config, storage)
    if index is not None:
        return ShardPlan(config, index.classes, describe_sources(config, storage), ())
    names, listings = source_names(config), _list_sources(config, storage)
    sources = {split: listing.fingerprint for split, listing in listings.items()}
    plan = digest(origin(config, sources))
    shards = [
        shard
        for split, records in _split(listings, config).items()
        for shard in _cut(split, records, names.get(split, config.source), config, plan, bool(listings[TRAIN].classes))
    ]
    excluded = [each for listing in listings.values() for each in listing.excluded]
    return ShardPlan(config, listings[TRAIN].classes, sources, tuple(shards), tuple(excluded))


def describe_sources(config: ShardsConfig, storage: Storage) -> dict[str, Fingerprint]:
    """Fingerprints of the sources by split, from names and sizes; raises UserError as `plan_shards` does."""
    index = read_index(config, storage)
    if index is not None:
        return {
            split: {"kind": INDEXED, "classes": [*index.classes], "images": index.count(split), "digest": index.digest}
            for split in index.splits
        }
    return {split: listing.fingerprint for split, listing in _list_sources(config, storage).items()}


def read_index(config: ShardsConfig, storage: Storage) -> Manifest | None:
    """The manifest of shards that others made, with the image size of the configuration; None for any other source.

    Raises:
        UserError: there is none, or it was made with another key of the classes.
    """
    kind, _, folder = config.source.partition(":")
    if kind != INDEXED:
        return None
    manifest = read_manifest(storage.at(folder))
    update: dict[str, Any] = {
        "image_size": config.image_size,
        **config.pixel_format.fields,
        "image_key": config.image_key or manifest.image_key,
    }
    if config.label_key == NO_LABELS:
        update |= {"classes": (), "label_key": None, "by_name": None}
    elif config.label_key not in (None, manifest.label_key or LABEL):
        raise UserError(
            f"shards.label_key={config.label_key}, but {config.source} was made with {manifest.label_key or LABEL}: "
            "leave it out, or run `vavae data index --label-key` again"
        )
    return manifest.model_copy(update=update)


def input_digests(sources: Mapping[str, Fingerprint]) -> dict[str, str]:
    """The digests by which the artifact of the shards names its sources."""
    return {split: digest(fingerprint) for split, fingerprint in sources.items()}


def origin(config: ShardsConfig, sources: Mapping[str, Fingerprint]) -> dict[str, Any]:
    """Plain values that determine the bytes of the shards: configuration and sources."""
    return {"config": identity(config), "sources": identity(sources)}


def source_names(config: ShardsConfig) -> dict[str, str]:
    """Names of the sources by split."""
    names = {TRAIN: config.source, VALIDATION: config.validation_source}
    return {split: name for split, name in names.items() if name is not None}


def open_split(config: ShardsConfig, storage: Storage, split: str) -> Source:
    """Open the source of a split; UserError where it can't be opened."""
    field = {TRAIN: "labels", VALIDATION: "validation_labels"}[split]
    return open_source(source_names(config)[split], storage, getattr(config, field), config.keys, field)


def _list_sources(config: ShardsConfig, storage: Storage) -> dict[str, Listing]:
    listings = {split: open_split(config, storage, split).listing() for split in source_names(config)}
    if config.label_key == NO_LABELS:
        return {split: listing.without_labels() for split, listing in listings.items()}
    return listings


def _split(listings: dict[str, Listing], config: ShardsConfig) -> dict[str, Sequence[Record]]:
    train = listings[TRAIN]
    if VALIDATION in listings:
        return {TRAIN: train.records, VALIDATION: _relabel(listings[VALIDATION], train.classes, config)}
    if not config.validation_fraction:
        return {TRAIN: train.records}
    splits: dict[str, Sequence[Record]] = {
        TRAIN: [record for record in train.records if not is_held_out(record.key, config)],
        VALIDATION: [record for record in train.records if is_held_out(record.key, config)],
    }
    empty = next((split for split, records in splits.items() if not records), None)
    if empty:
        raise UserError(
            f"validation_fraction={config.validation_fraction} of {len(train.records)} images leaves none for {empty}: "
            "change it, or name a validation_source"
        )
    return splits


def is_held_out(key: str, config: ShardsConfig) -> bool:
    """Return whether an image belongs to validation: a function of its name alone, so other images never move it."""
    value = hashlib.sha256(f"{config.seed} {VALIDATION} {key}".encode(errors="surrogateescape")).digest()[:8]
    return int.from_bytes(value, "big") < config.validation_fraction * 2**64


def _relabel(listing: Listing, classes: Sequence[str], config: ShardsConfig) -> list[Record]:
    """The records with labels that index the classes of the train split."""
    if bool(classes) != bool(listing.classes):
        with_labels, without = ("source", "validation_source") if classes else ("validation_source", "source")
        raise UserError(
            f"shards.{with_labels} has classes and shards.{without} has none: name those of both (labels, "
            f"validation_labels), or take both without labels (label_key={NO_LABELS})"
        )
    if not classes:
        return [*listing.records]
    labels = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in listing.classes if name not in labels]
    if unknown:
        raise UserError(
            f"validation_source {config.validation_source}: class {unknown[0]} is not among the {len(classes)} of "
            f"{config.source}; both must name their classes alike"
        )
    return [record._replace(label=labels[listing.classes[record.label]]) for record in listing.records]


def _cut(
    split: str, records: Sequence[Record], source: str, config: ShardsConfig, plan: str, has_labels: bool
) -> Iterator[PlannedShard]:
    order = numpy_generator(config.seed, "shards", split).permutation(len(records))
    for number, first in enumerate(range(0, len(records), config.shard_images)):
        chosen = tuple(records[index] for index in order[first : first + config.shard_images])
        yield PlannedShard(f"{split}/{number:06d}", source, chosen, first, config, plan, has_labels)
