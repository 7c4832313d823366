"""Callbacks of a training: previews and probes that change nothing of it."""
