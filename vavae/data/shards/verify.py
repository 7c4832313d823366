"""Checks of whole sets of shards, their statistics, and the manifest of shards made by others."""

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from vavae.data.config import RGB, PixelFormat, RecordKeys, ShardsConfig
from vavae.data.exclusions import exclusion
from vavae.data.image import UnreadableImage, decode_image
from vavae.data.record import LABEL, Numbering, RecordReader, find_image, find_label, read_label, readable
from vavae.data.shards.manifest import Manifest, ShardInfo, ShardList, shard_file
from vavae.data.shards.mapped_shard import MappedShard
from vavae.errors import UserError
from vavae.storage.storage import Storage, sha256_of


class _Labels:
    """Labels of the records of an index; where all of them are null, the set has none.

    Args:
        keys: members of a record with the image and the class.
    """

    def __init__(self, keys: RecordKeys) -> None:
        self.values: dict[int | str, str] = {}
        """Each label, with the place of its first record."""
        self._keys, self._key, self._is_first = keys, keys.label, True
        self._null: dict[tuple[str, int], list[int]] = {}
        self._unlabeled: list[str] = []

    def add(self, record: Mapping[str, bytes], name: str, position: tuple[str, int, int]) -> None:
        """Read the label of a record with a name for users, at a position in a shard of a split."""
        if self._is_first:
            self._key, self._is_first = find_label(record, name, self._keys.label), False
        label = None if self._key is None else read_label(record, self._key, name)
        if label is not None:
            self.values.setdefault(label, name)
        elif self._key is not None:
            split, shard, index = position
            self._null.setdefault((split, shard), []).append(index)
            self._unlabeled.append(name)

    @property
    def key(self) -> str | None:
        """Member of a record that holds its label; None where there are no labels."""
        return self._key if self.values else None

    @property
    def null(self) -> dict[tuple[str, int], list[int]]:
        """Positions of records of a null label by split and shard."""
        return self._null if self.values else {}

    @property
    def unlabeled(self) -> list[str]:
        """Names of those records."""
        return self._unlabeled if self.values else []


def index_shards(
    splits: Mapping[str, Sequence[str]],
    classes: Sequence[str] | None,
    storage: Storage,
    keys: RecordKeys = RecordKeys(),  # noqa: B008 - it cannot be changed
) -> Manifest:
    """Build the manifest of existing WebDataset tars, which stay where they are; it leaves out records of a null label.

    Its image size is the default: a run that takes the manifest for its shards puts its own there.

    Args:
        splits: by split, paths or URLs of shards, or of folders whose .tar files are meant, at any depth.
        classes: names of the classes; None takes those that stand in the records, or numbers them.
        storage: whose options and cache are used for shards that lie in a store.
        keys: members of a record with the image and the class.

    Raises:
        UserError: no shards there, a damaged or empty one, a record without an image or without a class where others
            have one, several that can be meant, or a class that has no name.
    """
    found: dict[str, tuple[ShardInfo, ...]] = {}
    labels = _Labels(keys)
    for split, urls in splits.items():
        infos: list[ShardInfo] = []
        for place in _shards(urls, storage):
            path, url = place.local_file(), place.url()
            shard = MappedShard(path)
            if not len(shard):
                raise UserError(f"{url}: a shard without a record; delete it or leave it out")
            for index in range(len(shard)):
                record, name = shard[index], f"{url}#{readable(shard.key(index))}"
                find_image(record, name, keys.image)
                labels.add(record, name, (split, len(infos), index))
            infos.append(
                ShardInfo(
                    name=f"{len(infos):06d}.tar",
                    count=len(shard),
                    bytes=path.stat().st_size,
                    sha256=sha256_of(path),
                    url=url,
                )
            )
        found[split] = tuple(infos)
    values, label_key = labels.values, labels.key
    kept = _without(found, labels.null)
    empty_split = next((split for split, shards in kept.items() if not shards), None)
    if empty_split:
        raise UserError(f"{label_key} is null in every record of split {empty_split}: nothing would be left of it")
    by_name = any(isinstance(value, str) for value in values)
    names = _names_of(classes, values, by_name)
    used = {str(value) if by_name else names[int(value)] for value in values}
    empty = [name for name in names if name not in used]
    return Manifest(
        splits=kept,
        classes=names,
        image_size=ShardsConfig.model_fields["image_size"].default,
        sources={},
        excluded=(
            *exclusion("classes without an image", empty),
            *exclusion("records of a null label", labels.unlabeled),
        )
        or None,
        image_key=keys.image,
        label_key=None if label_key == LABEL else label_key,
        by_name=by_name or None,
    )


