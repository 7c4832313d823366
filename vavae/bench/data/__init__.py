"""Benchmarks of reading shards against plain WebDataset pipelines."""
