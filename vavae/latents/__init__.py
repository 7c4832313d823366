"""Latents: their manifest, shards, stream and statistics, and their extraction with a trained tokenizer."""
