"""Sweeps: a space of configurations, what its trials share, and the frontier that comes out. Knows nothing of Ray."""
