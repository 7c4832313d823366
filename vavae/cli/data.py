"""``vavae data index | verify | stats``: shards of images, indexed, verified and described."""

import argparse
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vavae.errors import UserError

if TYPE_CHECKING:
    from vavae.storage.storage import Storage


def add_commands(commands: Any) -> None:
    """Add ``vavae data`` with its commands; ``act`` of their arguments returns the exit status."""
    data = commands.add_parser("data", help="index, verify and describe shards of images")
    commands = data.add_subparsers(required=True, metavar="COMMAND")
    index = _command(commands, "index", "write the manifest of WebDataset shards made by others", _index)
    index.add_argument("--train", nargs="+", required=True, metavar="URL", help="shards, or folders of .tar files")
    index.add_argument("--validation", nargs="+", required=True, metavar="URL", help="held-out ones likewise")
    index.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line")
    index.add_argument("--image-key", metavar="KEY", help="member of a record with the image, where it has several")
    index.add_argument(
        "--label-key",
        metavar="KEY",
        help="member with the class, or json.<key>; `none` takes the images without classes",
    )
    verify = _command(commands, "verify", "check size, checksum, count and classes of every shard", _verify)
    verify.add_argument("--images", action="store_true", help="decode every image, too")
    verify.add_argument("--drop", action="store_true", help="decode, and take unreadable images out of the manifest")
    stats = _command(commands, "stats", "show counts, sizes and classes", _stats)
    for command in (index, verify, stats):
        command.add_argument("folder", metavar="FOLDER", help="path or URL of the folder of manifest.json")
        command.add_argument("--cache", help="folder for fetched shards; default: one below the temporary folder")
        command.add_argument("--anonymous", action="store_true", help="ask S3 without keys, for public buckets")


def _storage(arguments: argparse.Namespace) -> "Storage":
    """Folder of the shards; S3's endpoint, region, keys and authorities come from its variables (AWS_PROFILE, ...)."""
    from vavae.storage.config import StorageOptions
    from vavae.storage.storage import Storage

    return Storage(arguments.folder, arguments.cache, StorageOptions(anonymous=arguments.anonymous))


def _command(commands: Any, name: str, text: str, act: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(act=act)
    return command


def _index(arguments: argparse.Namespace) -> int:
    from vavae.data.config import RecordKeys
    from vavae.data.shards.manifest import write_manifest
    from vavae.data.shards.verify import index_shards, read_class_names

    splits = {"train": arguments.train, "validation": arguments.validation}
    classes = read_class_names(arguments.classes) if arguments.classes else None
    storage = _storage(arguments)
    manifest = index_shards(splits, classes, storage, RecordKeys(arguments.image_key, arguments.label_key))
    write_manifest(storage, "", manifest)
    counts = ", ".join(f"{manifest.count(split):,} {split}" for split in manifest.splits)
    left_out = f" (left out: {manifest.left_out})" if manifest.left_out else ""
    kinds = f"{len(manifest.classes):,} classes" if manifest.classes else "no classes"
    print(f"{counts} images of {kinds}{left_out}; use them with shards.source=indexed:{arguments.folder}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from vavae.data.shards.manifest import Manifest, write_manifest
    from vavae.data.shards.verify import ShardFaults, verify_shards, without_unreadable
    from vavae.latents.manifest import LatentManifest, read_any_manifest, require_stored

    storage, images = _storage(arguments), arguments.images or arguments.drop
    manifest = read_any_manifest(storage)
    if isinstance(manifest, LatentManifest):
        require_stored(storage, manifest)
    if images and isinstance(manifest, LatentManifest):
        raise UserError(f"{storage.url()} holds latents, which have no images to decode: leave the option out")
    if arguments.drop and any(shard.url is None for shards in manifest.splits.values() for shard in shards):
        raise UserError(f"{storage.url()} is a run's own: delete the shard with the image and run prepare_shards again")
    checked = verify_shards(storage, manifest, images)
    if isinstance(manifest, LatentManifest):
        from vavae.latents.features import verify_features  # which imports networks

        checked = chain(checked, verify_features(storage, manifest))
    found: list[ShardFaults] = []
    for faults in checked:
        for line in (*faults.lines, *faults.unreadable.values()):
            print(line, flush=True)
        found.append(faults)
    unreadable = sum(len(faults.unreadable) for faults in found)
    if arguments.drop and unreadable:
        assert isinstance(manifest, Manifest), "latents were refused"
        write_manifest(storage, "", without_unreadable(manifest, found))
        print(f"{unreadable:,} images are out of the manifest, which makes it another source for a run")
    whole = sum(not faults.lines and (arguments.drop or not faults.unreadable) for faults in found)
    print(f"{whole} of {len(found)} shards are as the manifest says")
    return 0 if whole == len(found) else 1


def _stats(arguments: argparse.Namespace) -> int:
    from rich import filesize

    from vavae.data.shards.manifest import read_manifest
    from vavae.data.shards.verify import split_statistics

    storage = _storage(arguments)
    manifest = read_manifest(storage)
    for split in manifest.splits:
        found = split_statistics(storage, manifest, split)
        forms = ", ".join(f"{count:,} {extension}" for extension, count in found.extensions.most_common())
        counts = [found.labels[label] for label in range(len(manifest.classes))]
        mean = filesize.decimal(found.image_bytes // max(1, found.images))
        print(f"{split}: {found.images:,} images in {found.shards:,} shards, {filesize.decimal(found.bytes)}")
        print(f"  {forms}; {mean} each on average")
        if counts:
            print(f"  {len(counts):,} classes of {min(counts):,} to {max(counts):,} images")
            empty = [name for name, count in zip(manifest.classes, counts, strict=True) if not count]
            if empty:
                print(f"  {len(empty):,} classes without an image, such as {empty[0]}")
        else:
            print("  no classes")
    if manifest.left_out:
        print(f"left out: {manifest.left_out}")
    return 0
