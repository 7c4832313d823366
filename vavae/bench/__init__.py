"""Benchmarks that run vavae and its baselines interleaved in one process."""
