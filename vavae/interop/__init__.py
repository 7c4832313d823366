"""Trained models in and out of storage."""