def _names_of(classes: Sequence[str] | None, found: Mapping[int | str, str], by_name: bool) -> tuple[str, ...]:
    """Names of the classes of an index; UserError where the given ones do not fit.

    Args:
        classes: names that are given.
        found: what stands in the records, with the place of the first of each.
        by_name: whether these are names, not labels.
    """
    if classes is None:
        return Numbering.of(found).classes
    if not found:
        raise UserError(f"--classes names {len(classes)} classes, but the records have no labels: leave it out")
    for value, place in found.items():
        if by_name and str(value) not in classes:
            raise UserError(f"{place}: its class {value!r} is none of the {len(classes)} that are named")
        if not by_name and int(value) >= len(classes):
            raise UserError(f"{place}: label {value}, but the manifest has {len(classes)} classes; name all of them")
    return tuple(classes)


def _shards(urls: Sequence[str], storage: Storage) -> Iterator[Storage]:
    for url in urls:
        place = storage.at(url)
        names = [""] if place.is_file() else [name for name in place.sizes() if name.endswith(".tar")]
        if not names:
            raise UserError(f"{url}: no shard there; give a .tar or a folder of them")
        yield from (place.child(name) if name else place for name in names)


class ShardFaults(NamedTuple):
    """Faults of one shard; empty for an intact one."""

    split: str
    number: int
    """Position of the shard in its split."""
    lines: list[str]
    """Lines on faults that would stop a run."""
    unreadable: dict[int, str]
    """Lines on images that cannot be read, by position in the shard."""


class ShardSet(Protocol):
    """The part of a manifest, of images or of latents, that a check of its shards needs."""

    @property
    def splits(self) -> Mapping[str, Sequence[ShardInfo]]:
        """Shards by split, in order."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes."""


def verify_shards(storage: Storage, manifest: ShardSet, images: bool) -> Iterator[ShardFaults]:
    """Check every shard of a set and yield its faults.

    A shard may be gone, have another size, checksum or count than the manifest says, or a class beyond the manifest's.
    All of it is read where it lies: no copy in the cache of this machine stands in for a shard of a store.

    Args:
        storage: the folder of the manifest.
        manifest: the shards, of images or latents.
        images: decode every image, too.
    """
    form = (manifest.pixel_format if isinstance(manifest, Manifest) else RGB) if images else None
    reader = manifest.reader if isinstance(manifest, Manifest) else RecordReader(RecordKeys(), manifest.classes)

    def check(path: Path, info: ShardInfo, faults: ShardFaults) -> None:
        _check_records(MappedShard(path, info.count, info.dropped), info, reader, form, faults)

    for split, shards in manifest.splits.items():
        yield from verify_files(storage, split, shards, check)


def verify_files(
    storage: Storage, split: str, shards: Iterable[ShardInfo], check: Callable[[Path, ShardInfo, ShardFaults], None]
) -> Iterator[ShardFaults]:
    """Check every shard of a split by its size and checksum, and by a function, and yield its faults.

    Args:
        storage: the folder of the manifest.
        split: the folder of the shards in it.
        shards: the shards.
        check: adds faults of a local file that has this size and checksum, or raises the UserError that is one.
    """
    for number, info in enumerate(shards):
        faults = ShardFaults(split, number, [], {})
        with tempfile.TemporaryDirectory(prefix="vavae-") as cache:
            fresh = Storage(storage.root, cache, storage.options)
            try:
                check(shard_file(fresh, split, info), info, faults)
            except UserError as error:
                faults.lines.append(str(error))
        yield faults


