"""Writing a set of image shards.

Each shard is a pure function of its plan and commits by itself, so any number of processes may write them in any order,
be killed, and resume.
"""

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vavae.config import differences, digest
from vavae.data.config import ShardsConfig
from vavae.data.exclusions import Exclusion, exclusion
from vavae.data.image import UnreadableImage, stored_image
from vavae.data.record import CAPTION, LABEL, readable
from vavae.data.shards.manifest import MANIFEST, Manifest, ShardInfo, write_manifest
from vavae.data.shards.plan import (
    TRAIN,
    VALIDATION,
    PlannedShard,
    ShardPlan,
    input_digests,
    origin,
    plan_shards,
    read_index,
)
from vavae.data.shards.tar import ShardWriter, write_tar
from vavae.data.sources.listing import Fingerprint, Source
from vavae.data.sources.opening import reopen_source
from vavae.errors import UserError
from vavae.storage.artifact import Artifact, FileInfo, commit
from vavae.storage.storage import Storage, sha256_of

KIND = "shards"
_PLAN = "plan.json"
_SKIPPED_NAMES = 1000
_log = logging.getLogger(__name__)


class ShardRecord(BaseModel):
    """The commit record of one shard, written after it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: str
    """Digest of the plan that the shard belongs to."""
    shard: ShardInfo
    """Entry for the manifest; a shard without a single readable image has count 0 and no file."""
    skipped: tuple[str, ...]
    """Names of the images that could not be read."""


def _ignore(images: int) -> None:
    pass


def write_shards(
    storage: Storage, prefix: str, config: ShardsConfig, progress: Callable[[int, int | None], None]
) -> Manifest:
    """Make the shards of a configuration in this process, except those that are done already.

    Args:
        storage: the target.
        prefix: folder of the shards.
        config: sources and form.
        progress: called with the images done and their total.

    Raises:
        UserError: see `plan_shards`, `claim`, `write_shard` and `finish`.
    """
    plan = plan_shards(config, storage)
    claim(storage, prefix, config, plan.sources)
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        progress(done, plan.images)

    return finish(storage, prefix, plan, [write_shard(storage, prefix, shard, advance) for shard in plan.shards])


def claim(storage: Storage, prefix: str, config: ShardsConfig, sources: Mapping[str, Fingerprint]) -> None:
    """Claim a folder for the shards of a configuration and its sources.

    Raises:
        UserError: it holds shards of another source or configuration, or anything else.
    """
    check_origin(storage, prefix, config, sources)
    storage.write_json(f"{prefix}/{_PLAN}", origin(config, sources))


def write_shard(
    storage: Storage, prefix: str, shard: PlannedShard, advance: Callable[[int], None] = _ignore
) -> ShardRecord:
    """Write one shard and then its record, unless both are there.

    Args:
        storage: the target.
        prefix: folder of the shards.
        shard: what to write.
        advance: called with the number of images done since the last call.

    Raises:
        UserError: the source is damaged. An image that cannot be decoded is left out and recorded instead.
    """
    present = _read_record(storage, prefix, shard)
    if present is not None:
        advance(len(shard.records))
        return present
    path, record_path = _path(prefix, shard), _record_path(prefix, shard)
    storage.delete(record_path)
    source = reopen_source(shard.source, storage, shard.plan, shard.config.keys)
    with storage.create(path) as local:
        with write_tar(local) as tar:
            skipped = _fill(tar, source, shard, advance)
        size, sha256 = local.stat().st_size, sha256_of(local)
    if not tar.count:
        storage.delete(path)
    info = ShardInfo(name=path.rpartition("/")[2], count=tar.count, bytes=size, sha256=sha256)
    record = ShardRecord(plan=shard.plan, shard=info, skipped=tuple(skipped))
    storage.write_json(record_path, record.model_dump(mode="json"))
    return record


def _read_record(storage: Storage, prefix: str, shard: PlannedShard) -> ShardRecord | None:
    """Read the record of a shard that is done; None where it is not, or not by this plan."""
    try:
        record = ShardRecord.model_validate_json(storage.read_bytes(_record_path(prefix, shard)))
        size = storage.size(_path(prefix, shard)) if record.shard.count else None
    except (FileNotFoundError, ValidationError):
        return None
    return record if _is_done(shard, record, size) else None


def _is_done(shard: PlannedShard, record: ShardRecord, size: int | None) -> bool:
    """Return whether a record is of this plan, and its shard the size that it says; None where there is none."""
    return record.plan == shard.plan and (not record.shard.count or size == record.shard.bytes)


def _path(prefix: str, shard: PlannedShard) -> str:
    return f"{prefix}/{shard.name}.tar"


def _record_path(prefix: str, shard: PlannedShard) -> str:
    return f"{prefix}/{shard.name}.json"


def finish(storage: Storage, prefix: str, plan: ShardPlan, records: Sequence[ShardRecord]) -> Manifest:
    """Write the manifest, then the commit record of the whole, once all shards are there.

    Args:
        storage: the target.
        prefix: folder of the shards.
        plan: all shards, in order.
        records: those that `write_shard` returned for them.

    Raises:
        UserError: not a single image of a split could be read; nothing is left in the folder then.
    """
    manifest = read_index(plan.config, storage) or _gather(storage, prefix, plan, records)
    write_manifest(storage, prefix, manifest)
    commit(storage, prefix, _artifact(storage, prefix, plan, manifest))
    return manifest


def _gather(storage: Storage, prefix: str, plan: ShardPlan, records: Sequence[ShardRecord]) -> Manifest:
    """Build the manifest of the shards that were written, with one listing for the sizes of all."""
    splits: dict[str, list[ShardInfo]] = {}
    skipped: list[str] = []
    sizes = storage.sizes(prefix)
    count_of: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for shard, record in zip(plan.shards, records, strict=True):
        path = _path(prefix, shard)
        assert _is_done(shard, record, sizes.get(path)), f"{storage.url(path)} is not what its record says"
        splits.setdefault(shard.name.partition("/")[0], []).append(record.shard)
        skipped += record.skipped
        count_of[shard.name.partition("/")[0]].update(_labels_written(shard, record))
    empty = next((split for split, shards in splits.items() if not any(shard.count for shard in shards)), None)
    if empty:
        storage.delete(prefix)
        raise UserError(f"no image of split {empty} can be read ({skipped[0]}, ...): check {plan.config.source}")
    return Manifest(
        splits={split: tuple(shard for shard in shards if shard.count) for split, shards in splits.items()},
        classes=plan.classes,
        image_size=plan.config.image_size,
        **plan.config.pixel_format.fields,
        sources=plan.sources,
        skipped=tuple(skipped[:_SKIPPED_NAMES]),
        skipped_count=len(skipped),
        excluded=(*plan.excluded, *_empty_classes(plan.classes, count_of)) or None,
    )


def _labels_written(shard: PlannedShard, record: ShardRecord) -> Iterator[int]:
    """Yield the labels of the images in a shard."""
    skipped = set(record.skipped)
    return (image.label for image in shard.records if not skipped or readable(image.key) not in skipped)


def _empty_classes(classes: Sequence[str], count_of: Mapping[str, Counter[int]]) -> list[Exclusion]:
    """Classes that no image is left of, or none but held-out ones."""
    train, held_out = (count_of.get(split, Counter[int]()) for split in (TRAIN, VALIDATION))
    without = [label for label in range(len(classes)) if not train[label]]
    return [
        *exclusion("classes without an image", [classes[label] for label in without if not held_out[label]]),
        *exclusion("classes whose only images are held out", [classes[label] for label in without if held_out[label]]),
    ]


def check_origin(storage: Storage, prefix: str, config: ShardsConfig, sources: Mapping[str, Fingerprint]) -> None:
    """Make sure that the shards in a folder, if there are any, are those of a configuration and its sources.

    Raises:
        UserError: they are of another source or configuration, or the folder holds anything else.
    """
    try:
        made = storage.read_json(f"{prefix}/{_PLAN}")
    except FileNotFoundError:
        if storage.sizes(prefix):
            raise UserError(
                f"{storage.url(prefix)} holds something else than shards: delete it, or take another name"
            ) from None
        return
    found = differences(made, {"config": config, "sources": sources})
    if found:
        raise UserError(
            f"{storage.url(prefix)} holds shards made {_describe_difference(found)}: delete it, or take another name"
        )


def _describe_difference(found: list[tuple[str, Any, Any]]) -> str:
    """Describe the most telling difference of two origins: configuration, then contents, then their digest."""
    path, before, now = min(found, key=lambda item: (not item[0].startswith("config."), item[0].endswith(".digest")))
    if path.startswith("config."):
        return f"with {path.removeprefix('config.')}={before}, not {now}"
    if isinstance(before, list) and isinstance(now, list):
        before, now = ", ".join(before[:3]), ", ".join(now[:3])
    return f"from another source ({path.removeprefix('sources.')} was {before}, is {now} now)"


def _fill(tar: ShardWriter, source: Source, shard: PlannedShard, advance: Callable[[int], None]) -> list[str]:
    """Write the samples of a shard; return the names of those left out."""
    skipped = []
    for index, image in enumerate(shard.records, shard.first_index):
        data = source.read(image)  # a source that fails is an error, not a bad image
        try:
            stored = stored_image(data, shard.config)
        except UnreadableImage as error:
            _log.warning("left out %s: %s", readable(image.key), error)
            skipped.append(readable(image.key))
        else:
            members = {stored.extension: stored.data}
            if shard.has_labels:
                members[LABEL] = b"%d" % image.label
            members["json"] = json.dumps({"key": readable(image.key)}).encode()
            if image.caption is not None:
                members[CAPTION] = image.caption.encode()
            tar.add(index, members)
        advance(1)
    return skipped


def _artifact(storage: Storage, prefix: str, plan: ShardPlan, manifest: Manifest) -> Artifact:
    files = {
        f"{split}/{shard.name}": FileInfo(bytes=shard.bytes, sha256=shard.sha256)
        for split, shards in manifest.splits.items()
        for shard in shards
        if shard.url is None
    }
    text = storage.read_bytes(f"{prefix}/{MANIFEST}")
    files[MANIFEST] = FileInfo(bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
    return Artifact(
        kind=KIND,
        digest=manifest.digest,
        config=digest(plan.config),
        inputs=input_digests(plan.sources),
        files=files,
        details={**{split: manifest.count(split) for split in manifest.splits}, "skipped": manifest.skipped_count},
    )
