"""Images and latents: sources, shards, the order of samples and their streams."""
