"""From image shards to latent shards through a trained tokenizer."""
