"""Benchmarks of reading shards beside plain WebDataset pipelines."""
