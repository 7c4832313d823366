"""WebDataset shards of images: planned, written, listed in a manifest, mapped and verified."""
