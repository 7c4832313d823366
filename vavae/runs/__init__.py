"""A run: its configuration, the graph of its artifacts with what is still to do, and its events."""
