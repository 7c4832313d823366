"""The image sources of a run, opened to see that they are there."""

from vavae.data.config import ShardsConfig
from vavae.data.shards.plan import open_split, source_names
from vavae.errors import UserError
from vavae.storage.storage import Storage


def missing_sources(shards: ShardsConfig, storage: Storage) -> list[str]:
    """List the image sources that can't be opened from here, one line each."""
    missing = []
    for split in source_names(shards):
        try:
            open_split(shards, storage, split)
        except UserError as error:
            missing.append(f"shards: {error}")
    return missing


def check_sources(shards: ShardsConfig, storage: Storage) -> None:
    """Open the image sources; raises UserError for one that can't be opened from here."""
    for split in source_names(shards):
        open_split(shards, storage, split)
