"""Floating-point operations of a training, counted on models without memory, and what GPUs can do."""