def _check_records(
    shard: MappedShard, info: ShardInfo, reader: RecordReader, form: PixelFormat | None, faults: ShardFaults
) -> None:
    dropped = info.dropped or ()
    positions = (position for position in range(len(shard) + len(dropped)) if position not in dropped)
    for index, position in enumerate(positions):
        record, place = shard[index], f"{faults.split}/{info.name}#{shard.key(index)}"
        try:
            reader.label(record, place)
            if form is not None:
                decode_image(reader.image(record, place), form=form)
        except UserError as error:
            faults.lines.append(str(error))
        except UnreadableImage as error:
            faults.unreadable[position] = f"{place}: unreadable ({error})"


def without_unreadable(manifest: Manifest, found: Iterable[ShardFaults]) -> Manifest:
    """The manifest of the same shards less their unreadable images: another content, of another digest.

    Raises:
        UserError: no image of a split is left.
    """
    unreadable = {(faults.split, faults.number): faults.unreadable for faults in found if faults.unreadable}
    names = [line.partition(": ")[0] for lines in unreadable.values() for line in lines.values()]
    left = _without(manifest.splits, unreadable)
    empty = next((split for split, shards in left.items() if not shards), None)
    if empty:
        raise UserError(f"no image of split {empty} can be read: nothing would be left of it")
    skipped = {"skipped": (*manifest.skipped, *names), "skipped_count": manifest.skipped_count + len(names)}
    return manifest.model_copy(update={"splits": left, **skipped})


def _without(
    splits: Mapping[str, Sequence[ShardInfo]], positions: Mapping[tuple[str, int], Collection[int]]
) -> dict[str, ShardList]:
    """The shards of splits less some of their records, by split and number of the shard; none is left empty."""

    def less(info: ShardInfo, dropped: Collection[int]) -> ShardInfo:
        update = {"count": info.count - len(dropped), "dropped": tuple(sorted({*(info.dropped or ()), *dropped}))}
        return info.model_copy(update=update) if dropped else info

    return {
        split: ShardList.of(
            left for number, info in enumerate(infos) if (left := less(info, positions.get((split, number), ()))).count
        )
        for split, infos in splits.items()
    }


class SplitStatistics(NamedTuple):
    """Statistics of the shards of a split."""

    shards: int
    images: int
    bytes: int
    """Size of the shards, bytes."""
    labels: Counter[int]
    """Number of images by class."""
    extensions: Counter[str]
    """Number of images by file extension."""
    image_bytes: int
    """Size of the encoded images alone, bytes."""


def split_statistics(storage: Storage, manifest: Manifest, split: str) -> SplitStatistics:
    """Count the content of the shards of a split; UserError where one is damaged."""
    labels, extensions, size = Counter[int](), Counter[str](), 0
    shards, reader = manifest.splits[split], manifest.reader
    for info in shards:
        shard = MappedShard(shard_file(storage, split, info), info.count, info.dropped)
        for index in range(len(shard)):
            record, place = shard[index], f"{split}/{info.name}#{shard.key(index)}"
            labels[reader.label(record, place)] += 1
            size += len(reader.image(record, place))
            extensions[find_image(record, place, manifest.image_key)] += 1
    total = sum(shard.bytes for shard in shards)
    return SplitStatistics(len(shards), manifest.count(split), total, labels, extensions, size)


def read_class_names(path: Path) -> list[str]:
    """Read names of classes, one per line in the order of their labels."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected the name of a class on every line") from None
    if not names:
        raise UserError(f"{path}: no names of classes; expected one a line")
    return names
