"""Checkpoints of a training: saved, restored, kept, leased and evaluated."""
